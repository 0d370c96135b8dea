"""Launch templates for instances of a channel: one for each image, channel, role and region.

A template names the channel's SSM parameter in place of an AMI, so a promotion or a rollback changes what is
launched next, and not the template.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from ami_builder.aws import instances
from ami_builder.aws import tags as tagging
from ami_builder.aws.session import Account, aws_errors, code_of
from ami_builder.aws.user_data import with_settings
from ami_builder.config.schema import Image
from ami_builder.console import Step
from ami_builder.core.errors import CloudFailed, UsageError
from ami_builder.core.options import ContainerNetwork, Role

RATES = (100, 300)
"""The least and the most of EBS's Provisioned Rate for Volume Initialization, in MiB/s (EC2's API)."""

_GIB = 1 << 30
_LONGEST_NAME = 128
_ADDRESS = re.compile(r"(?:(tcp|tls)://)?(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9][A-Za-z0-9.-]*)(?::([0-9]{1,5}))?/?")
_TLS = re.compile(r"(?:secretsmanager|ssm):[A-Za-z0-9/_+=.@-]+")
_GROUP = re.compile(r"(?:([a-z]{2}(?:-[a-z]+)+-[0-9]+)=)?(sg-[0-9a-f]{8,17})")
# Keys of tags that are in the instance's metadata; EC2 refuses to launch with others.
_TAG_IN_METADATA = re.compile(r"(?!\.{1,2}$|_index$)[A-Za-z0-9+=.,_:@-]+")
# What EC2 may answer to a parameter that it does not take in a region.
_NOT_TAKEN = frozenset(
    {
        "InvalidParameter",
        "InvalidParameterCombination",
        "InvalidParameterValue",
        "UnknownParameter",
        "Unsupported",
        "UnsupportedOperation",
    }
)


class Change(StrEnum):
    """What became of a template."""

    CREATED = "created"
    CHANGED = "changed"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What a template launches, beside the AMI. Empty: not in the template."""

    role: Role = Role.WORKER
    scheduler: str = ""
    """The address of a worker's scheduler."""
    tls: str = ""
    """Where the machine's certificates are: `secretsmanager:NAME` or `ssm:NAME`."""
    unhealthy_seconds: float = 0.0
    """After how long an unhealthy instance tells its Auto Scaling group; 0: never."""
    hook: str = ""
    """The group's lifecycle hook that an instance completes once its worker is retired."""
    instance_type: str = ""
    """Empty: the first one that the image is verified on."""
    profile: str = ""
    """Name or ARN of an instance profile."""
    groups: tuple[str, ...] = ()
    """Security groups; `REGION=sg-…` is one of that region alone."""
    key_name: str = ""
    disk: int = 0
    """Bytes of the root volume; 0: as large as the AMI's."""
    rate: int = 0
    """Provisioned Rate for Volume Initialization, in MiB/s."""
    spot: bool = False
    endpoint: str = ""
    """Where instances call AWS with their role; empty: the region's own endpoints."""
    user_data: str = ""
    """More user data, of any cloud-init type."""

    def require_valid(self) -> None:
        """Raise UsageError for what no region could take."""
        with_settings(self.settings(), self.user_data)
        _groups(self.groups, "")
        if self.rate and not RATES[0] <= self.rate <= RATES[1]:
            raise UsageError(f"--initialization-rate {self.rate}: expected {RATES[0]} to {RATES[1]} MiB/s")

    def settings(self) -> dict[str, str]:
        """Return the content of dask.env. Raises UsageError for a value that a guest would refuse."""
        found = {"DASK_ROLE": str(self.role)}
        if self.role is Role.WORKER:
            found["DASK_SCHEDULER_ADDRESS"] = _address(self.scheduler, tls=bool(self.tls))
        elif self.scheduler:
            raise UsageError(f"--scheduler {self.scheduler}: only a worker has a scheduler")
        if self.tls:
            if not _TLS.fullmatch(self.tls):
                raise UsageError(
                    f"--tls {self.tls}: expected secretsmanager:NAME or ssm:NAME",
                    hint="it names the secret or the parameter with the certificates of this role",
                )
            found["DASK_TLS"] = self.tls
        if self.unhealthy_seconds:
            found["DASK_GROUP_HEALTH_SECONDS"] = str(max(1, round(self.unhealthy_seconds)))
        if self.hook:
            if not re.fullmatch(r"[A-Za-z0-9_/-]{1,255}", self.hook):
                raise UsageError(f"--lifecycle-hook {self.hook}: expected a name of A-Z, a-z, 0-9, - _ and /")
            found["DASK_LIFECYCLE_HOOK"] = self.hook
        if self.endpoint:
            if not re.fullmatch(r"https?://[A-Za-z0-9.:-]+/?", self.endpoint):
                raise UsageError(
                    f"--aws-endpoint {self.endpoint}: expected a URL, such as https://vpce-….amazonaws.com"
                )
            found["DASK_AWS_ENDPOINT"] = self.endpoint
        if not self.profile and (flag := self._needs_role()):
            raise UsageError(
                f"{flag} needs --instance-profile: the instance calls AWS with that role",
                hint="`ami-builder iam-policy --instance` prints the role's policy",
            )
        return found

    def _needs_role(self) -> str:
        flags = {
            "--tls": self.tls,
            "--replace-unhealthy-after": self.unhealthy_seconds,
            "--lifecycle-hook": self.hook,
        }
        return next((flag for flag, value in flags.items() if value), "")


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
    data = launch_data(
        launch,
        image.container.network,
        region=account.region,
        parameter=parameter,
        root=ami.get("RootDeviceName", ""),
        tags=tags,
    )
    found = _find(account, name_of(image, channel, launch.role), tags)
    with_rate = data
    if launch.rate:
        data = _without_rate(data)
        try:
            return _kept(account, found, with_rate, tags, image, channel, launch.role, ami["ImageId"])
        except CloudFailed as refused:
            if code_of(refused) not in _NOT_TAKEN or "initialization" not in refused.message.lower():
                raise
            step.announce(
                f"{account.region}: EC2 does not take --initialization-rate {launch.rate} here, so volumes"
                f" are initialized at the default rate ({refused.message})"
            )
    return _kept(account, found, data, tags, image, channel, launch.role, ami["ImageId"])


