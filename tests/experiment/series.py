"""A series of runs: those that are missing, several side by side, and the results of all."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from pydantic import ValidationError

from ami_builder.core.errors import AmiBuilderError, Locked
from ami_builder.qemu.accelerator import choose_accelerator
from ami_builder.qemu.disks import image_info
from ami_builder.state import jsonl
from ami_builder.state.workspace import Run, StoredImage, Workspace, dump, load
from ami_builder.verify.executor import side_by_side
from tests.experiment.cases import METHOD, Case, left
from tests.experiment.driver import require_distributed
from tests.experiment.results import Result, Trace, parse, plain
from tests.experiment.run import Setup, make

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ami_builder.config.schema import Image
    from ami_builder.console import Progress

EXPERIMENT = "experiment"
"""The command in the records of runs."""
_RESULTS = "results.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The runs that are wanted."""

    cases: tuple[Case, ...]
    """In their order. Those that exist are skipped."""
    timeout: float | None
    """For the work of one run, in seconds. None: what the work and the memory need."""
    jobs: int
    """VMs side by side."""
    saved: bool = False
    """Let runs go on from VMs that were saved before Dask started, in place of booting."""
    time: float | None
    """Start no run after so many seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesResult:
    """The results after a call."""

    results: tuple[Result, ...]
    """All results of this image, from this call and earlier ones."""
    left: tuple[Case, ...]
    """Wanted, but not run: the time was up, or the run failed."""
    failed: tuple[tuple[Case, AmiBuilderError], ...]


def folder_of(image: str, digest: str, workspace: Workspace) -> Path:
    """Return the folder with the results of an image."""
    return workspace.state / "experiments" / image / digest[:16]


def read_results(folder: Path) -> tuple[Result, ...]:
    """Return the recorded runs. Those of another method can't be compared and are left out."""
    found = []
    for line in jsonl.read(folder / _RESULTS):
        try:
            result = parse(line)
        except ValidationError:
            continue
        if result.method == METHOD:
            found.append(result)
    return tuple(found)


def read_trace(folder: Path, case: Case) -> Trace | None:
    """Return the memory over time of a run; None if it was not kept."""
    return load(Trace, folder / "traces" / f"{case.name}.json")


def run_series(
    image: Image, stored: StoredImage, wanted: Wanted, workspace: Workspace, progress: Progress
) -> SeriesResult:
    """Make the missing runs and return all results. Each result is on disk as soon as its run ends.

    Raises MissingTool and Locked, and the error of the first run if all runs failed.
    """
    folder = folder_of(image.name, stored.artifact.digest, workspace)
    with _locked(folder):
        missing = left(wanted.cases, (result.case for result in read_results(folder)))
        failed: list[tuple[Case, AmiBuilderError]] = []
        if missing:
            require_distributed()
            image_info(stored.path)
            with workspace.run(EXPERIMENT, image.name, stored.artifact.digest) as run:
                failed = _make_all(image, stored, missing, wanted, folder, workspace, run, progress)
        found = read_results(folder)
    if failed and len(failed) == len(missing):
        raise failed[0][1]
    return SeriesResult(
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
        accelerator, reason = choose_accelerator(
            stored.path, cache=workspace.cache / "accelerator.json", directory=run.work
        )
        step.done(reason)
    setup = Setup(
        image=image,
        disk=stored.path,
        accelerator=accelerator,
        saved=folder / "saved" if wanted.saved else None,
        timeout=wanted.timeout,
    )

    def one(number: int, case: Case) -> None:
        if wanted.time is not None and time.monotonic() - began > wanted.time:
            return
        try:
            with progress.step(f"run {number} of {len(missing)}: {case.name}") as step:
                result, trace = make(case, setup, run, step)
                with lock:
                    dump(trace, folder / "traces" / f"{case.name}.json")
                    jsonl.append(folder / _RESULTS, plain(result))
                step.done(summed(result))
        except AmiBuilderError as wrong:
            # A VM that does not boot must not stop the other runs.
            with lock:
                failed.append((case, wrong))

    calls = [partial(one, number, case) for number, case in enumerate(missing, 1)]
    side_by_side(calls, workers=wanted.jobs)
    return failed


def summed(result: Result) -> str:
    """Return a result in one line."""
    return (
        f"{result.done} done, {result.failed} failed, {result.unfinished} unfinished in "
        f"{result.seconds:.0f} s; restarts {result.by_nanny} by the nanny, {result.by_kernel} by the kernel; "
        f"{result.system_oom_kills} system-wide OOM kills; stalled {result.stalled:.1f} s, at most "
        f"{result.longest_stall:.1f} s; ssh failed {result.ssh_failed} of {result.ssh_tries}"
    )
