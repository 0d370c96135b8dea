"""Launch templates for instances of a channel: one for each image, channel, role and region.

A template names the channel's SSM parameter in place of an AMI, so a promotion or a rollback changes what is
launched next, and not the template.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from ami_builder.aws import instances
from ami_builder.aws import tags as tagging
from ami_builder.aws.launch_settings import Launch, identity, launch_data, tags_of
from ami_builder.aws.session import Account, aws_errors
from ami_builder.config.schema import Image
from ami_builder.console import Step
from ami_builder.core.errors import CloudFailed, UsageError
from ami_builder.core.options import Role

_LONGEST_NAME = 128
_NO_RATE = " at the default rate"
"""Added to the description of a version that has no initialization rate because EC2 does not take it."""


class _NotValid(CloudFailed):
    """EC2 made the template, or the version, and warns that it can't launch from it."""


class Change(StrEnum):
    """What became of a template."""

    CREATED = "created"
    CHANGED = "changed"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A launch template as it is in a region."""

    id: str
    name: str
    version: int
    """The default version."""
    change: Change
    ami: str
    """What its parameter names now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """A launch template to delete, and what keeps it."""

    id: str
    name: str
    groups: tuple[str, ...] = ()
    """The Auto Scaling groups that use it."""

    @property
    def deletable(self) -> bool:
        """Whether no group uses it."""
        return not self.groups


def name_of(image: Image, channel: str, role: Role) -> str:
    """Return the name of a template. Raises UsageError if EC2 has no room for it."""
    name = f"ami-builder-{image.name}-{channel}" + ("" if role is Role.WORKER else f"-{role}")
    if len(name) > _LONGEST_NAME:
        raise UsageError(
            f"the launch template's name {name} has {len(name)} characters, but EC2 accepts {_LONGEST_NAME}",
            hint="give the image or the channel a shorter name",
        )
    return name


def keep(
    account: Account, image: Image, channel: str, launch: Launch, parameter: str, step: Step
) -> Template:
    """Create the template of a channel in a region, or give it a new default version if it changed.

    `parameter` is the channel's. Raises UsageError and CloudFailed.
    """
    ami = _current(account, parameter, channel, image.name)
    launch = replace(launch, instance_type=launch.instance_type or image.verify.instance_types[0])
    setting = "--instance-type"
    instances.require_offered(account, [launch.instance_type], setting)
    instances.require_arch(account, [launch.instance_type], image.arch, setting)
    tags = tags_of(image, channel, launch.role)
    root = ami.get("RootDeviceName", "")
    if launch.disk or launch.rate:
        _require_lasting(account, image, channel, ami["ImageId"], root)
    network = image.container.network
    place = {"region": account.region, "parameter": parameter, "root": root}
    data = launch_data(launch, network, **place, tags=tags)
    description = _description(data)
    name = name_of(image, channel, launch.role)
    found = _find(account, name, tags)
    try:
        return _kept(account, found, name, data, description, tags, ami["ImageId"])
    except _NotValid as invalid:
        if not launch.rate or "initialization" not in invalid.message.lower():
            raise
        step.announce(
            f"{account.region}: EC2 does not take --initialization-rate {launch.rate} here, so volumes are"
            f" initialized at the default rate ({invalid.message})"
        )
    data = launch_data(replace(launch, rate=None), network, **place, tags=tags)
    return _kept(account, found, name, data, f"{description}{_NO_RATE}", tags, ami["ImageId"])


def plan_deletion(account: Account, image: Image, channel: str, role: Role) -> Deletion | None:
    """Return the template of a channel in a region and what uses it; None if there is none.

    The channel and the region may not be in the configuration any more.
    """
    found = _find(account, name_of(image, channel, role), identity(image, channel, role))
    if found is None:
        return None
    template = found["LaunchTemplateId"]
    groups = account.listed("describe_auto_scaling_groups", "AutoScalingGroups", service="autoscaling")
    return Deletion(
        id=template,
        name=found["LaunchTemplateName"],
        groups=tuple(one["AutoScalingGroupName"] for one in groups if template in _templates_of(one)),
    )


def delete(account: Account, deletion: Deletion) -> None:
    """Delete a template, which may be missing already. Raises UsageError when a group uses it."""
    if not deletion.deletable:
        raise UsageError(
            f"{account.region}: launch template {deletion.name} is used by the Auto Scaling group"
            f" {', '.join(deletion.groups)}",
            hint="delete the group, or give it another template, first",
        )
    with aws_errors(ignore="InvalidLaunchTemplateId.NotFound"):
        account.ec2.delete_launch_template(LaunchTemplateId=deletion.id)


