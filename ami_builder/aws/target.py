"""The aws target: AMIs that are baked and booted in one region of an account."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from ami_builder.aws import (
    account_settings,
    cleanup,
    copies,
    gc,
    images,
    instances,
    preflight,
    quotas,
    sharing,
    source_ami,
    tags,
)
from ami_builder.aws.bake import SOURCE, bake_ami, finish
from ami_builder.aws.channels import ChannelParameters
from ami_builder.aws.matrix import jobs_of, require_results, run_jobs
from ami_builder.aws.session import NOT_ENABLED, Account, aws_errors, code_of
from ami_builder.build import preflight as shared_preflight
from ami_builder.build.inputs import Inputs, gather
from ami_builder.build.target import Shared
from ami_builder.config.schema import Image
from ami_builder.config.types import Destination
from ami_builder.console import Progress, Step
from ami_builder.core.cleanup import Action, Decision
from ami_builder.core.errors import CloudFailed, TimedOut, UsageError
from ami_builder.core.options import ContainerSource
from ami_builder.core.records import Artifact, CheckResult, Finding, Measurement, Outcome, TargetKind, Verdict
from ami_builder.state.ledger import FILE as LEDGER
from ami_builder.state.ledger import Ledger
from ami_builder.state.workspace import Run, StoredImage, Workspace
from ami_builder.verify.executor import open_executor
from ami_builder.verify.machine import MachineResult

_ATTEMPTS_ELSEWHERE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class AwsTarget:
    """One region of an account."""

    account: Account
    workspace: Workspace
    home: str
    """The region that images are baked in; settings without a region are for it."""
    public: bool = False
    dask_scheduler: str | None = None
    """The cluster whose workers verify images; None for threads of this process."""
    kind: TargetKind = field(default=TargetKind.AWS, init=False)
    bases: dict[str, source_ami.BaseAmi] = field(default_factory=dict, init=False, compare=False, repr=False)
    """The base AMIs that `gather` resolved, by id."""
    emulated: None = field(default=None, init=False)
    builds_side_by_side: bool = field(default=True, init=False)

    @classmethod
    def open(
        cls,
        image: Image,
        workspace: Workspace,
        *,
        region: str = "",
        public: bool = False,
        dask_scheduler: str | None = None,
    ) -> AwsTarget:
        """Return the region that an image is baked in, or another one of the same account.

        Raises CloudFailed without credentials or a region.
        """
        account = Account.open(image.aws.region, otherwise=region)
        return cls(
            account=account.in_region(region or account.region),
            workspace=workspace,
            home=account.region,
            public=public,
            dask_scheduler=dask_scheduler,
        )

    @property
    def name(self) -> str:
        """The region."""
        return self.account.region

    @property
    def region(self) -> str:
        """The region."""
        return self.account.region

    def gather(self, image: Image, *, refresh: bool) -> Inputs:
        """Resolve the base AMI and the container to what they would be now."""

        def base() -> str:
            found = source_ami.resolve(self.account, image.aws.source, image.arch)
            self.bases[found.id] = found
            return found.id

        inputs = gather(
            image,
            self.workspace,
            base,
            resolved={"source", "suite", "mirror", "checksum"},
            more=f" {image.aws.encrypt} {image.aws.kms_key} {image.aws.root_device}",
            refresh=refresh,
        )
        return replace(inputs, base=str(self.bases[inputs.base_digest]))

    def find(self, image: Image, digest: str) -> StoredImage | None:
        """Return the finished AMI with exactly this digest, no matter which host baked it."""
        ami = images.find_by_digest(self.account, image.name, digest)
        if ami is None or not ami.finished or ami.state != "available":
            return None
        return self._stored(image, digest, ami)

    def bake(
        self, inputs: Inputs, run: Run, step: Step, *, again: bool, on_boot: Callable[[float], None]
    ) -> StoredImage:
        """Bake an AMI. Unless `again`, finish the one that a killed run has made."""
        del on_boot
        packages: Path | None = None
        ami = None if again else images.find_by_digest(self.account, inputs.image.name, inputs.digest)
        if ami is not None:
            with step.step("finish the AMI of a killed run", detail=ami.id) as child:
                ledger = Ledger(run.directory / LEDGER)
                ami = finish(inputs, self.account, ami, ledger, child, public=self.public)
                child.done(ami.id)
        else:
            here = replace(inputs, image=self._here(inputs.image))
            base = self.bases[inputs.base_digest]
            account_settings.require(self._settings(here.image, base))
            ami = bake_ami(here, base, self.account, self.workspace, run, step, public=self.public)
            packages = run.directory / "packages.txt"
        stored = self._stored(inputs.image, inputs.digest, ami)
        return self.workspace.store_remote(stored.artifact, packages)

    def verify(
        self, image: Image, stored: StoredImage, run: Run, step: Step, evidence: Path
    ) -> Sequence[MachineResult]:
        """Verify an AMI on an instance of each configured type. One that fails does not end the others."""
        with_files = self.dask_scheduler is not None
        jobs = jobs_of(self._here(image), stored, run.record.run_id, with_files=with_files)
        with open_executor(self.dask_scheduler, len(jobs)) as executor:
            found = run_jobs(jobs, executor, step, evidence, self.workspace)
        return require_results(found)

    def keep_verdict(self, stored: StoredImage, verdict: Verdict) -> StoredImage:
        """Tag an AMI of ours with the verdict, so that every host knows it."""
        if stored.artifact.run_id:
            images.record_verdict(
                self.account,
                stored.artifact.location,
                verdict.outcome,
                verdict.checks_digest,
                verdict.measured,
            )
        return self.workspace.store_verdict(stored, verdict)

    def copies(self, image: Image) -> Sequence[AwsTarget]:
        """Return the regions of aws.copy_to. Raises UsageError if a region is there twice."""
        regions = [self.home, *(one.region for one in image.aws.copy_to)]
        if len(set(regions)) < len(regions):
            twice = next(each for each in regions if regions.count(each) > 1)
            raise UsageError(
                f"aws.copy_to: {twice} is there twice, or is where the AMI is baked",
                hint="aws.region, or else AWS_REGION or the profile, says where that is",
            )
        return self.elsewhere(regions[1:]) if regions[1:] else ()

    def elsewhere(self, regions: Sequence[str]) -> Sequence[AwsTarget]:
        """Return the targets of these regions, once each; this one for none."""
        return tuple(
            replace(self, account=self.account.in_region(region))
            for region in dict.fromkeys(regions or [self.name])
        )

    def unconfigured(self, image: Image) -> Sequence[AwsTarget]:
        """Return the account's other enabled regions: a region may have been removed from aws.copy_to.

        A call there is attempted twice only: a network may have no route to some region.
        """
        known = {self.home, self.name, *(one.region for one in image.aws.copy_to)}
        with aws_errors():
            regions = [one["RegionName"] for one in self.account.ec2.describe_regions()["Regions"]]
        return tuple(
            replace(self, account=self.account.in_region(region, attempts=_ATTEMPTS_ELSEWHERE))
            for region in sorted(set(regions) - known)
        )

    def find_copy(self, image: Image, stored: StoredImage) -> StoredImage | None:
        """Return an AMI as it is here, finished or not; None without a copy of it. Raises CloudFailed."""
        with named(self.name):
            ami = stored.artifact.location
            if stored.artifact.region != self.name:
                found = copies.find(self.account, self._source(stored)[0])
                if found is None:
                    return None
                ami = found.id
            return self.ami(image, ami)

    def receive(self, image: Image, stored: StoredImage, step: Step) -> StoredImage:
        """Return an AMI as it is here, once it can be launched; copy it if there is no copy yet.

        Raises CloudFailed and TimedOut, which name the region.
        """
        with named(self.name):
            source, origin = self._source(stored)
            found = source
            if origin.region != self.name:
                destination = next(
                    (one for one in image.aws.copy_to if one.region == self.name),
                    Destination(region=self.name),
                )
                with step.step(f"copy {source.id}", detail=f"from {origin.region}") as child:
                    found = copies.copy(
                        source,
                        origin.region,
                        self.account,
                        destination,
                        encrypt=image.aws.encrypt,
                        own_tags=tags.own_tags(image.aws),
                        on_progress=child.update,
                    )
                    child.done(found.id)
            with step.step(f"check that {found.id} can be launched") as child:
                self._require_launchable(image, found, child)
            return self.ami(image, found.id)

    def share(self, image: Image, stored: StoredImage, step: Step) -> Shared:
        """Let those of aws.share_with launch an AMI of this region. Raises CloudFailed."""
        with named(self.name):
            found = self._finished(self.account, stored.artifact.location)
            shared = sharing.share(self.account, found, image.aws.share_with)
        step.done(f"added {', '.join(shared.added)}" if shared.added else "already shared")
        return shared

    def channels(self, image: Image) -> ChannelParameters:
        """Return the parameters of this region."""
        ami = partial(self.ami, image)
        return ChannelParameters(
            account=self.account,
            image=image.name,
            arch=image.arch,
            workspace=self.workspace,
            ami=ami,
            own_tags=tags.own_tags(image.aws),
        )

    def exclusive(self, images: Mapping[str, Image]) -> AbstractContextManager[object]:
        """Lock nothing: nothing can lock an account, so what is young or in use is kept."""
        del images
        return nullcontext()

    def plan_cleanup(self, images: Mapping[str, Image], step: Step) -> tuple[Decision, ...]:
        """Decide about every AMI and orphaned snapshot of ours in this region. Raises CloudFailed."""
        del step
        records = {name: self.channels(image) for name, image in images.items()}
        return cleanup.plan_cleanup(self.account, self.workspace, images, records)

    def clean_up(self, decisions: Sequence[Decision], progress: Progress) -> Iterator[Decision]:
        """Deprecate and deregister AMIs and delete snapshots as planned, unless something needs them by now.

        Yields each decision once it is done. Raises CloudFailed.
        """
        for decision in cleanup.clean_up(self.account, decisions, progress):
            yield decision
            if decision.action is Action.DELETE:
                self.workspace.forget_remote(decision.candidate.id)

    def remove_orphans(self, images: Mapping[str, Image], progress: Progress) -> None:
        """Remove what killed runs have left in this region, as far as no other host may still use it."""
        regions = {self.account: max(image.aws.lifetime for image in images.values())}
        found = gc.find_orphans(regions, self.workspace, progress)
        gc.remove_orphans(found, regions, self.workspace, progress)

    def ami(self, image: Image, ami: str) -> StoredImage:
        """Return an AMI by its id, ours or not. Raises UsageError when there is none."""
        found = images.get(self.account, ami)
        if found is None:
            raise UsageError(
                f"there is no AMI {ami} in {self.account.region} that these credentials may use",
                hint="AMI ids differ between regions; aws.region or AWS_REGION sets the region",
            )
        return self._stored(image, found.tags.get(tags.DIGEST, ""), found)

    def _settings(self, image: Image, base: source_ami.BaseAmi) -> Iterator[account_settings.Named]:
        """Yield what would fail this build late."""
        yield from account_settings.of_build(self.account, image, base, public=self.public)
        yield "quota of vCPUs", partial(quotas.vcpus, self.account, image)

    def _here(self, image: Image) -> Image:
        """Return the image with the settings of this region."""
        return image.at(self.name, self.home)

    def _stored(self, image: Image, digest: str, ami: images.Ami) -> StoredImage:
        artifact = Artifact(
            image=image.name,
            target=self.kind,
            location=ami.id,
            region=self.account.region,
            digest=digest,
            created=ami.created or datetime.now(UTC),
            run_id=ami.tags.get(tags.RUN, ""),
            size=ami.size,
            arch=ami.arch,
        )
        known = self.workspace.image(image.name, digest) if digest else None
        if known is not None and known.artifact.location != ami.id:
            known = None
        verdict = known.verdict if known is not None else None
        if verdict is None and ami.verdict is not None:
            verdict = _tagged(digest, *ami.verdict, ami.measured)
        directory = known.directory if known is not None else None
        return StoredImage(artifact=artifact, verdict=verdict, directory=directory)

    def _source(self, stored: StoredImage) -> tuple[images.Ami, Account]:
        """Return the AMI that a stored image is, and the account of its region."""
        origin = self.account.in_region(stored.artifact.region or self.name)
        return self._finished(origin, stored.artifact.location), origin

    def _require_launchable(self, image: Image, ami: images.Ami, step: Step) -> None:
        if ami.state != "available":
            raise CloudFailed(f"{ami.id} is {ami.state}" + (f": {ami.reason}" if ami.reason else ""))
        tagged = tags.resource_tags(image, ami.tags.get(tags.DIGEST, ""), "check", tags.Purpose.VERIFY)
        kind = image.verify.instance_types[0]
        subnet = next(iter(self._here(image).aws.subnets), "")
        untried = images.dry_run_launch(self.account, ami.id, kind, tagged, subnet)
        if not untried:
            step.done(f"yes, as {kind}")
            return
        # Without a group of a run's a launch is in the VPC's own, which the printed policy does not allow.
        instances.require_offered(self.account, [kind], "verify.instance_types")
        instances.require_arch(self.account, [kind], ami.arch, "verify.instance_types")
        step.done(f"yes, it is available, and {self.name} has {kind}; no dry run of a launch: {untried}")

    @staticmethod
    def _finished(account: Account, ami: str) -> images.Ami:
        found = images.get(account, ami)
        if found is None or not found.finished:
            raise CloudFailed(
                f"{ami} is not a finished AMI of ours in {account.region}",
                hint="`ami-builder build --target aws` makes one, `ami-builder copy` copies it",
            )
        return found


def check(image: Image, workspace: Workspace) -> Iterator[Finding]:
    """Yield what a build in the account needs: what it uses here, and all that the account must allow."""
    yield from shared_preflight.open_settings(image)
    recipe = ("mmdebstrap",) if image.container.source is ContainerSource.ARCHIVE else ()
    yield from shared_preflight.tools(SOURCE.plugin, ("ssh", "ssh-keygen", *recipe))
    if recipe:
        yield from shared_preflight.programs(image.arch)
        yield shared_preflight.disk_space(workspace)
    yield from preflight.check(image)


def _tagged(digest: str, outcome: Outcome, checks_digest: str, measured: tuple[Measurement, ...]) -> Verdict:
    """Return the verdict in an AMI's tags. They have its outcome, but not the single results."""
    result = CheckResult(
        name="the verdict that the AMI is tagged with",
        phase="",
        machine="",
        outcome=outcome,
        seconds=0,
        message="",
    )
    return Verdict(digest=digest, checks_digest=checks_digest, results=(result,), measured=measured)


@contextmanager
def named(region: str) -> Iterator[None]:
    """Let an error within begin with the region."""
    try:
        yield
    except (CloudFailed, TimedOut) as failed:
        hint = failed.hint
        if code_of(failed) in NOT_ENABLED:
            hint = f"is {region} enabled for this account? If so, {hint}" if hint else None
        raise type(failed)(
            f"{region}: {failed.message}", hint=hint, log=failed.log, tail=failed.tail
        ) from failed
