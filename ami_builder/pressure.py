"""What a machine's answer to memory pressure tells: pure; sizes are bytes, times seconds.

Whom the kernel killed and because of whose limit, how long something was silent, and from which limit on the
nanny comes before the kernel.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

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
class Silence:
    """How long something that should give a sign of life again and again gave none."""

    longest: float
    """The longest time between two signs, however short."""
    total: float
    """The sum of all times between two signs that were over the bound."""


def silence(times: Iterable[float], over: float) -> Silence:
    """Return how long there was silence between signs of life at these times, in their order.

    The first and the last time are the beginning and the end of the watch: without them a watch that ended in
    silence looks well. Raises ValueError for fewer than two, or when they go back.
    """
    gaps = list(_gaps(list(times)))
    return Silence(longest=max(gaps), total=math.fsum(gap for gap in gaps if gap > over))


def _gaps(times: list[float]) -> Iterator[float]:
    if len(times) < 2:
        raise ValueError(f"{len(times)} times have nothing between them")
    for before, after in pairwise(times):
        if after < before:
            raise ValueError(f"the times go back from {before} to {after}")
        yield after - before


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
