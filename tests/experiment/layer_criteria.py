"""The criteria for an image with layers of defence, and the runs judged by them.

The bounds are those of the request and were set before the first run with layers.
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timedelta
from statistics import median
from typing import TYPE_CHECKING

from ami_builder.core.units import GIB, MIB
from tests.experiment.cases import Case, Kind, LimitPolicy, Work
from tests.experiment.criteria import PUBLISHED, Grade, Judged, format_kind
from tests.experiment.layers import IMAGE, OFF

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.experiment.results import Result

KINDS: tuple[Kind, ...] = tuple((memory * GIB, 2) for memory in (1, 2, 4, 8))
WORKS = tuple(work for work in Work if work is not Work.RESTARTS)
ABOVE_REST, ABOVE_REST_UNLIMITED = 5.0, 10.0
USED_PERCENT = 97
COST_PERCENT = 1
APART = timedelta(hours=1)
"""Between the beginnings of a pair: one host did the same work in 400 s at one hour, in 585 s at another."""
_LEAKS = (Work.LEAK_SLOW, Work.LEAK_FAST)


def above_rest(result: Result) -> float:
    """Return by how many seconds the longest wait for a login exceeded a login at rest.

    Time in which the host did not run the VM does not count, if that was measured.
    """
    if result.ssh_above_rest is not None:
        return result.ssh_above_rest
    return result.ssh_longest - (result.ssh_rest or 0.0)


def judge_layers(results: Sequence[Result]) -> tuple[Judged, ...]:
    """Return every criterion with its grade, from runs with the image's layers and their controls."""
    image = [result for result in results if result.case.layers == IMAGE and result.case.work in WORKS]
    default = [result for result in image if result.case.policy is LimitPolicy.DEFAULT]
    free = [result for result in image if result.case.policy is LimitPolicy.NONE]
    return (
        *(one for kind in KINDS for one in _default(kind, default, free)),
        *_outside("no limit", free, ABOVE_REST_UNLIMITED, _leaks_and_spikes),
        *(_cost(work, results) for work in (Work.ARRAY, Work.MATRIX)),
    )


def _default(kind: Kind, default: Sequence[Result], free: Sequence[Result]) -> tuple[Judged, ...]:
    runs = [result for result in default if result.case.kind == kind]
    where = f"{format_kind(kind)}, default settings"
    return (*_outside(where, runs, ABOVE_REST, _all_works), _used(where, kind, runs, free))


def _all_works(runs: Sequence[Result]) -> bool:
    counts = Counter(result.case.work for result in runs)
    return all(counts[work] >= PUBLISHED for work in WORKS)


def _leaks_and_spikes(runs: Sequence[Result]) -> bool:
    counts = Counter((result.case.kind, result.case.work) for result in runs)
    wanted = (Work.LEAK_FAST, Work.SPIKES)
    return all(counts[kind, work] >= PUBLISHED for kind in KINDS[:2] for work in wanted)


def _outside(
    where: str, runs: Sequence[Result], bound: float, whole: Callable[[Sequence[Result]], bool]
) -> tuple[Judged, ...]:
    def judged(text: str, bad: Callable[[Result], bool], found: str) -> Judged:
        text = f"{where}: {text}"
        if not runs:
            return Judged(text=text, grade=Grade.NOT_SHOWN, found="no run", runs=0)
        wrong = sum(map(bad, runs))
        if wrong:
            return Judged(
                text=text,
                grade=Grade.FAILED,
                found=f"{found}; in {wrong} of {len(runs)} runs",
                runs=len(runs),
            )
        grade = Grade.PASSED if whole(runs) else Grade.NOT_SHOWN
        return Judged(
            text=text,
            grade=grade,
            found=found + ("" if grade is Grade.PASSED else "; not every work was run five times"),
            runs=len(runs),
        )

    kills = sum(result.system_oom_kills for result in runs)
    failed, tries = sum(result.ssh_failed for result in runs), sum(result.ssh_tries for result in runs)
    others = sorted({task for result in runs for task in result.killed_outside})
    longest = max(map(above_rest, runs), default=0.0)
    limited = where != "no limit"
    return (
        *(
            (judged("no system-wide OOM kill", lambda r: r.system_oom_kills > 0, f"{kills} kills"),)
            if limited
            else ()
        ),
        judged(
            "no process outside the container is killed",
            lambda r: bool(r.killed_outside),
            ", ".join(others) or "none",
        ),
        judged("no login fails", lambda r: r.ssh_failed > 0, f"{failed} of {tries} failed"),
        judged(
            f"no login takes {bound:g} s longer than at rest",
            lambda r: above_rest(r) > bound,
            f"{longest:.1f} s longer",
        ),
    )


def could_give(kind: Kind, layers: str, results: Sequence[Result]) -> float | None:
    """Return what leaks without a limit held before the first long stall or system-wide kill."""
    held = [
        result.held_before_long_stall
        for result in results
        if (result.case.kind, result.case.layers) == (kind, layers)
        and result.case.work in _LEAKS
        and result.case.policy is LimitPolicy.NONE
        and result.held_before_long_stall
    ]
    return median(held) if held else None


def _used(where: str, kind: Kind, runs: Sequence[Result], free: Sequence[Result]) -> Judged:
    text = f"{where}: Dask gets at least {USED_PERCENT} % of what the system could give"
    most, limits = could_give(kind, IMAGE, free), [result.container for result in runs if result.container]
    if most is None or not limits:
        return Judged(text=text, grade=Grade.NOT_SHOWN, found="no leak without a limit", runs=0)
    share = median(limits) / most
    return Judged(
        text=text,
        grade=Grade.PASSED if share * 100 >= USED_PERCENT else Grade.FAILED,
        found=f"{share:.1%}: {median(limits) / MIB:.0f} of {most / MIB:.0f} MiB",
        runs=len(limits),
    )


def _cost(work: Work, results: Sequence[Result]) -> Judged:
    """Compare pairs whose cases differ in nothing but the layers, by CPU time where both have it."""
    text = f"{work.text.split(':')[0]} takes at most {COST_PERCENT} % longer with the layers"

    def key(case: Case) -> tuple[object, ...]:
        return case.kind, case.policy, case.repeat, case.seed

    whole = [r for r in results if r.case.work is work and not (r.unfinished or r.failed)]
    without = {key(r.case): r for r in whole if r.case.layers == OFF}
    both = [(without[key(r.case)], r) for r in whole if r.case.layers == IMAGE and key(r.case) in without]
    pairs = [(off, on) for off, on in both if abs(_began(on) - _began(off)) <= APART]
    if not pairs:
        return Judged(text=text, grade=Grade.NOT_SHOWN, found="no pair of runs", runs=0)
    by_cpu = [(off.cpu_seconds, on.cpu_seconds) for off, on in pairs if off.cpu_seconds and on.cpu_seconds]
    times, unit = by_cpu or [(off.seconds, on.seconds) for off, on in pairs], "CPU s" if by_cpu else "s"
    ratio = median(after / before for before, after in times)
    count = f"{len(times)} pair{'s' if len(times) > 1 else ''}"
    found = f"{(ratio - 1) * 100:+.1f} %, the median of {count} ({_pairs(times, unit)})"
    grade = Grade.PASSED if ratio <= 1 + COST_PERCENT / 100 else Grade.FAILED
    return Judged(text=text, grade=grade, found=found, runs=2 * len(times))


def _began(result: Result) -> datetime:
    return datetime.fromisoformat(result.when)


def _pairs(pairs: Sequence[tuple[float, float]], unit: str) -> str:
    return ", ".join(f"{before:.0f} and {after:.0f} {unit}" for before, after in pairs)
