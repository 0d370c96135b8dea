"""What counts as success, written down before the runs; and what the runs came to, in numbers.

Changing a number here after having seen results is what these lines are to prevent: see the history. What is
asked of the default reserve came after 57 and 98 runs, with the bounds that were there for a reserve of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from typing import TypeVar

from ami_builder.core.units import GIB, MIB
from tests.experiment.cases import DEFAULT, RESERVE_PERCENT, Kind, Policy, Work
from tests.experiment.results import FROZEN_SECONDS, Result

SILENT_SECONDS = 5.0
LESS_FROZEN = 10.0
SLOWER = 1.15
USED_PERCENT = 95
NOISE = 0.05
"""A limit that is by more above what the system gave tells of something else than memory."""
PUBLISHED = 5
"""Of so many runs of each kind a number that is published should be the median."""

_NAMES = {
    Policy.AVAILABLE: f"reserve {RESERVE_PERCENT[Policy.AVAILABLE]}",
    DEFAULT: f"the default reserve of {RESERVE_PERCENT[DEFAULT]} %",
}

K = TypeVar("K")
V = TypeVar("V")


class Answer(StrEnum):
    """How a criterion came out."""

    PASSED = "passed"
    FAILED = "not"
    NOT_SHOWN = "not shown"
    """There are no runs that would show it, or nothing to be better than."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One criterion, what was found, and in how many runs."""

    text: str
    answer: Answer
    found: str
    runs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A number over the runs of one kind."""

    least: float
    median: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return it; raises ValueError without values."""
        ordered = sorted(values)
        if not ordered:
            raise ValueError("no values")
        return cls(least=ordered[0], median=median(ordered), most=ordered[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """All runs of one policy and work on one kind of machine."""

    kind: Kind
    work: Work
    policy: Policy
    results: tuple[Result, ...]

    @property
    def runs(self) -> int:
        """How many there are."""
        return len(self.results)

    def spread(self, value: Callable[[Result], float]) -> Spread:
        """Return a number over them."""
        return Spread.of(value(result) for result in self.results)

    def median(self, value: Callable[[Result], float]) -> float:
        """Return a number's median over them."""
        return self.spread(value).median


def said(kind: Kind) -> str:
    """Return a machine as a person says it."""
    memory, cpus = kind
    return f"{memory / GIB:g} GiB, {cpus} CPU{'s' if cpus > 1 else ''}"


def rows(results: Iterable[Result]) -> tuple[Row, ...]:
    """Group runs, by machine, work and policy in the order of their definition."""
    found = grouped(results, lambda result: (result.case.kind, result.case.work, result.case.policy))
    works, policies = list(Work), list(Policy)
    ordered = sorted(found, key=lambda key: (key[0], works.index(key[1]), policies.index(key[2])))
    return tuple(Row(kind=key[0], work=key[1], policy=key[2], results=tuple(found[key])) for key in ordered)


def grouped(values: Iterable[V], key: Callable[[V], K]) -> Mapping[K, list[V]]:
    """Return values by a key."""
    found: dict[K, list[V]] = {}
    for value in values:
        found.setdefault(key(value), []).append(value)
    return found


def asked(results: Iterable[Result]) -> list[Result]:
    """Leave the control out: what its machines suffer comes of no memory that Dask has taken."""
    return [result for result in results if result.case.work is not Work.RESTARTS]


def judge(results: Sequence[Result]) -> tuple[Judged, ...]:
    """Return every criterion with its answer."""
    results = asked(results)
    reserves = [Policy.AVAILABLE, *([DEFAULT] if _of(DEFAULT, results) else [])]
    return (
        *(one for policy in reserves for one in _outside(policy, results)),
        _fails_without(_of(Policy.NONE, results)),
        *(
            ask(kind, policy, results)
            for ask in (_of_spikes, _frozen, _array, _used)
            for policy in reserves
            # What was not run with a reserve of 0 is said to be missing, on every machine.
            for kind in _kinds(results if policy is Policy.AVAILABLE else _of(policy, results))
        ),
    )


def _of(policy: Policy, results: Sequence[Result]) -> list[Result]:
    return [result for result in results if result.case.policy is policy]


def _kinds(results: Sequence[Result]) -> list[Kind]:
    return sorted({result.case.kind for result in results})


def _outside(policy: Policy, results: Sequence[Result]) -> tuple[Judged, ...]:
    runs, name = _of(policy, results), _NAMES[policy]
    return (
        _none_of(runs, f"{name}: the kernel never kills for want of the machine's memory",
                 lambda r: r.global_kills, "such kills"),
        _silence(runs, f"{name}: neither the machine nor ssh is silent for more than {SILENT_SECONDS:g} s"),
        _none_of(runs, f"{name}: no login by ssh fails", lambda r: r.ssh_failed, "failed logins"),
        _none_of(runs, f"{name}: no other service is killed", lambda r: len(r.harmed), "killed processes"),
    )  # fmt: skip


def _none_of(runs: Sequence[Result], text: str, count: Callable[[Result], int], what: str) -> Judged:
    if not runs:
        return Judged(text=text, answer=Answer.NOT_SHOWN, found="no run", runs=0)
    bad = sum(count(result) for result in runs)
    where = sum(count(result) > 0 for result in runs)
    found = f"{what}: {bad}" + (f", in {where} of {len(runs)} runs" if bad else "")
    return Judged(text=text, answer=Answer.FAILED if bad else Answer.PASSED, found=found, runs=len(runs))


def _silence(runs: Sequence[Result], text: str) -> Judged:
    if not runs:
        return Judged(text=text, answer=Answer.NOT_SHOWN, found="no run", runs=0)
    inside, outside = max(r.frozen_longest for r in runs), max(r.ssh_longest for r in runs)
    late = sum(max(r.frozen_longest, r.ssh_longest) > SILENT_SECONDS for r in runs)
    found = f"at most {inside:.1f} s inside, {outside:.1f} s until ssh answered" + (
        f"; over {SILENT_SECONDS:g} s in {late} of {len(runs)} runs" if late else ""
    )
    return Judged(text=text, answer=Answer.FAILED if late else Answer.PASSED, found=found, runs=len(runs))


def _fails_without(runs: Sequence[Result]) -> Judged:
    text = "without a limit the same work breaks one of these"
    if not runs:
        return Judged(text=text, answer=Answer.NOT_SHOWN, found="no run", runs=0)
    broken = [r for r in runs if not unhurt(r)]
    found = (
        f"{len(broken)} of {len(runs)} runs: {sum(r.global_kills for r in runs)} kills for want of the "
        f"machine's memory, silent for {max(r.frozen_longest for r in runs):.1f} s at most, "
        f"{sum(r.ssh_failed for r in runs)} logins failed"
    )
    return Judged(text=text, answer=Answer.PASSED if broken else Answer.FAILED, found=found, runs=len(runs))


def unhurt(result: Result) -> bool:
    """Tell whether nothing outside the container was hurt in a run."""
    silent = max(result.frozen_longest, result.ssh_longest)
    return not (result.global_kills or result.harmed or result.ssh_failed) and silent <= SILENT_SECONDS


def _compared(
    text: str, kind: Kind, policy: Policy, work: Work, results: Sequence[Result],
    compare: Callable[[Row, Row], tuple[Answer, str]],
) -> Judged:  # fmt: skip
    text = f"{said(kind)}, {_NAMES[policy]}: {text}"
    found = {row.policy: row for row in rows(results) if (row.kind, row.work) == (kind, work)}
    if not {Policy.NONE, policy} <= found.keys():
        return Judged(text=text, answer=Answer.NOT_SHOWN, found="not run under both", runs=0)
    free, limited = found[Policy.NONE], found[policy]
    answer, told = compare(free, limited)
    return Judged(text=text, answer=answer, found=told, runs=min(free.runs, limited.runs))


def _of_spikes(kind: Kind, policy: Policy, results: Sequence[Result]) -> Judged:
    def compare(free: Row, limited: Row) -> tuple[Answer, str]:
        before, now = free.median(lambda r: r.done), limited.median(lambda r: r.done)
        answer = Answer.PASSED if now >= before else Answer.FAILED
        return answer, f"{now:g} tasks with it, {before:g} without"

    text = "W3 completes at least as much as without a limit"
    return _compared(text, kind, policy, Work.SPIKES, results, compare)


def _frozen(kind: Kind, policy: Policy, results: Sequence[Result]) -> Judged:
    def compare(free: Row, limited: Row) -> tuple[Answer, str]:
        before, now = free.median(lambda r: r.frozen), limited.median(lambda r: r.frozen)
        found = f"{now:.1f} s with it, {before:.1f} s without"
        if before < FROZEN_SECONDS:
            return Answer.NOT_SHOWN, f"{found}: there was nothing to be better than"
        return Answer.PASSED if now * LESS_FROZEN <= before else Answer.FAILED, found

    text = f"W3 stands still at least {LESS_FROZEN:g} times less than without a limit"
    return _compared(text, kind, policy, Work.SPIKES, results, compare)


def _array(kind: Kind, policy: Policy, results: Sequence[Result]) -> Judged:
    def compare(free: Row, limited: Row) -> tuple[Answer, str]:
        before, now = free.median(lambda r: r.seconds), limited.median(lambda r: r.seconds)
        whole = all(not (r.failed or r.unfinished) for r in limited.results)
        found = f"{now:.0f} s with it, {before:.0f} s without" + ("" if whole else "; not all of it was done")
        return Answer.PASSED if whole and now <= SLOWER * before else Answer.FAILED, found

    text = f"W1 takes at most {SLOWER:g} × as long as without"
    return _compared(text, kind, policy, Work.ARRAY, results, compare)


def given(kind: Kind, results: Sequence[Result]) -> float | None:
    """Return what the system can really give Dask: what a leak without a cgroup held before it suffered."""
    leaks = [
        r.unharmed
        for r in results
        if r.case.kind == kind
        and r.case.work in (Work.LEAK_SLOW, Work.LEAK_FAST)
        and r.case.policy in (Policy.NONE, Policy.DASK_ONLY)
    ]
    return median(leaks) if leaks else None


def _used(kind: Kind, policy: Policy, results: Sequence[Result]) -> Judged:
    where = f"{said(kind)}, {_NAMES[policy]}"
    text = f"{where}: Dask may use at least {USED_PERCENT} % of what the system can really give"
    most = given(kind, results)
    limits = [r.limit for r in results if (r.case.kind, r.case.policy) == (kind, policy)]
    if most is None or not limits:
        return Judged(text=text, answer=Answer.NOT_SHOWN, found="no leak without a limit", runs=0)
    share, mine, all_of_it = median(limits) / most, median(limits) / MIB, most / MIB
    found = f"{share:.1%}: {mine:.0f} MiB; the system gave {all_of_it:.0f} MiB before it suffered"
    if share > 1 + NOISE:
        # Either the limit is too high, which other criteria would tell, or it was not memory that it wanted.
        return Judged(text=text, answer=Answer.NOT_SHOWN, found=f"{found}, which is less", runs=len(limits))
    answer = Answer.PASSED if share * 100 >= USED_PERCENT else Answer.FAILED
    return Judged(text=text, answer=answer, found=found, runs=len(limits))
