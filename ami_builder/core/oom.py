"""What a machine's answer to memory pressure tells: pure; sizes are bytes, times seconds.

Whom the kernel killed and because of whose limit, whether the machine answered in time, and from which limit
on the nanny comes before the kernel.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

TERMINATE = 0.95
"""The part of a worker's limit at which its nanny restarts it (distributed.worker.memory.terminate)."""

_MARK = "oom-kill:constraint="
# Linux, mm/oom_kill.c, dump_oom_summary, and mm/memcontrol.c, mem_cgroup_print_oom_context. A task's name may
# have anything in it, so what follows it is found from the end. Before it stands the time, as
# `journalctl -o short-unix` or `dmesg` write it.
_LINE = re.compile(
    r"^(?:<\d+>)?(?:\[ *(?P<uptime>\d+\.\d+)\]|(?P<unix>\d+\.\d+) ).*?"
    rf"{_MARK}(?P<constraint>CONSTRAINT_[A-Z_]+),.*?"
    r",(?:global_oom|oom_memcg=(?P<oom>.*?)),task_memcg=(?P<memcg>.*?),task=(?P<task>.*),pid=(?P<pid>\d+),uid=\d+"
)


class Constraint(StrEnum):
    """Whose memory was at its end when the kernel killed."""

    GLOBAL = "global"
    """The machine's: also when a NUMA policy or a cpuset kept a task from the rest of it."""
    MEMCG = "memcg"
    """A cgroup's, at its limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One process that the kernel killed for want of memory."""

    seconds: float
    """Since 1970 by `journalctl -o short-unix`, since the boot by `dmesg`."""
    constraint: Constraint
    oom_memcg: str
    """Path of the cgroup whose limit was reached; empty when it was the machine's memory."""
    task_memcg: str
    """Path of the cgroup that the process was in."""
    task: str
    """Its name, of at most 15 characters."""
    pid: int

    def inside(self, memcg: str) -> bool:
        """Tell whether it was the limit of this cgroup, or of one in it, that a process in there died of."""
        paths = (self.oom_memcg, self.task_memcg)
        return self.constraint is Constraint.MEMCG and all(
            path == memcg or path.startswith(memcg.rstrip("/") + "/") for path in paths
        )


def kills(log: str) -> tuple[Kill, ...]:
    """Return whom the kernel killed for want of memory, by its log in the order of its lines.

    The log is `journalctl -k -o short-unix`, or `dmesg`. Lines about anything else are passed over; raises
    ValueError for one that tells of a kill and can't be read, since nothing may pass for "nobody was killed".
    """
    return tuple(_kill(line) for line in log.splitlines() if _MARK in line)


def _kill(line: str) -> Kill:
    found = _LINE.match(line)
    if found is None:
        raise ValueError(f"the kernel's line can't be read: {line.strip()[:300]}")
    memcg = found["constraint"] == "CONSTRAINT_MEMCG"
    return Kill(
        seconds=float(found["uptime"] or found["unix"]),
        constraint=Constraint.MEMCG if memcg else Constraint.GLOBAL,
        oom_memcg=found["oom"] or "",
        task_memcg=found["memcg"],
        task=found["task"],
        pid=int(found["pid"]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """How long somebody waited for a machine to answer."""

    seconds: float
    denied: float = 0.0
    """For how much of that the host kept the machine from running."""

    @property
    def own(self) -> float:
        """The part of it that the machine itself is answerable for."""
        return max(0.0, self.seconds - self.denied)


class Answers(StrEnum):
    """How a machine answers under pressure, compared with the same machine at rest."""

    IN_TIME = "in time"
    LATE = "late"
    UNKNOWN = "unknown"
    """The host was too busy to tell."""


LEAST_ALLOWED = 10.0
"""A wait of so many seconds is allowed on any host; a frozen machine keeps one waiting for minutes."""
TIMES_ALLOWED = 5.0
"""And so many times what it takes at rest: the same work beside a container that uses all its processors."""
MOST_AT_REST = 20.0
"""Where a machine takes longer at rest, a wait over the bound says nothing about pressure."""
MOST_DENIED = 0.75
"""Where the host keeps the machine from running for more of a wait than this, the wait says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """The longest wait under pressure beside what is usual at rest."""

    answers: Answers
    longest: Wait
    rest: Wait
    """The median."""
    allowed: float
    """How many seconds of its own the longest may have."""

    def __str__(self) -> str:
        """Return both, and the bound, in one line."""
        ratio = f"{self.longest.own / self.rest.own:.1f} x" if self.rest.own else "-"
        text = (
            f"longest wait for a login {self.longest.own:.1f} s, {self.rest.own:.1f} s at rest: {ratio},"
            f" allowed {TIMES_ALLOWED:.0f} x or {LEAST_ALLOWED:.0f} s"
        )
        if self.longest.denied >= 0.1:
            text += f" (not counted: {self.longest.denied:.1f} s in which the host did not run the machine)"
        return text


def compare(rest: Iterable[Wait], under: Iterable[Wait]) -> Compared:
    """Compare waits under pressure with those at rest, each without what the host denied the machine.

    Raises ValueError when there are none of either.
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


def room(limit: int, *, beside: int, headroom: int = 0, terminate: float = TERMINATE) -> int:
    """Return how much a container may still take when its worker has reached what the nanny restarts it at.

    `limit` is the container's, `beside` what all else in it holds (nanny, scheduler), and `headroom` how much
    less than the container's limit the workers' own limits add up to. Below 0 the kernel comes first; above,
    the nanny does if the worker does not grow by more than this between two of its looks (100 ms).
    """
    return limit - beside - math.ceil(terminate * (limit - headroom))


def smallest_limit(*, beside: int, headroom: int = 0, terminate: float = TERMINATE) -> int:
    """Return the smallest container limit at which the nanny comes before the kernel: `room` is 0 there."""
    return max(0, math.ceil((beside - terminate * headroom) / (1 - terminate)))


def least_headroom(limit: int, *, beside: int, terminate: float = TERMINATE) -> int:
    """Return the headroom with which the nanny comes before the kernel in a container with this limit."""
    return max(0, math.ceil((beside - (1 - terminate) * limit) / terminate))
