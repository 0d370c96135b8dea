"""What stands in a channel and what stood there before: pure, from the record of its moves."""

from __future__ import annotations

from collections.abc import Iterable
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
class Entry:
    """One move: what stands in a channel from then on."""

    channel: str
    move: Move
    id: str
    """A local image's digest, or an AMI's id; empty when nothing stands there any more."""
    at: datetime
    by: str
    """Who did it, as far as this machine or AWS knows."""
    reason: str = ""


def stack(entries: Iterable[Entry], revoked: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the ids that a channel goes back through, the one that stands in it last.

    `entries` are of one channel, the oldest first. A promotion puts an image on top; going back takes away
    all above the one that it goes back to. What was revoked is nowhere.
    """
    standing: list[str] = []
    for entry in entries:
        if not entry.id:
            standing = []
        elif entry.move is Move.PROMOTED or entry.id not in standing:
            standing.append(entry.id)
        else:
            while standing[-1] != entry.id:
                standing.pop()
    gone = set(revoked)
    left = [id for id in standing if id not in gone]
    return tuple(id for id, before in zip(left, ["", *left], strict=False) if id != before)
