"""The recorded runs and nightly runs of the workspace, and how a word on the command line names one."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ami_builder.core.diff import Difference, Quantity, Side, compare, read_packages
from ami_builder.core.errors import UsageError, did_you_mean
from ami_builder.core.records import FIRST_BOOT, NightlyRun, RunRecord, TargetKind
from ami_builder.state.workspace import StoredImage, Workspace, folders, load

RECORD = "record.json"
NIGHTLY_RECORD = "night.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """A run's record and folder."""

    record: RunRecord
    directory: Path

    @property
    def id(self) -> str:
        """The run's id."""
        return self.record.run_id

    @property
    def when(self) -> datetime:
        """The time by which runs are sorted."""
        return self.record.started

    @property
    def is_part(self) -> bool:
        """Whether it is one machine of another run, with whose id its own begins (`Workspace.run`)."""
        return "." in self.id

    @property
    def baked(self) -> StoredImage | None:
        """The image that this run made, as recorded then; it may have changed or be deleted since."""
        artifact = self.record.artifact
        if artifact is None or artifact.run_id != self.id:
            return None
        return StoredImage(artifact=artifact, verdict=self.record.verdict, directory=self.directory)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedNightlyRun:
    """A nightly run's record and folder."""

    record: NightlyRun
    directory: Path

    @property
    def id(self) -> str:
        """The nightly run's id."""
        return self.record.id

    @property
    def when(self) -> datetime:
        """Its end, which is later than the runs that it started."""
        return self.record.ended or self.record.started


def runs(workspace: Workspace) -> tuple[RecordedRun, ...]:
    """Return every run that has a record, oldest first."""
    found = [
        RecordedRun(record=record, directory=folder)
        for folder in folders(workspace.runs_dir)
        if (record := load(RunRecord, folder / RECORD)) is not None
    ]
    return tuple(sorted(found, key=lambda run: (run.when, run.id)))


def run_records(workspace: Workspace) -> tuple[RunRecord, ...]:
    """Return the record of every run, oldest first."""
    return tuple(run.record for run in runs(workspace))


def nightly_runs(workspace: Workspace) -> tuple[RecordedNightlyRun, ...]:
    """Return every nightly run that has ended, oldest first."""
    found = [
        RecordedNightlyRun(record=record, directory=folder)
        for name in folders(workspace.nightly_dir)
        for folder in folders(name)
        # `latest` names one of the others.
        if not folder.is_symlink() and (record := load(NightlyRun, folder / NIGHTLY_RECORD)) is not None
    ]
    return tuple(sorted(found, key=lambda one: (one.when, one.id)))


def find(workspace: Workspace, word: str | None) -> RecordedRun | RecordedNightlyRun:
    """Return the run or nightly run whose id begins with a word, or whose folder it names.

    Without a word, return the last one. A part of a run is found by more than the run's own id. Raises
    UsageError with the most similar id.
    """
    recorded = runs(workspace)
    parts = [run for run in recorded if run.is_part]
    whole: list[RecordedRun | RecordedNightlyRun] = [
        *(run for run in recorded if not run.is_part),
        *nightly_runs(workspace),
    ]
    known = [*whole, *parts]
    if word is None:
        if not known:
            raise UsageError("no run is recorded yet", hint="`ami-builder build` builds an image")
        return max(whole or known, key=lambda one: one.when)
    begin = Path(word).resolve().name if Path(word).is_dir() else word
    # The id of a run is the beginning of those of its parts too.
    matching = [one for one in whole if begin and one.id.startswith(begin)]
    matching = matching or [one for one in parts if begin and one.id.startswith(begin)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        ids = ", ".join(one.id for one in matching[-3:])
        raise UsageError(
            f"{word} is the beginning of {len(matching)} ids, among them {ids}",
            hint="give more of the id",
        )
    for folder in (workspace.runs_dir / begin, *(each / begin for each in folders(workspace.nightly_dir))):
        if begin and folder.is_dir():
            raise UsageError(f"{folder} has no record that can be read", hint=f"look into {folder / 'logs'}")
    raise UsageError(
        f"no run or nightly run has the id {word}{did_you_mean(word, [one.id for one in known])}",
        hint=f"ids are the names of folders in {workspace.runs_dir} and {workspace.nightly_dir}/IMAGE.TARGET",
    )


def builds(
    known: tuple[RecordedRun, ...], image: str, target: TargetKind, until: datetime
) -> tuple[RecordedRun, ...]:
    """Return the runs up to a time that built this image for this target."""
    return tuple(
        run
        for run in known
        if (baked := run.baked) is not None
        and (baked.artifact.image, baked.artifact.target) == (image, target)
        and run.when <= until
    )


def compare_images(before: StoredImage, after: StoredImage, workspace: Workspace) -> Difference:
    """Return how one finished image differs from another."""
    return compare(_side(before, workspace), _side(after, workspace))


def _side(stored: StoredImage, workspace: Workspace) -> Side:
    packages = None
    if stored.directory is not None and (stored.directory / "packages.txt").is_file():
        text = (stored.directory / "packages.txt").read_text(encoding="utf-8", errors="replace")
        packages = read_packages(text.splitlines())
    measured = stored.verdict.measured if stored.verdict is not None else ()
    first = [one for one in measured if one.phase == FIRST_BOOT]
    run = load(RunRecord, workspace.runs_dir / stored.artifact.run_id / "record.json")
    # The image's name is in each step of its run; without it those of differing names compare too.
    mine = f"build {stored.artifact.image}"
    steps = run.own_steps if run is not None else ()
    return Side(
        packages=packages,
        measured={
            Quantity.SIZE: {"": stored.artifact.size},
            Quantity.AVAILABLE: {one.machine: one.available for one in first},
            Quantity.BOOT: {one.machine: one.boot_ratio for one in first if one.boot_ratio is not None},
            Quantity.SSH: {one.machine: one.ssh_seconds for one in first if one.ssh_seconds is not None},
            Quantity.DASK: {one.machine: one.dask_seconds for one in first if one.dask_seconds is not None},
            Quantity.TIME: {
                "build" + one.name.removeprefix(mine): one.seconds
                for one in steps
                if one.name.startswith(mine)
            },
        },
    )
