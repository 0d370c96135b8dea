"""A matrix of images, regions and instance types: every cell is proved, wherever its executor runs it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from ami_builder.aws.jobs import Cell, CellProof, cells, prove_cell
from ami_builder.build.target import Site
from ami_builder.config.schema import Image
from ami_builder.console import Progress, Step
from ami_builder.core.errors import AmiBuilderError
from ami_builder.core.records import CheckResult, Measurement, Outcome, Verdict
from ami_builder.state import runs
from ami_builder.state.workspace import StoredImage, Workspace, write_atomically
from ami_builder.verify import estimate
from ami_builder.verify import executor as cluster
from ami_builder.verify.concurrency import open_executor, threads
from ami_builder.verify.journey import Proof
from ami_builder.verify.verdict import keep_verdict, require_passed, verdict_of

_NOT_PASSED = (Outcome.FAILED, Outcome.INCONCLUSIVE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """An image in one region, the settings that it is proved with, and where its verdict is kept."""

    image: Image
    stored: StoredImage
    site: Site


@dataclass(frozen=True, slots=True, kw_only=True)
class Proved:
    """The verdict on each subject, and all of them as one to be shown."""

    verdicts: tuple[Verdict, ...]
    whole: Verdict


def verify_matrix(
    subjects: Sequence[Subject], dask_scheduler: str | None, workspace: Workspace, progress: Progress
) -> Proved:
    """Prove an image in each of its regions on all configured types; the verdicts are kept with them.

    A region that can't be proved leaves the others theirs; then the first failure is raised, with all named.
    Raises ChecksFailed, Inconclusive, and what a machine raises that doesn't come up.
    """
    workspace.ensure()
    workspace.sweep()
    first = subjects[0].stored
    with workspace.run("verify", first.artifact.image, first.artifact.digest) as run:
        run.update(artifact=first.artifact)
        early = estimate.of_verification(
            runs.run_records(workspace), subjects[0].image, first.artifact.target, emulated=None
        )
        machines = run.directory / "machines"
        groups = [
            cells(one.image, one.stored, run.record.run_id, travelling=dask_scheduler is not None)
            for one in subjects
        ]
        every = [cell for group in groups for cell in group]
        try:
            with progress.step(f"verify {first.name}") as step:
                if early is not None:
                    step.announce(str(early))
                with open_executor(dask_scheduler, len(every)) as executor:
                    proofs = prove_matrix(every, executor, step, machines)
                rest = iter(proofs)
                verdicts = [
                    _judged(one, [next(rest) for _ in group])
                    for one, group in zip(subjects, groups, strict=True)
                ]
                proved(proofs)
        finally:
            run.update(steps=progress.steps)
        known = [verdict for verdict in verdicts if verdict is not None]
        whole = _together(subjects, known)
        run.update(verdict=whole)
        require_passed(whole, machines, _again(subjects))
    return Proved(verdicts=tuple(known), whole=whole)


def prove_matrix(
    cells: Sequence[Cell], executor: Executor, step: Step, evidence: Path
) -> tuple[CellProof, ...]:
    """Prove all cells and return what became of each, in their order; one that fails doesn't end the others.

    What the machines left to be looked at lands in `evidence`. When this raises (Ctrl-C), cells of other
    processes are cancelled, and leaving the executor's context ends those of threads.
    """
    several = len({_place(cell) for cell in cells}) > 1
    with ExitStack() as stack:
        opened = {
            place: stack.enter_context(step.step(" in ".join(place.parts))) if several else step
            for place in dict.fromkeys(map(_place, cells))
        }
        parents = [opened[_place(cell)] for cell in cells]
        if here := isinstance(executor, ThreadPoolExecutor):
            futures = [
                executor.submit(prove_cell, cell, parent) for cell, parent in zip(cells, parents, strict=True)
            ]
            wait(futures)
        else:
            futures = _followed(cells, executor, parents)
        proofs = [_ended(cell, future) for cell, future in zip(cells, futures, strict=True)]
    for proof in proofs:
        _keep(proof, evidence / _place(proof.cell) if several else evidence, here=here)
    return tuple(proofs)


def proved(proofs: Sequence[CellProof]) -> list[Proof]:
    """Return what all machines showed; raises the first failure, which names the others too."""
    failures = [proof.failure for proof in proofs if proof.failure is not None]
    if not failures:
        return [proof.proof for proof in proofs if proof.proof is not None]
    first = failures[0]
    if len(proofs) == 1:
        raise first
    raise type(first)(
        f"{len(failures)} of {len(proofs)} machines could not be proved: {first.message}",
        hint=first.hint,
        log=first.log,
        tail=tuple(line for proof in proofs for line in _lines(proof)),
    )


def _followed(cells: Sequence[Cell], executor: Executor, parents: Sequence[Step]) -> list[Future[CellProof]]:
    """Submit cells to other processes, show a step for each until it has ended, and return them ended."""
    remote: list[Future[CellProof]] = []
    with threads(len(cells)) as watchers:
        try:
            remote += [executor.submit(prove_cell, cell) for cell in cells]
            wait(
                [
                    watchers.submit(_follow, cell, future, parent)
                    for cell, future, parent in zip(cells, remote, parents, strict=True)
                ]
            )
        except BaseException:
            for future in remote:
                future.cancel()
            raise
    return remote


def _follow(cell: Cell, future: Future[CellProof], parent: Step) -> None:
    with parent.step(f"machine of {cell.instance_type}", detail="with the Dask cluster") as step:
        proof = _ended(cell, future)
        step.done(f"on {proof.host}")
        if proof.failure is not None:
            raise proof.failure


def _ended(cell: Cell, future: Future[CellProof]) -> CellProof:
    try:
        return future.result()
    except Exception as error:
        failure = error if isinstance(error, AmiBuilderError) else cluster.lost(error, cell.name)
        if failure is None:
            raise
        return CellProof(
            cell=cell, host="", directory=None, proof=None, failure=failure, steps=(), evidence={}
        )


def _keep(proof: CellProof, folder: Path, *, here: bool) -> None:
    """Write a cell's evidence, and let its failure name what of it lies on this machine."""
    for name, content in proof.evidence.items():
        write_atomically(folder / name, content)
    failure = proof.failure
    if failure is None:
        return
    if not here and proof.host:
        failure.add_note(f"on {proof.host}, in {proof.directory}")
    if failure.log is not None:
        brought = next((name for name in proof.evidence if Path(name).name == failure.log.name), None)
        failure.log = folder / brought if brought is not None else failure.log if here else None


