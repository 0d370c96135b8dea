"""The rules of channels: which image is the current one of `stable`, say. Only verified images get there."""

import getpass
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from ami_builder.core.channels import ChannelEntry, Move, stack, taken_back
from ami_builder.core.cleanup import Reference
from ami_builder.core.errors import UsageError, did_you_mean
from ami_builder.state.workspace import StoredImage


class ChannelStore(Protocol):
    """The record of one image's channels at one target: a file on this host, or parameters in an account."""

    def locked(self) -> AbstractContextManager[object]:
        """Lock the record, as far as that is possible, while it is read and changed."""

    def id_of(self, stored: StoredImage) -> str:
        """Return the id of an image in the record. Raises UsageError if it is not a finished one of ours."""

    def find(self, image_id: str) -> StoredImage | None:
        """Return the image of an id; None if it does not exist any more."""

    def entries(self, channel: str) -> tuple[ChannelEntry, ...]:
        """Return the moves of a channel, the oldest first."""

    def used(self) -> tuple[str, ...]:
        """Return the channels that have a record."""

    def revoked(self, ids: Sequence[str]) -> Mapping[str, str]:
        """Return which of these images were revoked, each with the reason."""

    def require_movable(self, channel: str) -> None:
        """Raise UsageError if the record can't take moves of this channel."""

    def write(self, entry: ChannelEntry) -> None:
        """Add a move, completely or not at all."""

    def revoke(self, image_id: str, reason: str, entries: Sequence[ChannelEntry]) -> None:
        """Mark an image as revoked, then add the moves that follow from that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelMove:
    """The image of a command, and the moves that were made: none if nothing had to change."""

    stored: StoredImage
    entries: tuple[ChannelEntry, ...]


def promote(
    channels: ChannelStore, stored: StoredImage, channel: str, known: Sequence[str], reason: str = ""
) -> ChannelMove:
    """Make an image the current one of a channel.

    Raises UsageError when it has no passing verdict for exactly its digest, was revoked, or when `channel` is
    not one of the `known` channels.
    """
    _require_known(channel, known)
    image_id = channels.id_of(stored)
    _require_verified(stored)
    with channels.locked():
        if (why := channels.revoked([image_id]).get(image_id)) is not None:
            raise UsageError(
                f"{image_id} was revoked and can't be promoted again: {why}",
                hint="build an image with other inputs",
            )
        # Since it was chosen it may have been pruned or verified again.
        if (found := channels.find(image_id)) is None:
            raise UsageError(
                f"{image_id} does not exist any more, or can't be launched",
                hint="`ami-builder list` shows the images",
            )
        _require_verified(found)
        channels.require_movable(channel)
        if _named(channels, channel) == image_id:
            return ChannelMove(stored=stored, entries=())
        entry = _entry(channel, Move.PROMOTED, image_id, reason)
        channels.write(entry)
    return ChannelMove(stored=stored, entries=(entry,))


def rollback(channels: ChannelStore, channel: str, known: Sequence[str], reason: str = "") -> ChannelMove:
    """Make the previous image of a channel the current one again.

    If the record names an image that does not exist any more, this is the newest of the channel that does.
    Raises UsageError when there is none, when it does not exist any more, or is not verified any more.
    """
    _require_known(channel, [*known, *channels.used()])
    with channels.locked():
        channels.require_movable(channel)
        ids = _stack(channels, channel)
        before = ids if is_lost(channels, channel) else ids[:-1]
        if not before:
            what = "no image is current" if not ids else "there is no image before the current one"
            which = "one" if not ids else "another one"
            hint = f"`ami-builder promote IMAGE {channel}` makes {which} current"
            raise UsageError(f"{what} in channel {channel}", hint=hint)
        stored = channels.find(before[-1])
        if stored is None:
            raise UsageError(
                f"the previous image of channel {channel}, {before[-1]}, does not exist any more,"
                " or can't be launched",
                hint=f"make another one current: `ami-builder promote IMAGE {channel}`",
            )
        _require_verified(stored)
        entry = _entry(channel, Move.ROLLED_BACK, before[-1], reason)
        channels.write(entry)
    return ChannelMove(stored=stored, entries=(entry,))


def revoke(channels: ChannelStore, stored: StoredImage, reason: str) -> ChannelMove:
    """Remove an image from every channel, and never let it back. The previous image becomes current.

    A channel without a previous image has no current image from then on.
    """
    image_id = channels.id_of(stored)
    with channels.locked():
        entries = []
        for channel in channels.used():
            moves = channels.entries(channel)
            revoked = channels.revoked(sorted({e.id for e in moves if e.id} - {image_id}))
            if stack(moves, revoked)[-1:] == (image_id,):
                left = [one for one in _stack(channels, channel) if one != image_id]
                entries.append(_entry(channel, Move.REVOKED, left[-1] if left else "", reason))
        channels.revoke(image_id, reason, entries)
    return ChannelMove(stored=stored, entries=tuple(entries))


def history(channels: ChannelStore, channel: str, known: Sequence[str]) -> tuple[ChannelEntry, ...]:
    """Return the moves of a channel, the oldest first. Raises UsageError for an unknown channel."""
    _require_known(channel, [*known, *channels.used()])
    return channels.entries(channel)


def all_current(channels: ChannelStore) -> dict[str, tuple[str, ...]]:
    """Return the ids that are current now, each with its channels."""
    found: dict[str, tuple[str, ...]] = {}
    for channel in channels.used():
        if image_id := current(channels, channel):
            found[image_id] = (*found.get(image_id, ()), channel)
    return found


def current(channels: ChannelStore, channel: str) -> str:
    """Return the id that is current in a channel; empty if none is."""
    return next(iter(_stack(channels, channel)[-1:]), "")


def is_lost(channels: ChannelStore, channel: str) -> bool:
    """Return whether the record of a channel names an image that is deleted or revoked."""
    return current(channels, channel) != _named(channels, channel)


def references(channels: ChannelStore) -> Iterator[Reference]:
    """Yield the images that channels need: the current one of each, and the one before it."""
    for channel in channels.used():
        ids = _stack(channels, channel)
        for image_id in ids[-1:]:
            yield Reference(id=image_id, by=f"in channel {channel}")
        for image_id in ids[-2:-1]:
            yield Reference(id=image_id, by=f"channel {channel} would roll back to it")


def taken_out(channels: ChannelStore, channel: str, image_id: str) -> str:
    """Return why a person would not want an image back in a channel; empty if nobody removed it."""
    if reason := channels.revoked([image_id]).get(image_id):
        return f"it was revoked: {reason}"
    if (entry := taken_back(channels.entries(channel)).get(image_id)) is None:
        return ""
    why = f": {entry.reason}" if entry.reason else ""
    return f"channel {channel} was {entry.move} from it on {entry.at:%Y-%m-%d} by {entry.by}{why}"


def _named(channels: ChannelStore, channel: str) -> str:
    """Return the id that the record names now, even if that image does not exist any more."""
    return next((entry.id for entry in channels.entries(channel)[-1:]), "")


def _stack(channels: ChannelStore, channel: str) -> tuple[str, ...]:
    entries = channels.entries(channel)
    return stack(entries, channels.revoked(sorted({entry.id for entry in entries if entry.id})))


def _entry(channel: str, move: Move, image_id: str, reason: str) -> ChannelEntry:
    at = datetime.now(UTC).replace(microsecond=0)
    return ChannelEntry(channel=channel, move=move, id=image_id, at=at, by=_who(), reason=reason)


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in containers
        user = str(os.getuid())
    return f"{user}@{platform.node()}"


def _require_known(channel: str, known: Sequence[str]) -> None:
    if channel not in known:
        raise UsageError(
            f"there is no channel {channel}{did_you_mean(channel, known)}",
            hint=f"lifecycle.channels in ami-builder.toml names them: {', '.join(dict.fromkeys(known))}",
        )


def _require_verified(stored: StoredImage) -> None:
    artifact, verdict = stored.artifact, stored.verdict
    again = f"run `ami-builder verify {artifact.location}` first"
    if verdict is None or verdict.digest != artifact.digest:
        raise UsageError(f"{artifact.location} has not been verified, so it can't be promoted", hint=again)
    if verdict.inconclusive:
        raise UsageError(
            f"{artifact.location}: its verification was inconclusive, so it can't be promoted", hint=again
        )
    if not verdict.passed:
        raise UsageError(
            f"{artifact.location} failed its checks, so it can't be promoted",
            hint=f"`ami-builder verify {artifact.location}` runs them again and prints those that fail",
        )
