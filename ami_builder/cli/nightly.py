"""The command that a timer runs every night."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from ami_builder import console
from ami_builder.cli.options import (
    DaskFlag,
    JsonFlag,
    TargetFlag,
    app,
    load_config,
    mode,
    open_site,
    open_workspace,
    parse_target,
    plain,
)

if TYPE_CHECKING:
    from ami_builder.build.place import Place
    from ami_builder.config.loading import Config
    from ami_builder.config.schema import Image
    from ami_builder.console import Progress
    from ami_builder.core.cleanup import Decision
    from ami_builder.core.records import NightlyRun, TargetKind
    from ami_builder.nightly.run import Ended


@app.command()
def nightly(
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="IMAGE", help="Names of images in ami-builder.toml.  [default: all]"),
    ] = None,
    target: TargetFlag = "qemu",
    prune: Annotated[bool, typer.Option(help="Delete what nothing needs, as `prune` and `gc` do.")] = True,
    dask_scheduler: DaskFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Build, verify, compare, copy, share, promote and prune what changed since the last nightly run.

    A run that was killed continues where it stopped. The result is posted
    to the Slack-compatible webhook of AMI_BUILDER_WEBHOOK.

    Exit codes: 0 promoted or unchanged, 4 the build failed, 5 checks failed,
    6 the cloud or a region failed, 7 timed out, 8 another nightly run is active,
    9 on hold until a person decides, 10 inconclusive because the host was too busy.
    """
    try:
        ended = _nights(images or (), target, prune, dask_scheduler)
    except Exception as aborted:
        # A nightly run that ended by itself has already sent its result.
        from ami_builder.nightly.summary import aborted_text

        _notify(aborted_text(images or (), target, aborted))
        raise
    nights = [one.night for one in ended]
    for one in ended:
        if one.error is not None:
            console.error(one.error)
    _print(nights, as_json=as_json)
    codes = [night.exit_code for night in nights if night.exit_code]
    if codes:
        raise typer.Exit(worst(codes))


def worst(codes: Sequence[int]) -> int:
    """Return the worst exit code of several runs: a failure, else a busy host, else an image on hold."""
    from ami_builder.core.errors import Inconclusive, OnHold

    milder = {Inconclusive.exit_code: 1, OnHold.exit_code: 2}
    return min(codes, key=lambda code: milder.get(code, 0))


def _nights(images: Sequence[str], target: str, prune: bool, dask_scheduler: str | None) -> Sequence[Ended]:
    from ami_builder.nightly.run import Subject
    from ami_builder.nightly.run import nightly as go

    config, where = load_config(), parse_target(target)
    subjects = [
        Subject(
            image=one,
            site=open_site(one, where, dask_scheduler=dask_scheduler),
            places=_places(one, where),
        )
        for one in (config.select(name) for name in dict.fromkeys(images or config.names))
    ]
    with console.open_progress(mode()) as progress:
        return go(
            subjects,
            open_workspace(),
            progress,
            prune=partial(_prune, config, where) if prune else None,
            notify=_notify,
        )


def _notify(text: str) -> str:
    from ami_builder.nightly import webhook

    unsent = webhook.notify_if_set(os.environ, text)
    if unsent:
        console.note(f"the webhook was not notified: {unsent}")
    return unsent


def _places(image: Image, target: TargetKind) -> Sequence[Place]:
    from ami_builder.core.records import TargetKind

    if target is TargetKind.AWS:
        from ami_builder.aws.place import places

        return places(image, open_workspace())
    from ami_builder.build.place import LocalPlace

    return (LocalPlace(workspace=open_workspace(), image=image.name),)


def _prune(config: Config, target: TargetKind, progress: Progress) -> Sequence[Decision]:
    from ami_builder.core.records import TargetKind

    if target is TargetKind.AWS:
        from ami_builder.aws.cleanup import plan_cloud, prune_cloud
        from ami_builder.aws.gc import every_region, find_orphans, remove_orphans

        workspace, regions = open_workspace(), every_region(config.images.values())
        planned = plan_cloud(workspace, config.images, progress)
        prune_cloud(planned, progress)
        remove_orphans(find_orphans(regions, workspace, progress), regions, workspace, progress)
        return [decision for _, decisions in planned for decision in decisions]
    from ami_builder.core.cleanup import Action
    from ami_builder.qemu.cleanup import prune_local

    with progress.step("prune") as step:
        decisions = prune_local(open_workspace(), config.images)
        step.done(f"{sum(one.action is Action.DELETE for one in decisions)} deleted")
    return decisions


def _print(nights: Sequence[NightlyRun], *, as_json: bool) -> None:
    from ami_builder.nightly.summary import headline, short

    if as_json:
        console.result_json({"nights": plain(nights)})
        return
    rows = []
    for night in nights:
        ended = [(one.place, one.ending, short(one.id), one.text) for one in night.places]
        ended = ended or [("", night.ending, short(night.digest), night.error or "; ".join(night.drifts))]
        rows += [(night.image, night.channel, *row) for row in ended]
    console.table(("image", "channel", "where", "ended", "id", "because"), rows)
    for night in nights:
        console.note(headline(night))
