"""The Target protocol: one place where images are baked, kept, verified and current in channels.

There are two kinds: this host (`qemu`), and one region of an account (`aws`). The modules above take targets,
and never ask which kind one is. Only `cli.targets` does, where it opens a target by the name of its kind.

- A target does not belong to an image: its methods take the image. An image has a home target, where it is
  baked, and `copies()` of it. A command that concerns all of them (promote, prune, a nightly run) takes a
  list of targets, the home first, and works on each with `at_each`.
- What a target offers is one protocol, in the order of an image's life: bake, verify, release, clean up. The
  channels are the one part with a protocol of its own, ChannelStore: their rules (`build.channels`) need
  nothing else of a target, and their eight methods would all have to repeat the image.
- Machines have a protocol too, `verify.machine.Machine`, because the verification needs no more of a target.
- The checks before a build (`ami-builder check`) are no part of it: they have to work where a target can't
  be opened, such as without credentials.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from ami_builder.build.channels import ChannelStore
from ami_builder.build.inputs import Inputs
from ami_builder.config.schema import Image
from ami_builder.console import Progress, Step
from ami_builder.core.cleanup import Decision
from ami_builder.core.errors import AmiBuilderError, CloudFailed
from ami_builder.core.records import TargetKind, Verdict
from ami_builder.state.workspace import Run, StoredImage
from ami_builder.verify.executor import side_by_side
from ami_builder.verify.machine import MachineResult

T = TypeVar("T")
K = TypeVar("K", bound="Target")


class Target(Protocol):
    """One place where images are baked, kept, verified and current in channels."""

    @property
    def kind(self) -> TargetKind:
        """The kind, as --target and records name it."""

    @property
    def name(self) -> str:
        """`this host`, or the region."""

    @property
    def region(self) -> str:
        """The region; empty for this host."""

    @property
    def emulated(self) -> bool | None:
        """Whether its machines are emulated; None if that is unknown, or never the case."""

    @property
    def builds_side_by_side(self) -> bool:
        """Whether it has room for the builds of several images at the same time."""

    def gather(self, image: Image, *, refresh: bool) -> Inputs:
        """Resolve everything that goes into the image, and digest it."""

    def find(self, image: Image, digest: str) -> StoredImage | None:
        """Return the finished image with exactly this digest."""

    def bake(
        self, inputs: Inputs, run: Run, step: Step, *, again: bool, on_boot: Callable[[float], None]
    ) -> StoredImage:
        """Bake an image. Unless `again`, finish one that a killed run has baked.

        `on_boot` gets the seconds until ssh answered on an emulated VM.
        """

    def verify(
        self, image: Image, stored: StoredImage, run: Run, step: Step, evidence: Path
    ) -> Sequence[MachineResult]:
        """Verify an image on every configured machine, and return their results in that order.

        The image is never written. `evidence` gets the consoles and the logs of checks that did not pass.
        Raises BuildFailed, CloudFailed or TimedOut when a machine doesn't come up.
        """

    def keep_verdict(self, stored: StoredImage, verdict: Verdict) -> StoredImage:
        """Keep a verdict with its image."""

    def copies(self, image: Image) -> Sequence[Target]:
        """Return the targets that the image is copied to. Raises UsageError if one is there twice."""

    def elsewhere(self, regions: Sequence[str]) -> Sequence[Target]:
        """Return the targets of these regions, once each; this one for none. Raises UsageError."""

    def unconfigured(self, image: Image) -> Sequence[Target]:
        """Return other targets where copies of the image may be, though it is not copied there now.

        They are to look only: they give up soon where nothing answers.
        """

    def find_copy(self, image: Image, stored: StoredImage) -> StoredImage | None:
        """Return an image as it is here, finished or not; None without a copy. Raises CloudFailed."""

    def receive(self, image: Image, stored: StoredImage, step: Step) -> StoredImage:
        """Return an image as it is here, once it can be launched; copy it if there is no copy yet.

        Raises CloudFailed and TimedOut.
        """

    def share(self, image: Image, stored: StoredImage, step: Step) -> Shared:
        """Share an image of this target with those that it is configured for. Raises CloudFailed."""

    def channels(self, image: Image) -> ChannelStore:
        """Return the record of the image's channels."""

    def exclusive(self, images: Mapping[str, Image]) -> AbstractContextManager[object]:
        """Keep builds and channels from changing during a clean-up, as far as possible. Raises Locked."""

    def plan_cleanup(self, images: Mapping[str, Image], step: Step) -> tuple[Decision, ...]:
        """Decide about everything of ours, by the rules of the configured `images`; change nothing.

        Raises CloudFailed if anything that may need an image can't be read.
        """

    def clean_up(self, decisions: Sequence[Decision], progress: Progress) -> Iterator[Decision]:
        """Carry out a plan that was made just now; yield each decision once done. Raises CloudFailed."""

    def remove_orphans(self, images: Mapping[str, Image], progress: Progress) -> None:
        """Remove what killed runs have left outside this host. Raises CloudFailed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """Who may launch an image after it was shared."""

    added: tuple[str, ...] = ()
    """Who was added; empty if everyone could before."""
    extra: tuple[str, ...] = ()
    """Who else may launch it, although the configuration does not name them: left as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetOutcome(Generic[T]):
    """The result at one target: a value, or the error that it failed with."""

    target: str
    value: T | None
    error: AmiBuilderError | None = None


def at_each(
    targets: Sequence[K], act: Callable[[K, Step], T], progress: Progress | Step, what: str = ""
) -> list[TargetOutcome[T]]:
    """Call `act` for all targets in parallel. One that fails does not end the others.

    A step of the progress has the name of its target, with `what` is done there if that is given.
    """

    def one(target: K) -> TargetOutcome[T]:
        try:
            with progress.step(_step_name(target, what)) as step:
                return TargetOutcome(target=target.name, value=act(target, step))
        except AmiBuilderError as failed:
            return TargetOutcome(target=target.name, value=None, error=failed)

    return side_by_side([partial(one, target) for target in targets])


def first_alone(
    targets: Sequence[Target], act: Callable[[Target, Step], T], progress: Progress, what: str
) -> list[TargetOutcome[T]]:
    """Call `act` for the first target, whose errors are raised, and then for the others in parallel."""
    first, *others = targets
    with progress.step(_step_name(first, what)) as step:
        done = TargetOutcome(target=first.name, value=act(first, step))
    return [done, *at_each(others, act, progress, what)]


def _step_name(target: Target, what: str) -> str:
    return f"{what} ({target.name})" if what else target.name


def require_all(outcomes: Sequence[TargetOutcome[T]]) -> None:
    """Raise CloudFailed if any target failed, with all of them and why."""
    failed = [(one.target, one.error) for one in outcomes if one.error is not None]
    if failed:
        raise CloudFailed(
            f"{len(failed)} of {len(outcomes)} regions failed: {', '.join(name for name, _ in failed)}",
            tail=tuple(error.message for _, error in failed),
            hint=next((error.hint for _, error in failed if error.hint), "run it again: what is done stays"),
        )
