"""Which image is current in a channel, and which were before it, from the recorded moves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


class Move(StrEnum):
    """Why an image became current in a channel."""

    PROMOTED = "promoted"
    ROLLED_BACK = "rolled back"
    REVOKED = "revoked"
    """The image that was current was revoked, and this is the one before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelEntry:
    """One move: which image is current in a channel from then on."""

    channel: str
    move: Move
    id: str
    """A local image's digest or an AMI's id; empty when no image is current any more."""
    at: datetime
    by: str
    """Who did it, as far as this host or AWS knows."""
    reason: str = ""


def stack(entries: Iterable[ChannelEntry], revoked: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the ids that rollbacks of a channel go through, the current image last.

    `entries` are of one channel, the oldest first. A promotion puts an image on top; a rollback removes all
    above the image that it goes back to. Revoked images are left out.
    """
    current, _ = _replay(entries)
    left = [id for id in current if id not in set(revoked)]
    return tuple(id for id, before in zip(left, ["", *left], strict=False) if id != before)


def taken_back(entries: Iterable[ChannelEntry]) -> Mapping[str, ChannelEntry]:
    """Return the ids that were removed from a channel and not promoted since, with the move that did it.

    `entries` are of one channel, the oldest first.
    """
    return _replay(entries)[1]


def _replay(entries: Iterable[ChannelEntry]) -> tuple[list[str], dict[str, ChannelEntry]]:
    current: list[str] = []
    removed: dict[str, ChannelEntry] = {}
    for entry in entries:
        if entry.id and (entry.move is Move.PROMOTED or entry.id not in current):
            current.append(entry.id)
        else:
            while current and current[-1] != entry.id:
                removed[current.pop()] = entry
        removed.pop(entry.id, None)
    return current, removed
