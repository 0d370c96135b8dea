"""What of ours stands in an account, and what of it may go: a pure plan with a reason for every thing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from ami_builder.core.cleanup import Action


class Resource(StrEnum):
    """What of ours can stand in an account."""

    INSTANCE = "instance"
    LAUNCH_TEMPLATE = "launch-template"
    VOLUME = "volume"
    IMAGE = "image"
    SNAPSHOT = "snapshot"
    SECURITY_GROUP = "security-group"


MARGIN = timedelta(hours=1)
"""Beyond an instance's lifetime: how long the machine of another may still need what it made."""

COPYING = timedelta(hours=2)
"""How long a copy to another region may take."""

ORDER = (
    Resource.INSTANCE,
    Resource.LAUNCH_TEMPLATE,
    Resource.VOLUME,
    Resource.IMAGE,
    Resource.SNAPSHOT,
    Resource.SECURITY_GROUP,
)
"""What uses another goes first."""


class RunState(StrEnum):
    """What this machine knows of a run."""

    LIVE = "live"
    ENDED = "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundResource:
    """One thing in an account that carries our tag, or stands in a ledger of ours."""

    kind: Resource
    id: str
    region: str
    run_id: str
    name: str = ""
    created: datetime | None = None
    """None where the account does not tell."""
    finished: bool = False
    """An AMI that was completed: it is what runs are for."""
    image: str = ""
    """The AMI that a snapshot belongs to."""
    used_by: str = ""
    """Something that is not ours and uses it."""
    copied: bool = False
    """It is a copy from another region: its run has ended, and whoever copies it may still be at work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphan:
    """One thing, and what is to happen to it."""

    found: FoundResource
    action: Action
    reason: str


def plan(
    found: Sequence[FoundResource], runs: Mapping[str, RunState], now: datetime, lifetime: float
) -> tuple[Orphan, ...]:
    """Decide about everything that was found, in the order in which it can be deleted.

    `runs` are those that this machine knows; what belongs to none of them was made by another machine, which
    may still be at work: it stays until it is older than `lifetime` (seconds) and a margin. In doubt a thing
    stays.
    """
    kept_images = {
        one.id: reason
        for one in found
        if one.kind is Resource.IMAGE
        for action, reason in [_decide(one, runs, now, lifetime)]
        if action is Action.KEEP
    }
    orphans = []
    for one in sorted(found, key=lambda one: (ORDER.index(one.kind), one.created is not None, one.id)):
        action, reason = _decide(one, runs, now, lifetime)
        if action is Action.DELETE and one.kind is Resource.SNAPSHOT and one.image in kept_images:
            action, reason = Action.KEEP, f"belongs to {one.image}: {kept_images[one.image]}"
        orphans.append(Orphan(found=one, action=action, reason=reason))
    return tuple(orphans)


def _decide(
    one: FoundResource, runs: Mapping[str, RunState], now: datetime, lifetime: float
) -> tuple[Action, str]:
    if one.finished:
        return Action.KEEP, "a finished image"
    if one.used_by:
        return Action.KEEP, f"{one.used_by}, which is not ours, uses it"
    subject = "it is a copy" if one.copied else f"run {one.run_id} is another machine's"
    state = None if one.copied else runs.get(one.run_id)
    if state is RunState.LIVE:
        return Action.KEEP, f"run {one.run_id} is still going"
    if state is RunState.ENDED:
        return Action.DELETE, f"run {one.run_id} has ended"
    if one.created is None:
        return Action.KEEP, f"{subject}, and its age is unknown"
    going = max(timedelta(seconds=lifetime), COPYING) if one.copied else timedelta(seconds=lifetime)
    age, allowed = now - one.created, going + MARGIN
    if age <= allowed:
        return Action.KEEP, f"{subject}, and may be going still ({_hours(age)})"
    return Action.DELETE, f"{subject}, and too old to be going ({_hours(age)})"


def _hours(age: timedelta) -> str:
    return f"{age.total_seconds() / 3600:.1f} h old"
