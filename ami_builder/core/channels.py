"""What stands in a channel and what stood there before: pure, from the record of its moves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


class Move(StrEnum):
    """How an image came to stand in a channel."""

    PROMOTED = "promoted"
    ROLLED_BACK = "rolled back"
    REVOKED = "revoked"
    """The one that stood there was revoked, and this is the one before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelEntry:
    """One move: what stands in a channel from then on."""

    channel: str
    move: Move
    id: str
    """A local image's digest, or an AMI's id; empty when nothing stands there any more."""
    at: datetime
    by: str
    """Who did it, as far as this machine or AWS knows."""
    reason: str = ""


def stack(entries: Iterable[ChannelEntry], revoked: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the ids that a channel goes back through, the one that stands in it last.

    `entries` are of one channel, the oldest first. A promotion puts an image on top; going back takes away
    all above the one that it goes back to. What was revoked is nowhere.
    """
    standing, _ = _walk(entries)
    gone = set(revoked)
    left = [id for id in standing if id not in gone]
    return tuple(id for id, before in zip(left, ["", *left], strict=False) if id != before)


def taken_back(entries: Iterable[ChannelEntry]) -> Mapping[str, ChannelEntry]:
    """Return the ids that were taken out of a channel, and by which move; a later promotion puts one back.

    `entries` are of one channel, the oldest first.
    """
    return _walk(entries)[1]


def _walk(entries: Iterable[ChannelEntry]) -> tuple[list[str], dict[str, ChannelEntry]]:
    standing: list[str] = []
    taken: dict[str, ChannelEntry] = {}
    for entry in entries:
        if entry.id and (entry.move is Move.PROMOTED or entry.id not in standing):
            standing.append(entry.id)
        else:
            while standing and standing[-1] != entry.id:
                taken[standing.pop()] = entry
        taken.pop(entry.id, None)
    return standing, taken
