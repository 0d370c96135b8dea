"""The commands that bring an AMI to other regions, and let others launch it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ami_builder import console
from ami_builder.cli.shared import JsonFlag, ami_of, app, failures, mode, open_workspace, plain
from ami_builder.core.errors import CloudFailed, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ami_builder.aws.place import CloudPlace
    from ami_builder.aws.sharing import Shared
    from ami_builder.console import Step
    from ami_builder.core.records import Aws, Destination
    from ami_builder.state.workspace import StoredImage

AmiArgument = Annotated[
    str | None, typer.Argument(metavar="[IMAGE|AMI]", help="A name (its newest AMI), or an AMI's id.")
]


@app.command()
def copy(
    image: AmiArgument = None,
    region: Annotated[
        list[str] | None,
        typer.Option(
            "--region",
            metavar="REGION[=KEY]",
            help="Where to, and the KMS key there, instead of aws.copy_to; repeatable.",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Copy a finished AMI to other regions, side by side; prints region and AMI id, one a line.

    A copy that is there already is answered, one that a killed run began is finished.
    """
    from dataclasses import replace

    from ami_builder.aws.place import at_each, places, require_all

    chosen, stored = ami_of(image)
    if region:
        chosen = replace(chosen, aws=replace(chosen.aws, copy_to=_destinations(region, chosen.aws)))
    if not chosen.aws.copy_to:
        raise UsageError("no region to copy to", hint="name them in aws.copy_to, or with --region")
    _, *others = places(chosen, open_workspace())

    def bring(place: CloudPlace, step: Step) -> StoredImage:
        return place.bring(stored, step)

    with console.open_progress(mode()) as progress:
        outcomes = at_each(others, bring, progress)
    done = [one.value.artifact for one in outcomes if one.value is not None]
    if as_json:
        console.result_json({"copies": plain(done), "failed": failures(outcomes)})
    elif done:
        console.result([f"{one.region}\t{one.location}" for one in done])
    require_all(outcomes)


@app.command()
def share(image: AmiArgument = None, as_json: JsonFlag = False) -> None:
    """Let those of aws.share_with launch an AMI and its copies; prints region and AMI id, one a line.

    It only ever adds. Whom aws.share_with names no more is told, and stays
    until somebody takes it back in AWS: clusters may be running from it.
    The key of an encrypted AMI must let them use it besides.
    """
    from ami_builder.aws.place import at_each, places, require_all

    chosen, stored = ami_of(image)

    def grant(place: CloudPlace, step: Step) -> tuple[str, Shared]:
        if (found := place.find(stored)) is None:
            raise CloudFailed(
                f"{place.name}: there is no copy of {stored.artifact.location}",
                hint="`ami-builder copy` makes one",
            )
        shared = place.grant(found)
        step.done(f"added {', '.join(shared.added)}" if shared.added else "nobody was lacking")
        return found.artifact.location, shared

    with console.open_progress(mode()) as progress:
        outcomes = at_each(places(chosen, open_workspace()), grant, progress)
    done = [(one.place, *one.value) for one in outcomes if one.value is not None]
    if as_json:
        told = [{"region": region, "ami": ami, **plain(shared)} for region, ami, shared in done]
        console.result_json({"shared": told, "failed": failures(outcomes)})
    elif done:
        console.result([f"{region}\t{ami}" for region, ami, _ in done])
    for region, ami, shared in done:
        if shared.extra:
            console.note(f"{region}: {', '.join(shared.extra)} may launch {ami} too, not by aws.share_with")
    require_all(outcomes)


def _destinations(words: Sequence[str], aws: Aws) -> tuple[Destination, ...]:
    """Return what --region names; a region of aws.copy_to has the key that stands there, unless told."""
    from ami_builder.config.types import parse_destination

    known = {one.region: one for one in aws.copy_to}
    found = []
    for word in words:
        try:
            asked = parse_destination(word)
        except ValueError as wrong:
            raise UsageError(f"--region {word}: {wrong}") from wrong
        found.append(asked if asked.kms_key else known.get(asked.region, asked))
    return tuple(found)
