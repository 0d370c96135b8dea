"""What a machine does when it runs out of memory. Sizes are bytes, times seconds.

Which processes the kernel killed and because of which limit, whether the machine stayed responsive, and from
which limit on the nanny restarts a worker before the kernel kills it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from ami_builder.core.options import Role
from ami_builder.core.units import MIB

TERMINATE = 0.95
"""The part of a worker's limit at which its nanny restarts it (distributed.worker.memory.terminate)."""

_MARK = "oom-kill:constraint="
# Linux, mm/oom_kill.c, dump_oom_summary, and mm/memcontrol.c, mem_cgroup_print_oom_context. A task's name can
# contain anything, so what follows it is matched from the end. The time at the start of the line is
# as `journalctl -o short-monotonic` and `dmesg` print it.
_LINE = re.compile(
    r"^(?:<\d+>)?\[ *(?P<seconds>\d+\.\d+)\].*?"
    rf"{_MARK}(?P<constraint>CONSTRAINT_[A-Z_]+),.*?"
    r",(?:global_oom|oom_memcg=(?P<oom>.*?)),task_memcg=(?P<memcg>.*?),task=(?P<task>.*),pid=(?P<pid>\d+),uid=\d+"
)


class Constraint(StrEnum):
    """Which memory was exhausted when the kernel killed a process."""

    GLOBAL = "global"
    """The machine's (system-wide), also if a NUMA policy or a cpuset kept a task from part of it."""
    MEMCG = "memcg"
    """A cgroup's, at its limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One process that the kernel's OOM killer killed."""

    seconds: float
    """Since the machine's boot, or since 1970 if `kills` had the time of the boot."""
    constraint: Constraint
    oom_memcg: str
    """Path of the cgroup whose limit was reached; empty for a system-wide kill."""
    task_memcg: str
    """Path of the cgroup that the process was in."""
    task: str
    """Its name, of at most 15 characters."""
    pid: int

    def inside(self, memcg: str) -> bool:
        """Return whether the limit of this cgroup, or of one in it, killed a process in it."""
        paths = (self.oom_memcg, self.task_memcg)
        return self.constraint is Constraint.MEMCG and all(
            path == memcg or path.startswith(memcg.rstrip("/") + "/") for path in paths
        )


def kills(log: str, *, booted: float = 0.0) -> tuple[Kill, ...]:
    """Return the OOM kills in the kernel's log, in the order of its lines.

    The log is that of `dmesg`, or of `journalctl -k -o short-monotonic`. The journal's times are when it
    received the lines: seconds late when memory has run out. `booted` is when the kernel's clock began, in
    seconds since 1970. Raises ValueError for a line about a kill that can't be parsed, so that no kill is
    missed.
    """
    return tuple(_kill(line, booted) for line in log.splitlines() if _MARK in line)


def _kill(line: str, booted: float) -> Kill:
    found = _LINE.match(line)
    if found is None:
        raise ValueError(f"can't parse the kernel's line: {line.strip()[:300]}")
    memcg = found["constraint"] == "CONSTRAINT_MEMCG"
    return Kill(
        seconds=booted + float(found["seconds"]),
        constraint=Constraint.MEMCG if memcg else Constraint.GLOBAL,
        oom_memcg=found["oom"] or "",
        task_memcg=found["memcg"],
        task=found["task"],
        pid=int(found["pid"]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """How long a machine took to respond."""

    seconds: float
    denied: float = 0.0
    """How much of that was CPU steal: the host did not run the machine."""

    @property
    def own(self) -> float:
        """The part without CPU steal."""
        return max(0.0, self.seconds - self.denied)


class Answers(StrEnum):
    """How a machine responds under pressure, compared with the same machine at rest."""

    IN_TIME = "in time"
    LATE = "late"
    UNKNOWN = "unknown"
    """The host was too busy for a result."""


LEAST_ALLOWED = 10.0
"""A wait of so many seconds is allowed on any host; an unresponsive machine takes minutes."""
TIMES_ALLOWED = 5.0
"""A wait of so many times the wait at rest is allowed: a container can use all processors."""
MOST_AT_REST = 20.0
"""If a machine takes longer at rest, a wait over the bound is not due to pressure."""
MOST_DENIED = 0.75
"""If CPU steal is a larger part of a wait than this, the wait is inconclusive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """The longest wait under pressure and the median wait at rest."""

    answers: Answers
    longest: Wait
    rest: Wait
    allowed: float
    """The bound in seconds without CPU steal."""

    def __str__(self) -> str:
        """Return both, and the bound, in one line."""
        ratio = f"{self.longest.own / self.rest.own:.1f} x" if self.rest.own else "-"
        text = (
            f"longest wait for a login {self.longest.own:.1f} s, {self.rest.own:.1f} s at rest: {ratio},"
            f" allowed {TIMES_ALLOWED:.0f} x or {LEAST_ALLOWED:.0f} s"
        )
        if self.longest.denied >= 0.1:
            text += f" (not counted: {self.longest.denied:.1f} s of CPU steal)"
        return text


def compare(rest: Iterable[Wait], under: Iterable[Wait]) -> Compared:
    """Compare waits under pressure with those at rest, without CPU steal.

    Raises ValueError if either is empty.
    """
    resting, waits = sorted(rest, key=lambda wait: wait.own), list(under)
    if not resting or not waits:
        raise ValueError("there is nothing to compare")
    median, longest = resting[len(resting) // 2], max(waits, key=lambda wait: wait.own)
    allowed = max(LEAST_ALLOWED, TIMES_ALLOWED * median.own)
    answers = Answers.IN_TIME
    if longest.own > allowed:
        denied = longest.denied > MOST_DENIED * longest.seconds
        answers = Answers.UNKNOWN if denied or median.own > MOST_AT_REST else Answers.LATE
    return Compared(answers=answers, longest=longest, rest=median, allowed=allowed)


def room(limit: int, *, beside: int, headroom: int = 0) -> int:
    """Return how much memory a container has left when the nanny restarts its worker.

    `limit` is the container's, `beside` what everything else in it uses (nanny, scheduler), and `headroom`
    how much less than the container's limit the workers' own limits add up to. Below 0 the kernel comes
    first; above, the nanny does, if the worker grows by less than this between two of its checks (100 ms).
    """
    return limit - beside - math.ceil(TERMINATE * (limit - headroom))


def smallest_limit(*, beside: int, headroom: int = 0) -> int:
    """Return the smallest container limit at which the nanny comes before the kernel, where `room` is 0."""
    return max(0, math.ceil((beside - TERMINATE * headroom) / (1 - TERMINATE)))


def least_headroom(limit: int, *, beside: int) -> int:
    """Return the headroom with which the nanny comes before the kernel in a container with this limit."""
    return max(0, math.ceil((beside - (1 - TERMINATE) * limit) / TERMINATE))


BESIDE = {Role.WORKER: 80 * MIB, Role.LOCAL: 128 * MIB}
"""What a container holds beside its workers: the nanny's processes, and the scheduler of role `local`."""
SMALL = 1536 * MIB
"""Below this limit of a container the headroom is automatic; above, its limit is Dask's."""


def nanny_headroom(setting: int | None, *, limit: int, role: Role) -> int:
    """Return how much less than a container's limit its workers' limits add up to, in bytes.

    `setting` is memory.nanny_headroom; None is `auto`, which start-dask computes in the same way.
    """
    if setting is not None:
        return setting
    if limit >= SMALL:
        return 0
    # least_headroom in whole numbers
    headroom = max(0, -(-(20 * BESIDE.get(role, 0) - limit) // 19))
    return headroom if 2 * headroom <= limit else 0
