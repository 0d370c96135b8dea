"""One cell of a matrix: an AMI proved on one instance type, in any thread, process or machine that can."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from ami_builder.aws import network, tags
from ami_builder.aws.instances import Instance, Launch
from ami_builder.aws.session import Account
from ami_builder.config.schema import Image
from ami_builder.console import Mode, Step, open_progress
from ami_builder.core.errors import AmiBuilderError
from ami_builder.core.options import Connect
from ami_builder.core.records import Artifact, Endpoint, StepRecord
from ami_builder.state.ledger import FILE as LEDGER
from ami_builder.state.ledger import Ledger
from ami_builder.state.workspace import Run, StoredImage, Workspace, write_atomically
from ami_builder.system.ssh import Session
from ami_builder.verify.journey import Proof, prove

_EVIDENCE_BYTES = 1 << 20


@dataclass(slots=True, kw_only=True)
class CloudMachine:
    """An EC2 instance of an AMI."""

    name: str
    image: Image
    ami: str
    account: Account
    ledger: Ledger
    group: str
    run_id: str
    tags: Mapping[str, str]
    memory: int = field(default=0, init=False)
    _instance: Instance | None = field(default=None, init=False)

    def start(self, stack: ExitStack, directory: Path, user_data: str, public_key: str) -> Endpoint:
        """Launch it; it ends itself after aws.lifetime, whatever happens here."""
        aws = self.image.aws
        launch = Launch(
            ami=self.ami,
            instance_types=(self.name,),
            subnets=aws.subnets,
            security_group=self.group,
            user_data=user_data,
            public_key=public_key,
            user=self.image.base.ssh_user,
            lifetime=aws.lifetime,
            disk_size=self.image.verify.disk_size,
            instance_profile=aws.instance_profile,
            connect=aws.connect,
            ssh_port=aws.ssh_port,
            encrypt=aws.encrypt,
            kms_key=aws.kms_key,
        )
        self._instance = Instance(
            self.account, self.ledger, launch, run_id=self.run_id, tags=self.tags, directory=directory
        )
        endpoint = stack.enter_context(self._instance)
        self.memory = self._instance.memory
        return endpoint

    def check_alive(self) -> None:
        """Raise BuildFailed when the instance is ending."""
        assert self._instance is not None, "it was not started"
        self._instance.check_alive()

    def reboot(self, session: Session, timeout: float, alive: Callable[[], None]) -> None:
        """Reboot the instance from inside, and wait for a login."""
        session.reboot(timeout, alive)

    def cpu_seconds(self, session: Session) -> float | None:
        """Return the CPU seconds that the instance has used since it was started, or rebooted.

        proc_stat(5): all but idle, iowait, steal, and guest time, which is in user time already.
        """
        done = session.run("head -n 1 /proc/stat; getconf CLK_TCK", check=False)
        fields = done.stdout.split()
        if done.status or len(fields) < 10:
            return None
        user, nice, system, _, _, irq, softirq = (int(field) for field in fields[1:8])
        return (user + nice + system + irq + softirq) / int(fields[-1])

    @property
    def emulator(self) -> int:
        """No process of this host runs an instance."""
        return 0

    def save_console(self) -> None:
        """Fetch what EC2 has of the console."""
        if self._instance is not None and self._instance.instance_id:
            self._instance.save_console()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What is to be proved where; all that another machine needs, but for its own credentials."""

    image: Image
    artifact: Artifact
    instance_type: str
    parent: str
    """The id of the run that it is part of."""
    checks: Mapping[str, bytes]
    """The user's own check files, by where each comes to lie; none when they are read where they are."""

    @property
    def region(self) -> str:
        """Where the AMI is."""
        return self.artifact.region

    @property
    def name(self) -> str:
        """What people call it."""
        return f"{self.instance_type} in {self.region}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CellProof:
    """What became of a cell, and where."""

    cell: Cell
    host: str
    """Empty when nobody can tell any more."""
    directory: Path | None
    """The run directory on that host; None when there was none."""
    proof: Proof | None
    """None when the machine did not come up, or went away."""
    failure: AmiBuilderError | None
    """Why there is no proof."""
    steps: tuple[StepRecord, ...]
    """What a matrix on another machine has not seen itself."""
    evidence: Mapping[str, bytes]
    """Consoles, journals, JUnit XML and the like, by path; of each the end, 1 MiB."""


