"""The unattended pipeline, as a command for a timer."""

from __future__ import annotations

import os
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
    open_workspace,
    plain,
)
from ami_builder.cli.targets import open_target
from ami_builder.core.records import TargetKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from ami_builder.build.target import Target
    from ami_builder.config.schema import Image
    from ami_builder.console import Progress
    from ami_builder.core.cleanup import Decision
    from ami_builder.core.records import NightlyRun
    from ami_builder.nightly.run import Ended


@app.command()
def nightly(
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="IMAGE", help="Names of images in ami-builder.toml. Default: all."),
    ] = None,
    target: TargetFlag = TargetKind.QEMU,
    prune: Annotated[bool, typer.Option(help="Delete what nothing needs, as `prune` and `gc` do.")] = True,
    dask_scheduler: DaskFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Build and verify images whose inputs changed, copy and promote them, and delete old images.

    A new image that differs too much from the current one is put on hold instead.
    A run that was killed continues where it stopped. The result is posted
    to the Slack-compatible webhook whose URL is in AMI_BUILDER_WEBHOOK.

    Exit codes: 0 promoted or unchanged, 4 the build failed, 5 checks failed,
    6 the cloud or a region failed, 7 timed out, 8 another nightly run is active,
    9 on hold until a person decides, 10 inconclusive because the host was too busy.
    """
    try:
        ended = _run(images or (), target, prune, dask_scheduler)
    except Exception as aborted:
        # A nightly run that ended by itself has already sent its result.
        from ami_builder.nightly.summary import aborted_text

        _notify(aborted_text(images or (), target, aborted))
        raise
    runs = [one.run for one in ended]
    for one in ended:
        if one.error is not None:
            console.error(one.error)
    _print(runs, as_json=as_json)
    codes = [run.exit_code for run in runs if run.exit_code]
    if codes:
        raise typer.Exit(worst(codes))


def worst(codes: Sequence[int]) -> int:
    """Return the worst exit code of several runs: a failure, else a busy host, else an image on hold."""
    from ami_builder.core.errors import Inconclusive, OnHold

    milder = {Inconclusive.exit_code: 1, OnHold.exit_code: 2}
    return min(codes, key=lambda code: milder.get(code, 0))


def _run(
    images: Sequence[str], target: TargetKind, prune: bool, dask_scheduler: str | None
) -> Sequence[Ended]:
    from ami_builder.nightly.run import nightly as go

    config = load_config(target)
    chosen = [config.select(name) for name in dict.fromkeys(images or config.images)]
    subjects = [(one, open_target(one, target, dask_scheduler=dask_scheduler)) for one in chosen]
    with console.open_progress(mode()) as progress:
        return go(
            subjects,
            open_workspace(),
            progress,
            prune=partial(_prune, config.images, partial(open_target, kind=target)) if prune else None,
            notify=_notify,
        )


def _notify(text: str) -> str:
    from ami_builder.nightly import webhook

    unsent = webhook.notify_if_set(os.environ, text)
    if unsent:
        console.note(f"the webhook was not notified: {unsent}")
    return unsent


def _prune(
    images: Mapping[str, Image], home: Callable[[Image], Target], progress: Progress
) -> Iterator[Decision]:
    from ami_builder.build.cleanup import clean_up, remove_orphans

    yield from clean_up(images, home, progress, apply=True)
    remove_orphans(images, home, progress)


def _print(runs: Sequence[NightlyRun], *, as_json: bool) -> None:
    from ami_builder.nightly.summary import headline, short

    if as_json:
        console.result_json({"nights": plain(runs)})
        return
    rows = []
    for run in runs:
        ended = [(one.place, one.ending, short(one.id), one.text) for one in run.places]
        ended = ended or [("", run.ending, short(run.digest), run.error or "; ".join(run.drifts))]
        rows += [(run.image, run.channel, *row) for row in ended]
    console.table(("image", "channel", "where", "ended", "id", "because"), rows)
    for run in runs:
        console.note(headline(run))
