"""The records that ami-builder leaves in a workspace, read without its code: it may be another commit's."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

_SECOND_TRY = "at the second try"
_NOT_PASSED = ("failed", "inconclusive")


def known(runs: Path) -> frozenset[str]:
    """Return the ids of all runs in a workspace's folder of runs."""
    return frozenset(path.parent.name for path in runs.glob("*/record.json"))


def newest(runs: Path, before: Collection[str]) -> Mapping[str, Any]:
    """Return the record of the newest run that is not one of `before`; empty when there is none.

    A record has the verdict whatever the exit status was; `--json` prints it only when all checks passed.
    """
    added = sorted(known(runs) - set(before))
    if not added:
        return {}
    found: Mapping[str, Any] = json.loads((runs / added[-1] / "record.json").read_text())
    return found


def results(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the results of all checks."""
    return list((record.get("verdict") or {}).get("results", ()))


def not_passed(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the checks that failed or are inconclusive, each with its phase and message."""
    return tuple(
        f"{result['name']} ({result['phase']}): {result['message']}"
        for result in results(record)
        if result["outcome"] in _NOT_PASSED
    )


def second_try(record: Mapping[str, Any]) -> bool:
    """Tell whether the steps of memory pressure were done twice."""
    return any(_SECOND_TRY in result["message"] for result in results(record))
