"""The runs that are still to be made, side by side, and what all of them say."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from ami_builder import qemu
from ami_builder.config.schema import Image
from ami_builder.console import Progress
from ami_builder.core.errors import AmiBuilderError, Locked
from ami_builder.state import jsonl
from ami_builder.state.workspace import Run, StoredImage, Workspace, dump, load
from ami_builder.verify.concurrency import side_by_side
from tests.experiment.cases import METHOD, Case, left
from tests.experiment.driver import require_distributed
from tests.experiment.results import Result, Trace
from tests.experiment.run import Place, make

EXPERIMENT = "experiment"
"""The command in the records of runs."""
_RESULTS = "results.jsonl"
_RESULT = TypeAdapter(Result)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be run."""

    cases: tuple[Case, ...]
    """In their order; those that were made are skipped."""
    timeout: float
    """For the work of one run, in seconds."""
    jobs: int
    """Machines side by side."""
    time: float | None
    """No run is started after so many seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What there is after a call."""

    results: tuple[Result, ...]
    """All that this image has shown, by this call and earlier ones."""
    left: tuple[Case, ...]
    """Wanted, and not made: the time was up, or it failed."""
    failed: tuple[tuple[Case, AmiBuilderError], ...]


def folder_of(image: str, digest: str, workspace: Workspace) -> Path:
    """Return where the results of an image are kept."""
    return workspace.state / "experiments" / image / digest[:16]


def read_results(folder: Path) -> tuple[Result, ...]:
    """Return the runs that were kept; those of another method don't compare, and are passed over."""
    found = []
    for line in jsonl.read(folder / _RESULTS):
        try:
            result = _RESULT.validate_python(line)
        except ValidationError:
            continue
        if result.method == METHOD:
            found.append(result)
    return tuple(found)


def read_trace(folder: Path, case: Case) -> Trace | None:
    """Return the memory over time of a run."""
    return load(Trace, folder / "traces" / f"{case.name}.json")


def experiment(
    image: Image, stored: StoredImage, wanted: Wanted, workspace: Workspace, progress: Progress
) -> Outcome:
    """Make the runs that are missing and return all results; each is on disk as soon as it is made.

    Raises MissingTool, Locked, BuildFailed when no run could be made.
    """
    folder = folder_of(image.name, stored.artifact.digest, workspace)
    with _locked(folder):
        missing = left(wanted.cases, (result.case for result in read_results(folder)))
        failed: list[tuple[Case, AmiBuilderError]] = []
        if missing:
            require_distributed()
            qemu.image_info(stored.path)
            with workspace.run(EXPERIMENT, image.name, stored.artifact.digest) as run:
                failed = _make_all(image, stored, missing, wanted, folder, workspace, run, progress)
        found = read_results(folder)
    if failed and len(failed) == len(missing):
        raise failed[0][1]
    return Outcome(
        results=found, left=left(wanted.cases, (result.case for result in found)), failed=tuple(failed)
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as busy:
        raise Locked(f"another process runs the experiment in {folder}", hint="wait until it ends") from busy


def _make_all(
    image: Image, stored: StoredImage, missing: Sequence[Case], wanted: Wanted, folder: Path,
    workspace: Workspace, run: Run, progress: Progress,
) -> list[tuple[Case, AmiBuilderError]]:  # fmt: skip
    began, lock = time.monotonic(), threading.Lock()
    failed: list[tuple[Case, AmiBuilderError]] = []
    with progress.step("choose the accelerator") as step:
        accelerator, reason = qemu.choose_accelerator(
            stored.path, cache=workspace.cache / "accelerator.json", directory=run.work
        )
        step.done(reason)
    place = Place(image=image, disk=stored.path, accelerator=accelerator, timeout=wanted.timeout)

    def one(number: int, case: Case) -> None:
        if wanted.time is not None and time.monotonic() - began > wanted.time:
            return
        try:
            with progress.step(f"run {number} of {len(missing)}: {case.name}") as step:
                result, trace = make(case, place, run, step)
                with lock:
                    dump(trace, folder / "traces" / f"{case.name}.json")
                    jsonl.append(folder / _RESULTS, _RESULT.dump_python(result, mode="json"))
                step.done(summed(result))
        except AmiBuilderError as wrong:
            # One machine that does not come up must not cost what the others would show.
            with lock:
                failed.append((case, wrong))

    calls = [partial(one, number, case) for number, case in enumerate(missing, 1)]
    side_by_side(calls, workers=wanted.jobs)
    return failed


def summed(result: Result) -> str:
    """Return a run in one line."""
    return (
        f"{result.done} done, {result.failed} failed, {result.unfinished} unfinished in "
        f"{result.seconds:.0f} s; restarts {result.by_nanny} by the nanny, {result.by_kernel} by the kernel; "
        f"{result.global_kills} global kills; frozen {result.frozen:.1f} s, at most "
        f"{result.frozen_longest:.1f} s; ssh failed {result.ssh_failed} of {result.ssh_tries}"
    )
