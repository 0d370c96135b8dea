"""The channels of AMIs: one SSM parameter each, in one account and region."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from filelock import FileLock

from ami_builder.aws import images, parameters, tags
from ami_builder.aws.target import CloudSite
from ami_builder.config.schema import Image
from ami_builder.core.channels import ChannelEntry
from ami_builder.core.errors import UsageError
from ami_builder.state.workspace import StoredImage


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudChannels:
    """The channels of one image name in the region of a site."""

    site: CloudSite
    image: Image

    def locked(self) -> AbstractContextManager[object]:
        """Let no other process here move them; what other machines do meanwhile is seen by reading back."""
        self.site.workspace.ensure()
        name = f"{self.image.name}.{self.site.account.region}.channels.lock"
        return FileLock(self.site.workspace.state / "locks" / name)

    def id_of(self, stored: StoredImage) -> str:
        """Return the id of an AMI; raises UsageError when it is not a finished one of ours."""
        id = stored.artifact.location
        found = images.get(self.site.account, id)
        if found is None or not found.finished or found.state != "available":
            raise UsageError(
                f"{id} is not a finished AMI of ours in {self.site.account.region}",
                hint="`ami-builder build --target aws` makes one",
            )
        name = found.tags.get(tags.IMAGE)
        if name != self.image.name:
            raise UsageError(f"{id} is an image of {name!r}, not of {self.image.name!r}")
        return id

    def find(self, id: str) -> StoredImage | None:
        """Return an AMI that can be launched."""
        found = images.get(self.site.account, id)
        if found is None or found.state != "available":
            return None
        return self.site.ami(self.image, id)

    def entries(self, channel: str) -> tuple[ChannelEntry, ...]:
        """Return the history of the parameter."""
        return parameters.entries(self.site.account, self.image.name, channel)

    def used(self) -> tuple[str, ...]:
        """Return the channels that have a parameter."""
        return parameters.used(self.site.account, self.image.name)

    def revoked(self, ids: Sequence[str]) -> Mapping[str, str]:
        """Return which of these AMIs were revoked by their tag, or deregistered: neither comes back."""
        there = images.find_by_ids(self.site.account, ids)
        gone = {id: "it was deregistered" for id in ids if id not in there}
        return gone | {id: ami.revoked for id, ami in there.items() if ami.revoked is not None}

    def write(self, entry: ChannelEntry) -> None:
        """Write the parameter, and see that it holds."""
        parameters.write(self.site.account, self.image.name, entry)

    def revoke(self, id: str, reason: str, entries: Sequence[ChannelEntry]) -> None:
        """Tag the AMI, then write each parameter; a parameter that is to hold nothing is deleted."""
        images.revoke(self.site.account, id, reason)
        for entry in entries:
            self.write(entry)
