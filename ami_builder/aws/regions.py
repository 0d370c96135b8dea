"""One move of a channel in every region that an AMI is promoted in, and what came of it in each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from ami_builder.aws.place import CloudPlace, Outcome, at_each
from ami_builder.build import channels
from ami_builder.build.channels import Moved
from ami_builder.console import Progress, Step
from ami_builder.core.channels import ChannelEntry
from ami_builder.core.errors import CloudFailed, UsageError
from ami_builder.state.workspace import StoredImage

T = TypeVar("T")

Moves = list[Outcome[Moved | None]]
"""What came of each region, home first: a move, None where there was nothing to move, or why it failed."""


def narrowed(places: Sequence[CloudPlace], regions: Sequence[str]) -> tuple[CloudPlace, ...]:
    """Return the places that are named, in that order; all when none is. Raises UsageError."""
    known = {place.name: place for place in places}
    for region in regions:
        if region not in known:
            raise UsageError(
                f"--region {region}: no image is promoted there",
                hint=f"aws.region and aws.copy_to name the regions: {', '.join(known)}",
            )
    return tuple(known[region] for region in dict.fromkeys(regions)) or tuple(places)


def promote(
    places: Sequence[CloudPlace], stored: StoredImage, channel: str, reason: str, progress: Progress
) -> Moves:
    """Make an AMI, and its copies elsewhere, the ones that stand in a channel.

    Raises UsageError, and moves nothing, when it can't stand there in the first region.
    """

    def act(place: CloudPlace, step: Step) -> Moved | None:
        if (found := place.find(stored)) is None:
            raise CloudFailed(
                f"{place.name}: there is no copy of {stored.artifact.location}",
                hint=f"`ami-builder copy {stored.artifact.location}` makes one; then promote it again",
            )
        moved = channels.promote(place.channels, found, channel, place.image.lifecycle.channels, reason)
        step.done(f"{found.name} stands in {channel}" + ("" if moved.entries else " already"))
        return moved

    return _first_alone(places, act, progress)


def rollback(places: Sequence[CloudPlace], channel: str, reason: str, progress: Progress) -> Moves:
    """Go back to the image before, wherever the one stands that stands in the first region.

    Regions in which another one stands stay as they are. Raises UsageError, and moves nothing, when the first
    region has none to go back to.
    """
    standing = _standing(places[0], channel)

    def act(place: CloudPlace, step: Step) -> Moved | None:
        if place is not places[0] and _standing(place, channel) != standing:
            step.done("another image stands there, or none: left as it is")
            return None
        moved = channels.rollback(place.channels, channel, place.image.lifecycle.channels, reason)
        step.done(f"{moved.stored.name} stands in {channel} again")
        return moved

    return _first_alone(places, act, progress)


def revoke(places: Sequence[CloudPlace], stored: StoredImage, reason: str, progress: Progress) -> Moves:
    """Take an AMI and its copies out of every channel of every region; a copy that is made later is told.

    A region that can't be reached does not keep the others. Raises UsageError when it is no image of ours.
    """

    def act(place: CloudPlace, step: Step) -> Moved | None:
        found = place.find(stored)
        if found is None:
            step.done("there is no copy")
            return None
        moved = channels.revoke(place.channels, found, reason)
        step.done(f"taken out of {', '.join(e.channel for e in moved.entries) or 'no channel'}")
        return moved

    moves = at_each(places, act, progress)
    for one in moves:
        if isinstance(one.error, UsageError):
            raise one.error
    return moves


def history(
    places: Sequence[CloudPlace], channel: str, progress: Progress
) -> list[Outcome[tuple[str, tuple[ChannelEntry, ...]]]]:
    """Return of each region what stands in a channel, empty for nothing, and all its moves."""

    def act(place: CloudPlace, step: Step) -> tuple[str, tuple[ChannelEntry, ...]]:
        record, known = place.channels, place.image.lifecycle.channels
        return channels.current(record, channel), channels.history(record, channel, known)

    return _first_alone(places, act, progress)


def _standing(place: CloudPlace, channel: str) -> str:
    """Return the digest of what stands in a channel; empty when nothing does."""
    id = channels.current(place.channels, channel)
    stored = place.channels.find(id) if id else None
    return stored.artifact.digest if stored is not None else ""


def _first_alone(
    places: Sequence[CloudPlace], act: Callable[[CloudPlace, Step], T], progress: Progress
) -> list[Outcome[T]]:
    """Act in the first region, whose errors are raised, and then in the others side by side."""
    first, *others = places
    with progress.step(first.name) as step:
        done = Outcome(place=first.name, value=act(first, step))
    return [done, *at_each(others, act, progress)]
