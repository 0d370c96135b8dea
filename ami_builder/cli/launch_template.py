"""The command that keeps the launch templates of a channel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ami_builder import console
from ami_builder.cli.channels import ChannelArgument
from ami_builder.cli.options import ImageArgument, JsonFlag, app, failures, load_config, mode, plain
from ami_builder.cli.targets import open_aws
from ami_builder.core.errors import UsageError, did_you_mean
from ami_builder.core.options import Role
from ami_builder.core.records import TargetKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ami_builder.aws.launch_settings import Launch
    from ami_builder.aws.launch_template import Deletion, Template
    from ami_builder.aws.target import AwsTarget
    from ami_builder.build.target import TargetOutcome
    from ami_builder.config.schema import Image
    from ami_builder.console import Step


@app.command("launch-template")
def launch_template(
    channel: ChannelArgument,
    image: ImageArgument = None,
    scheduler: Annotated[
        str, typer.Option("--scheduler", metavar="HOST:PORT", help="The scheduler that workers join.")
    ] = "",
    role: Annotated[
        str, typer.Option("--role", metavar="worker|scheduler", help="What Dask does on the instances.")
    ] = Role.WORKER,
    instance_type: Annotated[
        str,
        typer.Option("--instance-type", metavar="TYPE", help="Default: the first of verify.instance_types."),
    ] = "",
    profile: Annotated[
        str,
        typer.Option(
            "--instance-profile",
            metavar="NAME|ARN",
            help="Instance profile; its role needs what `iam-policy --instance --tls --group` prints.",
        ),
    ] = "",
    group: Annotated[
        list[str] | None,
        typer.Option(
            "--security-group", metavar="[REGION=]SG", help="Security group of the instances; repeatable."
        ),
    ] = None,
    key_name: Annotated[str, typer.Option("--key-name", metavar="NAME", help="EC2 key pair for ssh.")] = "",
    disk: Annotated[
        str, typer.Option("--disk", metavar="SIZE", help="Size of the root volume. Default: as the AMI's.")
    ] = "",
    rate: Annotated[
        int | None,
        typer.Option(
            "--initialization-rate",
            metavar="MIB",
            help="Read the root volume from its snapshot at 100 to 300 MiB/s. AWS charges for it.",
        ),
    ] = None,
    spot: Annotated[
        bool,
        typer.Option("--spot", help="Launch spot instances. Not for groups with a mixed instances policy."),
    ] = False,
    tls: Annotated[
        str,
        typer.Option(
            "--tls",
            metavar="secretsmanager:NAME|ssm:NAME",
            help="Secret or parameter with the certificates of this role.",
        ),
    ] = "",
    replace_after: Annotated[
        str,
        typer.Option(
            "--replace-unhealthy-after",
            metavar="DURATION",
            help="Let the Auto Scaling group replace an instance whose Dask is unhealthy for so long.",
        ),
    ] = "",
    hook: Annotated[
        str,
        typer.Option(
            "--lifecycle-hook",
            metavar="NAME",
            help="Lifecycle hook of the group to complete once a worker is retired.",
        ),
    ] = "",
    user_data: Annotated[
        Path | None,
        typer.Option("--user-data", metavar="FILE", help="More user data, of any cloud-init type."),
    ] = None,
    region: Annotated[
        list[str] | None,
        typer.Option("--region", metavar="REGION", help="Only in this region; repeatable."),
    ] = None,
    delete: Annotated[
        bool, typer.Option("--delete", help="Plan the deletion of the templates instead.")
    ] = False,
    apply: Annotated[bool, typer.Option("--apply", help="With --delete: delete them.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Keep one EC2 launch template per region for the current AMI of a channel.

    It is created in aws.region and in every region of aws.copy_to, or gets a new
    default version when something changed. Prints one line per region: region,
    template id, default version. EC2 reads the AMI from the channel at each launch,
    so a promotion or a rollback needs no new version.
    """
    from ami_builder.build.target import require_all

    chosen = load_config(TargetKind.AWS).select(image)
    if not delete and channel not in chosen.lifecycle.channels:
        raise UsageError(
            f"channel {channel!r} is not in lifecycle.channels of image {chosen.name!r}"
            f"{did_you_mean(channel, chosen.lifecycle.channels)}",
            hint=f"its channels are {', '.join(chosen.lifecycle.channels)}",
        )
    if role not in (Role.WORKER, Role.SCHEDULER):
        raise UsageError(f"--role {role}: expected worker or scheduler")
    if apply and not delete:
        raise UsageError(
            "--apply is for --delete only", hint="without --delete the templates are kept at once"
        )
    home = open_aws(chosen)
    if delete:
        # A region may have been removed from aws.copy_to.
        regions = home.elsewhere(region) if region else (home, *home.copies(chosen))
        _delete(regions, chosen, channel, Role(role), apply=apply, as_json=as_json)
        return
    regions = _regions(home, chosen, region or ())
    launch = _launch(
        role=Role(role),
        scheduler=scheduler,
        tls=tls,
        replace_after=replace_after,
        hook=hook,
        instance_type=instance_type,
        profile=profile,
        groups=tuple(group or ()),
        key_name=key_name,
        disk=disk,
        rate=rate,
        spot=spot,
        user_data=user_data,
    )
    outcomes = _keep(regions, chosen, channel, launch)
    done = [(one.target, one.value) for one in outcomes if one.value is not None]
    if as_json:
        rows = [{"region": where, **plain(template)} for where, template in done]
        console.result_json({"templates": rows, "failed": failures(outcomes)})
    elif done:
        console.result([f"{where}\t{template.id}\t{template.version}" for where, template in done])
    wrong = [one.error for one in outcomes if isinstance(one.error, UsageError)]
    if wrong and len(wrong) == len(outcomes):
        raise wrong[0]
    require_all(outcomes)


