"""Channels: which image is the current one of `stable`, say; moved only to images that were proved."""

from __future__ import annotations

import getpass
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from ami_builder.core.channels import ChannelEntry, Move, stack, taken_back
from ami_builder.core.errors import UsageError, did_you_mean
from ami_builder.state.workspace import StoredImage


class Channels(Protocol):
    """The record of an image's channels: a journal on this machine, or parameters in an account."""

    def locked(self) -> AbstractContextManager[object]:
        """Own the record as far as that is possible while it is read and changed."""

    def id_of(self, stored: StoredImage) -> str:
        """Return what the record calls an image."""

    def find(self, id: str) -> StoredImage | None:
        """Return the image of an id, if it is still there."""

    def entries(self, channel: str) -> tuple[ChannelEntry, ...]:
        """Return the moves of a channel, the oldest first."""

    def used(self) -> tuple[str, ...]:
        """Return the channels that have a record."""

    def revoked(self, ids: Sequence[str]) -> Mapping[str, str]:
        """Return which of these images were revoked, and why."""

    def write(self, entry: ChannelEntry) -> None:
        """Add a move, wholly or not at all."""

    def revoke(self, id: str, reason: str, entries: Sequence[ChannelEntry]) -> None:
        """Mark an image as revoked first of all, then add the moves that this makes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """What came of a command: the moves that were made, none when everything stood as asked already."""

    stored: StoredImage
    entries: tuple[ChannelEntry, ...]


def promote(
    channels: Channels, stored: StoredImage, channel: str, known: Sequence[str], reason: str = ""
) -> Moved:
    """Make an image the one that stands in a channel.

    Raises UsageError when it has no passing verdict for exactly its digest, was revoked, or when `channel` is
    not one of those that are `known`.
    """
    _require_known(channel, known)
    _require_proof(stored)
    id = channels.id_of(stored)
    with channels.locked():
        _require_unrevoked(channels, id)
        # What was chosen before may have been pruned or judged again meanwhile.
        if (found := channels.find(id)) is None:
            raise UsageError(f"{id} is not there any more", hint="`ami-builder list` shows what is")
        _require_proof(found)
        if _stack(channels, channel)[-1:] == (id,):
            return Moved(stored=stored, entries=())
        entry = _entry(channel, Move.PROMOTED, id, reason)
        channels.write(entry)
    return Moved(stored=stored, entries=(entry,))


def rollback(channels: Channels, channel: str, known: Sequence[str], reason: str = "") -> Moved:
    """Make the image that stood in a channel before the one that stands there again.

    Raises UsageError when there was none, or when it is not there or not proved any more.
    """
    _require_known(channel, [*known, *channels.used()])
    with channels.locked():
        standing = _stack(channels, channel)
        if len(standing) < 2:
            what = "nothing stands" if not standing else "nothing stood before the image that stands"
            raise UsageError(f"{what} in channel {channel}", hint="`ami-builder promote` puts an image there")
        stored = channels.find(standing[-2])
        if stored is None:
            raise UsageError(
                f"the image that stood in channel {channel} before, {standing[-2]}, is not there any more",
                hint=f"`ami-builder promote IMAGE {channel}` puts another one there",
            )
        _require_proof(stored)
        entry = _entry(channel, Move.ROLLED_BACK, standing[-2], reason)
        channels.write(entry)
    return Moved(stored=stored, entries=(entry,))


def revoke(channels: Channels, stored: StoredImage, reason: str) -> Moved:
    """Take an image out of every channel, each of which goes back to the one before; it never comes back.

    Where there was none before, nothing stands from then on.
    """
    id = channels.id_of(stored)
    with channels.locked():
        entries = []
        for channel in channels.used():
            moves = channels.entries(channel)
            if stack(moves, channels.revoked(sorted({e.id for e in moves if e.id} - {id})))[-1:] == (id,):
                left = [one for one in _stack(channels, channel) if one != id]
                entries.append(_entry(channel, Move.REVOKED, left[-1] if left else "", reason))
        channels.revoke(id, reason, entries)
    return Moved(stored=stored, entries=tuple(entries))


def history(channels: Channels, channel: str, known: Sequence[str]) -> tuple[ChannelEntry, ...]:
    """Return who stood in a channel when, and why, the oldest first; raises UsageError."""
    _require_known(channel, [*known, *channels.used()])
    return channels.entries(channel)


def standing(channels: Channels) -> dict[str, tuple[str, ...]]:
    """Return the ids that stand in channels now, and in which."""
    found: dict[str, tuple[str, ...]] = {}
    for channel in channels.used():
        for id in _stack(channels, channel)[-1:]:
            found[id] = (*found.get(id, ()), channel)
    return found


def current(channels: Channels, channel: str) -> str:
    """Return the id that stands in a channel; empty when nothing does."""
    return next(iter(_stack(channels, channel)[-1:]), "")


def taken_out(channels: Channels, channel: str, id: str) -> str:
    """Return why a person would not want an image back in a channel; empty when nobody took it out."""
    if reason := channels.revoked([id]).get(id):
        return f"it was revoked: {reason}"
    if (entry := taken_back(channels.entries(channel)).get(id)) is None:
        return ""
    why = f": {entry.reason}" if entry.reason else ""
    return f"channel {channel} was {entry.move} from it on {entry.at:%Y-%m-%d} by {entry.by}{why}"


def choose(images: Sequence[StoredImage], word: str, names: Sequence[str]) -> StoredImage:
    """Return the image that a word means: the newest of a name, or the one whose digest begins like that.

    Also an image's path or AMI id. Raises UsageError with the nearest right spelling.
    """
    tests: tuple[Callable[[StoredImage], bool], ...] = (
        lambda one: one.artifact.image == word,
        lambda one: one.artifact.location in (word, os.path.abspath(word)),  # noqa: PTH100 - of text, not a file
        lambda one: len(word) >= _LEAST_DIGITS and one.artifact.digest.startswith(word.lower()),
    )
    for test in tests:
        found = [one for one in images if test(one)]
        if found and len({one.artifact.digest for one in found}) > 1 and test is tests[-1]:
            raise UsageError(f"{word}: several digests begin like that", hint="give more of it")
        if found:
            return found[-1]
    digests = [one.artifact.digest[: max(len(word), _LEAST_DIGITS)] for one in images]
    if word in names:
        raise UsageError(
            f"image {word!r} has not been built yet", hint=f"run `ami-builder build {word}` first"
        )
    raise UsageError(
        f"there is no image {word}{did_you_mean(word, [*names, *digests])}",
        hint="name an image, or the first digits of a digest, as `ami-builder list` shows them",
    )


_LEAST_DIGITS = 4


def _stack(channels: Channels, channel: str) -> tuple[str, ...]:
    entries = channels.entries(channel)
    return stack(entries, channels.revoked(sorted({entry.id for entry in entries if entry.id})))


def _entry(channel: str, move: Move, id: str, reason: str) -> ChannelEntry:
    at = datetime.now(UTC).replace(microsecond=0)
    return ChannelEntry(channel=channel, move=move, id=id, at=at, by=_who(), reason=reason)


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


def _require_proof(stored: StoredImage) -> None:
    artifact, verdict = stored.artifact, stored.verdict
    again = f"run `ami-builder verify {artifact.location}` first"
    if verdict is None or verdict.digest != artifact.digest:
        raise UsageError(f"{artifact.location} has not been verified: no channel can have it", hint=again)
    if verdict.inconclusive:
        raise UsageError(
            f"{artifact.location}: its verification was inconclusive, so no channel can have it", hint=again
        )
    if not verdict.passed:
        raise UsageError(f"{artifact.location} failed its checks: no channel can have it", hint=again)


def _require_unrevoked(channels: Channels, id: str) -> None:
    for reason in channels.revoked([id]).values():
        raise UsageError(
            f"{id} was revoked, and never comes back: {reason}", hint="build an image with other inputs"
        )
