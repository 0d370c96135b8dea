"""The runs and nights that the workspace has records of, and which of them a word means."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ami_builder.core.errors import UsageError, did_you_mean
from ami_builder.core.records import NightlyRun, RunRecord, TargetKind
from ami_builder.state.workspace import StoredImage, Workspace, load

RECORD = "record.json"
NIGHT = "night.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """A run's record and folder."""

    record: RunRecord
    directory: Path

    @property
    def id(self) -> str:
        """The run's own id."""
        return self.record.run_id

    @property
    def when(self) -> datetime:
        """What the last of several is told by."""
        return self.record.started

    @property
    def baked(self) -> StoredImage | None:
        """The image that this run made, as it was recorded then, whatever became of it since."""
        artifact = self.record.artifact
        if artifact is None or artifact.run_id != self.id:
            return None
        return StoredImage(artifact=artifact, verdict=self.record.verdict, directory=self.directory)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedNight:
    """What a night did, and its folder."""

    night: NightlyRun
    directory: Path

    @property
    def id(self) -> str:
        """The night's own id."""
        return self.night.id

    @property
    def when(self) -> datetime:
        """Its end: it is later than the runs that it made."""
        return self.night.ended or self.night.started


def runs(workspace: Workspace) -> tuple[RecordedRun, ...]:
    """Return every run that has a record, the last one last."""
    found = [
        RecordedRun(record=record, directory=path.parent)
        for path in workspace.runs_dir.glob(f"*/{RECORD}")
        if (record := load(RunRecord, path)) is not None
    ]
    return tuple(sorted(found, key=lambda run: (run.when, run.id)))


def read(workspace: Workspace) -> tuple[RunRecord, ...]:
    """Return the record of every run, the last one last."""
    return tuple(run.record for run in runs(workspace))


def nights(workspace: Workspace) -> tuple[RecordedNight, ...]:
    """Return every night that has ended, the last one last."""
    found = [
        RecordedNight(night=night, directory=path.parent)
        for path in workspace.nights_dir.glob(f"*/*/{NIGHT}")
        # `latest` names one of the others.
        if not path.parent.is_symlink() and (night := load(NightlyRun, path)) is not None
    ]
    return tuple(sorted(found, key=lambda one: (one.when, one.id)))


def find(workspace: Workspace, word: str | None) -> RecordedRun | RecordedNight:
    """Return the run or the night whose id is or begins with a word, or whose folder it names.

    Without a word, what ended last. Raises UsageError with the nearest right spelling.
    """
    known: list[RecordedRun | RecordedNight] = [*runs(workspace), *nights(workspace)]
    if word is None:
        if not known:
            raise UsageError("nothing has run yet", hint="`ami-builder build` makes an image, and a record")
        return max(known, key=lambda one: one.when)
    begin = Path(word).resolve().name if Path(word).is_dir() else word
    matching = [one for one in known if begin and one.id.startswith(begin)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        ids = ", ".join(one.id for one in matching[-3:])
        raise UsageError(
            f"{word}: {len(matching)} ids begin like that, {ids} among them", hint="give more of it"
        )
    raise UsageError(
        f"there is no run or night {word}{did_you_mean(word, [one.id for one in known])}",
        hint=f"their ids are the names of the folders in {workspace.runs_dir} and {workspace.nights_dir}",
    )


def builds(
    known: tuple[RecordedRun, ...], image: str, target: TargetKind, until: datetime
) -> tuple[RecordedRun, ...]:
    """Return the runs that made an image of this name for this target up to then."""
    return tuple(
        run
        for run in known
        if (baked := run.baked) is not None
        and (baked.artifact.image, baked.artifact.target) == (image, target)
        and run.when <= until
    )
