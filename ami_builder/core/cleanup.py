"""Which finished images may go: a pure plan in which every image, kept or deleted, has its reason."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum


class Action(StrEnum):
    """What is to happen to an image."""

    KEEP = "keep"
    DEPRECATE = "deprecate"
    DELETE = "delete"


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionPolicy:
    """What an image must have behind it before it may go."""

    keep: int
    """How many of the newest stay: of those that stood in each channel, and that stood in none."""
    young: timedelta
    """Whatever is younger stays."""
    grace: timedelta
    """How long an image is deprecated before it is deleted; zero: it is deleted at once."""
    most: int
    """How many images one run deletes, and how many it deprecates."""
    size: int = 0
    """Nothing goes while all images together are no larger, in bytes; 0: that does not matter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One image that there is, and what it tells of itself."""

    id: str
    image: str
    """The name that it was built under; those of one name are counted together."""
    created: datetime | None
    """None where that is not known."""
    ours: bool = True
    """It belongs to this account, and carries our tag."""
    finished: bool = True
    region: str = ""
    """Where it is; empty for this machine."""
    size: int = 0
    channels: frozenset[str] = frozenset()
    """Where it stands or has stood."""
    revoked: bool = False
    shared: str = ""
    """Whom it is shared with, in words; empty for nobody."""
    protected: str = ""
    """What protects it, in words; empty for nothing."""
    deprecated: datetime | None = None
    """Since when it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Something that needs an image: `in channel stable`, `used by instance i-… (stopped)`."""

    id: str
    """The image's."""
    by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One image, and what is to happen to it."""

    candidate: Candidate
    action: Action
    reason: str


def plan(
    images: Sequence[Candidate], references: Iterable[Reference], policy: RetentionPolicy, now: datetime
) -> tuple[Decision, ...]:
    """Decide about every image, the oldest first; in doubt it stays.

    `references` must be all that there are: when some could not be read, there must be no plan.
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
            # What is on its way out counts as gone, or every run would retire more.
            excess = excess - one.size if excess is not None else None
        if action is not Action.KEEP and done[action] >= policy.most:
            reason = f"a later run {action}s it: this one {action}s {policy.most} at most"
            action = Action.KEEP
        done[action] += 1
        decisions.append(Decision(candidate=one, action=action, reason=reason))
    return tuple(decisions)


_NEVER = datetime.min.replace(tzinfo=UTC)


def _newest(ordered: Sequence[Candidate], keep: int) -> dict[str, str]:
    """Return why the newest of each group stay; what was revoked, or is no image of ours, takes no place."""
    counts: dict[tuple[str, str], int] = defaultdict(int)
    reasons: dict[str, str] = {}
    for one in reversed(ordered):
        if not one.ours or not one.finished or one.revoked:
            continue
        for channel in one.channels or _NO_CHANNEL:
            group = (one.image, channel)
            if counts[group] < keep:
                counts[group] += 1
                where = f"of channel {channel}" if channel else "that stood in no channel"
                reasons.setdefault(one.id, f"among the newest {keep} {where}")
    return reasons


_NO_CHANNEL = frozenset({""})


def _needed(one: Candidate, by: str, newest: str, policy: RetentionPolicy, now: datetime) -> str:
    """Return why an image stays, or nothing."""
    if not one.ours:
        return "not ours"
    if by:
        return by
    if not one.finished:
        return "not finished: `ami-builder gc` decides about it"
    if one.protected or one.shared:
        return one.protected or one.shared
    if one.created is None:
        return "its age is unknown"
    if one.created > now:
        return "made in the future: a clock is wrong"
    if now - one.created < policy.young:
        return f"younger than {_days(policy.young)}"
    return newest


def _retired(one: Candidate, policy: RetentionPolicy, now: datetime) -> tuple[Action, str]:
    assert one.created is not None, "what has no age is kept"
    why = "revoked" if one.revoked else f"{_days(now - one.created)} old, and nothing needs it"
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
