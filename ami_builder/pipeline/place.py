"""Where a channel stands: the same steps for this machine and for each region of an account."""

from __future__ import annotations

from typing import Protocol

from ami_builder.console import Step
from ami_builder.pipeline.channels import Channels
from ami_builder.workspace import StoredImage


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
