"""The criteria for success, and the runs judged by them.

The bounds were set before the first run and must not be changed after seeing results; the git history shows
it. The criteria for a reserve of 2 % were added after 57 and 98 runs, with the same bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from typing import TYPE_CHECKING, TypeVar

from ami_builder.core.units import GIB, MIB
from tests.experiment.cases import RESERVE_PERCENT, TWO_PERCENT, Kind, LimitPolicy, Work
from tests.experiment.layers import OFF
from tests.experiment.results import STALL_SECONDS, Result

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

MOST_SECONDS = 5.0
FEWER_STALLS = 10.0
SLOWER = 1.15
USED_PERCENT = 95
NOISE = 0.05
"""If a limit exceeds what the system gave by more than this, that number was not limited by memory."""
PUBLISHED = 5
"""A published number should be the median of at least this many runs."""

_NAMES = {
    LimitPolicy.AVAILABLE: f"reserve {RESERVE_PERCENT[LimitPolicy.AVAILABLE]}",
    TWO_PERCENT: f"reserve {RESERVE_PERCENT[TWO_PERCENT]} %",
}

K = TypeVar("K")
V = TypeVar("V")


class Grade(StrEnum):
    """The result of a criterion."""

    PASSED = "passed"
    FAILED = "not"
    NOT_SHOWN = "not shown"
    """There are no such runs, or there was nothing to improve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A criterion with its grade, the numbers found, and the number of runs."""

    text: str
    grade: Grade
    found: str
    runs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The spread of a number over several runs."""

    least: float
    median: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return the spread of values; raises ValueError if there are none."""
        ordered = sorted(values)
        if not ordered:
            raise ValueError("no values")
        return cls(least=ordered[0], median=median(ordered), most=ordered[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All runs of one policy and work on one kind of VM."""

    kind: Kind
    work: Work
    policy: LimitPolicy
    layers: str
    results: tuple[Result, ...]

    @property
    def runs(self) -> int:
        """The number of runs."""
        return len(self.results)

    def spread(self, value: Callable[[Result], float]) -> Spread:
        """Return the spread of a number over the runs."""
        return Spread.of(value(result) for result in self.results)

    def median(self, value: Callable[[Result], float]) -> float:
        """Return the median of a number over the runs."""
        return self.spread(value).median


def format_kind(kind: Kind) -> str:
    """Return a kind of VM as text."""
    memory, cpus = kind
    return f"{memory / GIB:g} GiB, {cpus} CPU{'s' if cpus > 1 else ''}"


def groups(results: Iterable[Result]) -> tuple[Group, ...]:
    """Group runs by VM, work, policy and layers, in the order in which these are defined."""

    def key(result: Result) -> tuple[Kind, int, int, bool, str]:
        case = result.case
        return (
            case.kind,
            list(Work).index(case.work),
            list(LimitPolicy).index(case.policy),
            case.layers != OFF,
            case.layers,
        )

    found = grouped(results, key)
    return tuple(
        Group(
            kind=runs[0].case.kind,
            work=runs[0].case.work,
            policy=runs[0].case.policy,
            layers=runs[0].case.layers,
            results=tuple(runs),
        )
        for _, runs in sorted(found.items())
    )


def grouped(values: Iterable[V], key: Callable[[V], K]) -> Mapping[K, list[V]]:
    """Return values grouped by a key."""
    found: dict[K, list[V]] = {}
    for value in values:
        found.setdefault(key(value), []).append(value)
    return found


def without_control(results: Iterable[Result]) -> list[Result]:
    """Return the runs except the control, which uses no memory."""
    return [result for result in results if result.case.work is not Work.RESTARTS]


