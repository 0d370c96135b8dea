"""The results of a run, computed from what the VM and the observers recorded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from ami_builder.core.oom import Constraint, Kill
from tests.experiment.cases import Case

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence


STALL_SECONDS = 1.0
"""A gap of more than this between two ticks is a stall of the VM: ten ticks are due in that time."""
LONG_STALL_SECONDS = 5.0
"""Also on 1 GiB, where VMs stall for a second and then go on."""
SSH_LATE_SECONDS = 5.0
"""A login that takes longer is late. An emulated VM needs a second or two for one."""
_POINTS = 400
_TICK = re.compile(r"^tick (\d+\.\d+) (\d+) (\d+) (\d+) (\d+) \.\r?$", re.MULTILINE)
# Linux, mm/oom_kill.c, __oom_kill_process.
_CONSOLE_KILL = re.compile(r"(Out of memory|Memory cgroup out of memory): Killed process \d+")
_SYSTEM_KILL_TIME = re.compile(r"\[ *(\d+\.\d+)\] Out of memory: Killed process")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """The VM at one time: bytes, and seconds of memory stalls since it booted."""

    uptime: float
    held: int
    """Anonymous memory of Dask's container."""
    available: int
    some: float
    full: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoginTry:
    """One try to log in by ssh, in seconds since the work began."""

    began: float
    ended: float
    answered: bool
    denied: float = 0.0
    """CPU steal in that time."""

    @property
    def own(self) -> float:
        """The time without CPU steal."""
        return max(0.0, self.ended - self.began - self.denied)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One run. Sizes are bytes, times seconds."""

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
    """The memory limit that the Dask worker uses."""
    done: int
    failed: int
    unfinished: int
    """When the time was up."""
    came_back: bool
    """Whether ssh worked after the run. Otherwise restarts and kills are counted on the console."""
    seconds: float
    by_nanny: int
    """Restarts of the worker by its nanny."""
    by_kernel: int
    """Processes of the container that the kernel killed."""
    system_oom_kills: int
    """System-wide OOM kills, of any process."""
    cgroup_oom_kills: int
    killed_outside: tuple[str, ...]
    """Processes outside the container that the kernel killed."""
    longest_stall: float
    """The longest time between two ticks."""
    stalled: float
    """The sum of all times between ticks that exceed `STALL_SECONDS`."""
    ssh_tries: int
    ssh_failed: int
    ssh_longest: float
    """The longest wait for a login, failed tries included."""
    ssh_late: float
    """The sum of all waits that exceed `SSH_LATE_SECONDS`."""
    psi_some: float
    """How long at least one task waited for memory (PSI)."""
    psi_full: float
    """How long all tasks did."""
    spilled: int
    """The maximum, sampled at each heartbeat of the worker."""
    peak: int
    """The most anonymous memory that the container held."""
    held_before_stall: int
    """The same, until the first stall."""
    cpu_steal: float
    """How long the VM waited for a processor of the host. That causes stalls too, whatever the policy."""
    # Results of 2026 have none of these.
    saved: bool = False
    """Whether the VM was saved before Dask started and went on for this run, in place of a boot."""
    ssh_rest: float | None = None
    """The median time of three logins before the work."""
    ssh_above_rest: float | None = None
    """By how much the longest wait exceeded the median at rest, both without CPU steal."""
    held_before_long_stall: int | None = None
    """The most memory that the container held until the first stall of more than `LONG_STALL_SECONDS`, or
    until the first system-wide OOM kill."""
    container: int | None = None
    """The container's own limit. 0: none. Dask's can be lower, for the nanny."""
    protected: int | None = None
    """The memory of the system that the kernel does not reclaim (MemoryMin)."""
    cpu_seconds: float | None = None
    """CPU time that the VM's process used on the host during the work."""


_RESULT = TypeAdapter(Result)
_FORMER_KEYS = {
    "global_kills": "system_oom_kills",
    "container_kills": "cgroup_oom_kills",
    "harmed": "killed_outside",
    "frozen_longest": "longest_stall",
    "frozen": "stalled",
    "ssh_frozen": "ssh_late",
    "stalled_some": "psi_some",
    "stalled_full": "psi_full",
    "unharmed": "held_before_stall",
    "starved": "cpu_steal",
}
"""Keys in results of 2026, which are still readable."""


def parse(line: Mapping[str, Any]) -> Result:
    """Return a recorded result; raises pydantic's ValidationError."""
    return _RESULT.validate_python({_FORMER_KEYS.get(key, key): value for key, value in line.items()})


