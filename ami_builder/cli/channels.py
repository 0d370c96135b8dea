"""The commands that set, or list, which image is current in a channel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ami_builder import console
from ami_builder.cli.options import ImageWord, JsonFlag, TargetFlag, app, failures, load_config, mode, plain
from ami_builder.cli.targets import find_image, open_target
from ami_builder.core.channels import Move
from ami_builder.core.records import TargetKind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ami_builder.build.channels import ChannelMove
    from ami_builder.build.promotion import Moves
    from ami_builder.build.target import Target
    from ami_builder.config.schema import Image
    from ami_builder.console import Progress

ChannelArgument = Annotated[
    str, typer.Argument(metavar="CHANNEL", help="Name of a channel in lifecycle.channels.")
]
NamedFlag = Annotated[
    str | None,
    typer.Option(
        "--image", metavar="IMAGE", help="Name of an image in ami-builder.toml; needed if there are several."
    ),
]
ReasonFlag = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why; `history` prints it.")]
RegionFlag = Annotated[
    list[str] | None,
    typer.Option("--region", metavar="REGION", help="With --target aws: only in this region; repeatable."),
]


@app.command()
def promote(
    image: ImageWord,
    channel: ChannelArgument,
    target: TargetFlag = TargetKind.QEMU,
    region: RegionFlag = None,
    reason: ReasonFlag = "",
    as_json: JsonFlag = False,
) -> None:
    """Make a verified image the current one of a channel.

    An AMI is promoted in aws.region and in every region of aws.copy_to, each with its own copy.
    """
    from ami_builder.build import promotion

    chosen, stored, home = find_image(image, target)

    def move(targets: Sequence[Target], progress: Progress) -> Moves:
        return promotion.promote(targets, chosen, stored, channel, reason, progress)

    _everywhere(chosen, home, region or (), move, as_json=as_json)


@app.command()
def rollback(
    channel: ChannelArgument,
    image: NamedFlag = None,
    target: TargetFlag = TargetKind.QEMU,
    region: RegionFlag = None,
    reason: ReasonFlag = "",
    as_json: JsonFlag = False,
) -> None:
    """Make the previous image of a channel current again.

    An AMI is also rolled back in every other region where the same image is current.
    """
    from ami_builder.build import promotion

    chosen = load_config(target).select(image)

    def move(targets: Sequence[Target], progress: Progress) -> Moves:
        return promotion.rollback(targets, chosen, channel, reason, progress)

    home = open_target(chosen, target)
    _everywhere(chosen, home, region or (), move, as_json=as_json)


@app.command()
def revoke(
    image: ImageWord,
    reason: Annotated[
        str,
        typer.Option("--reason", metavar="TEXT", help="Why; printed when someone tries to use the image."),
    ],
    target: TargetFlag = TargetKind.QEMU,
    as_json: JsonFlag = False,
) -> None:
    """Remove an image and its copies from every channel, and refuse to promote it again."""
    from ami_builder.build import promotion

    chosen, stored, home = find_image(image, target)

    def move(targets: Sequence[Target], progress: Progress) -> Moves:
        return promotion.revoke(targets, chosen, stored, reason, progress)

    _everywhere(chosen, home, (), move, as_json=as_json)


@app.command()
def history(
    channel: ChannelArgument,
    image: NamedFlag = None,
    target: TargetFlag = TargetKind.QEMU,
    region: RegionFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """List the moves of a channel: when, which image became current, who and why, newest last.

    AMIs have one history per region; AWS keeps the last 100 moves.
    """
    from ami_builder.build import promotion
    from ami_builder.build.target import require_all
    from ami_builder.nightly.summary import short

    chosen = load_config(target).select(image)
    home = open_target(chosen, target)
    with console.open_progress(console.Mode.QUIET) as progress:
        targets = promotion.chosen((home, *home.copies(chosen)), region or ())
        found = promotion.history(targets, chosen, channel, progress)
    moves = [(one.target, *one.value) for one in found if one.value is not None]
    if not as_json and not any(entries for _, _, entries in moves):
        console.note(f"no image was ever current in channel {channel}")
    if as_json:
        found_in = [
            {"region": name, "standing": current or None, "entries": plain(entries)}
            for name, current, entries in moves
        ]
        whole = {key: value for key, value in found_in[0].items() if key != "region"}
        console.result_json({**whole, "regions": found_in} if home.region else whole)
    else:
        rows = [
            (
                name,
                f"{e.at:%Y-%m-%d %H:%M}Z",
                f"{e.move} {short(before)}" if e.move is Move.REVOKED else e.move,
                short(e.id) or "none",
                e.by,
                e.reason,
            )
            for name, _, entries in moves
            for e, before in zip(entries, ["", *(one.id for one in entries)], strict=False)
        ]
        first = 0 if len(moves) > 1 else 1  # without the only target
        heading = ("where", "when", "what", "current from then on", "who", "why")
        console.table(heading[first:], [row[first:] for row in rows])
    require_all(found)


def _everywhere(
    image: Image,
    home: Target,
    regions: Sequence[str],
    move: Callable[[Sequence[Target], Progress], Moves],
    *,
    as_json: bool,
) -> None:
    """Move a channel at every target of an image, and print one line for each."""
    from ami_builder.build.promotion import chosen
    from ami_builder.build.target import require_all
    from ami_builder.nightly.summary import short

    every = (home, *home.copies(image))
    with console.open_progress(mode()) as progress:
        moves = move(chosen(every, regions), progress)
    done = [(one.target, one.value) for one in moves if one.value is not None]
    several = len(every) > 1 or len(done) > 1
    if as_json:
        first = _plain(done[0][1]) if done else {}
        rows = [{"region": name, **_plain(moved)} for name, moved in done]
        more = {"regions": rows, "failed": failures(moves)} if home.region else {}
        console.result_json({**first, **more})
    elif done:
        locations = [(name, moved.stored.artifact.location) for name, moved in done]
        console.result([f"{name}\t{location}" if several else location for name, location in locations])
    for name, moved in done:
        for entry in moved.entries:
            if entry.move is Move.REVOKED:
                where, now = f"{name}: " if several else "", short(entry.id) or "no image is current"
                console.note(f"{where}channel {entry.channel}: {now}")
    require_all(moves)


def _plain(moved: ChannelMove) -> dict[str, Any]:
    return {"artifact": plain(moved.stored.artifact), "entries": plain(moved.entries)}