def judge(results: Sequence[Result]) -> tuple[Judged, ...]:
    """Return every criterion with its grade. The runs have the same layers of defence."""
    results = without_control(results)
    reserves = [LimitPolicy.AVAILABLE, *([TWO_PERCENT] if _of(TWO_PERCENT, results) else [])]
    return (
        *(one for policy in reserves for one in _outside(policy, results)),
        _fails_without(_of(LimitPolicy.NONE, results)),
        *(
            ask(kind, policy, results)
            for ask in (_spikes, _stalls, _array, _used)
            for policy in reserves
            # With a reserve of 0, kinds that were not run are listed as not shown.
            for kind in _kinds(results if policy is LimitPolicy.AVAILABLE else _of(policy, results))
        ),
    )


def _of(policy: LimitPolicy, results: Sequence[Result]) -> list[Result]:
    return [result for result in results if result.case.policy is policy]


def _kinds(results: Sequence[Result]) -> list[Kind]:
    return sorted({result.case.kind for result in results})


def _outside(policy: LimitPolicy, results: Sequence[Result]) -> tuple[Judged, ...]:
    runs, name = _of(policy, results), _NAMES[policy]
    return (
        _none_of(runs, f"{name}: no system-wide OOM kill",
                 lambda r: r.system_oom_kills, "system-wide OOM kills"),
        _responsive(runs, f"{name}: no stall and no wait for ssh of more than {MOST_SECONDS:g} s"),
        _none_of(runs, f"{name}: no ssh login fails", lambda r: r.ssh_failed, "failed logins"),
        _none_of(runs, f"{name}: no process outside the container is killed",
                 lambda r: len(r.killed_outside), "killed processes"),
    )  # fmt: skip


def _none_of(runs: Sequence[Result], text: str, count: Callable[[Result], int], what: str) -> Judged:
    if not runs:
        return Judged(text=text, grade=Grade.NOT_SHOWN, found="no run", runs=0)
    bad = sum(count(result) for result in runs)
    where = sum(count(result) > 0 for result in runs)
    found = f"{what}: {bad}" + (f", in {where} of {len(runs)} runs" if bad else "")
    return Judged(text=text, grade=Grade.FAILED if bad else Grade.PASSED, found=found, runs=len(runs))


def _responsive(runs: Sequence[Result], text: str) -> Judged:
    if not runs:
        return Judged(text=text, grade=Grade.NOT_SHOWN, found="no run", runs=0)
    inside, outside = max(r.longest_stall for r in runs), max(r.ssh_longest for r in runs)
    late = sum(max(r.longest_stall, r.ssh_longest) > MOST_SECONDS for r in runs)
    found = f"longest stall {inside:.1f} s, longest wait for ssh {outside:.1f} s" + (
        f"; over {MOST_SECONDS:g} s in {late} of {len(runs)} runs" if late else ""
    )
    return Judged(text=text, grade=Grade.FAILED if late else Grade.PASSED, found=found, runs=len(runs))


def _fails_without(runs: Sequence[Result]) -> Judged:
    text = "without a limit, the same work fails one of these"
    if not runs:
        return Judged(text=text, grade=Grade.NOT_SHOWN, found="no run", runs=0)
    broken = [r for r in runs if not is_unaffected(r)]
    found = (
        f"{len(broken)} of {len(runs)} runs: {sum(r.system_oom_kills for r in runs)} system-wide OOM kills, "
        f"longest stall {max(r.longest_stall for r in runs):.1f} s, "
        f"{sum(r.ssh_failed for r in runs)} failed logins"
    )
    return Judged(text=text, grade=Grade.PASSED if broken else Grade.FAILED, found=found, runs=len(runs))


def is_unaffected(result: Result) -> bool:
    """Return whether nothing outside the container was affected in a run."""
    longest = max(result.longest_stall, result.ssh_longest)
    return (
        not (result.system_oom_kills or result.killed_outside or result.ssh_failed)
        and longest <= MOST_SECONDS
    )


