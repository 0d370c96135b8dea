"""One move of a channel at every target where the image is promoted: its home, and its copies."""

from collections.abc import Sequence
from functools import partial

from ami_builder.build import channels
from ami_builder.build.channels import ChannelMove
from ami_builder.build.target import Target, TargetOutcome, at_each, first_alone
from ami_builder.config.schema import Image
from ami_builder.console import Progress, Step
from ami_builder.core.channels import ChannelEntry
from ami_builder.core.errors import CloudFailed, UsageError
from ami_builder.state.workspace import StoredImage
from ami_builder.verify.executor import ask_side_by_side

Moves = list[TargetOutcome["ChannelMove | None"]]
"""The outcome at each target, home first: a move, or None where nothing was to be moved."""


def chosen(targets: Sequence[Target], regions: Sequence[str]) -> list[Target]:
    """Return the targets with these names, in that order; all targets for none. Raises UsageError."""
    known = {target.name: target for target in targets}
    if regions and not targets[0].region:
        raise UsageError(f"--region {regions[0]}: a local image has no region", hint="add --target aws")
    for region in regions:
        if region not in known:
            raise UsageError(
                f"--region {region}: the image is not promoted there; expected one of {', '.join(known)}",
                hint="aws.region and aws.copy_to in ami-builder.toml name the regions",
            )
    return [known[region] for region in dict.fromkeys(regions)] or list(targets)


def promote(
    targets: Sequence[Target],
    image: Image,
    stored: StoredImage,
    channel: str,
    reason: str,
    progress: Progress,
) -> Moves:
    """Make an image the current one of a channel, and its copies at the other targets.

    Raises UsageError, and moves nothing, if the first target does not allow it.
    """

    def act(target: Target, step: Step) -> ChannelMove | None:
        if (found := target.find_copy(image, stored)) is None:
            raise CloudFailed(
                f"{target.name}: there is no copy of {stored.artifact.location}",
                hint=f"run `ami-builder copy {stored.artifact.location}`, then promote it again",
            )
        known = image.lifecycle.channels
        moved = channels.promote(target.channels(image), found, channel, known, reason)
        step.done(f"{_label(found)} is {'' if moved.entries else 'already '}current in {channel}")
        return moved

    return first_alone(targets, act, progress, "promote")


def rollback(targets: Sequence[Target], image: Image, channel: str, reason: str, progress: Progress) -> Moves:
    """Make the previous image current again, at each target whose current image is that of the first.

    Raises UsageError, and moves nothing, if the first target has no previous image.
    """
    digest = _current_digest(targets[0], image, channel)

    def act(target: Target, step: Step) -> ChannelMove | None:
        if target is not targets[0] and _current_digest(target, image, channel) != digest:
            step.done("left as it is: another image is current, or none")
            return None
        moved = channels.rollback(target.channels(image), channel, image.lifecycle.channels, reason)
        step.done(f"{_label(moved.stored)} is current in {channel} again")
        return moved

    return first_alone(targets, act, progress, "rollback")


def revoke(
    targets: Sequence[Target], image: Image, stored: StoredImage, reason: str, progress: Progress
) -> Moves:
    """Remove an image and its copies from every channel of every target, reachable or not.

    Copies are also looked for where the configuration does not name a target any more. A copy that is made
    later is revoked too. Raises UsageError if it is not an image of ours or if a channel can't be
    moved, after it was revoked everywhere else.
    """

    def act(target: Target, step: Step) -> ChannelMove | None:
        found = target.find_copy(image, stored)
        if found is None:
            step.done("there is no copy")
            return None
        moved = channels.revoke(target.channels(image), found, reason)
        step.done(f"removed from {', '.join(e.channel for e in moved.entries) or 'no channel'}")
        return moved

    moves = at_each(targets, act, progress, "revoke")
    moves += at_each(_more_with_copies(targets[0], image, stored, progress), act, progress, "revoke")
    for one in moves:
        if isinstance(one.error, UsageError):
            raise one.error
    return moves


def _more_with_copies(home: Target, image: Image, stored: StoredImage, progress: Progress) -> list[Target]:
    """Return the other targets that have a copy; report those where that can't be found out."""

    def has_copy(target: Target) -> bool | None:
        try:
            return target.find_copy(image, stored) is not None
        except CloudFailed:
            return None

    if not home.region:
        return []
    with progress.step("look for copies in other regions") as step:
        try:
            targets = home.unconfigured(image)
        except CloudFailed as failed:
            step.done(f"not done: {failed.message}")
            return []
        step.update(f"in {', '.join(target.name for target in targets)}")
        answers = ask_side_by_side([partial(has_copy, target) for target in targets])
        found = [target.name for target, answer in zip(targets, answers, strict=True) if answer]
        unknown = [target.name for target, answer in zip(targets, answers, strict=True) if answer is None]
        text = f"found in {', '.join(found)}" if found else "none found"
        step.done(text + (f"; could not look in {', '.join(unknown)}" if unknown else ""))
    return list(home.elsewhere(found)) if found else []


def history(
    targets: Sequence[Target], image: Image, channel: str, progress: Progress
) -> list[TargetOutcome[tuple[str, tuple[ChannelEntry, ...]]]]:
    """Return the current id of a channel, empty for none, and all its moves, for each target."""

    def act(target: Target, _: Step) -> tuple[str, tuple[ChannelEntry, ...]]:
        store = target.channels(image)
        entries = channels.history(store, channel, image.lifecycle.channels)
        return channels.current(store, channel), entries

    return first_alone(targets, act, progress, "history")


def _label(stored: StoredImage) -> str:
    """Return an AMI's id, or the first digits of a local image's digest, as `list` prints them."""
    return stored.name if stored.artifact.region else f"{stored.artifact.image} {stored.artifact.digest[:16]}"


def _current_digest(target: Target, image: Image, channel: str) -> str:
    """Return the digest of the current image of a channel; empty for none."""
    store = target.channels(image)
    image_id = channels.current(store, channel)
    stored = store.find(image_id) if image_id else None
    return stored.artifact.digest if stored is not None else ""
