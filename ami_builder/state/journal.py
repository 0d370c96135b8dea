"""The journal of a nightly run: each finished step is on disk, so that a killed run can continue."""

import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from ami_builder.core.errors import UsageError
from ami_builder.core.records import TargetKind
from ami_builder.state import jsonl
from ami_builder.state.workspace import Workspace, folders

_LATEST = "latest"
_FILE = "journal.jsonl"


class NightlyStep(StrEnum):
    """The steps of a nightly run, in order."""

    RESOLVED = "resolved"
    BUILT = "built"
    COMPARED = "compared"
    COPIED = "brought"
    """Copied to one region, and shared there."""
    PROMOTED = "promoted"
    """In one region."""
    PRUNED = "pruned"
    REPORTED = "reported"
    ENDED = "ended"


class NightlyJournal:
    """The finished steps of one nightly run. Thread-safe."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._path = directory / _FILE
        self._lock = threading.Lock()
        self._done = {
            (str(line.get("step")), str(line.get("place"))): line for line in jsonl.read(self._path)
        }

    @property
    def id(self) -> str:
        """The id of the nightly run."""
        return self.directory.name

    @property
    def started(self) -> datetime:
        """When the nightly run began."""
        try:
            return datetime.fromisoformat(self._done[NightlyStep.RESOLVED, ""]["at"])
        except (KeyError, ValueError, TypeError) as damaged:
            raise UsageError(
                f"{self._path} is damaged: its first step has no time", hint=f"delete {self.directory}"
            ) from damaged

    @property
    def digest(self) -> str:
        """The digest of its inputs; empty if it was killed before it resolved them."""
        return str((self.find(NightlyStep.RESOLVED) or {}).get("digest", ""))

    @property
    def locations(self) -> tuple[str, ...]:
        """Where its image is, in every region: paths, or AMI ids."""
        locations = (line.get("location") for line in self._done.values())
        return tuple(dict.fromkeys(str(location) for location in locations if location))

    def find(self, step: NightlyStep, place: str = "") -> Mapping[str, Any] | None:
        """Return the record of a finished step, or None."""
        return self._done.get((step, place))

    def note(self, step: NightlyStep, place: str = "", **details: Any) -> None:
        """Record a step as finished."""
        line = {"step": str(step), "place": place, "at": datetime.now(UTC).isoformat(), **details}
        with self._lock:
            jsonl.append(self._path, line)
            self._done[step, place] = line


def open_journal(workspace: Workspace, image: str, target: TargetKind, digest: str) -> NightlyJournal:
    """Return the journal of the last nightly run if it was killed and had the same inputs, else a new one.

    An empty `digest` stands for unknown inputs, which may be the same. The caller holds
    `Workspace.lock_nightly_run`.
    """
    folder = workspace.nightly_dir / f"{image}.{target}"
    latest = folder / _LATEST
    last = NightlyJournal(latest.resolve()) if latest.exists() else None
    if last is None or last.find(NightlyStep.ENDED) is not None:
        last = _new(folder)
    elif digest and last.digest and last.digest != digest:
        last.note(NightlyStep.ENDED, ending="killed, and its inputs have changed since")
        last = _new(folder)
    if last.find(NightlyStep.RESOLVED) is None:
        last.note(NightlyStep.RESOLVED, digest=digest)
    return last


def _new(folder: Path) -> NightlyJournal:
    directory = folder / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
    directory.mkdir(parents=True)
    aside = folder / f".{_LATEST}.{os.getpid()}"
    aside.unlink(missing_ok=True)
    aside.symlink_to(directory.name)
    # This link names the last one, because the clock may have jumped.
    aside.replace(folder / _LATEST)
    return NightlyJournal(directory)


def unfinished(workspace: Workspace) -> Iterator[NightlyJournal]:
    """Yield the nightly runs that are in progress, or were killed and can continue."""
    for folder in folders(workspace.nightly_dir):
        latest = folder / _LATEST
        try:
            latest.lstat()  # unlike `exists`, it raises if the folder can't be read
        except FileNotFoundError:
            continue
        journal = NightlyJournal(latest.resolve())
        if journal.find(NightlyStep.ENDED) is None:
            yield journal
