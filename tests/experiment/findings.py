"""Findings beside the criteria: where the limit makes no difference, what it costs, what Dask may use."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING

from tests.experiment.cases import Kind, LimitPolicy
from tests.experiment.criteria import Group, format_kind, given, groups, is_unaffected, without_control

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.experiment.results import Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """How much of a VM's memory Dask may use under a policy, and in how many runs something else suffered."""

    kind: Kind
    policy: LimitPolicy
    limit: float
    """Bytes, the median."""
    of_total: float
    """As part of MemTotal."""
    of_given: float | None
    """As part of what a leak held before the first stall; None if that was not measured."""
    affected: int
    """Runs in which something outside the container was affected."""
    runs: int


def shares(results: Sequence[Result]) -> tuple[Share, ...]:
    """Return the share for every kind of VM and policy."""
    found = []
    key = lambda group: (group.kind, list(LimitPolicy).index(group.policy))  # noqa: E731 - for sorted and groupby
    for _, same in groupby(sorted(groups(without_control(results)), key=key), key=key):
        runs = [result for group in same for result in group.results]
        case, most = runs[0].case, given(runs[0].case.kind, results)
        limit = median(result.limit for result in runs)
        found.append(
            Share(
                kind=case.kind,
                policy=case.policy,
                limit=limit,
                of_total=limit / runs[0].total,
                of_given=limit / most if most else None,
                affected=sum(not is_unaffected(result) for result in runs),
                runs=len(runs),
            )
        )
    return tuple(found)


def notes(results: Sequence[Result]) -> tuple[str, ...]:
    """Return sentences on where the limit made no difference, and on what it costs."""
    return tuple(_notes(groups(results)))


def _notes(found: Sequence[Group]) -> Iterator[str]:
    free = {(group.kind, group.work): group for group in found if group.policy is LimitPolicy.NONE}
    for group in found:
        without = free.get((group.kind, group.work))
        if group.policy is not LimitPolicy.AVAILABLE or without is None:
            continue
        where = f"{format_kind(group.kind)}, {group.work.text}"
        if all(is_unaffected(result) for result in without.results):
            yield f"{where}: no difference, nothing outside the container was affected without a limit."
        before, now = without.median(_lost), group.median(_lost)
        if now > before:
            yield f"{where}: {now:g} tasks fail or don't end with the limit, {before:g} without."
        before, now = without.median(_restarts), group.median(_restarts)
        if now > before:
            yield f"{where}: {now:g} restarts of the worker with the limit, {before:g} without."
        without_ended, ended = _seconds_to_its_end(without), _seconds_to_its_end(group)
        if without_ended and ended and median(ended) > median(without_ended):
            before, now = median(without_ended), median(ended)
            yield f"{where}: the work takes {now:.0f} s with the limit, {before:.0f} s without."
        if bad := sum(not is_unaffected(result) for result in group.results):
            yield f"{where}: something else was affected despite the limit, in {bad} of {group.runs} runs."


def _lost(result: Result) -> float:
    return result.failed + result.unfinished


def _restarts(result: Result) -> float:
    return result.by_nanny + result.by_kernel


def _seconds_to_its_end(group: Group) -> list[float]:
    return [result.seconds for result in group.results if not result.unfinished]
