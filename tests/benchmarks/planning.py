"""How long it takes to plan which images go, in seconds of CPU."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

from ami_builder.core.cleanup import Action, Candidate, Reference, RetentionPolicy, plan

_NOW = datetime(2026, 6, 1, tzinfo=UTC)
_POLICY = RetentionPolicy(keep=5, young=timedelta(days=30), grace=timedelta(days=7), most=1000)


def planning_seconds(images: int, references: int) -> float:
    """Return the CPU seconds of one plan over a world of that size."""
    candidates = [
        Candidate(
            id=f"ami-{number:017x}",
            image=f"image-{number % 50}",
            created=_NOW - timedelta(minutes=number * 7919 % 1_000_003),
            channels=frozenset({"stable"}) if number % 3 == 0 else frozenset(),
            deprecated=_NOW - timedelta(days=10) if number % 2 else None,
        )
        for number in range(images)
    ]
    used = [
        Reference(id=f"ami-{number * 7919 % images * 2:017x}", by=f"used by instance i-{number:017x}")
        for number in range(references)
    ]
    started = time.process_time()
    decisions = plan(candidates, used, _POLICY, _NOW)
    seconds = time.process_time() - started
    assert len(decisions) == images
    assert any(decision.action is Action.DELETE for decision in decisions)
    return seconds
