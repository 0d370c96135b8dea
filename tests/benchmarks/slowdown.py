"""A host that is slower than it is: an emulator with a CPU quota, or a neighbour that keeps the CPUs busy.

Also counts what that did: how long the emulator's threads ran, and how long they waited for a CPU.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ami_builder.system import processes
from tests.benchmarks import cgroups

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

EMULATOR = "qemu-system-"
"""How the names of the emulator's processes begin, as the kernel shortens them."""

LOOK_SECONDS = 0.2
"""How often new processes of the emulator are looked for: it is started again when the VM reboots."""

_BUSY_LOOP = "while True: pass"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slowdown:
    """How the host is slowed down: by a quota for the emulator, or by busy loops beside everything."""

    name: str
    share: str
    """What is left of a CPU for each of the emulator's threads."""
    quota: float | None = None
    """CPUs that the emulator's processes may use together."""
    loops: int = 0

    def __str__(self) -> str:
        if self.quota is not None:
            limit = f"{self.quota:g} CPU{'s' if self.quota > 1 else ''}"
            return f"emulator limited to {limit} ({self.share})"
        return f"beside {self.loops} busy loops ({self.share})"


def slowdowns(cpus: int, used: int) -> tuple[Slowdown, ...]:
    """Return the four ways on a host with so many CPUs, of which the emulator can use `used`.

    Its threads get a half or a quarter of a CPU each: beside busy loops as many as it takes on all CPUs.
    """
    used = min(cpus, used)
    shares = {"half": 0.5, "quarter": 0.25}
    quotas = [
        Slowdown(name=f"quota-{name}", share=f"a {name}", quota=share * used)
        for name, share in shares.items()
    ]
    neighbours = [
        Slowdown(name=f"neighbour-{name}", share=f"a {name}", loops=round(cpus / share) - used)
        for name, share in shares.items()
    ]
    return (*quotas, *neighbours)


@dataclass(slots=True, kw_only=True)
class Usage:
    """What the emulator's threads have used and waited for, in seconds; thread by thread, as last seen."""

    threads: dict[tuple[int, int], tuple[float, float]] = field(default_factory=dict)
    pids: set[int] = field(default_factory=set)

    def look(self, pid: int) -> None:
        """Read all threads of a process; one that has ended keeps its last figures."""
        self.pids.add(pid)
        for thread in Path(f"/proc/{pid}/task").glob("*"):
            # Linux, Documentation/scheduler/sched-stats.rst: a throttled thread counts as one that waits.
            with suppress(OSError, ValueError):
                ran, waited, _ = (thread / "schedstat").read_text().split()
                self.threads[pid, int(thread.name)] = (int(ran) / 1e9, int(waited) / 1e9)

    @property
    def ran(self) -> float:
        """CPU seconds."""
        return sum(ran for ran, _ in self.threads.values())

    @property
    def wait_share(self) -> float:
        """Seconds of waiting for a CPU in those in which a thread ran or could have run; 0 to 1."""
        waited = sum(waited for _, waited in self.threads.values())
        return waited / (self.ran + waited) if self.threads else 0.0


@contextmanager
def slowed(slowdown: Slowdown) -> Iterator[cgroups.Group]:
    """Slow the host down until the block ends, and yield the cgroup that `run` needs; raises NoGroup."""
    with ExitStack() as stack:
        group = stack.enter_context(cgroups.group("cpu"))
        if slowdown.quota is not None:
            group.limit(slowdown.quota)
        # One group for all, so that each thread has the same weight: else Linux divides the CPUs by sessions
        # (autogroup) or by systemd's units first.
        for _ in range(slowdown.loops):
            argv = group.command([sys.executable, "-I", "-S", "-c", _BUSY_LOOP])
            stack.enter_context(processes.running(argv))
        yield group


def run(
    argv: Sequence[str | Path],
    slowdown: Slowdown,
    group: cgroups.Group,
    *,
    env: Mapping[str, str],
    cwd: Path,
    log: Path,
    emulator: str = EMULATOR,
) -> tuple[int, Usage]:
    """Run a command on the slowed host; return its exit status, and what its emulators used.

    With a quota only its emulators are in the group, from the moment that they are seen.
    """
    usage = Usage()
    if slowdown.quota is None:
        argv = group.command(argv)
    with log.open("w") as out, processes.running(argv, env=env, cwd=cwd, stdout=out.fileno()) as process:

        def ended() -> bool:
            for pid in descendants(process.pid, lambda name: name.startswith(emulator)):
                if slowdown.quota is not None and pid not in usage.pids and not group.add(pid):
                    continue
                usage.look(pid)
            return process.poll() is not None

        processes.wait_until(ended, what="the command's end", timeout=float("inf"), interval=LOOK_SECONDS)
    return process.returncode, usage


def descendants(pid: int, named: Callable[[str], bool]) -> Iterator[int]:
    """Yield the processes below `pid` whose name is asked for; not those below these.

    What such a process starts has its name for a moment, and its cgroup from the beginning.
    """
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):
            for child in map(int, (thread / "children").read_text().split()):
                with suppress(OSError):
                    if named(Path(f"/proc/{child}/comm").read_text().strip()):
                        yield child
                    else:
                        yield from descendants(child, named)


def usable_cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0))
