"""The real command in a process of its own, stopped by a signal at an exact call of its."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ami_builder.system.processes import wait_until
from tests.cloud.faulting import (
    BOUND,
    BUILD,
    Cell,
    Leak,
    Missed,
    Place,
    Verdict,
    check_ended,
    fresh,
    judged,
    rebuilt,
)
from tests.cloud.flow import READ_SECONDS, Ran, ami_builder, in_haste, without_ssh
from tests.fake_ec2.faults import Fault
from tests.fake_ec2.server import ACCESS_KEY, Cloud
from tests.process.nightly_host import die_after

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess

POWER_LOSS = "power loss"
"""SIGKILL to the command and to Packer; SIGKILL alone lets Packer clean up after itself."""
SIGNALS = ("SIGINT", "SIGTERM", "SIGKILL", POWER_LOSS)
DIES_AFTER = "TEST_DIES_AFTER"
"""In the environment of a command that is to be killed once it has made so many entries in its journal."""
_HELD_SECONDS = READ_SECONDS - 0.2
_PERFORMED_SECONDS = 0.05
_INTERRUPTED = 130


def processes() -> multiprocessing.context.ForkServerContext:
    """Return what starts commands: a server that has imported everything, and forks for each."""
    context = multiprocessing.get_context("forkserver")
    read = ("ami_builder.aws.target", "ami_builder.aws.gc", "tests.cloud.preloaded")
    context.set_forkserver_preload([__name__, *read])
    return context


def start(home: Path, environment: dict[str, str], *arguments: str) -> ForkServerProcess:
    """Start a command whose output goes to `home`/out."""
    home.mkdir(parents=True, exist_ok=True)
    environment = {**environment, "AMI_BUILDER_HOME": str(home)}
    process = processes().Process(target=_command, args=(environment, home / "out", arguments))
    process.start()
    return process


def _command(environment: dict[str, str], out: Path, arguments: tuple[str, ...]) -> None:
    os.environ.update(environment)
    with out.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    monkeypatch = pytest.MonkeyPatch()
    without_ssh(monkeypatch)
    in_haste(monkeypatch)
    if entries := environment.get(DIES_AFTER):
        die_after(int(entries), monkeypatch)
    sys.exit(ami_builder(*arguments))


def try_signal(cloud: Cloud, place: Place, column: str, home: Path) -> Cell:
    """Build, stop it at a call, and then see to it that nothing stays; raises Leak."""
    start = time.monotonic()
    ran = stopped(cloud, place, column, home / "first")
    seconds = time.monotonic() - start
    by_hand = column in ("SIGINT", "SIGTERM")
    check_ended(ran, seconds, [_INTERRUPTED if by_hand else -signal.SIGKILL])
    left = cloud.left()
    verdict = judged(cloud, ran.status)
    if by_hand and verdict is Verdict.GC:
        raise Leak(f"left by {column} at {place}, and not for good: {left}; {ran.err}")
    if verdict is not Verdict.ERROR:
        # Once more, with the next build before any `gc`.
        stopped(cloud, place, column, home / "second")
    rebuilt(cloud)
    return Cell(place=place, column=column, verdict=verdict, status=ran.status, said="", seconds=seconds)


def stopped(
    cloud: Cloud,
    place: Place,
    column: str,
    home: Path,
    *settings: str,
    access_key: str = ACCESS_KEY,
    reset: bool = True,
) -> Ran:
    """Build in a workspace of its own, and stop it while the call has been done, but not answered.

    Without `reset` the account stays as it is. Returns once Packer has ended too; raises Leak when the
    command does not end.
    """
    if reset:
        fresh(cloud, home)
    before = cloud.count(place.action, packer=place.packer)
    cloud.faults.add(place.action, Fault.SLOW, nth=place.nth, seconds=_HELD_SECONDS, packer=place.packer)
    process = start(home, cloud.environment(access_key), *settings, *BUILD)

    def called() -> bool:
        if process.exitcode is not None:
            raise Missed(f"there was no {place}: {(home / 'out').read_text()}")
        return cloud.count(place.action, packer=place.packer) >= before + place.nth

    wait_until(called, what=str(place), timeout=BOUND, interval=0.005)
    time.sleep(_PERFORMED_SECONDS)
    assert process.pid is not None
    children = _descendants(process.pid)
    if column == POWER_LOSS:
        # Stopped first, so that none cleans up at the end of another: a plugin does.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for each in (process.pid, *children):
                with suppress(ProcessLookupError):
                    os.kill(each, number)
    else:
        os.kill(process.pid, signal.Signals[column])
    cloud.faults.clear()
    process.join(BOUND)
    if process.exitcode is None:
        process.kill()
        raise Leak(f"{column} at {place} did not end it")
    wait_until(
        lambda: not any(Path(f"/proc/{child}").exists() for child in children),
        what="the end of Packer",
        timeout=BOUND,
        interval=0.02,
    )
    return Ran(status=process.exitcode, out="", err=(home / "out").read_text())


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):
            found += [int(child) for child in (task / "children").read_text().split()]
    return found + [each for child in found for each in _descendants(child)]
