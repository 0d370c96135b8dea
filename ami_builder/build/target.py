"""What a target offers the pipeline: the same steps for a disk here and for an AMI in an account."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ami_builder.build.inputs import Inputs
from ami_builder.config.schema import Image
from ami_builder.console import Step
from ami_builder.core.records import Endpoint, TargetKind, Verdict
from ami_builder.state.workspace import Run, StoredImage

if TYPE_CHECKING:
    from ami_builder.system.ssh import Session
    from ami_builder.verify.journey import Proof


class Machine(Protocol):
    """A machine that an image is proved on, started and ended with the context that it is given."""

    @property
    def name(self) -> str:
        """What people call it: its memory, or its instance type."""

    @property
    def memory(self) -> int:
        """Bytes; known once it was started."""

    def start(self, stack: ExitStack, directory: Path, user_data: str, public_key: str) -> Endpoint:
        """Boot the image untouched; ending `stack` ends the machine. Its files go to `directory`."""

    def check_alive(self) -> None:
        """Raise BuildFailed, with the end of the console, when it can't come up any more."""

    def reboot(self, session: Session, timeout: float, alive: Callable[[], None]) -> None:
        """Reboot it from inside and wait for a login, calling `alive` in between; raises as that does."""

    def cpu_seconds(self, session: Session) -> float | None:
        """Return the CPU seconds that it has used since it was started, or rebooted; None when unknown."""

    @property
    def emulator(self) -> int:
        """The process on this host that runs it; 0 when none does."""

    def save_console(self) -> None:
        """Bring the console's log on this machine up to date."""


class Site(Protocol):
    """Where images are baked, kept and booted."""

    @property
    def target(self) -> TargetKind:
        """Its name."""

    @property
    def emulated(self) -> bool | None:
        """Whether its machines are emulated; None where that is not known yet, or never the case."""

    def gather(self, image: Image, *, refresh: bool) -> Inputs:
        """Resolve everything that goes into the image, and digest it."""

    def find(self, inputs: Inputs) -> StoredImage | None:
        """Return the finished image of exactly these inputs."""

    def bake(
        self, inputs: Inputs, run: Run, step: Step, *, again: bool, on_boot: Callable[[float], None]
    ) -> StoredImage:
        """Bake an image, or finish one that a killed run has baked unless it is to be done `again`.

        `on_boot` gets the seconds that an emulated VM took until ssh answered.
        """

    def prove(self, image: Image, stored: StoredImage, run: Run, step: Step) -> Sequence[Proof]:
        """Prove an image on every configured machine, in their order.

        Raises BuildFailed, CloudFailed or TimedOut when one doesn't come up.
        """

    def judge(self, stored: StoredImage, verdict: Verdict) -> StoredImage:
        """Keep a verdict with the image that it is about."""