def _kept(
    account: Account,
    found: Mapping[str, Any] | None,
    name: str,
    data: Mapping[str, Any],
    description: str,
    tags: Mapping[str, str],
    ami: str,
) -> Template:
    if found is None:
        with aws_errors():
            answer = account.ec2.create_launch_template(
                LaunchTemplateName=name,
                LaunchTemplateData=data,  # type: ignore[arg-type]
                VersionDescription=description,
                TagSpecifications=tagging.specifications(tags, "launch-template"),
            )
        made = answer["LaunchTemplate"]
        if invalid := _not_valid(account, answer):
            delete(account, Deletion(id=made["LaunchTemplateId"], name=name))
            raise invalid
        template, version = made.get("LaunchTemplateId", ""), made.get("DefaultVersionNumber", 1)
        return Template(id=template, name=name, version=version, change=Change.CREATED, ami=ami)
    template = found["LaunchTemplateId"]
    default, latest = _versions(account, template)
    change = Change.UNCHANGED
    version = int(latest["VersionNumber"])
    # What is the latest, but not the default, may be one that EC2 can't launch.
    known = latest.get("VersionDescription", "") in (description, f"{description}{_NO_RATE}")
    if not known or int(default["VersionNumber"]) != version:
        with aws_errors():
            new = account.ec2.create_launch_template_version(
                LaunchTemplateId=template,
                LaunchTemplateData=data,  # type: ignore[arg-type]
                VersionDescription=description,
            )
        if invalid := _not_valid(account, new):
            raise invalid
        version = new["LaunchTemplateVersion"].get("VersionNumber", 0)
        with aws_errors():
            account.ec2.modify_launch_template(LaunchTemplateId=template, DefaultVersion=str(version))
        change = Change.CHANGED
    if changed := dict(tags.items() - tagging.as_dict(found.get("Tags", [])).items()):
        with aws_errors():
            account.ec2.create_tags(Resources=[template], Tags=tagging.as_list(changed))
        change = Change.CHANGED
    return Template(id=template, name=name, version=version, change=change, ami=ami)


def _versions(account: Account, template: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the default version and the latest one; groups use either."""
    with aws_errors():
        found = account.ec2.describe_launch_template_versions(
            LaunchTemplateId=template, Versions=["$Default", "$Latest"]
        )["LaunchTemplateVersions"]
    default = next((one for one in found if one.get("DefaultVersion")), None)
    if default is None:
        raise CloudFailed(f"launch template {template} has no default version")
    return default, max(found, key=lambda one: int(one["VersionNumber"]))


def _description(data: Mapping[str, Any]) -> str:
    """Return the description of a version: it shows whether a template has changed.

    EC2 describes a version's data with values that nobody asked for.
    """
    text = json.dumps(data, sort_keys=True)
    return f"ami-builder {hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _not_valid(account: Account, answer: Mapping[str, Any]) -> _NotValid | None:
    """Return EC2's warning about a template or version that it made, but can't launch from."""
    errors = answer.get("Warning", {}).get("Errors", [])
    if not errors:
        return None
    said = "; ".join(f"{one.get('Code', '')}: {one.get('Message', '')}" for one in errors)
    return _NotValid(
        f"{account.region}: EC2 can't launch from this template: {said}",
        hint="what was launched before stays as it is; change the flags, and run it again",
    )


def _require_lasting(account: Account, image: Image, channel: str, ami: str, root: str) -> None:
    """Raise UsageError if images to come have another root device: a template names one."""
    wanted = image.aws.root_device
    if wanted and root != wanted:
        raise UsageError(
            f"{account.region}: --disk and --initialization-rate name the root device, but that of {ami},"
            f" which is current in {channel}, is {root}, and that of new images is {wanted}",
            hint=f"build and promote an image with this version, or set aws.root_device to {root}",
        )


def _find(account: Account, name: str, tags: Mapping[str, str]) -> Mapping[str, Any] | None:
    """Return the template of this name. Raises UsageError if it is another channel's, or not ours."""
    found = account.matching("describe_launch_templates", "LaunchTemplates", "launch-template-name", [name])
    if not found:
        return None
    has = tagging.as_dict(found[0].get("Tags", []))
    ours = (tagging.IMAGE, tagging.CHANNEL, tagging.ROLE)
    if any(has.get(key) != tags[key] for key in ours):
        whose = ", ".join(f"{key}={has.get(key, '')}" for key in ours) if tagging.CHANNEL in has else ""
        raise UsageError(
            f"{account.region}: there is a launch template {name} that is not of this channel"
            f" ({whose or 'ami-builder did not create it'})",
            hint="rename or delete it, or give the image or the channel another name",
        )
    return dict(found[0])


def _current(account: Account, parameter: str, channel: str, image: str) -> Mapping[str, Any]:
    """Return the AMI that is current in a channel. Raises CloudFailed if none is."""
    value = ""
    with aws_errors("ssm", ignore="ParameterNotFound"):
        value = account.client("ssm").get_parameter(Name=parameter)["Parameter"]["Value"]
    if not value:
        raise CloudFailed(
            f"no image is current in channel {channel} of {image}: there is no parameter {parameter}",
            hint=f"`ami-builder promote {image} {channel} --target aws` makes one current",
        )
    found = account.matching("describe_images", "Images", "image-id", [value])
    if not found:
        raise CloudFailed(
            f"channel {channel} of {image} names {value}, which does not exist any more",
            hint=f"`ami-builder rollback {channel} --image {image} --target aws` recovers the channel",
        )
    return dict(found[0])


def _templates_of(group: Mapping[str, Any]) -> set[str]:
    """Return the ids of the templates that a group launches from."""
    mixed = group.get("MixedInstancesPolicy", {}).get("LaunchTemplate", {})
    used = [
        group,
        {"LaunchTemplate": mixed.get("LaunchTemplateSpecification")},
        *({"LaunchTemplate": one.get("LaunchTemplateSpecification")} for one in mixed.get("Overrides", [])),
    ]
    return {(one.get("LaunchTemplate") or {}).get("LaunchTemplateId", "") for one in used}
