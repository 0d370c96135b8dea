"""Which finished images can be deleted: a plan with a reason for every image, kept or deleted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum


class Action(StrEnum):
    """What a plan does with an image or a resource."""

    KEEP = "keep"
    DEPRECATE = "deprecate"
    DELETE = "delete"


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionPolicy:
    """When an image can be deleted."""

    keep: int
    """How many of the newest are kept, of each channel and of those that were in none."""
    young: timedelta
    """Younger images are kept."""
    grace: timedelta
    """How long an image is deprecated before it is deleted; zero: deleted at once."""
    most: int
    """How many images one run deletes at most, and how many it deprecates."""
    shared: timedelta = timedelta(0)
    """Shared images older than this can be deleted too; zero: never. Public ones never can."""
    size: int = 0
    """Nothing is deleted while all images together are no larger, in bytes; 0: no such limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One existing image, and what is known about it."""

    id: str
    image: str
    """Its name in ami-builder.toml; images of one name are counted together."""
    created: datetime | None
    """None if unknown."""
    ours: bool = True
    """Whether it belongs to this account and has our tag."""
    finished: bool = True
    region: str = ""
    """Where it is; empty for this host."""
    size: int = 0
    channels: frozenset[str] = frozenset()
    """The channels that it is or was current in."""
    revoked: bool = False
    shared: str = ""
    """Who it is shared with, in words; empty for nobody."""
    public: bool = False
    protected: str = ""
    """What protects it, in words; empty for nothing."""
    deprecated: datetime | None = None
    """Since when."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Something that needs an image: `in channel stable`, `used by instance i-… (stopped)`."""

    id: str
    """The image's."""
    by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What happens to one image, and why."""

    candidate: Candidate
    action: Action
    reason: str


def plan(
    images: Sequence[Candidate], references: Iterable[Reference], policy: RetentionPolicy, now: datetime
) -> tuple[Decision, ...]:
    """Return a decision for every image, the oldest first; if in doubt the image is kept.

    `references` must be complete: if some could not be read, do not plan.
    """
    used: dict[str, str] = {}
    uses: dict[str, int] = defaultdict(int)
    for reference in references:
        used.setdefault(reference.id, reference.by)
        uses[reference.id] += 1
    ordered = sorted(images, key=lambda one: (one.created or _NEVER, one.id))
    newest = _newest(ordered, policy.keep)
    excess = sum(one.size for one in images if one.ours) - policy.size if policy.size else None
    decisions, done = [], dict.fromkeys(Action, 0)
    for one in ordered:
        by = used.get(one.id, "")
        if by and uses[one.id] > 1:
            by += f", and {uses[one.id] - 1} more"
        reason = _needed(one, by, newest.get(one.id, ""), policy, now)
        action = Action.KEEP
        if not reason and excess is not None and excess <= 0:
            reason = "all images together are no larger than allowed"
        if not reason:
            action, reason = _retired(one, policy, now)
            # An image that is deprecated counts as deleted, or every run would deprecate more.
            excess = excess - one.size if excess is not None else None
        if action is not Action.KEEP and done[action] >= policy.most:
            reason = f"a later run {action}s it: this one {action}s {policy.most} at most"
            action = Action.KEEP
        done[action] += 1
        decisions.append(Decision(candidate=one, action=action, reason=reason))
    return tuple(decisions)


_NEVER = datetime.min.replace(tzinfo=UTC)


def _newest(ordered: Sequence[Candidate], keep: int) -> dict[str, str]:
    """Return why the newest of each group are kept; revoked and foreign images do not count."""
    counts: dict[tuple[str, str], int] = defaultdict(int)
    reasons: dict[str, str] = {}
    for one in reversed(ordered):
        if not one.ours or not one.finished or one.revoked:
            continue
        for channel in one.channels or _NO_CHANNEL:
            group = (one.image, channel)
            if counts[group] < keep:
                counts[group] += 1
                where = f"of channel {channel}" if channel else "of those in no channel"
                reasons.setdefault(one.id, f"among the newest {keep} {where}")
    return reasons


_NO_CHANNEL = frozenset({""})


def _needed(one: Candidate, by: str, newest: str, policy: RetentionPolicy, now: datetime) -> str:
    """Return why an image is kept, or nothing."""
    if not one.ours:
        return "not ours"
    if by:
        return by
    if not one.finished:
        return "not finished: `ami-builder gc` handles it"
    if one.protected:
        return one.protected
    if one.created is None:
        return one.shared or "its age is unknown"
    if one.created > now:
        return "created in the future: a clock is wrong"
    if now - one.created < policy.young:
        return f"younger than {_days(policy.young)}"
    if one.shared and (one.public or not policy.shared or now - one.created < policy.shared):
        return one.shared + (f", and younger than {_days(policy.shared)}" if _limited(one, policy) else "")
    return newest


def _limited(one: Candidate, policy: RetentionPolicy) -> bool:
    return bool(policy.shared) and not one.public


def _retired(one: Candidate, policy: RetentionPolicy, now: datetime) -> tuple[Action, str]:
    assert one.created is not None, "images of unknown age are kept"
    why = "revoked" if one.revoked else f"{_days(now - one.created)} old, and nothing needs it"
    if one.shared:
        why += f" here; {one.shared}, and older than {_days(policy.shared)}"
    if not policy.grace:
        return Action.DELETE, why
    if one.deprecated is None:
        return Action.DEPRECATE, f"{why}; it can be deleted {_days(policy.grace)} from now"
    if now - one.deprecated < policy.grace:
        return Action.KEEP, f"{why}; deprecated, to be deleted from {one.deprecated + policy.grace:%Y-%m-%d}"
    return Action.DELETE, f"{why}; deprecated since {one.deprecated:%Y-%m-%d}"


def _days(time: timedelta) -> str:
    days = time / timedelta(days=1)
    return f"{days:.0f} days" if days >= 2 else f"{days * 24:.0f} h"
