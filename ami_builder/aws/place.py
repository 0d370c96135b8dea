"""The regions of an account as places: where an AMI was baked, and where it is copied to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from botocore.exceptions import ClientError

from ami_builder.aws import copies, images, sharing, tags
from ami_builder.aws.channels import CloudChannels
from ami_builder.aws.session import Account, code_of
from ami_builder.aws.target import CloudSite
from ami_builder.config.schema import Image
from ami_builder.config.types import Destination
from ami_builder.console import Progress, Step
from ami_builder.core.errors import AmiBuilderError, CloudFailed, TimedOut, UsageError
from ami_builder.state.workspace import StoredImage, Workspace
from ami_builder.verify.concurrency import side_by_side

# What a region says of good credentials while the account has not enabled it.
_NOT_ENABLED = frozenset(
    {"AuthFailure", "InvalidClientTokenId", "OptInRequired", "UnrecognizedClientException"}
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudPlace:
    """One region that an image is promoted in."""

    site: CloudSite
    image: Image
    destination: Destination

    @property
    def name(self) -> str:
        """The region."""
        return self.site.account.region

    @property
    def channels(self) -> CloudChannels:
        """The parameters of the region."""
        return CloudChannels(site=self.site, image=self.image)

    def find(self, stored: StoredImage) -> StoredImage | None:
        """Return an AMI as it is here, finished or not; None when there is none yet; raises CloudFailed."""
        with _named(self.name):
            ami = stored.artifact.location
            if stored.artifact.region != self.name:
                found = copies.find(self.site.account, self._source(stored)[0])
                if found is None:
                    return None
                ami = found.id
            return self.site.ami(self.image, ami)

    def bring(self, stored: StoredImage, step: Step) -> StoredImage:
        """Return an AMI as it is here once it can be launched here, copied when it was not here.

        Raises CloudFailed and TimedOut, which name the region.
        """
        with _named(self.name):
            source, origin = self._source(stored)
            found = source
            if origin.region != self.name:
                with step.step(f"copy {source.id}", detail=f"from {origin.region}") as child:
                    found = copies.copy(
                        source,
                        origin.region,
                        self.site.account,
                        self.destination,
                        encrypt=self.image.aws.encrypt,
                        on_progress=child.update,
                    )
                    child.done(found.id)
            with step.step(f"see whether {found.id} can be launched") as child:
                self._require_launchable(found, child)
            return self.site.ami(self.image, found.id)

    def share(self, stored: StoredImage, step: Step) -> None:
        """Let those of aws.share_with launch an AMI of this region. Raises CloudFailed."""
        shared = self.grant(stored)
        step.done(f"added {', '.join(shared.added)}" if shared.added else "nobody was lacking")

    def grant(self, stored: StoredImage) -> sharing.Shared:
        """Share an AMI of this region, and return who was added, and who may launch it besides."""
        with _named(self.name):
            found = _finished(self.site.account, stored.artifact.location)
            return sharing.share(self.site.account, found, self.image.aws.share_with)

    def _source(self, stored: StoredImage) -> tuple[images.Ami, Account]:
        """Return the AMI that a stored image is, and where it is."""
        origin = self.site.account.in_region(stored.artifact.region or self.name)
        return _finished(origin, stored.artifact.location), origin

    def _require_launchable(self, ami: images.Ami, step: Step) -> None:
        if ami.state != "available":
            raise CloudFailed(f"{ami.id} is {ami.state}" + (f": {ami.reason}" if ami.reason else ""))
        told = tags.resource_tags(
            self.image.name, ami.tags.get(tags.DIGEST, ""), "check", tags.Purpose.VERIFY
        )
        kind = self.image.verify.instance_types[0]
        untold = images.dry_run_launch(self.site.account, ami.id, kind, told)
        step.done(f"it is available; a launch was not tried: {untold}" if untold else f"yes, as {kind}")


def places(image: Image, workspace: Workspace) -> tuple[CloudPlace, ...]:
    """Return the region where an image is baked, and after it those of aws.copy_to.

    Raises CloudFailed without credentials or a region, UsageError when a region is there twice.
    """
    home = CloudSite.open(image, workspace).account
    wanted = (Destination(region=home.region), *image.aws.copy_to)
    regions = [one.region for one in wanted]
    if len(set(regions)) < len(regions):
        twice = next(each for each in regions if regions.count(each) > 1)
        raise UsageError(
            f"aws.copy_to: {twice} is there twice, or is where the AMI is baked",
            hint="aws.region, or else AWS_REGION or the profile, says where that is",
        )
    return tuple(
        CloudPlace(
            site=CloudSite(account=home.in_region(one.region), workspace=workspace),
            image=image,
            destination=one,
        )
        for one in wanted
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(Generic[T]):
    """What came of one place: a value, or why there is none."""

    place: str
    value: T | None
    error: AmiBuilderError | None = None


def at_each(
    places: Sequence[CloudPlace], act: Callable[[CloudPlace, Step], T], progress: Progress
) -> list[Outcome[T]]:
    """Do the same in all regions, side by side and each to its end, whatever becomes of the others."""

    def one(place: CloudPlace) -> Outcome[T]:
        try:
            with progress.step(place.name) as step:
                return Outcome(place=place.name, value=act(place, step))
        except AmiBuilderError as failed:
            return Outcome(place=place.name, value=None, error=failed)

    return side_by_side([partial(one, place) for place in places])


def require_all(outcomes: Sequence[Outcome[T]]) -> None:
    """Raise CloudFailed that names every region that failed, and why."""
    failed = [(one.place, one.error) for one in outcomes if one.error is not None]
    if failed:
        raise CloudFailed(
            f"{len(failed)} of {len(outcomes)} regions failed: {', '.join(place for place, _ in failed)}",
            tail=tuple(error.message for _, error in failed),
            hint=next((error.hint for _, error in failed if error.hint), "run it again: what is done stays"),
        )


def _finished(account: Account, ami: str) -> images.Ami:
    found = images.get(account, ami)
    if found is None or not found.finished:
        raise CloudFailed(
            f"{ami} is not a finished AMI of ours in {account.region}",
            hint="`ami-builder build --target aws` makes one, `ami-builder copy` brings it to other regions",
        )
    return found


@contextmanager
def _named(region: str) -> Iterator[None]:
    """Let an error within begin with the region."""
    try:
        yield
    except (CloudFailed, TimedOut) as failed:
        cause, hint = failed.__cause__, failed.hint
        if isinstance(cause, ClientError) and code_of(cause) in _NOT_ENABLED:
            hint = f"is {region} enabled for this account? If so, {hint}" if hint else None
        raise type(failed)(
            f"{region}: {failed.message}", hint=hint, log=failed.log, tail=failed.tail
        ) from failed
