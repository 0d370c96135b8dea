"""Cleaning up at all targets of the configured images: one plan for all, then its execution."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from datetime import timedelta
from functools import partial

from ami_builder.build.target import Target, TargetOutcome, require_all
from ami_builder.config.schema import Image, LifecycleSettings
from ami_builder.console import Progress
from ami_builder.core.cleanup import Action, Decision, RetentionPolicy
from ami_builder.core.errors import CloudFailed
from ami_builder.verify.executor import ask_side_by_side

KEEP_ALL = RetentionPolicy(keep=0, young=timedelta.max, grace=timedelta(0), most=0)


def policy(lifecycle: LifecycleSettings, *, deprecates: bool = False) -> RetentionPolicy:
    """Return the retention policy of an image's settings.

    Where images are deprecated before they are deleted there is a grace period, and no bound on their size.
    """
    return RetentionPolicy(
        keep=lifecycle.keep,
        young=timedelta(days=lifecycle.keep_days),
        grace=timedelta(days=lifecycle.grace_days if deprecates else 0),
        most=lifecycle.most_deletions,
        shared=timedelta(days=lifecycle.shared_days),
        size=0 if deprecates else lifecycle.size,
    )


def clean_up(
    images: Mapping[str, Image], home: Callable[[Image], Target], progress: Progress, *, apply: bool
) -> Iterator[Decision]:
    """Yield what is to be deprecated or deleted at every target of the images; if `apply`, once it is done.

    `home` opens the target of an image. Raises Locked, with nothing changed, while a build is running, and
    CloudFailed, without any plan, if anything that may need an image can't be read at one of the targets.
    """
    groups = _by_target(images, home)

    def plan(target: Target, mine: Mapping[str, Image]) -> tuple[Decision, ...]:
        with progress.step(f"plan the clean-up of {target.name}") as step:
            decisions = target.plan_cleanup(mine, step)
            to_do = sum(one.action is not Action.KEEP for one in decisions)
            step.done(f"{len(decisions)} found, {to_do} to deprecate or delete")
        return decisions

    with ExitStack() as locks:
        if apply:
            for target, mine in groups:
                locks.enter_context(target.exclusive(mine))
        plans = ask_side_by_side([partial(plan, *group) for group in groups])
        for (target, _), decisions in zip(groups, plans, strict=True):
            yield from target.clean_up(decisions, progress) if apply else decisions


def remove_orphans(images: Mapping[str, Image], home: Callable[[Image], Target], progress: Progress) -> None:
    """Remove what killed runs have left at every target of the images. Raises CloudFailed."""
    outcomes: list[TargetOutcome[None]] = []
    for target, mine in _by_target(images, home):
        error: CloudFailed | None = None
        try:
            target.remove_orphans(mine, progress)
        except CloudFailed as failed:
            error = failed
        outcomes.append(TargetOutcome(target=target.name, value=None, error=error))
    require_all(outcomes)


def _by_target(
    images: Mapping[str, Image], home: Callable[[Image], Target]
) -> list[tuple[Target, dict[str, Image]]]:
    """Return every target that an image is baked at or copied to, with its images."""
    found: dict[str, tuple[Target, dict[str, Image]]] = {}
    for name, image in images.items():
        target = home(image)
        for one in (target, *target.copies(image)):
            found.setdefault(one.name, (one, {}))[1][name] = image
    return list(found.values())
