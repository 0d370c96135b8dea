"""A cgroup of our own: counts the CPU time of the processes in it, or limits it. Needs root; v1 and v2."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ami_builder.core.errors import AmiBuilderError, TimedOut
from ami_builder.system import processes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PERIOD = 100_000
"""Microseconds in which a group may use its quota; the kernel's default."""

_ENTER = 'echo $$ >"$0" && exec "$@"'
_EMPTY_SECONDS = 20.0


class NoGroup(AmiBuilderError):
    """The host or its owner allows no cgroup of our own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A control group of the host; made and removed by `group`."""

    folder: Path
    version: int

    @property
    def _members(self) -> Path:
        return self.folder / "cgroup.procs"

    def add(self, pid: int) -> bool:
        """Move a process with all of its threads; returns False when it has ended."""
        try:
            self._members.write_text(str(pid))
        except ProcessLookupError:
            return False
        return True

    def command(self, argv: Sequence[str | Path]) -> list[str | Path]:
        """Return a command line that runs `argv` in this group, and all that it starts."""
        return ["sh", "-c", _ENTER, self._members, *argv]

    def limit(self, cpus: float) -> None:
        """Let all processes in the group together use at most so many CPUs."""
        quota = round(cpus * PERIOD)
        if self.version == 2:
            (self.folder / "cpu.max").write_text(f"{quota} {PERIOD}")
            return
        (self.folder / "cpu.cfs_period_us").write_text(str(PERIOD))
        (self.folder / "cpu.cfs_quota_us").write_text(str(quota))

    def cpu_seconds(self) -> float:
        """Return the CPU seconds that processes have used in this group so far, those that ended included."""
        if self.version == 1:
            return int((self.folder / "cpuacct.usage").read_text()) / 1e9
        values = dict(line.split() for line in (self.folder / "cpu.stat").read_text().splitlines())
        return int(values["usage_usec"]) / 1e6

    def members(self) -> list[int]:
        """Return the processes in the group."""
        return [int(pid) for pid in self._members.read_text().split()]


@contextmanager
def group(controller: str) -> Iterator[Group]:
    """Make a cgroup with the controller `cpu` (limits) or `cpuacct` (counts), and remove it in the end.

    Processes that are still in it then are killed: only what this program started is put in.
    Raises NoGroup without root, or where the host has no such controller.
    """
    if os.geteuid() != 0:
        raise NoGroup("a cgroup of our own needs root")
    found = find(controller, Path("/proc/self/mounts").read_text())
    if found is None:
        raise NoGroup(f"the host has no cgroup controller {controller}")
    root, version = found
    made = Group(folder=root / f"ami-builder-{controller}-{os.getpid()}", version=version)
    try:
        if version == 2 and controller == "cpu":
            _enable(root, controller)
        made.folder.mkdir()
    except OSError as wrong:
        raise NoGroup(f"no cgroup can be made in {root}: {wrong.strerror}") from wrong
    try:
        yield made
    finally:
        _remove(made)


def find(controller: str, mounts: str) -> tuple[Path, int] | None:
    """Return where the hierarchy with a controller is mounted, and its version: 1 where there are both.

    `mounts` is the text of /proc/self/mounts.
    """
    fields = [line.split() for line in mounts.splitlines()]
    for _, folder, kind, options, *_ in fields:
        if kind == "cgroup" and controller in options.split(","):
            return Path(folder), 1
    # Version 2 counts CPU time in every group, whatever its controllers are.
    return next(((Path(folder), 2) for _, folder, kind, *_ in fields if kind == "cgroup2"), None)


def _enable(root: Path, controller: str) -> None:
    """Let groups below the root of version 2 use a controller; raises NoGroup when there is none."""
    if controller not in (root / "cgroup.controllers").read_text().split():
        raise NoGroup(f"the host has no cgroup controller {controller}")
    wanted = root / "cgroup.subtree_control"
    if controller not in wanted.read_text().split():
        wanted.write_text(f"+{controller}")


def _remove(made: Group) -> None:
    try:
        _wait_until_empty(made)
    except TimedOut:
        for pid in made.members():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _wait_until_empty(made)
    made.folder.rmdir()


def _wait_until_empty(made: Group) -> None:
    processes.wait_until(
        lambda: not made.members(),
        what="the end of a cgroup",
        timeout=_EMPTY_SECONDS,
        interval=0.1,
    )
