"""One machine's way through the phases, with a clock that only the machine moves: what is measured of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ami_builder.adapters import checks, ssh
from ami_builder.adapters.qemu import GuestStuck
from ami_builder.console import Mode, open_progress
from ami_builder.errors import TimedOut
from ami_builder.model import CheckResult, Endpoint, Image, Measurement, Outcome
from ami_builder.pipeline import prove
from ami_builder.pipeline.prove import Proof
from ami_builder.workspace import Workspace

from .guest import GIB, image

LAUNCH, SSH, RESTART, REBOOT, DASK, CHECKS = 500.0, 30.0, 4.0, 50.0, 25.0, 1000.0
"""How long each takes here, in seconds."""


@dataclass
class Guest:
    """A machine, the ssh to it and the checks on it, all of them only a clock that goes on."""

    now: float = 1.0
    answers: bool = True
    """Whether Dask does."""
    outcome: Outcome = Outcome.PASSED
    """Of the check when Dask answers."""
    panics: int = 0
    """How many boots panic before one comes up."""
    name: str = "2 GiB"
    memory: int = 2 * GIB
    phases: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    """The evidence that was asked for."""

    def start(self, stack: ExitStack, directory: Path, user_data: str, public_key: str) -> Endpoint:
        self.now += LAUNCH
        return Endpoint(
            address="127.0.0.1", port=22, user="admin", console_log=directory / "console.log", ports={}
        )

    def check_alive(self) -> None: ...

    def save_console(self) -> None: ...

    def session(self, endpoint: Endpoint, *, key: Path, directory: Path) -> Session:
        return Session(self, directory / "config")

    def checks(
        self,
        *,
        phase: str,
        on_ready: Callable[[], None] | None,
        on_result: Callable[[CheckResult], None],
        context: checks.Context,
        **_: Any,
    ) -> tuple[CheckResult, ...]:
        self.phases.append(phase)
        self.now += DASK
        if self.answers and on_ready is not None:
            on_ready()
        self.now += CHECKS
        outcome = self.outcome if self.answers else Outcome.FAILED
        result = CheckResult(
            name="x", phase=phase, machine=context.machine, outcome=outcome, seconds=0, message=""
        )
        on_result(result)
        return (result,)


@dataclass
class Session:
    """What prove asks of ssh."""

    guest: Guest
    config: Path

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None: ...

    def wait(self, timeout: float, alive: Callable[[], None]) -> None:
        self.guest.now += SSH
        if self.guest.panics:
            self.guest.panics -= 1
            panic = GuestStuck("the guest's kernel panicked")
            panic.boot_again = True
            raise panic

    def reboot(self, timeout: float, alive: Callable[[], None]) -> None:
        self.guest.now += REBOOT

    def run(self, command: str, **_: object) -> SimpleNamespace:
        if "AVAILABLE_MEMORY_FOR_DASK" in command:
            return SimpleNamespace(stdout=f"{GIB}\n")
        self.guest.now += RESTART
        return SimpleNamespace(stdout="")

    def fetch(self, command: str, path: Path, **_: object) -> None:
        self.guest.fetched.append(path.name)
        raise TimedOut("nothing is there")


@pytest.fixture
def proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Proof]]:
    workspace = Workspace.open({"AMI_BUILDER_HOME": str(tmp_path)})
    with workspace.run("verify", "dask") as run, open_progress(mode=Mode.QUIET) as progress:

        def way(guest: Guest, of: Image | None = None) -> Proof:
            monkeypatch.setattr(prove, "time", SimpleNamespace(monotonic=lambda: guest.now))
            monkeypatch.setattr(ssh, "Session", guest.session)
            monkeypatch.setattr(checks, "run", guest.checks)
            with progress.step("verify") as step:
                return prove.prove(of or image(), guest, run, step)

        yield way


def test_each_start_has_its_own_times(proved: Callable[[Guest], Proof]) -> None:
    def one(phase: str, ssh_seconds: float | None, dask_seconds: float) -> Measurement:
        return Measurement(
            machine="2 GiB",
            phase=phase,
            total=2 * GIB,
            available=GIB,
            ssh_seconds=ssh_seconds,
            dask_seconds=dask_seconds,
        )

    assert proved(Guest()).measured == (
        one("boot", SSH, SSH + DASK),
        one("restart", None, RESTART + DASK),
        one("reboot", REBOOT, REBOOT + DASK),
    )


def test_the_boot_that_came_up_is_measured_and_none_before_it(proved: Callable[[Guest], Proof]) -> None:
    guest = Guest(panics=2)
    proof = proved(guest)
    assert guest.phases == ["boot", "restart", "reboot", "pressure"]
    assert proof.measured[0].ssh_seconds == SSH


def test_a_dask_that_does_not_answer_has_no_time(proved: Callable[[Guest], Proof]) -> None:
    proof = proved(Guest(answers=False))
    assert [one.dask_seconds for one in proof.measured] == [None, None]
    assert [one.ssh_seconds for one in proof.measured] == [SSH, None]
    assert {result.outcome for result in proof.results} == {Outcome.FAILED}


@pytest.mark.parametrize(
    ("guest", "pressure", "phases"),
    [(Guest(answers=False), True, ["boot", "restart"]), (Guest(), False, ["boot", "restart", "reboot"])],
)
def test_the_long_steps_are_for_machines_that_passed_and_pressure_can_be_left_out(
    proved: Callable[..., Proof], guest: Guest, pressure: bool, phases: list[str]
) -> None:
    """A machine whose limit is wrong may freeze for good: it is red already."""
    of = image()
    proved(guest, replace(of, verify=replace(of.verify, pressure=pressure)))
    assert guest.phases == phases


@pytest.mark.parametrize("outcome", [Outcome.INCONCLUSIVE, Outcome.PASSED])
def test_an_inconclusive_check_is_no_failure_and_leaves_evidence(
    proved: Callable[[Guest], Proof], outcome: Outcome
) -> None:
    guest = Guest(outcome=outcome)
    proof = proved(guest)
    assert guest.phases == ["boot", "restart", "reboot", "pressure"], "the way goes on"
    assert {result.outcome for result in proof.results} == {outcome}
    assert ("journal.txt" in guest.fetched) == (outcome is Outcome.INCONCLUSIVE)


def result(outcome: Outcome, message: str = "") -> CheckResult:
    return CheckResult(name="x", phase="boot", machine="2 GiB", outcome=outcome, seconds=0, message=message)


@pytest.mark.parametrize(
    ("results", "line"),
    [
        ([result(Outcome.PASSED)] * 2, "2 checks passed"),
        ([result(Outcome.PASSED, "12 logins"), result(Outcome.SKIPPED, "no")], "2 checks passed; 12 logins"),
        (
            [result(Outcome.PASSED, "12 logins"), result(Outcome.INCONCLUSIVE, "busy")],
            "1 of 2 checks inconclusive",
        ),
        ([result(Outcome.INCONCLUSIVE), result(Outcome.FAILED)], "1 of 2 checks failed"),
    ],
)
def test_a_phase_in_one_line(results: list[CheckResult], line: str) -> None:
    assert prove.summary(results) == line