def plain(result: Result) -> dict[str, Any]:
    """Return a result as plain JSON types."""
    found: dict[str, Any] = _RESULT.dump_python(result, mode="json")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Memory over time in one run. Times are seconds since the work began."""

    times: tuple[float, ...]
    held: tuple[int, ...]
    available: tuple[int, ...]
    marks: tuple[tuple[float, str], ...]
    """`paused`, `resumed`, `lost` and `back`: the state of the worker, as the scheduler sees it."""


def ticks(text: str) -> tuple[Tick, ...]:
    """Return the lines that ticker.py wrote to a console. Lines that the kernel interrupted are ignored."""
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
    """Return the numbers of system-wide and of cgroup OOM kills on a console."""
    found = _CONSOLE_KILL.findall(text)
    return found.count("Out of memory"), found.count("Memory cgroup out of memory")


def watched(found: Sequence[Tick], began: float, seconds: float) -> tuple[Tick, ...]:
    """Return the ticks during the work; raises ValueError if there are none."""
    inside = tuple(tick for tick in found if began <= tick.uptime <= began + seconds)
    if not inside:
        raise ValueError("the VM wrote no tick during the work")
    return inside


def stalls(inside: Sequence[Tick], began: float, seconds: float) -> tuple[float, float]:
    """Return the longest gap between ticks, and the sum of the gaps over `STALL_SECONDS`.

    The gaps to the begin and the end of the work count too.
    """
    end = max(began + seconds, inside[-1].uptime)
    gaps = [after - before for before, after in pairwise([began, *(t.uptime for t in inside), end])]
    return max(gaps), _sum_over(STALL_SECONDS, gaps)


def held_before_stall(inside: Sequence[Tick]) -> int:
    """Return the most memory that the container held before the first stall."""
    most = inside[0].held
    for before, after in pairwise(inside):
        if after.uptime - before.uptime > STALL_SECONDS:
            break
        most = max(most, after.held)
    return most


def held_before_long_stall(inside: Sequence[Tick], console: str) -> int:
    """Return the most memory that the container held before a long stall or a system-wide OOM kill."""
    killed = [float(time) for time in _SYSTEM_KILL_TIME.findall(console)]
    first = min((time for time in killed if time >= inside[0].uptime), default=float("inf"))
    most = inside[0].held
    for before, after in pairwise(inside):
        if after.uptime - before.uptime > LONG_STALL_SECONDS or after.uptime > first:
            break
        most = max(most, after.held)
    return most


def waits(logins: Sequence[LoginTry]) -> tuple[float, float]:
    """Return the longest wait for a login, and the sum of those over `SSH_LATE_SECONDS`.

    A wait begins with a try and ends with the next one that is answered, or with the last one.
    """
    found = [seconds for seconds, _ in _waits(logins)]
    return max(found, default=0.0), _sum_over(SSH_LATE_SECONDS, found)


def longest_own_wait(logins: Sequence[LoginTry]) -> float:
    """Return the longest wait for a login without CPU steal."""
    return max((max(0.0, seconds - denied) for seconds, denied in _waits(logins)), default=0.0)


def _waits(logins: Sequence[LoginTry]) -> Iterator[tuple[float, float]]:
    """Yield each wait and the CPU steal in it."""
    since: float | None = None
    denied = 0.0
    for login in logins:
        since = login.began if since is None else since
        denied += login.denied
        if login.answered:
            yield login.ended - since, denied
            since, denied = None, 0.0
    if since is not None:
        yield logins[-1].ended - since, denied


def _sum_over(bound: float, values: Iterable[float]) -> float:
    return sum(value for value in values if value > bound)


def counted(kills: Sequence[Kill]) -> tuple[int, int, int, tuple[str, ...]]:
    """Return the kills in the container, system-wide, by a cgroup, and the processes killed elsewhere."""
    inside = [kill for kill in kills if "docker-" in kill.task_memcg]
    system = sum(kill.constraint is Constraint.GLOBAL for kill in kills)
    outside = tuple(kill.task for kill in kills if kill not in inside)
    return len(inside), system, len(kills) - system, outside


def trace(inside: Sequence[Tick], began: float, marks: Sequence[tuple[float, str]]) -> Trace:
    """Return a run's memory over time in about 400 points, which include the peaks."""
    width = max(1, len(inside) // _POINTS)
    parts = [inside[at : at + width] for at in range(0, len(inside), width)]
    thin = [max(part, key=lambda tick: tick.held) for part in parts]
    return Trace(
        times=tuple(round(tick.uptime - began, 2) for tick in thin),
        held=tuple(tick.held for tick in thin),
        available=tuple(tick.available for tick in thin),
        marks=tuple((time, kind) for time, kind in marks),
    )
