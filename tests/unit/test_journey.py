"""One machine's way through the phases, with a clock that only the machine moves: what is measured of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ami_builder.config.schema import Image
from ami_builder.console import Mode, Progress, open_progress
from ami_builder.core.errors import TimedOut
from ami_builder.core.records import CheckResult, Endpoint, Measurement, Outcome, RunStatus
from ami_builder.qemu.machine import GuestStuck, boot_again
from ami_builder.state.workspace import Workspace
from ami_builder.system import ssh
from ami_builder.system.ssh import Session as RealSession
from ami_builder.verify import journey, runner
from ami_builder.verify.machine import MachineResult
from tests.sample_image import GIB, image

LAUNCH, SSH, RESTART, REBOOT, DASK, CHECKS, CONTROL = 500.0, 30.0, 4.0, 50.0, 25.0, 1000.0, 3.0
"""How long each takes here, in seconds."""
CPUS = 2
IDLE_SECONDS, IDLE = 3.0, 0.25
"""How long it is watched at rest, and the CPU seconds that it uses in each second of that."""
"""All of them work all the time."""


@dataclass
class Guest:
    """A machine, the ssh to it and the checks on it, all of them only a clock that goes on."""

    now: float = 1.0
    ssh: float = SSH
    """Seconds from the start to a login."""
    cpu: bool = True
    """Whether its CPU time is known."""
    emulator: int = 4711
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
    allowed: dict[str, float] = field(default_factory=dict)
    """What was waited for -> for how many seconds at most."""
    contexts: list[runner.Context] = field(default_factory=list)
    began: float = 0.0
    """When the boot that it is in began."""
    unused: float = 0.0
    """CPU seconds that it could have used while it was idle."""

    def start(self, stack: ExitStack, directory: Path, user_data: str, public_key: str) -> Endpoint:
        self.now += LAUNCH
        self.began = self.now
        return Endpoint(address="127.0.0.1", port=22, user="admin", console_log=directory / "console.log")

    def check_alive(self) -> None: ...

    def save_console(self) -> None: ...

    def reboot(self, session: RealSession, timeout: float, alive: Callable[[], None]) -> None:
        self.allowed["reboot"] = timeout
        self.began, self.unused = self.now, 0.0
        self.now += REBOOT

    def cpu_seconds(self, session: RealSession) -> float | None:
        return (self.now - self.began) * CPUS - self.unused if self.cpu else None

    def session(self, endpoint: Endpoint, *, key: Path, directory: Path) -> Session:
        return Session(self, directory / "config")

    def checks(
        self,
        *,
        phase: str,
        on_ready: Callable[[], None] | None,
        on_result: Callable[[CheckResult], None],
        context: runner.Context,
        timeout: float,
        **_: Any,
    ) -> tuple[CheckResult, ...]:
        self.phases.append(phase)
        self.contexts.append(context)
        self.allowed[f"checks after {phase}"] = timeout
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
    """What the journey asks of ssh."""

    guest: Guest
    config: Path

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None: ...

    def wait(self, timeout: float, alive: Callable[[], None]) -> None:
        self.guest.allowed["ssh"] = timeout
        self.guest.now += self.guest.ssh
        if self.guest.panics:
            self.guest.panics -= 1
            panic = GuestStuck("the guest's kernel panicked")
            panic.boot_again = True
            raise panic

    def run(self, command: str, *, timeout: float, **_: object) -> SimpleNamespace:
        if "AVAILABLE_MEMORY_FOR_DASK" in command:
            self.guest.allowed["measured"] = timeout
            return SimpleNamespace(stdout=f"{GIB}\n")
        if command.startswith("sleep"):
            self.guest.now += IDLE_SECONDS
            self.guest.unused += IDLE_SECONDS * (CPUS - IDLE)
            return SimpleNamespace(stdout="")
        control = "while" in command
        self.guest.allowed["control" if control else "restart"] = timeout
        self.guest.now += CONTROL if control else RESTART
        return SimpleNamespace(stdout="")

    def fetch(self, command: str, path: Path, *, timeout: float, **_: object) -> None:
        self.guest.fetched.append(path.name)
        self.guest.allowed["evidence"] = timeout
        raise TimedOut("nothing is there")


@pytest.fixture
def progress() -> Iterator[Progress]:
    with open_progress(mode=Mode.QUIET) as progress:
        yield progress


@pytest.fixture
def verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: Progress
) -> Iterator[Callable[..., MachineResult]]:
    workspace = Workspace.open({"AMI_BUILDER_HOME": str(tmp_path)})
    with workspace.run("verify", "dask") as run:

        def way(guest: Guest, of: Image | None = None) -> MachineResult:
            monkeypatch.setattr(journey, "time", SimpleNamespace(monotonic=lambda: guest.now))
            monkeypatch.setattr(ssh, "Session", guest.session)
            monkeypatch.setattr(runner, "run", guest.checks)
            with progress.step("verify") as step:
                return boot_again(
                    lambda attempt: journey.verify_machine(
                        of or image(),
                        guest,
                        work=run.work,
                        evidence=run.directory,
                        step=step,
                        attempt=attempt,
                    ),
                    lambda: True,
                )

        yield way


def test_each_start_has_its_own_times(verified: Callable[[Guest], MachineResult]) -> None:
    def one(
        phase: str, ssh_seconds: float | None, dask_seconds: float, control: float | None = None
    ) -> Measurement:
        return Measurement(
            machine="2 GiB",
            phase=phase,
            total=2 * GIB,
            available=GIB,
            ssh_seconds=ssh_seconds,
            dask_seconds=dask_seconds,
            # From power-on to a registered worker; a service's restart is no boot.
            cpu_seconds=None if ssh_seconds is None else dask_seconds * CPUS,
            control_seconds=control,
        )

    assert verified(Guest()).measured == (
        one("boot", SSH, SSH + DASK, CONTROL * (CPUS - IDLE)),
        one("restart", None, RESTART + DASK),
        one("reboot", REBOOT, REBOOT + DASK),
    )


def test_the_boot_that_came_up_is_measured_and_none_before_it(
    verified: Callable[[Guest], MachineResult],
) -> None:
    guest = Guest(panics=2)
    found = verified(guest)
    assert guest.phases == ["boot", "restart", "reboot", "pressure"]
    assert found.measured[0].ssh_seconds == SSH


def test_a_dask_that_does_not_answer_has_no_time(verified: Callable[[Guest], MachineResult]) -> None:
    found = verified(Guest(answers=False))
    assert [one.dask_seconds for one in found.measured] == [None, None]
    assert [one.ssh_seconds for one in found.measured] == [SSH, None]
    assert {result.outcome for result in found.results} == {Outcome.FAILED}


def test_cpu_time_that_is_not_known_is_not_measured(verified: Callable[[Guest], MachineResult]) -> None:
    found = verified(Guest(cpu=False))
    assert {(one.cpu_seconds, one.control_seconds) for one in found.measured} == {(None, None)}
    assert [one.dask_seconds for one in found.measured] == [SSH + DASK, RESTART + DASK, REBOOT + DASK]


@pytest.mark.parametrize(
    ("ssh_seconds", "times"),
    [(5.0, 1.0), (60.0, 1.0), (90.0, 1.5), (180.0, 3.0), (480.0, 8.0), (2000.0, 8.0)],
)
def test_a_slow_boot_gives_all_that_follows_more_time(
    verified: Callable[..., MachineResult], ssh_seconds: float, times: float
) -> None:
    """Up to eight times as much; it is no longer than before where the boot is fast."""
    of = image()
    guest = Guest(ssh=ssh_seconds, outcome=Outcome.INCONCLUSIVE)
    verified(guest, of)
    timeout = of.verify.timeout
    assert guest.allowed == {
        "ssh": timeout,
        "checks after boot": timeout * times,
        "control": timeout * times,
        "measured": 60 * times,
        "restart": timeout * times,
        "checks after restart": timeout * times,
        "reboot": timeout * times,
        "checks after reboot": timeout * times,
        "checks after pressure": timeout * times,
        "evidence": 60 * times,
    }
    assert {context.timeout for context in guest.contexts} == {timeout * times}


def test_a_boot_that_is_tried_again_is_measured_again(verified: Callable[[Guest], MachineResult]) -> None:
    """How slow the one was that panicked says nothing about this one."""
    guest = Guest(panics=1)
    verified(guest)
    assert guest.allowed["checks after boot"] == image().verify.timeout


def test_the_checks_know_the_process_that_runs_the_vm(verified: Callable[[Guest], MachineResult]) -> None:
    guest = Guest()
    verified(guest)
    assert {context.emulator for context in guest.contexts} == {4711}


@pytest.mark.parametrize(
    ("guest", "pressure", "phases"),
    [(Guest(answers=False), True, ["boot", "restart"]), (Guest(), False, ["boot", "restart", "reboot"])],
)
def test_the_long_steps_are_for_machines_that_passed_and_pressure_can_be_left_out(
    verified: Callable[..., MachineResult], guest: Guest, pressure: bool, phases: list[str]
) -> None:
    """A machine whose limit is wrong may freeze for good: it is red already."""
    of = image()
    verified(guest, replace(of, verify=replace(of.verify, pressure=pressure)))
    assert guest.phases == phases


@pytest.mark.parametrize("outcome", [Outcome.INCONCLUSIVE, Outcome.PASSED])
def test_an_inconclusive_check_is_no_failure_and_leaves_evidence(
    verified: Callable[[Guest], MachineResult], outcome: Outcome
) -> None:
    guest = Guest(outcome=outcome)
    found = verified(guest)
    assert guest.phases == ["boot", "restart", "reboot", "pressure"], "the way goes on"
    assert {result.outcome for result in found.results} == {outcome}
    assert ("journal.txt" in guest.fetched) == (outcome is Outcome.INCONCLUSIVE)


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.INCONCLUSIVE, Outcome.PASSED])
def test_a_step_ends_as_its_checks_did(
    verified: Callable[[Guest], MachineResult], progress: Progress, outcome: Outcome
) -> None:
    verified(Guest(outcome=outcome))
    ended = {step.name: step.status for step in progress.steps}
    assert ended.pop("verify > start") is RunStatus.PASSED
    assert "verify > first boot" in ended
    assert set(ended.values()) == {RunStatus(outcome)}


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
    assert journey.summary(results) == line
