"""The command that deletes finished images which nothing needs."""

from __future__ import annotations

from typing import Annotated

import typer

from ami_builder import console

from .shared import JsonFlag, app, load_config, open_workspace, plain


@app.command()
def prune(
    apply: Annotated[bool, typer.Option("--apply", help="Delete what the plan says.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Say of every local image and cache whether it is needed, and why; --apply deletes what is not."""
    from datetime import UTC, datetime

    from ami_builder.pipeline.prune import plan_local, prune_local
    from ami_builder.retention import Action

    images, workspace = load_config().images, open_workspace()
    decisions = prune_local(workspace, images) if apply else plan_local(workspace, images, datetime.now(UTC))
    if as_json:
        console.result_json({"applied": apply, "plan": plain(decisions)})
        return
    said = {Action.DELETE: "deleted" if apply else "to delete"}
    console.table(
        ("what", "created", "size", "plan", "because", "where"),
        [
            (
                d.candidate.image,
                f"{d.candidate.created:%Y-%m-%d %H:%M}Z" if d.candidate.created else "unknown",
                console.size(d.candidate.size),
                said.get(d.action, str(d.action)),
                d.reason,
                d.candidate.id,
            )
            for d in decisions
        ],
    )
    doomed = [d for d in decisions if d.action is Action.DELETE]
    freed = console.size(sum(d.candidate.size for d in doomed))
    if doomed and not apply:
        console.note(
            f"{len(doomed)} to delete ({freed}); nothing was changed: `ami-builder prune --apply` does it"
        )
    elif doomed:
        console.note(f"{len(doomed)} deleted ({freed})")