def launch_data(
    launch: Launch,
    network: ContainerNetwork,
    *,
    region: str,
    parameter: str,
    root: str,
    tags: Mapping[str, str],
) -> dict[str, Any]:
    """Return the LaunchTemplateData of EC2's requests. Raises UsageError."""
    text = with_settings(launch.settings(), launch.user_data)
    ebs: dict[str, Any] = {"VolumeType": "gp3", "DeleteOnTermination": True}
    if launch.disk:
        ebs["VolumeSize"] = -(-launch.disk // _GIB)
    if launch.rate:
        ebs["VolumeInitializationRate"] = launch.rate
    data: dict[str, Any] = {
        "ImageId": f"resolve:ssm:{parameter}",
        "InstanceType": launch.instance_type,
        "UserData": base64.b64encode(text.encode()).decode(),
        "MetadataOptions": {
            "HttpEndpoint": "enabled",
            "HttpTokens": "required",
            # A container with a network of its own is one hop further away.
            "HttpPutResponseHopLimit": 2 if network is ContainerNetwork.BRIDGE else 1,
            "InstanceMetadataTags": "enabled",
        },
        "BlockDeviceMappings": [{"DeviceName": root, "Ebs": ebs}],
        "TagSpecifications": tagging.specifications(tags, "instance", "volume"),
    }
    if launch.profile:
        key = "Arn" if launch.profile.startswith("arn:") else "Name"
        data["IamInstanceProfile"] = {key: launch.profile}
    if groups := _groups(launch.groups, region):
        data["SecurityGroupIds"] = groups
    if launch.key_name:
        data["KeyName"] = launch.key_name
    if launch.spot:
        data["InstanceMarketOptions"] = {"MarketType": "spot"}
    return data


def tags_of(image: Image, channel: str, role: Role) -> dict[str, str]:
    """Return the tags of a template, its instances and their volumes.

    No run's: `gc` would take them as left by it. Raises UsageError for a key that metadata can't have.
    """
    own = tagging.own_tags(image.aws)
    if wrong := [key for key in own if not _TAG_IN_METADATA.fullmatch(key)]:
        raise UsageError(
            f"aws.tags: {wrong[0]!r} can't be the key of a tag on an instance with its tags in its metadata:"
            " expected letters, digits and + - = . , _ : @",
            hint="the guest reads its Auto Scaling group's name there; rename the tag",
        )
    return {
        **own,
        tagging.NAME: f"{image.name} {role}",
        tagging.IMAGE: image.name,
        tagging.CHANNEL: channel,
        tagging.ROLE: str(role),
    }


def plan_deletion(account: Account, image: Image, channel: str, role: Role) -> Deletion | None:
    """Return the template of a channel in a region and what uses it; None if there is none."""
    found = _find(account, name_of(image, channel, role), tags_of(image, channel, role))
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
    data: Mapping[str, Any],
    tags: Mapping[str, str],
    image: Image,
    channel: str,
    role: Role,
    ami: str,
) -> Template:
    description = _description(data)
    name = name_of(image, channel, role)
    if found is None:
        with aws_errors():
            made = account.ec2.create_launch_template(
                LaunchTemplateName=name,
                LaunchTemplateData=data,  # type: ignore[arg-type]
                VersionDescription=description,
                TagSpecifications=tagging.specifications(tags, "launch-template"),
            )["LaunchTemplate"]
        template, version = made.get("LaunchTemplateId", ""), made.get("DefaultVersionNumber", 1)
        return Template(id=template, name=name, version=version, change=Change.CREATED, ami=ami)
    template = found["LaunchTemplateId"]
    default, latest = _versions(account, template)
    change = Change.UNCHANGED
    version = int(latest["VersionNumber"])
    if latest.get("VersionDescription") != description:
        with aws_errors():
            new = account.ec2.create_launch_template_version(
                LaunchTemplateId=template,
                LaunchTemplateData=data,  # type: ignore[arg-type]
                VersionDescription=description,
            )["LaunchTemplateVersion"]
        version, change = new.get("VersionNumber", 0), Change.CHANGED
    if int(default["VersionNumber"]) != version:
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
        raise CloudFailed(f"{account.region}: launch template {template} has no default version")
    return default, max(found, key=lambda one: int(one["VersionNumber"]))