def _lines(proof: CellProof) -> list[str]:
    where = f"{proof.cell.name} (on {proof.host})" if proof.host else proof.cell.name
    if proof.failure is not None:
        return [f"{where}: {proof.failure.message}", *(f"  {line}" for line in proof.failure.tail)]
    results = proof.proof.results if proof.proof is not None else ()
    counts = {one: sum(result.outcome is one for result in results) for one in _NOT_PASSED}
    return [f"{where}: {count} checks {outcome}" for outcome, count in counts.items() if count]


def _again(subjects: Sequence[Subject]) -> str:
    """Return the command that verifies the same AMIs once more."""
    first, *others = [one.stored.artifact for one in subjects]
    regions = [f" --region {one.region}" for one in (first, *others) if others]
    return f"ami-builder verify {first.location}{''.join(regions)}"


def _place(cell: Cell) -> Path:
    return Path(cell.image.name, cell.region)


def _judged(subject: Subject, proofs: Sequence[CellProof]) -> Verdict | None:
    """Keep a subject's verdict; there is none as long as one of its machines is missing."""
    shown = [proof.proof for proof in proofs if proof.proof is not None]
    if len(shown) < len(proofs):
        return None
    verdict = verdict_of(subject.image, subject.stored, shown)
    keep_verdict(subject.stored, verdict, subject.site)
    return verdict


def _together(subjects: Sequence[Subject], verdicts: Sequence[Verdict]) -> Verdict:
    """Return the verdicts of several regions as one, whose machines are called after their regions too."""
    if len(verdicts) == 1:
        return verdicts[0]
    results: list[CheckResult] = []
    measured: list[Measurement] = []
    for subject, verdict in zip(subjects, verdicts, strict=True):
        region = subject.stored.artifact.region
        results += [replace(each, machine=f"{each.machine} in {region}") for each in verdict.results]
        measured += [replace(each, machine=f"{each.machine} in {region}") for each in verdict.measured]
    return replace(verdicts[0], results=tuple(results), measured=tuple(measured))