def _launch(*, replace_after: str, disk: str, user_data: Path | None, **values: Any) -> Launch:
    from ami_builder.aws.launch_settings import Launch
    from ami_builder.core.units import parse_duration, parse_size

    def parsed(flag: str, text: str, parse: Any) -> Any:
        try:
            return parse(text) if text else 0
        except ValueError as wrong:
            raise UsageError(f"{flag} {text}: {wrong}") from wrong

    try:
        text = user_data.read_text() if user_data is not None else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--user-data {user_data}: {error}", hint="name a text file that can be read"
        ) from error
    launch = Launch(
        unhealthy_seconds=parsed("--replace-unhealthy-after", replace_after, parse_duration),
        disk=parsed("--disk", disk, parse_size),
        user_data=text,
        **values,
    )
    # A mistake is reported before AWS is asked anything.
    launch.require_valid()
    return launch


def _regions(home: AwsTarget, image: Image, wanted: Sequence[str]) -> Sequence[AwsTarget]:
    known = {one.name: one for one in (home, *home.copies(image))}
    if unknown := [one for one in wanted if one not in known]:
        raise UsageError(
            f"--region {unknown[0]}: image {image.name!r} is not in this region"
            f"{did_you_mean(unknown[0], known)}",
            hint="the AMI is in aws.region and in the regions of aws.copy_to",
        )
    return [known[one] for one in dict.fromkeys(wanted or known)]


def _keep(
    regions: Sequence[AwsTarget], image: Image, channel: str, launch: Launch
) -> list[TargetOutcome[Template]]:
    from ami_builder.aws.launch_template import keep
    from ami_builder.aws.target import named
    from ami_builder.build.target import at_each

    def kept(target: AwsTarget, step: Step) -> Template:
        parameter = target.channels(image).folder + channel
        with named(target.name):
            found = keep(target.account, image, channel, launch, parameter, step)
        step.done(f"{found.change}: {found.name}, version {found.version}, launches {found.ami}")
        return found

    with console.open_progress(mode()) as progress:
        return at_each(regions, kept, progress, "launch template")


def _delete(
    regions: Sequence[AwsTarget], image: Image, channel: str, role: Role, *, apply: bool, as_json: bool
) -> None:
    from ami_builder.aws.launch_template import delete, plan_deletion
    from ami_builder.aws.target import named
    from ami_builder.build.target import at_each, require_all

    def planned(target: AwsTarget, step: Step) -> tuple[Deletion, ...]:
        with named(target.name):
            found = plan_deletion(target.account, image, channel, role)
            if found is not None and apply:
                delete(target.account, found)
        if found is None:
            step.done("there is none")
        return () if found is None else (found,)

    with console.open_progress(mode()) as progress:
        outcomes = at_each(regions, planned, progress, "launch template")
    rows = [(one.target, found) for one in outcomes for found in one.value or ()]
    if as_json:
        plan = [{"region": where, **plain(found)} for where, found in rows]
        console.result_json({"applied": apply, "plan": plan, "failed": failures(outcomes)})
    else:
        done = "deleted" if apply else "to delete"
        console.table(
            ("region", "id", "name", "plan", "because"),
            [
                (where, one.id, one.name, *((done, "") if one.deletable else ("keep", _users(one))))
                for where, one in rows
            ],
        )
        if not apply and any(one.deletable for _, one in rows):
            console.note("nothing was changed; add --apply to delete")
    require_all(outcomes)


def _users(deletion: Deletion) -> str:
    return f"used by Auto Scaling group {', '.join(deletion.groups)}"
