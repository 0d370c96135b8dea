"""Where a channel stands: the same steps for this machine and for each region of an account."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ami_builder.build.channels import Channels
from ami_builder.console import Step
from ami_builder.qemu.channels import LocalChannels
from ami_builder.state.workspace import StoredImage, Workspace


class Place(Protocol):
    """One place that an image is brought to and promoted in."""

    @property
    def name(self) -> str:
        """`this machine`, or the region."""

    @property
    def channels(self) -> Channels:
        """The record of the image's channels there."""

    def bring(self, stored: StoredImage, step: Step) -> StoredImage:
        """Return an image as it is there once it can be launched, copied when it was not there.

        Raises CloudFailed, TimedOut.
        """

    def share(self, stored: StoredImage, step: Step) -> None:
        """Let those launch an image that it is configured to be shared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPlace:
    """This machine, where every image of the local target stands already."""

    workspace: Workspace
    image: str

    @property
    def name(self) -> str:
        """What people call it."""
        return "this machine"

    @property
    def channels(self) -> Channels:
        """The journal beside the images."""
        return LocalChannels(workspace=self.workspace, image=self.image)

    def bring(self, stored: StoredImage, step: Step) -> StoredImage:
        """Return the image itself."""
        return stored

    def share(self, stored: StoredImage, step: Step) -> None:
        """Do nothing: whoever may read the disk may boot it."""
