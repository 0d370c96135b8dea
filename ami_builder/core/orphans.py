"""Which resources of interrupted runs can be deleted: a plan with a reason for every resource."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from ami_builder.core.cleanup import Action


class Resource(StrEnum):
    """The kinds of resources that ami-builder creates in an account, users before what they use."""

    INSTANCE = "instance"
    LAUNCH_TEMPLATE = "launch-template"
    VOLUME = "volume"
    IMAGE = "image"
    SNAPSHOT = "snapshot"
    SECURITY_GROUP = "security-group"


MARGIN = timedelta(hours=1)
"""How much longer than an instance's lifetime another host can need the resources of its run."""

COPYING = timedelta(hours=2)
"""How long a copy to another region can take."""

ORDER = tuple(Resource)


class RunState(StrEnum):
    """What this host knows about a run."""

    LIVE = "live"
    ENDED = "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundResource:
    """One resource that has our tag or is in a ledger of this host."""

    kind: Resource
    id: str
    region: str
    run_id: str
    name: str = ""
    created: datetime | None = None
    """None if unknown."""
    finished: bool = False
    """A completed AMI: the result of a run."""
    images: tuple[str, ...] = ()
    """The AMIs that a snapshot belongs to."""
    used_by: str = ""
    """A foreign resource that uses it."""
    copied: bool = False
    """A copy from another region: its run has ended, but the copy can still be in progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphan:
    """What happens to one resource, and why."""

    found: FoundResource
    action: Action
    reason: str


def plan(
    found: Sequence[FoundResource], runs: Mapping[str, RunState], now: datetime, lifetime: float
) -> tuple[Orphan, ...]:
    """Return a decision for every resource, in the order of deletion.

    `runs` are those that this host knows. Resources of other runs belong to other hosts, which can still be
    using them: they are kept until they are older than `lifetime` (seconds) and a margin. If in doubt a
    resource is kept.
    """
    orphans, kept = [], dict[str, str]()
    for one in sorted(found, key=lambda one: (ORDER.index(one.kind), one.created is not None, one.id)):
        action, reason = _decide(one, runs, now, lifetime)
        using = next((image for image in one.images if image in kept), "")
        if action is Action.DELETE and one.kind is Resource.SNAPSHOT and using:
            action, reason = Action.KEEP, f"belongs to {using}: {kept[using]}"
        if action is Action.KEEP:
            kept[one.id] = reason
        orphans.append(Orphan(found=one, action=action, reason=reason))
    return tuple(orphans)


def _decide(
    one: FoundResource, runs: Mapping[str, RunState], now: datetime, lifetime: float
) -> tuple[Action, str]:
    if one.finished:
        return Action.KEEP, "a finished image"
    if one.used_by:
        return Action.KEEP, f"used by {one.used_by}, which is not ours"
    subject = "it is a copy" if one.copied else f"run {one.run_id} is not known here"
    state = None if one.copied else runs.get(one.run_id)
    if state is RunState.LIVE:
        return Action.KEEP, f"run {one.run_id} is still running"
    if state is RunState.ENDED:
        return Action.DELETE, f"run {one.run_id} has ended"
    if one.created is None:
        return Action.KEEP, f"{subject}, and its age is unknown"
    running = max(timedelta(seconds=lifetime), COPYING) if one.copied else timedelta(seconds=lifetime)
    age, allowed = now - one.created, running + MARGIN
    if age <= allowed:
        return Action.KEEP, f"{subject}, and can still be running ({_hours(age)})"
    return Action.DELETE, f"{subject}, and too old to be running ({_hours(age)})"


def _hours(age: timedelta) -> str:
    return f"{age.total_seconds() / 3600:.1f} h old"
