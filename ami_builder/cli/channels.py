"""The commands that set, or list, which image is current in a channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ami_builder import console
from ami_builder.cli.options import (
    AMI,
    JsonFlag,
    TargetFlag,
    ami_of,
    app,
    failures,
    load_config,
    mode,
    open_workspace,
    parse_target,
    plain,
)
from ami_builder.core.records import TargetKind

if TYPE_CHECKING:
    from ami_builder.aws.place import CloudPlace
    from ami_builder.aws.regions import Moves
    from ami_builder.build.channels import Moved
    from ami_builder.config.schema import Image
    from ami_builder.console import Progress
    from ami_builder.core.channels import ChannelEntry
    from ami_builder.qemu.channels import LocalChannels
    from ami_builder.state.workspace import StoredImage

ImageWord = Annotated[
    str,
    typer.Argument(
        metavar="IMAGE", help="Image name (its newest image), first digits of a digest, path, or AMI id."
    ),
]
ChannelArgument = Annotated[
    str, typer.Argument(metavar="CHANNEL", help="Name of a channel in lifecycle.channels.")
]
NamedFlag = Annotated[
    str | None,
    typer.Option(
        "--image", metavar="IMAGE", help="Image whose channel is meant, if there are several images."
    ),
]
ReasonFlag = Annotated[str, typer.Option("--reason", help="The reason that `history` prints.")]
RegionFlag = Annotated[
    list[str] | None,
    typer.Option("--region", metavar="REGION", help="With --target aws: only in this region; repeatable."),
]


@app.command()
def promote(
    image: ImageWord,
    channel: ChannelArgument,
    target: TargetFlag = "qemu",
    region: RegionFlag = None,
    reason: ReasonFlag = "",
    as_json: JsonFlag = False,
) -> None:
    """Make a verified image the current one of a channel.

    An AMI is promoted in aws.region and in every region of aws.copy_to, each with its own copy.
    """
    from ami_builder.build import channels

    chosen, stored = _subject(image, target)
    if stored.artifact.target is TargetKind.AWS:
        from ami_builder.aws import regions

        _everywhere(
            chosen,
            region,
            lambda places, progress: regions.promote(places, stored, channel, reason, progress),
            as_json=as_json,
        )
        return
    _refuse_regions(region)
    record = _local(chosen)
    _print(channels.promote(record, stored, channel, chosen.lifecycle.channels, reason), as_json=as_json)


@app.command()
def rollback(
    channel: ChannelArgument,
    image: NamedFlag = None,
    target: TargetFlag = "qemu",
    region: RegionFlag = None,
    reason: ReasonFlag = "",
    as_json: JsonFlag = False,
) -> None:
    """Make the previous image of a channel current again.

    AMIs are rolled back in every region whose current image is that of the first region.
    """
    from ami_builder.build import channels

    chosen = load_config().select(image)
    if parse_target(target) is TargetKind.AWS:
        from ami_builder.aws import regions

        _everywhere(
            chosen,
            region,
            lambda places, progress: regions.rollback(places, channel, reason, progress),
            as_json=as_json,
        )
        return
    _refuse_regions(region)
    record = _local(chosen)
    _print(channels.rollback(record, channel, chosen.lifecycle.channels, reason), as_json=as_json)


@app.command()
def revoke(
    image: ImageWord,
    reason: Annotated[
        str, typer.Option("--reason", help="Why; printed when someone tries to use the image.")
    ],
    target: TargetFlag = "qemu",
    as_json: JsonFlag = False,
) -> None:
    """Remove an image from every channel, with all its copies, and block it from being promoted again."""
    from ami_builder.build import channels

    chosen, stored = _subject(image, target)
    if stored.artifact.target is TargetKind.AWS:
        from ami_builder.aws import regions

        _everywhere(
            chosen,
            None,
            lambda places, progress: regions.revoke(places, stored, reason, progress),
            as_json=as_json,
        )
        return
    moved = channels.revoke(_local(chosen), stored, reason)
    _print(moved, as_json=as_json)
    _tell(moved)


@app.command()
def history(
    channel: ChannelArgument,
    image: NamedFlag = None,
    target: TargetFlag = "qemu",
    region: RegionFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """List the moves of a channel: when, which image, who and why, newest last.

    AMIs have one history per region; AWS keeps the last 100 moves.
    """
    from ami_builder.build import channels

    chosen = load_config().select(image)
    if parse_target(target) is TargetKind.AWS:
        from ami_builder.aws import place as cloud_place
        from ami_builder.aws import regions

        with console.open_progress(console.Mode.QUIET) as progress:
            places = regions.narrowed(cloud_place.places(chosen, open_workspace()), region or ())
            found = regions.history(places, channel, progress)
        told = [(one.place, *one.value) for one in found if one.value is not None]
        _print_history(told, as_json=as_json)
        cloud_place.require_all(found)
        return
    _refuse_regions(region)
    record = _local(chosen)
    entries = channels.history(record, channel, chosen.lifecycle.channels)
    _print_history([("", channels.current(record, channel), entries)], as_json=as_json)


def _print_history(told: Sequence[tuple[str, str, Sequence[ChannelEntry]]], *, as_json: bool) -> None:
    """Print the current image and the moves of a channel, per region or for this host."""
    from ami_builder.nightly.summary import short

    if as_json:
        shown = [
            {"region": region, "standing": standing or None, "entries": plain(entries)}
            for region, standing, entries in told
        ]
        first = {key: value for key, value in shown[0].items() if key != "region"}
        console.result_json({**first, "regions": shown} if told[0][0] else first)
        return
    several = len(told) > 1
    columns = ("when", "what", "image", "who", "why")
    console.table(
        ("where", *columns) if several else columns,
        [
            (
                *([region] if several else []),
                *(f"{e.at:%Y-%m-%d %H:%M}Z", e.move, short(e.id) or "nothing", e.by, e.reason),
            )
            for region, _, entries in told
            for e in entries
        ],
    )


def _subject(word: str, target: str) -> tuple[Image, StoredImage]:
    """Return the image that a word names. An AMI id needs no --target."""
    from ami_builder.build.channels import choose

    where = TargetKind.AWS if AMI.fullmatch(word) else parse_target(target)
    if where is TargetKind.AWS:
        return ami_of(word)
    config = load_config()
    known = [one for one in open_workspace().images() if one.artifact.target is where]
    stored = choose(known, word, config.names)
    return config.select(stored.artifact.image), stored


def _local(image: Image) -> LocalChannels:
    from ami_builder.qemu.channels import LocalChannels

    return LocalChannels(workspace=open_workspace(), image=image.name)


def _refuse_regions(regions: Sequence[str] | None) -> None:
    from ami_builder.core.errors import UsageError

    if regions:
        raise UsageError(f"--region {regions[0]}: a local image has no region", hint="add --target aws")


def _everywhere(
    image: Image,
    region: Sequence[str] | None,
    move: Callable[[Sequence[CloudPlace], Progress], Moves],
    *,
    as_json: bool,
) -> None:
    """Move a channel in every region and print one line per region: region and AMI, or only the AMI."""
    from ami_builder.aws import place as cloud_place
    from ami_builder.aws import regions

    with console.open_progress(mode()) as progress:
        places = regions.narrowed(cloud_place.places(image, open_workspace()), region or ())
        moves = move(places, progress)
    done = [(one.place, one.value) for one in moves if one.value is not None]
    several = bool(image.aws.copy_to)
    if as_json:
        told = [{"region": place, **_plain(moved)} for place, moved in done]
        first = _plain(done[0][1]) if done else {}
        console.result_json({**first, "regions": told, "failed": failures(moves)})
    elif done:
        locations = [(place, moved.stored.artifact.location) for place, moved in done]
        console.result([f"{place}\t{ami}" if several else ami for place, ami in locations])
    for place, moved in done:
        _tell(moved, f"{place}: " if several else "")
    cloud_place.require_all(moves)


def _print(moved: Moved, *, as_json: bool) -> None:
    if as_json:
        console.result_json(_plain(moved))
    else:
        console.result(moved.stored.artifact.location)


def _plain(moved: Moved) -> dict[str, Any]:
    return {"artifact": plain(moved.stored.artifact), "entries": plain(moved.entries)}


def _tell(moved: Moved, where: str = "") -> None:
    """Print which image became current because another one was revoked."""
    from ami_builder.core.channels import Move
    from ami_builder.nightly.summary import short

    for entry in moved.entries:
        if entry.move is Move.REVOKED:
            now = short(entry.id) or "no image is current"
            console.note(f"{where}channel {entry.channel}: {now}")