def cells(image: Image, stored: StoredImage, parent: str, *, travelling: bool) -> tuple[Cell, ...]:
    """Return a cell for each configured instance type; `travelling` ones take all files along."""
    files = _own_checks(image) if travelling else {}
    return tuple(
        Cell(image=image, artifact=stored.artifact, instance_type=kind, parent=parent, checks=files)
        for kind in image.verify.instance_types
    )


def prove_cell(cell: Cell, step: Step | None = None) -> CellProof:
    """Prove a cell with this machine's credentials and workspace; without `step` nobody watches.

    Every call is a run of its own, so that one that is repeated collides with nothing. What of ours fails
    is in the proof; only defects and Interrupted are raised.
    """
    workspace = Workspace.open(os.environ)
    proof: Proof | None = None
    failure: AmiBuilderError | None = None
    run: Run | None = None
    steps: tuple[StepRecord, ...] = ()
    with open_progress(Mode.QUIET) as quiet:
        try:
            with workspace.run("prove", cell.image.name, cell.artifact.digest, of=cell.parent) as run:
                try:
                    with quiet.step(cell.name) if step is None else nullcontext(step) as shown:
                        proof = _prove(cell, run, shown)
                finally:
                    steps = quiet.steps
                    run.update(artifact=cell.artifact, steps=steps)
        except AmiBuilderError as failed:
            failure = failed
    return CellProof(
        cell=cell,
        host=socket.gethostname(),
        directory=run.directory if run is not None else None,
        proof=proof,
        failure=failure,
        steps=steps,
        evidence=_evidence(run, cell) if run is not None else {},
    )


def _prove(cell: Cell, run: Run, step: Step) -> Proof:
    image = cell.image
    if cell.checks:
        for place, content in cell.checks.items():
            write_atomically(run.work / "checks" / place, content)
        paths = tuple(run.work / "checks" / str(n) / path.name for n, path in enumerate(image.verify.checks))
        image = replace(image, verify=replace(image.verify, checks=paths))
    with _machine(cell, run) as machine:
        return prove(image, machine, run, step)


@contextmanager
def _machine(cell: Cell, run: Run) -> Iterator[CloudMachine]:
    """Own the security group that the machine is in."""
    account = Account.open(cell.region)
    run_id = run.record.run_id
    ledger = Ledger(run.directory / LEDGER)
    aws = cell.image.aws
    told = tags.resource_tags(cell.image.name, cell.artifact.digest, run_id, tags.Purpose.VERIFY)
    group = network.SecurityGroup(
        account,
        ledger,
        run_id=run_id,
        purpose=tags.Purpose.VERIFY,
        tags=told,
        cidrs=() if aws.connect is Connect.SESSION_MANAGER else network.source_cidrs(aws.source_cidrs),
        port=aws.ssh_port,
        subnet=aws.subnets[0] if aws.subnets else "",
    )
    with group as group_id:
        yield CloudMachine(
            name=cell.instance_type,
            image=cell.image,
            ami=cell.artifact.location,
            account=account,
            ledger=ledger,
            group=group_id,
            run_id=run_id,
            tags=told,
        )


def _own_checks(image: Image) -> dict[str, bytes]:
    """Return the user's check files, each with the conftest.py beside it, and all that is in folders."""
    found: dict[str, bytes] = {}
    for number, path in enumerate(image.verify.checks):
        inside = (each for each in path.rglob("*") if "__pycache__" not in each.parts)
        for each in filter(Path.is_file, (path, path.with_name("conftest.py"), *inside)):
            # Files of one name in different folders must not meet.
            found[f"{number}/{each.relative_to(path.parent)}"] = each.read_bytes()
    return found


def _evidence(run: Run, cell: Cell) -> dict[str, bytes]:
    folder = run.directory / "machines"
    files = {str(each.relative_to(folder)): each for each in sorted(folder.rglob("*")) if each.is_file()}
    files[f"{cell.instance_type}/record.json"] = run.directory / "record.json"
    return {name: path.read_bytes()[-_EVIDENCE_BYTES:] for name, path in files.items()}
