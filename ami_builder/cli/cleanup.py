"""The commands that clean up: images that nothing needs, and orphaned resources of killed runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import typer

from ami_builder import console
from ami_builder.cli.options import (
    JsonFlag,
    TargetFlag,
    app,
    command,
    load_config,
    mode,
    open_workspace,
    plain,
)
from ami_builder.cli.targets import open_target
from ami_builder.core.cleanup import Action, Decision
from ami_builder.core.records import TargetKind


@app.command()
def prune(
    target: TargetFlag = TargetKind.QEMU,
    apply: Annotated[bool, typer.Option("--apply", help="Carry out the plan.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Plan which images, caches or AMIs to delete, with a reason for each. --apply deletes them.

    With --target aws the plan covers aws.region and all regions of aws.copy_to,
    and includes snapshots whose AMI no longer exists.
    """
    from ami_builder.build.cleanup import clean_up

    with console.open_progress(mode()) as progress:
        decisions = tuple(
            clean_up(load_config(target).images, partial(open_target, kind=target), progress, apply=apply)
        )
    if as_json:
        console.result_json({"applied": apply, "plan": plain(decisions)})
        return
    _print(decisions, target, apply=apply)


def _print(decisions: Sequence[Decision], target: TargetKind, *, apply: bool) -> None:
    to_do = {Action.DELETE: "to delete", Action.DEPRECATE: "to deprecate"}
    done = {Action.DELETE: "deleted", Action.DEPRECATE: "deprecated"}
    words = done if apply else to_do
    console.table(
        ("what", "created", "size", "plan", "because", "where"),
        [
            (
                d.candidate.image,
                f"{d.candidate.created:%Y-%m-%d %H:%M}Z" if d.candidate.created else "unknown",
                console.size(d.candidate.size),
                words.get(d.action, str(d.action)),
                d.reason,
                f"{d.candidate.id} ({d.candidate.region})" if d.candidate.region else d.candidate.id,
            )
            for d in decisions
        ],
    )
    for action, word in words.items():
        chosen = [d.candidate.size for d in decisions if d.action is action]
        if chosen:
            console.note(f"{len(chosen)} {word} ({console.size(sum(chosen))})")
    if not apply and any(d.action is not Action.KEEP for d in decisions):
        flags = [] if target is TargetKind.QEMU else ["--target", target]
        again = command("prune", *flags, "--apply")
        console.note(f"nothing was changed; run `{again}` to carry out the plan")


@app.command()
def gc(
    apply: Annotated[bool, typer.Option("--apply", help="Carry out the plan.")] = False,
    more: Annotated[
        list[str] | None,
        typer.Option(
            "--region",
            metavar="REGION",
            help="Another region to search, besides those in ami-builder.toml; repeatable.",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Find resources that killed runs left in the AWS account, by ledger and tag. --apply deletes them."""
    from ami_builder.aws.gc import every_region, find_orphans, remove_orphans

    regions = every_region(load_config(TargetKind.AWS).images.values(), more or ())
    workspace = open_workspace()
    with console.open_progress(mode()) as progress:
        orphans = find_orphans(regions, workspace, progress)
        if apply:
            remove_orphans(orphans, regions, workspace, progress)
    doomed = [one for one in orphans if one.action is Action.DELETE]
    if as_json:
        console.result_json({"applied": apply, "plan": plain(orphans)})
        return
    if not orphans:
        console.note(f"no resource of ami-builder in {', '.join(account.region for account in regions)}")
        return
    done = "deleted" if apply else "to delete"
    console.table(
        ("region", "what", "id", "name", "plan", "because"),
        [
            (
                one.found.region,
                one.found.kind,
                one.found.id,
                one.found.name,
                done if one.action is Action.DELETE else "keep",
                one.reason,
            )
            for one in orphans
        ],
    )
    if doomed and not apply:
        again = command("gc", *(word for region in more or () for word in ("--region", region)), "--apply")
        console.note(f"{len(doomed)} to delete; nothing was changed; run `{again}` to delete")
