"""The journal of a night: what is done stands on disk, so that a killed night goes on where it was."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from ami_builder.core.records import TargetKind
from ami_builder.state import jsonl
from ami_builder.state.workspace import Workspace

_LATEST = "latest"
_FILE = "journal.jsonl"


class Step(StrEnum):
    """What a night does, in its order."""

    RESOLVED = "resolved"
    BUILT = "built"
    COMPARED = "compared"
    BROUGHT = "brought"
    """To one place, and shared there."""
    PROMOTED = "promoted"
    """In one place."""
    PRUNED = "pruned"
    REPORTED = "reported"
    ENDED = "ended"


class Journal:
    """What one night has done so far. Threads may share it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._path = directory / _FILE
        self._lock = threading.Lock()
        self._done = {
            (str(line.get("step")), str(line.get("place"))): line for line in jsonl.read(self._path)
        }

    @property
    def id(self) -> str:
        """The night's own id."""
        return self.directory.name

    @property
    def started(self) -> datetime:
        """When it began."""
        return datetime.fromisoformat(self._done[Step.RESOLVED, ""]["at"])

    @property
    def digest(self) -> str:
        """What it is about; empty when it was killed before it knew."""
        return str((self.find(Step.RESOLVED) or {}).get("digest", ""))

    @property
    def locations(self) -> tuple[str, ...]:
        """Where its image is, in every place that it was brought to: paths, or AMI ids."""
        told = (line.get("location") for line in self._done.values())
        return tuple(dict.fromkeys(str(location) for location in told if location))

    def find(self, step: Step, place: str = "") -> Mapping[str, Any] | None:
        """Return what was noted of a step that is done; None when it is not."""
        return self._done.get((step, place))

    def note(self, step: Step, place: str = "", **told: Any) -> None:
        """Note a step as done."""
        line = {"step": str(step), "place": place, "at": datetime.now(UTC).isoformat(), **told}
        with self._lock:
            jsonl.append(self._path, line)
            self._done[step, place] = line


def open_night(workspace: Workspace, image: str, target: TargetKind, digest: str) -> Journal:
    """Return the journal of the last night if it was cut off and was about the same, else that of a new one.

    `digest` empty: what tonight is about is not known, so it may be the same. Hold `Workspace.lock_night`
    meanwhile.
    """
    folder = workspace.nights_dir / f"{image}.{target}"
    latest = folder / _LATEST
    last = Journal(latest.resolve()) if latest.exists() else None
    if last is None or last.find(Step.ENDED) is not None:
        last = _new(folder)
    elif digest and last.digest and last.digest != digest:
        last.note(Step.ENDED, ending="cut off, and its inputs have changed since")
        last = _new(folder)
    if last.find(Step.RESOLVED) is None:
        last.note(Step.RESOLVED, digest=digest)
    return last


def _new(folder: Path) -> Journal:
    night = folder / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
    night.mkdir(parents=True)
    aside = folder / f".{_LATEST}.{os.getpid()}"
    aside.unlink(missing_ok=True)
    aside.symlink_to(night.name)
    # Not by the clock, which may have jumped: the last one is the one that this names.
    aside.replace(folder / _LATEST)
    return Journal(night)


def unfinished(workspace: Workspace) -> Iterator[Journal]:
    """Yield the nights that are going, or were cut off and will be gone on with."""
    for latest in workspace.nights_dir.glob(f"*/{_LATEST}"):
        journal = Journal(latest.resolve())
        if journal.find(Step.ENDED) is None:
            yield journal
