"""What runs say beside the criteria: what made no difference, what the limit costs, what a policy leaves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median

from tests.experiment.cases import Kind, Policy
from tests.experiment.criteria import Row, asked, given, rows, said, unhurt
from tests.experiment.results import Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """How much of a machine Dask may use under a policy, and what became of the rest."""

    kind: Kind
    policy: Policy
    limit: float
    """Bytes, the median."""
    of_total: float
    """As part of MemTotal."""
    of_given: float | None
    """As part of what a leak got before the machine first stood still; None when that was not measured."""
    hurt: int
    """Runs in which something outside the container was hurt."""
    runs: int


def shares(results: Sequence[Result]) -> tuple[Share, ...]:
    """Return it for every machine and policy."""
    found = []
    key = lambda row: (row.kind, list(Policy).index(row.policy))  # noqa: E731 - for sorted and groupby
    for _, group in groupby(sorted(rows(asked(results)), key=key), key=key):
        runs = [result for row in group for result in row.results]
        case, most = runs[0].case, given(runs[0].case.kind, results)
        limit = median(result.limit for result in runs)
        found.append(
            Share(
                kind=case.kind,
                policy=case.policy,
                limit=limit,
                of_total=limit / runs[0].total,
                of_given=limit / most if most else None,
                hurt=sum(not unhurt(result) for result in runs),
                runs=len(runs),
            )
        )
    return tuple(found)


def notes(results: Sequence[Result]) -> tuple[str, ...]:
    """Return what speaks against the limit, or not for it, as sentences."""
    return tuple(_notes(rows(results)))


def _notes(found: Sequence[Row]) -> Iterator[str]:
    free = {(row.kind, row.work): row for row in found if row.policy is Policy.NONE}
    for row in found:
        without = free.get((row.kind, row.work))
        if row.policy is not Policy.AVAILABLE or without is None:
            continue
        where = f"{said(row.kind)}, {row.work.text}"
        if all(unhurt(result) for result in without.results):
            yield f"{where}: no difference to the machine; nothing was hurt without a limit either."
        before, now = without.median(_lost), row.median(_lost)
        if now > before:
            yield f"{where}: with the limit {now:g} tasks fail or don't end, without it {before:g}."
        before, now = without.median(_restarts), row.median(_restarts)
        if now > before:
            yield f"{where}: with the limit the worker is restarted {now:g} times, without it {before:g}."
        without_ended, ended = _seconds_to_its_end(without), _seconds_to_its_end(row)
        if without_ended and ended and median(ended) > median(without_ended):
            before, now = median(without_ended), median(ended)
            yield f"{where}: with the limit it comes to its end in {now:.0f} s, without it in {before:.0f} s."
        if hurt := sum(not unhurt(result) for result in row.results):
            yield f"{where}: with the limit something was hurt all the same, in {hurt} of {row.runs} runs."


def _lost(result: Result) -> float:
    return result.failed + result.unfinished


def _restarts(result: Result) -> float:
    return result.by_nanny + result.by_kernel


def _seconds_to_its_end(row: Row) -> list[float]:
    return [result.seconds for result in row.results if not result.unfinished]