def _description(data: Mapping[str, Any]) -> str:
    """Return the description of a version: it tells whether a template has changed.

    EC2 describes a version's data with values that nobody asked for.
    """
    text = json.dumps(data, sort_keys=True)
    return f"ami-builder {hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _without_rate(data: Mapping[str, Any]) -> dict[str, Any]:
    mappings = [
        {**one, "Ebs": {k: v for k, v in one["Ebs"].items() if k != "VolumeInitializationRate"}}
        for one in data["BlockDeviceMappings"]
    ]
    return {**data, "BlockDeviceMappings": mappings}


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
            f"{account.region}: no image is current in channel {channel} of {image}: there is no parameter"
            f" {parameter}",
            hint=f"`ami-builder promote {image} {channel} --target aws` makes one current",
        )
    found = account.matching("describe_images", "Images", "image-id", [value])
    if not found:
        raise CloudFailed(
            f"{account.region}: channel {channel} of {image} names {value}, which does not exist any more",
            hint=f"`ami-builder rollback {channel} --image {image} --target aws` recovers the channel",
        )
    return dict(found[0])


def _templates_of(group: Mapping[str, Any]) -> set[str]:
    """Return the ids of the templates that a group, or an instance in it, was launched from."""
    mixed = group.get("MixedInstancesPolicy", {}).get("LaunchTemplate", {})
    used = [
        group,
        {"LaunchTemplate": mixed.get("LaunchTemplateSpecification")},
        *({"LaunchTemplate": one.get("LaunchTemplateSpecification")} for one in mixed.get("Overrides", [])),
    ]
    return {(one.get("LaunchTemplate") or {}).get("LaunchTemplateId", "") for one in used}


def _address(scheduler: str, *, tls: bool) -> str:
    """Return a scheduler's address as dask.env has it: without a scheme where the image turns TLS on."""
    if not scheduler:
        raise UsageError(
            "a worker needs its scheduler",
            hint="add --scheduler HOST:8786, or --role scheduler for the scheduler's own template",
        )
    found = _ADDRESS.fullmatch(scheduler)
    if found is None or not 0 < int(found[3] or 8786) < 65536:
        raise UsageError(
            f"--scheduler {scheduler}: expected HOST:PORT, such as 10.0.0.7:8786 or scheduler.internal:8786"
        )
    scheme = f"{found[1]}://" if found[1] and not tls else ""
    return f"{scheme}{found[2]}:{found[3] or 8786}"


def _groups(words: Sequence[str], region: str) -> list[str]:
    """Return the security groups of a region. Raises UsageError for what is none, and if none is for it."""
    found = []
    for word in words:
        parts = _GROUP.fullmatch(word)
        if parts is None:
            raise UsageError(f"--security-group {word}: expected sg-…, or REGION=sg-… for one of that region")
        if parts[1] in (None, region):
            found.append(parts[2])
    if region and words and not found:
        raise UsageError(
            f"{region}: no --security-group is for this region", hint=f"add --security-group {region}=sg-…"
        )
    return found