def _compared(
    text: str, kind: Kind, policy: LimitPolicy, work: Work, results: Sequence[Result],
    compare: Callable[[Group, Group], tuple[Grade, str]],
) -> Judged:  # fmt: skip
    text = f"{format_kind(kind)}, {_NAMES[policy]}: {text}"
    found = {group.policy: group for group in groups(results) if (group.kind, group.work) == (kind, work)}
    if not {LimitPolicy.NONE, policy} <= found.keys():
        return Judged(text=text, grade=Grade.NOT_SHOWN, found="not run both ways", runs=0)
    free, limited = found[LimitPolicy.NONE], found[policy]
    grade, numbers = compare(free, limited)
    return Judged(text=text, grade=grade, found=numbers, runs=min(free.runs, limited.runs))


def _spikes(kind: Kind, policy: LimitPolicy, results: Sequence[Result]) -> Judged:
    def compare(free: Group, limited: Group) -> tuple[Grade, str]:
        before, now = free.median(lambda r: r.done), limited.median(lambda r: r.done)
        grade = Grade.PASSED if now >= before else Grade.FAILED
        return grade, f"{now:g} tasks with it, {before:g} without"

    text = "W3 completes at least as many tasks as without a limit"
    return _compared(text, kind, policy, Work.SPIKES, results, compare)


def _stalls(kind: Kind, policy: LimitPolicy, results: Sequence[Result]) -> Judged:
    def compare(free: Group, limited: Group) -> tuple[Grade, str]:
        before, now = free.median(lambda r: r.stalled), limited.median(lambda r: r.stalled)
        found = f"{now:.1f} s with it, {before:.1f} s without"
        if before < STALL_SECONDS:
            return Grade.NOT_SHOWN, f"{found}: nothing to improve"
        return Grade.PASSED if now * FEWER_STALLS <= before else Grade.FAILED, found

    text = f"W3 stalls for at most 1/{FEWER_STALLS:g} of the time without a limit"
    return _compared(text, kind, policy, Work.SPIKES, results, compare)


def _array(kind: Kind, policy: LimitPolicy, results: Sequence[Result]) -> Judged:
    def compare(free: Group, limited: Group) -> tuple[Grade, str]:
        before, now = free.median(lambda r: r.seconds), limited.median(lambda r: r.seconds)
        whole = all(not (r.failed or r.unfinished) for r in limited.results)
        found = f"{now:.0f} s with it, {before:.0f} s without" + (
            "" if whole else "; not all tasks were done"
        )
        return Grade.PASSED if whole and now <= SLOWER * before else Grade.FAILED, found

    text = f"W1 takes at most {SLOWER:g} × as long as without a limit"
    return _compared(text, kind, policy, Work.ARRAY, results, compare)


def given(kind: Kind, results: Sequence[Result]) -> float | None:
    """Return how much the system can give Dask: what leaks without a cgroup limit held before a stall."""
    leaks = [
        r.held_before_stall
        for r in results
        if r.case.kind == kind
        and r.case.work in (Work.LEAK_SLOW, Work.LEAK_FAST)
        and r.case.policy in (LimitPolicy.NONE, LimitPolicy.DASK_ONLY)
    ]
    return median(leaks) if leaks else None


def _used(kind: Kind, policy: LimitPolicy, results: Sequence[Result]) -> Judged:
    where = f"{format_kind(kind)}, {_NAMES[policy]}"
    text = f"{where}: Dask may use at least {USED_PERCENT} % of what the system can give"
    most = given(kind, results)
    limits = [r.limit for r in results if (r.case.kind, r.case.policy) == (kind, policy)]
    if most is None or not limits:
        return Judged(text=text, grade=Grade.NOT_SHOWN, found="no leak without a limit", runs=0)
    share, mine, all_of_it = median(limits) / most, median(limits) / MIB, most / MIB
    found = f"{share:.1%}: {mine:.0f} of {all_of_it:.0f} MiB"
    if share > 1 + NOISE:
        # Either the limit is too high, which other criteria detect, or memory did not cause the stall.
        return Judged(
            text=text, grade=Grade.NOT_SHOWN, found=f"{found}, which memory did not limit", runs=len(limits)
        )
    grade = Grade.PASSED if share * 100 >= USED_PERCENT else Grade.FAILED
    return Judged(text=text, grade=grade, found=found, runs=len(limits))
