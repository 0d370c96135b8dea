"""The commands for AWS: copy and share AMIs, print the IAM policy."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ami_builder import console
from ami_builder.aws.policy import LONGEST, Section, document, of_instances, parts, size
from ami_builder.cli.options import JsonFlag, app, failures, load_config, mode, plain
from ami_builder.cli.targets import find_image
from ami_builder.core.errors import CloudFailed, UsageError
from ami_builder.core.records import TargetKind
from ami_builder.state.workspace import write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ami_builder.build.target import Shared, Target
    from ami_builder.config.schema import AwsSettings
    from ami_builder.config.types import Destination
    from ami_builder.console import Step
    from ami_builder.state.workspace import StoredImage

AmiArgument = Annotated[
    str | None, typer.Argument(metavar="IMAGE|AMI", help="Image name (its newest AMI), or AMI id.")
]


@app.command()
def copy(
    image: AmiArgument = None,
    region: Annotated[
        list[str] | None,
        typer.Option(
            "--region",
            metavar="REGION[=KEY]",
            help="Copy to this region, with this KMS key, instead of aws.copy_to; repeatable.",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Copy a finished AMI to other regions in parallel. Prints one line per region: region and AMI id.

    An existing copy is reused. A copy that a killed run began is completed.
    """
    from dataclasses import replace

    from ami_builder.build.target import at_each, require_all

    chosen, stored, home = find_image(image, TargetKind.AWS)
    if region:
        chosen = replace(chosen, aws=replace(chosen.aws, copy_to=_destinations(region, chosen.aws)))
    if not chosen.aws.copy_to:
        raise UsageError("no region to copy to", hint="set aws.copy_to, or use --region")
    others = home.copies(chosen)

    def receive(target: Target, step: Step) -> StoredImage:
        return target.receive(chosen, stored, step)

    with console.open_progress(mode()) as progress:
        outcomes = at_each(others, receive, progress, "copy")
    done = [one.value.artifact for one in outcomes if one.value is not None]
    if as_json:
        console.result_json({"copies": plain(done), "failed": failures(outcomes)})
    elif done:
        console.result([f"{one.region}\t{one.location}" for one in done])
    require_all(outcomes)


@app.command()
def share(image: AmiArgument = None, as_json: JsonFlag = False) -> None:
    """Let the accounts in aws.share_with launch an AMI and its copies. Prints one line per region.

    It only adds permissions. An account that is no longer in aws.share_with is
    reported and keeps its permission, because clusters may run from the AMI;
    remove it in AWS. Accounts also need permission for the key of an encrypted AMI.
    """
    from ami_builder.build.target import at_each, require_all

    chosen, stored, home = find_image(image, TargetKind.AWS)

    def share(target: Target, step: Step) -> tuple[str, Shared]:
        if (found := target.find_copy(chosen, stored)) is None:
            raise CloudFailed(
                f"{target.name}: there is no copy of {stored.artifact.location}",
                hint="run `ami-builder copy` first",
            )
        return found.artifact.location, target.share(chosen, found, step)

    with console.open_progress(mode()) as progress:
        outcomes = at_each((home, *home.copies(chosen)), share, progress, "share")
    done = [(one.target, *one.value) for one in outcomes if one.value is not None]
    if as_json:
        rows = [{"region": region, "ami": ami, **plain(shared)} for region, ami, shared in done]
        console.result_json({"shared": rows, "failed": failures(outcomes)})
    elif done:
        console.result([f"{region}\t{ami}" for region, ami, _ in done])
    for region, ami, shared in done:
        if shared.extra:
            console.note(
                f"{region}: {', '.join(shared.extra)} may also launch {ami} but is not in aws.share_with"
            )
    require_all(outcomes)


def _destinations(words: Sequence[str], aws: AwsSettings) -> tuple[Destination, ...]:
    """Return the destinations that --region names. A region without a key takes its key from aws.copy_to."""
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


@app.command("iam-policy")
def iam_policy(
    section: Annotated[
        Section,
        typer.Argument(metavar="SECTION", help=f"What the policy allows: {', '.join(Section)}."),
    ] = Section.ALL,
    image: Annotated[
        str | None,
        typer.Option(
            "--image",
            metavar="IMAGE",
            help="Image whose regions, keys and instance profile the policy names.",
        ),
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--directory",
            metavar="DIR",
            help="Write ami-builder-1.json and so on there, each short enough for a managed policy.",
        ),
    ] = None,
    instance: Annotated[
        bool,
        typer.Option("--instance", help="The policy for the role of instances of `launch-template` instead."),
    ] = False,
    tls: Annotated[
        str,
        typer.Option(
            "--tls",
            metavar="secretsmanager:NAME|ssm:NAME",
            help="With --instance: read these certificates.",
        ),
    ] = "",
    key: Annotated[
        str,
        typer.Option(
            "--kms-key", metavar="KEY", help="With --instance: the KMS key of --tls, if it is yours."
        ),
    ] = "",
    group: Annotated[
        str,
        typer.Option(
            "--group",
            metavar="NAME",
            help="With --instance: report health to this Auto Scaling group, complete its hooks.",
        ),
    ] = "",
) -> None:
    """Print the least-privilege IAM policy for work in an AWS account.

    It is limited to aws.region, or else to the region of AWS_REGION or the profile,
    and to the regions of aws.copy_to and aws.subnets. Without any it allows all regions.
    """
    from dataclasses import replace

    from ami_builder.aws.session import default_region

    aws = load_config(TargetKind.AWS).select(image).aws
    aws = replace(aws, region=aws.region or default_region())
    if not instance and (tls or key or group):
        raise UsageError("--tls, --kms-key and --group need --instance")
    policy = of_instances(aws, tls=tls, group=group, key=key) if instance else document(section, aws)
    if directory is not None:
        console.result([str(path) for path in _write(parts(policy), directory)])
        return
    console.result(json.dumps(policy, indent=2))
    if (characters := size(policy)) > LONGEST:
        console.note(
            f"{characters} characters, but a managed policy holds at most {LONGEST}: "
            "use --directory DIR to get several, and attach all of them"
        )


def _write(policies: Sequence[Mapping[str, Any]], directory: Path) -> list[Path]:
    """Write numbered policies into a directory and return their paths; removes those of an earlier call."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        paths = [directory / f"ami-builder-{number}.json" for number in range(1, len(policies) + 1)]
        for path, policy in zip(paths, policies, strict=True):
            write_atomically(path, json.dumps(policy, indent=2) + "\n")
        for old in directory.iterdir():
            if old not in paths and re.fullmatch(r"ami-builder-[0-9]+\.json", old.name):
                old.unlink()
    except OSError as error:
        raise UsageError(
            f"--directory {directory}: {error.strerror}", hint="name a directory that can be written to"
        ) from error
    return paths
