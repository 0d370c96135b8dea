"""The commands that say which image is the current one of a channel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ami_builder import console

from .shared import (
    AMI,
    JsonFlag,
    TargetFlag,
    ami_of,
    app,
    load_config,
    open_workspace,
    parse_target,
    plain,
)

if TYPE_CHECKING:
    from ami_builder.model import Image, Target
    from ami_builder.pipeline.channels import Channels, Moved
    from ami_builder.workspace import StoredImage

ImageWord = Annotated[
    str,
    typer.Argument(metavar="IMAGE", help="A name (its newest image), a digest's first digits, or a path."),
]
ChannelArgument = Annotated[str, typer.Argument(metavar="CHANNEL", help="One of lifecycle.channels.")]
NamedFlag = Annotated[
    str | None, typer.Option("--image", metavar="IMAGE", help="Whose channel, of several images.")
]
ReasonFlag = Annotated[str, typer.Option("--reason", help="What `history` will tell.")]


@app.command()
def promote(
    image: ImageWord,
    channel: ChannelArgument,
    target: TargetFlag = "qemu",
    reason: ReasonFlag = "",
    as_json: JsonFlag = False,
) -> None:
    """Make a verified image the current one of a channel."""
    from ami_builder.pipeline import channels

    chosen, stored, record = _subject(image, target)
    moved = channels.promote(record, stored, channel, chosen.lifecycle.channels, reason)
    _print(moved, as_json=as_json)


@app.command()
def rollback(
    channel: ChannelArgument,
    image: NamedFlag = None,
    target: TargetFlag = "qemu",
    reason: ReasonFlag = "",
    as_json: JsonFlag = False,
) -> None:
    """Make the image that stood in a channel before the current one again."""
    from ami_builder.pipeline import channels

    chosen = load_config().select(image)
    record = _open(chosen, parse_target(target))
    _print(channels.rollback(record, channel, chosen.lifecycle.channels, reason), as_json=as_json)


@app.command()
def revoke(
    image: ImageWord,
    reason: Annotated[str, typer.Option("--reason", help="Why, for whoever meets it again.")],
    target: TargetFlag = "qemu",
    as_json: JsonFlag = False,
) -> None:
    """Take an image out of every channel, and keep it from coming back."""
    from ami_builder.pipeline import channels

    _, stored, record = _subject(image, target)
    moved = channels.revoke(record, stored, reason)
    _print(moved, as_json=as_json)
    for entry in moved.entries:
        console.note(f"channel {entry.channel}: {entry.id or 'nothing stands there any more'}")


@app.command()
def history(
    channel: ChannelArgument, image: NamedFlag = None, target: TargetFlag = "qemu", as_json: JsonFlag = False
) -> None:
    """Tell which image stood in a channel when, who moved it there, and why; the newest last."""
    from ami_builder.pipeline import channels
    from ami_builder.pipeline.summary import short

    chosen = load_config().select(image)
    record = _open(chosen, parse_target(target))
    entries = channels.history(record, channel, chosen.lifecycle.channels)
    if as_json:
        current = [id for id, where in channels.standing(record).items() if channel in where]
        console.result_json({"standing": current[0] if current else None, "entries": plain(entries)})
        return
    console.table(
        ("when", "what", "image", "who", "why"),
        [(f"{e.at:%Y-%m-%d %H:%M}Z", e.move, short(e.id) or "nothing", e.by, e.reason) for e in entries],
    )


def _subject(word: str, target: str) -> tuple[Image, StoredImage, Channels]:
    """Return the image that is meant, and the record of its channels; an AMI's id needs no --target."""
    from ami_builder.model import Target
    from ami_builder.pipeline.channels import choose

    where = Target.AWS if AMI.fullmatch(word) else parse_target(target)
    if where is Target.AWS:
        chosen, stored = ami_of(word)
        return chosen, stored, _open(chosen, where)
    config = load_config()
    known = [one for one in open_workspace().images() if one.artifact.target is where]
    stored = choose(known, word, config.names)
    chosen = config.select(stored.artifact.image)
    return chosen, stored, _open(chosen, where)


def _open(image: Image, target: Target) -> Channels:
    from ami_builder.model import Target

    if target is Target.AWS:
        from ami_builder.pipeline.cloud import CloudSite
        from ami_builder.pipeline.cloud_channels import CloudChannels

        return CloudChannels(site=CloudSite.open(image, open_workspace()), image=image)
    from ami_builder.pipeline.local_channels import LocalChannels

    return LocalChannels(workspace=open_workspace(), image=image.name)


def _print(moved: Moved, *, as_json: bool) -> None:
    if as_json:
        console.result_json({"artifact": plain(moved.stored.artifact), "entries": plain(moved.entries)})
    else:
        console.result(moved.stored.artifact.location)
