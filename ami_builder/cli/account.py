"""The commands about an AWS account: what was left there, and what we need to be allowed."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ami_builder import console
from ami_builder.cli.shared import JsonFlag, app, load_config, mode, open_workspace, parse_choice, plain


@app.command()
def gc(
    apply: Annotated[bool, typer.Option("--apply", help="Delete what the plan says.")] = False,
    more: Annotated[
        list[str] | None,
        typer.Option("--region", help="A region besides those in ami-builder.toml; repeatable."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Find what killed runs left in the AWS account, by ledger and by tag; show the plan, or act on it."""
    from ami_builder.aws.gc import every_region, find_leftovers, remove_leftovers
    from ami_builder.core.orphans import Action

    regions = every_region(load_config().images.values(), more or ())
    workspace = open_workspace()
    with console.open_progress(mode()) as progress:
        leftovers = find_leftovers(regions, workspace, progress)
        if apply:
            remove_leftovers(leftovers, regions, workspace, progress)
    doomed = [one for one in leftovers if one.action is Action.DELETE]
    if as_json:
        console.result_json({"applied": apply, "plan": plain(leftovers)})
        return
    if not leftovers:
        console.note(f"nothing of ours is in {', '.join(region.account.region for region in regions)}")
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
            for one in leftovers
        ],
    )
    if doomed and not apply:
        console.note(f"{len(doomed)} to delete; nothing was changed: `ami-builder gc --apply` does it")


@app.command("iam-policy")
def iam_policy(
    section: Annotated[
        str,
        typer.Argument(
            metavar="[all|check|build|verify|copy|promote|prune|lifecycle]", help="What it is to allow."
        ),
    ] = "all",
    image: Annotated[
        str | None, typer.Option("--image", metavar="IMAGE", help="Whose region, key, profile … it names.")
    ] = None,
) -> None:
    """Print the IAM policy with the least that the work in an AWS account needs."""
    from ami_builder.aws.policy import LONGEST, Section, document

    policy = document(parse_choice("iam-policy", section, Section), load_config().select(image).aws)
    console.result(json.dumps(policy, indent=2))
    if (size := len(json.dumps(policy, separators=(",", ":")))) > LONGEST:
        console.note(
            f"{size} characters, and a managed policy has {LONGEST} at most: "
            "print the parts one by one, and attach each"
        )
