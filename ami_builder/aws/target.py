"""The AWS target: an AMI baked and booted in an account, of which nothing but the AMI is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from ami_builder.aws import images, source_ami, tags
from ami_builder.aws.bake import bake_ami, finish
from ami_builder.aws.jobs import cells
from ami_builder.aws.matrix import Subject, prove_matrix, proved
from ami_builder.aws.session import Account
from ami_builder.build.inputs import Inputs, gather
from ami_builder.config.schema import Image
from ami_builder.console import Step
from ami_builder.core.errors import UsageError
from ami_builder.core.records import Artifact, CheckResult, Measurement, Outcome, TargetKind, Verdict
from ami_builder.state.workspace import Run, StoredImage, Workspace
from ami_builder.verify.concurrency import open_executor
from ami_builder.verify.journey import Proof


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudSite:
    """One account in one region."""

    account: Account
    workspace: Workspace
    public: bool = False
    dask_scheduler: str | None = None
    """Whose workers prove images; None for threads here."""
    target: TargetKind = field(default=TargetKind.AWS, init=False)
    emulated: None = field(default=None, init=False)

    @classmethod
    def open(
        cls, image: Image, workspace: Workspace, *, public: bool = False, dask_scheduler: str | None = None
    ) -> CloudSite:
        """Return the site that an image is configured for; raises CloudFailed without credentials."""
        return cls(
            account=Account.open(image.aws.region),
            workspace=workspace,
            public=public,
            dask_scheduler=dask_scheduler,
        )

    def gather(self, image: Image, *, refresh: bool) -> Inputs:
        """Resolve the base AMI and the container to what they would be now."""
        return gather(
            image,
            self.workspace,
            base_ami=lambda: source_ami.resolve(self.account, image.aws.source),
            refresh=refresh,
        )

    def find(self, inputs: Inputs) -> StoredImage | None:
        """Return the finished AMI of exactly these inputs, whichever machine baked it."""
        return self.of_digest(inputs.image, inputs.digest)

    def of_digest(self, image: Image, digest: str) -> StoredImage | None:
        """Return the finished AMI of a digest in this region."""
        ami = images.find_by_digest(self.account, image.name, digest)
        if ami is None or not ami.finished or ami.state != "available":
            return None
        return self._stored(image, digest, ami)

    def bake(
        self, inputs: Inputs, run: Run, step: Step, *, again: bool, on_boot: Callable[[float], None]
    ) -> StoredImage:
        """Bake an AMI, or finish the one that a killed run had made."""
        packages: Path | None = None
        ami = None if again else images.find_by_digest(self.account, inputs.image.name, inputs.digest)
        if ami is not None:
            with step.step("finish the AMI of a killed run", detail=ami.id) as child:
                ami = finish(inputs, self.account, ami, child, public=self.public)
                child.done(ami.id)
        else:
            ami = bake_ami(inputs, self.account, self.workspace, run, step, public=self.public)
            packages = run.directory / "packages.txt"
        stored = self._stored(inputs.image, inputs.digest, ami)
        return self.workspace.store_remote(stored.artifact, packages)

    def prove(self, image: Image, stored: StoredImage, run: Run, step: Step) -> Sequence[Proof]:
        """Prove an AMI on an instance of each configured type, all of them whatever becomes of one."""
        wanted = cells(image, stored, run.record.run_id, travelling=self.dask_scheduler is not None)
        with open_executor(self.dask_scheduler, len(wanted)) as executor:
            proofs = prove_matrix(wanted, executor, step, run.directory / "machines")
        return proved(proofs)

    def judge(self, stored: StoredImage, verdict: Verdict) -> StoredImage:
        """Tag an AMI of ours with the verdict, so that any machine knows it."""
        if stored.artifact.run_id:
            images.record_verdict(
                self.account,
                stored.artifact.location,
                verdict.outcome,
                verdict.checks_digest,
                verdict.measured,
            )
        return self.workspace.store_verdict(stored, verdict)

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


def subjects_in(
    regions: Sequence[str], image: Image, stored: StoredImage, workspace: Workspace
) -> list[Subject]:
    """Return an AMI where it is, and its copies elsewhere, which are found by its digest.

    Raises UsageError for a region that has none.
    """
    found = []
    for region in dict.fromkeys(regions):
        there = replace(image, aws=replace(image.aws, region=region))
        site = CloudSite.open(there, workspace)
        artifact = stored.artifact
        one = stored if artifact.region == region else None
        if one is None and artifact.digest:
            one = site.of_digest(there, artifact.digest)
        if one is None:
            raise UsageError(
                f"--region {region}: there is no copy of {stored.name} (image {image.name},"
                f" digest {artifact.digest[:16] or 'unknown'})",
                hint=f"it is in {artifact.region}; an AMI that isn't finished doesn't count",
            )
        found.append(Subject(image=there, stored=one, site=site))
    return found


def _told(digest: str, outcome: Outcome, checks_digest: str, measured: tuple[Measurement, ...]) -> Verdict:
    """Return the verdict that an AMI's tags tell of, whoever reached it: its single results are not known."""
    result = CheckResult(
        name="the verdict that the AMI is tagged with",
        phase="",
        machine="",
        outcome=outcome,
        seconds=0,
        message="",
    )
    return Verdict(digest=digest, checks_digest=checks_digest, results=(result,), measured=measured)
