"""The AWS target: an AMI baked and booted in an account, of which nothing but the AMI is left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from ami_builder.adapters.aws import base, images, network, tags
from ami_builder.adapters.aws.instance import Instance, Launch
from ami_builder.adapters.aws.session import Account
from ami_builder.console import Step
from ami_builder.errors import UsageError
from ami_builder.ledger import FILE as LEDGER
from ami_builder.ledger import Ledger
from ami_builder.model import (
    Artifact,
    CheckResult,
    Connect,
    Endpoint,
    Image,
    Measurement,
    Outcome,
    Target,
    Verdict,
)
from ami_builder.pipeline.bake_ami import bake_ami, finish
from ami_builder.pipeline.inputs import Inputs, gather
from ami_builder.pipeline.target import Machine
from ami_builder.workspace import Run, StoredImage, Workspace


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
    tags: dict[str, str]
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

    def save_console(self) -> None:
        """Fetch what EC2 has of the console."""
        if self._instance is not None and self._instance.instance_id:
            self._instance.save_console()


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudSite:
    """One account in one region."""

    account: Account
    workspace: Workspace
    public: bool = False
    target: Target = field(default=Target.AWS, init=False)

    @classmethod
    def open(cls, image: Image, workspace: Workspace, *, public: bool = False) -> CloudSite:
        """Return the site that an image is configured for; raises CloudFailed without credentials."""
        return cls(account=Account.open(image.aws.region), workspace=workspace, public=public)

    def gather(self, image: Image, *, refresh: bool) -> Inputs:
        """Resolve the base AMI and the container to what they would be now."""
        return gather(
            image,
            self.workspace,
            base_ami=lambda: base.resolve(self.account, image.aws.source),
            refresh=refresh,
        )

    def find(self, inputs: Inputs) -> StoredImage | None:
        """Return the finished AMI of exactly these inputs, whichever machine baked it."""
        ami = images.find(self.account, inputs.image.name, inputs.digest)
        if ami is None or not ami.finished or ami.state != "available":
            return None
        return self._stored(inputs.image, inputs.digest, ami)

    def bake(self, inputs: Inputs, run: Run, step: Step, *, again: bool) -> StoredImage:
        """Bake an AMI, or finish the one that a killed run had made."""
        packages: Path | None = None
        ami = None if again else images.find(self.account, inputs.image.name, inputs.digest)
        if ami is not None:
            with step.step("finish the AMI of a killed run", detail=ami.id) as child:
                ami = finish(inputs, self.account, ami, child, public=self.public)
                child.done(ami.id)
        else:
            ami = bake_ami(inputs, self.account, self.workspace, run, step, public=self.public)
            packages = run.directory / "packages.txt"
        stored = self._stored(inputs.image, inputs.digest, ami)
        return self.workspace.remember(stored.artifact, packages)

    @contextmanager
    def machines(
        self, image: Image, stored: StoredImage, run: Run, step: Step
    ) -> Iterator[tuple[Sequence[Machine], int]]:
        """Yield an instance for each configured type, in a security group that lives as long."""
        run_id = run.record.run_id
        ledger = Ledger(run.directory / LEDGER)
        told = tags.tags(image.name, stored.artifact.digest, run_id, tags.Purpose.VERIFY)
        through_ssm = image.aws.connect is Connect.SESSION_MANAGER
        group = network.SecurityGroup(
            self.account,
            ledger,
            run_id=run_id,
            purpose=tags.Purpose.VERIFY,
            tags=told,
            cidrs=() if through_ssm else network.my_cidrs(image.aws.source_cidrs),
            port=image.aws.ssh_port,
            subnet=image.aws.subnets[0] if image.aws.subnets else "",
        )
        with group as group_id:
            machines: list[Machine] = [
                CloudMachine(
                    name=kind,
                    image=image,
                    ami=stored.artifact.location,
                    account=self.account,
                    ledger=ledger,
                    group=group_id,
                    run_id=run_id,
                    tags=told,
                )
                for kind in image.verify.instance_types
            ]
            yield machines, len(machines)

    def judge(self, stored: StoredImage, verdict: Verdict) -> StoredImage:
        """Tag an AMI of ours with the verdict, so that any machine knows it."""
        if stored.artifact.run_id:
            images.record_verdict(
                self.account,
                stored.artifact.location,
                verdict.passed,
                verdict.checks_digest,
                verdict.measured,
            )
        return self.workspace.judge(stored, verdict)

    def ami(self, image: Image, ami: str) -> StoredImage:
        """Return an AMI by its id, ours or not; raises UsageError when there is none."""
        found = images.get(self.account, ami)
        if found is None:
            raise UsageError(
                f"there is no AMI {ami} in {self.account.region} that these credentials may use",
                hint="AMI ids differ between regions: aws.region or AWS_REGION says which one is meant",
            )
        return self._stored(image, found.tags.get(tags.DIGEST, ""), found)

    def _stored(self, image: Image, digest: str, ami: images.Ami) -> StoredImage:
        artifact = Artifact(
            image=image.name,
            target=self.target,
            location=ami.id,
            region=self.account.region,
            digest=digest,
            created=ami.created or datetime.now(UTC),
            run_id=ami.tags.get(tags.RUN, ""),
            size=ami.size,
        )
        known = self.workspace.image(image.name, digest) if digest else None
        mine = known is not None and known.artifact.location == ami.id
        verdict = known.verdict if known is not None and mine else None
        if verdict is None and ami.verdict is not None:
            verdict = _told(digest, *ami.verdict, ami.measured)
        return StoredImage(
            artifact=artifact,
            verdict=verdict,
            directory=known.directory if known is not None and mine else None,
        )


def _told(digest: str, passed: bool, checks_digest: str, measured: tuple[Measurement, ...]) -> Verdict:
    """Return the verdict that an AMI's tags tell of, whoever reached it: its single results are not known."""
    result = CheckResult(
        name="the verdict that the AMI is tagged with",
        phase="",
        machine="",
        outcome=Outcome.PASSED if passed else Outcome.FAILED,
        seconds=0,
        message="",
    )
    return Verdict(digest=digest, checks_digest=checks_digest, results=(result,), measured=measured)
