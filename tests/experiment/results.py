"""What a run measured, as it stands in the results: read from what the machine and the observers wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ami_builder.core.oom import Constraint, Kill
from tests.experiment.cases import Case
from tests.experiment.silence import silence

FROZEN_SECONDS = 1.0
"""A machine that gives no sign of life for so long stands still; ten are due in that time."""
SSH_FROZEN_SECONDS = 5.0
"""A login that takes longer is counted as silence: an emulated machine needs a second or two for one."""
_POINTS = 400
_TICK = re.compile(r"^tick (\d+\.\d+) (\d+) (\d+) (\d+) (\d+) \.\r?$", re.MULTILINE)
# Linux, mm/oom_kill.c, __oom_kill_process.
_CONSOLE_KILL = re.compile(r"(Out of memory|Memory cgroup out of memory): Killed process \d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """The machine at one time: bytes, and seconds of stalls since it booted."""

    uptime: float
    held: int
    """Anonymous memory of Dask's container."""
    available: int
    some: float
    full: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """One try to log in by ssh, in seconds since the work began."""

    began: float
    ended: float
    answered: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One run: bytes and seconds."""

    method: int
    case: Case
    when: str
    """ISO 8601, UTC."""
    accelerator: str
    total: int
    """MemTotal."""
    available: int
    """MemAvailable just before Dask started."""
    limit: int
    """The worker's limit, as Dask goes by it."""
    done: int
    failed: int
    unfinished: int
    """When the time was up."""
    came_back: bool
    """Whether the machine let us in afterwards; else restarts and kills are what its console showed."""
    seconds: float
    by_nanny: int
    """Restarts of the worker by its nanny."""
    by_kernel: int
    """Processes of the container that the kernel killed."""
    global_kills: int
    """Of anything, because the machine's memory was at its end."""
    container_kills: int
    """Because the container's was."""
    harmed: tuple[str, ...]
    """Processes outside the container that the kernel killed."""
    frozen_longest: float
    """The longest time without a sign of life inside the machine."""
    frozen: float
    """All such times over `FROZEN_SECONDS` together."""
    ssh_tries: int
    ssh_failed: int
    ssh_longest: float
    """The longest wait for a login, tries that failed included."""
    ssh_frozen: float
    """All such waits over `SSH_FROZEN_SECONDS` together."""
    stalled_some: float
    """How long some task waited for memory (PSI)."""
    stalled_full: float
    """How long all did."""
    spilled: int
    """At most, as seen once a heartbeat."""
    peak: int
    """Anonymous memory of the container at most."""
    unharmed: int
    """The same, until the machine first stood still."""
    starved: float
    """How long the machine waited for a processor of the host: that is silence too, and not the policy's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Memory over time in one run; times are seconds since the work began."""

    times: tuple[float, ...]
    held: tuple[int, ...]
    available: tuple[int, ...]
    marks: tuple[tuple[float, str], ...]
    """`paused`, `resumed`, `lost` and `back`: the worker, as the scheduler saw it."""


def ticks(text: str) -> tuple[Tick, ...]:
    """Read what ticker.py wrote to a console; a line that the kernel wrote into is passed over."""
    return tuple(
        Tick(
            uptime=float(uptime),
            held=int(held),
            available=int(available),
            some=int(some) / 1e6,
            full=int(full) / 1e6,
        )
        for uptime, held, available, some, full in _TICK.findall(text)
    )


def console_kills(text: str) -> tuple[int, int]:
    """Return how many were killed for want of the machine's memory, and of a cgroup's, by its console."""
    found = _CONSOLE_KILL.findall(text)
    return found.count("Out of memory"), found.count("Memory cgroup out of memory")


def watched(found: Sequence[Tick], began: float, seconds: float) -> tuple[Tick, ...]:
    """Return the ticks of the work alone; raises ValueError when there is none."""
    inside = tuple(tick for tick in found if began <= tick.uptime <= began + seconds)
    if not inside:
        raise ValueError("the machine gave no sign of life while it worked")
    return inside


def stood_still(inside: Sequence[Tick], began: float, seconds: float) -> tuple[float, float]:
    """Return the longest silence and the sum of those over `FROZEN_SECONDS`."""
    ends = max(began + seconds, inside[-1].uptime)
    told = silence([began, *(tick.uptime for tick in inside), ends], FROZEN_SECONDS)
    return told.longest, told.total


def unharmed(inside: Sequence[Tick]) -> int:
    """Return how much the container held at most until the machine first stood still."""
    most = inside[0].held
    for before, after in pairwise(inside):
        if after.uptime - before.uptime > FROZEN_SECONDS:
            break
        most = max(most, after.held)
    return most


def waits(logins: Sequence[Login]) -> tuple[float, float]:
    """Return the longest wait for a login, and the sum of those over `SSH_FROZEN_SECONDS`.

    A wait begins with a try and ends with the next one that is answered, or with the last one.
    """
    found: list[float] = []
    since: float | None = None
    for login in logins:
        since = login.began if since is None else since
        if login.answered:
            found.append(login.ended - since)
            since = None
    if since is not None:
        found.append(logins[-1].ended - since)
    return max(found, default=0.0), sum(wait for wait in found if wait > SSH_FROZEN_SECONDS)


def counted(kills: Sequence[Kill]) -> tuple[int, int, int, tuple[str, ...]]:
    """Return kills in the container, for want of the machine's memory, of a cgroup's, and who else died."""
    inside = [kill for kill in kills if "docker-" in kill.task_memcg]
    everywhere = sum(kill.constraint is Constraint.GLOBAL for kill in kills)
    harmed = tuple(kill.task for kill in kills if kill not in inside)
    return len(inside), everywhere, len(kills) - everywhere, harmed


def trace(inside: Sequence[Tick], began: float, marks: Sequence[tuple[float, str]]) -> Trace:
    """Return a run's memory over time, thinned out, with the peaks kept."""
    width = max(1, len(inside) // _POINTS)
    groups = [inside[at : at + width] for at in range(0, len(inside), width)]
    thin = [max(group, key=lambda tick: tick.held) for group in groups]
    return Trace(
        times=tuple(round(tick.uptime - began, 2) for tick in thin),
        held=tuple(tick.held for tick in thin),
        available=tuple(tick.available for tick in thin),
        marks=tuple((time, kind) for time, kind in marks),
    )
