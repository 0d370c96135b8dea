"""The machines of one AMI: a job for each instance type, run by threads or on a Dask cluster."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from ami_builder.aws import network, tags
from ami_builder.aws.machine import Ec2Machine
from ami_builder.aws.session import Account
from ami_builder.config.schema import Image
from ami_builder.console import Mode, Step, open_progress
from ami_builder.core.errors import AmiBuilderError, Interrupted
from ami_builder.core.records import Artifact, Outcome, RunStatus, StepRecord, outcome_of
from ami_builder.state.ledger import FILE as LEDGER
from ami_builder.state.ledger import Ledger
from ami_builder.state.workspace import Run, StoredImage, Workspace, write_atomically
from ami_builder.system import processes
from ami_builder.verify import executor as cluster
from ami_builder.verify.executor import threads
from ami_builder.verify.journey import verify_machine
from ami_builder.verify.machine import MachineResult

_EVIDENCE_BYTES = 1 << 20
_NOT_PASSED = (Outcome.FAILED, Outcome.INCONCLUSIVE)
_FOLLOW_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """An AMI to verify on one instance type: everything that another host needs, except its credentials."""

    image: Image
    artifact: Artifact
    instance_type: str
    parent: str
    """The id of the run that it is part of."""
    checks: Mapping[str, bytes]
    """The user's own check files, by path; empty if they are read where they are."""

    @property
    def name(self) -> str:
        """The instance type and the region."""
        return f"{self.instance_type} in {self.artifact.region}"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """The result of a job, and where it ran."""

    job: Job
    host: str
    """Empty if nobody knows any more."""
    directory: Path | None
    """The run directory on that host; None if there is none."""
    found: MachineResult | None
    """None if the machine did not come up, or was lost."""
    failure: AmiBuilderError | None
    """Why nothing was found."""
    steps: tuple[StepRecord, ...]
    evidence: Mapping[str, bytes]
    """Consoles, journals, JUnit XML and so on, by path; of each the last MiB."""


def jobs_of(image: Image, stored: StoredImage, parent: str, *, with_files: bool) -> tuple[Job, ...]:
    """Return a job for each configured instance type; for other hosts `with_files`, the user's own checks."""
    files = _own_checks(image) if with_files else {}
    return tuple(
        Job(image=image, artifact=stored.artifact, instance_type=kind, parent=parent, checks=files)
        for kind in image.verify.instance_types
    )


def run_jobs(
    jobs: Sequence[Job], executor: Executor, step: Step, evidence: Path, workspace: Workspace | None = None
) -> tuple[JobResult, ...]:
    """Run all jobs and return their results in order. A job that fails does not end the others.

    Threads use `workspace`; other hosts, and all without it, use the one of their environment.

    `evidence` gets what the machines left. When this raises (Ctrl-C), jobs of other processes are cancelled,
    and leaving the executor's context ends those of threads.
    """
    if here := isinstance(executor, ThreadPoolExecutor):
        futures = [executor.submit(run_job, job, step, workspace) for job in jobs]
        wait(futures)
    else:
        futures = _followed(jobs, executor, step)
    results = [_ended(job, future) for job, future in zip(jobs, futures, strict=True)]
    for result in results:
        _keep(result, evidence, here=here)
    return tuple(results)


def require_results(results: Sequence[JobResult]) -> list[MachineResult]:
    """Return what was found on all machines. Raises the first failure, with the messages of all."""
    failures = [result.failure for result in results if result.failure is not None]
    if not failures:
        return [result.found for result in results if result.found is not None]
    first = failures[0]
    if len(results) == 1:
        raise first
    raise type(first)(
        f"{len(failures)} of {len(results)} machines could not be verified: {first.message}",
        hint=first.hint,
        log=first.log,
        tail=tuple(line for result in results for line in _lines(result)),
    )


def run_job(job: Job, step: Step | None = None, workspace: Workspace | None = None) -> JobResult:
    """Run a job with this host's credentials and workspace; without `step` its progress is not displayed.

    Every call is a run of its own, so a job that is repeated collides with nothing. An AmiBuilderError is
    part of the result; internal errors and Interrupted are raised.
    """
    workspace = workspace or Workspace.open(os.environ)
    found: MachineResult | None = None
    failure: AmiBuilderError | None = None
    run: Run | None = None
    steps: tuple[StepRecord, ...] = ()
    with open_progress(Mode.QUIET) as quiet:
        try:
            with workspace.run("verify", job.image.name, job.artifact.digest, of=job.parent) as run:
                try:
                    with quiet.step(job.name) if step is None else nullcontext(step) as parent:
                        found = _verify(job, run, parent)
                finally:
                    steps = quiet.steps
                    run.update(artifact=job.artifact, steps=steps)
        except AmiBuilderError as failed:
            failure = failed
    return JobResult(
        job=job,
        host=socket.gethostname(),
        directory=run.directory if run is not None else None,
        found=found,
        failure=failure,
        steps=steps,
        evidence=_evidence(run, job) if run is not None else {},
    )


def _verify(job: Job, run: Run, step: Step) -> MachineResult:
    image = job.image
    if job.checks:
        for path, content in job.checks.items():
            write_atomically(run.work / "checks" / path, content)
        paths = tuple(run.work / "checks" / str(n) / path.name for n, path in enumerate(image.verify.checks))
        image = replace(image, verify=replace(image.verify, checks=paths))
    evidence = run.directory / "machines"
    with _machine(job, run) as machine, step.step(f"machine of {job.instance_type}") as child:
        return verify_machine(image, machine, work=run.work, evidence=evidence, step=child)


@contextmanager
def _machine(job: Job, run: Run) -> Iterator[Ec2Machine]:
    """Own the security group that the machine is in."""
    account = Account.open(job.artifact.region)
    run_id = run.record.run_id
    ledger = Ledger(run.directory / LEDGER)
    aws = job.image.aws
    purpose = tags.Purpose.VERIFY
    tagged = tags.resource_tags(job.image, job.artifact.digest, run_id, purpose)
    with network.security_group(
        account, ledger, aws, run_id=run_id, purpose=purpose, tags=tagged, subnets=aws.subnets
    ) as group:
        yield Ec2Machine(
            name=job.instance_type,
            image=job.image,
            ami=job.artifact.location,
            account=account,
            ledger=ledger,
            group=group,
            run_id=run_id,
            tags=tagged,
        )


def _followed(jobs: Sequence[Job], executor: Executor, parent: Step) -> list[Future[JobResult]]:
    """Submit jobs to other processes, display a step for each until it has ended, and return them ended."""
    remote: list[Future[JobResult]] = []
    with threads(len(jobs)) as followers:
        try:
            remote += [executor.submit(run_job, job) for job in jobs]
            following = [
                followers.submit(_follow, job, future, parent)
                for job, future in zip(jobs, remote, strict=True)
            ]
            wait(following)
            # A follower that Ctrl-C ended while another thread waits for this one.
            for one in following:
                if isinstance(stopped := one.exception(), Interrupted):
                    raise stopped
        except BaseException:
            for future in remote:
                future.cancel()
            raise
    return remote


def _follow(job: Job, future: Future[JobResult], parent: Step) -> None:
    with parent.step(f"machine of {job.instance_type}", detail="with the Dask cluster") as step:
        processes.wait_until(future.done, what=job.name, timeout=float("inf"), interval=_FOLLOW_SECONDS)
        result = _ended(job, future)
        if result.failure is not None:
            raise result.failure
        found = result.found.results if result.found is not None else ()
        step.done(f"on {result.host}", RunStatus(outcome_of(found)))


def _ended(job: Job, future: Future[JobResult]) -> JobResult:
    try:
        return future.result()
    except Exception as error:
        failure = error if isinstance(error, AmiBuilderError) else cluster.lost(error, job.name)
        if failure is None:
            raise
        return JobResult(job=job, host="", directory=None, found=None, failure=failure, steps=(), evidence={})


def _keep(result: JobResult, folder: Path, *, here: bool) -> None:
    """Write a job's evidence, and let its failure name the part of it on this host."""
    for name, content in result.evidence.items():
        write_atomically(folder / name, content)
    failure = result.failure
    if failure is None:
        return
    if not here and result.host:
        failure.add_note(f"on {result.host}, in {result.directory}")
    if failure.log is not None:
        written = next((name for name in result.evidence if Path(name).name == failure.log.name), None)
        failure.log = folder / written if written is not None else failure.log if here else None


def _lines(result: JobResult) -> list[str]:
    where = f"{result.job.name} (on {result.host})" if result.host else result.job.name
    if result.failure is not None:
        return [f"{where}: {result.failure.message}", *(f"  {line}" for line in result.failure.tail)]
    results = result.found.results if result.found is not None else ()
    counts = {one: sum(each.outcome is one for each in results) for one in _NOT_PASSED}
    return [f"{where}: {count} checks {outcome}" for outcome, count in counts.items() if count]


def _own_checks(image: Image) -> dict[str, bytes]:
    """Return the user's check files, each with the conftest.py beside it."""
    return {
        # Files of different folders may have the same name.
        f"{number}/{each.name}": each.read_bytes()
        for number, path in enumerate(image.verify.checks)
        for each in (path, path.with_name("conftest.py"))
        if each.is_file()
    }


def _evidence(run: Run, job: Job) -> dict[str, bytes]:
    folder = run.directory / "machines"
    files = {str(each.relative_to(folder)): each for each in sorted(folder.rglob("*")) if each.is_file()}
    files[f"{job.instance_type}/record.json"] = run.directory / "record.json"
    return {name: path.read_bytes()[-_EVIDENCE_BYTES:] for name, path in files.items()}
