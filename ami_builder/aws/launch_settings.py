"""What a launch template launches: flags, checked, as EC2's LaunchTemplateData and the guest's dask.env."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ami_builder.aws import tags as tagging
from ami_builder.aws.user_data import with_settings
from ami_builder.config.schema import Image
from ami_builder.core.addresses import parse_scheduler
from ami_builder.core.errors import UsageError
from ami_builder.core.options import ContainerNetwork, Role
from ami_builder.core.regions import REGION
from ami_builder.core.units import GIB

RATES = (100, 300)
"""The least and the most of EBS's Provisioned Rate for Volume Initialization, in MiB/s (EC2's API)."""

LEAST_UNHEALTHY_SECONDS = 60

_TLS = re.compile(r"(?:secretsmanager|ssm):[A-Za-z0-9/_+=.@-]+")
_GROUP = re.compile(rf"(?:({REGION})=)?(sg-[0-9a-f]{{8,17}})")
_KEY_NAME = re.compile(r"[ -~]{1,255}")
_PROFILE = re.compile(r"[\w+=,.@:/-]+")
# Keys of tags that are in the instance's metadata; EC2 refuses to launch with others.
_TAG_IN_METADATA = re.compile(r"(?!\.{1,2}$|_index$)[A-Za-z0-9+=.,_:@-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What a template launches, beside the AMI. Empty: not in the template."""

    role: Role = Role.WORKER
    scheduler: str = ""
    """The address of a worker's scheduler."""
    tls: str = ""
    """Where the machine's certificates are: `secretsmanager:NAME` or `ssm:NAME`."""
    unhealthy_seconds: float = 0.0
    """After how long an unhealthy instance reports itself to its Auto Scaling group; 0: never."""
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
    rate: int | None = None
    """Provisioned Rate for Volume Initialization, in MiB/s."""
    spot: bool = False
    user_data: str = ""
    """More user data, of any cloud-init type."""

    def require_valid(self) -> None:
        """Raise UsageError for what no region could take."""
        with_settings(self.settings(), self.user_data)
        _groups(self.groups, "")
        if self.disk and self.disk < GIB:
            raise UsageError(f"--disk: {self.disk} bytes, expected at least 1GiB, such as 30GiB")
        for flag, value, expected in (
            ("--key-name", self.key_name, _KEY_NAME),
            ("--instance-profile", self.profile, _PROFILE),
        ):
            if value and not expected.fullmatch(value):
                raise UsageError(f"{flag} {value!r}: expected the name of one")
        if self.rate is not None and not RATES[0] <= self.rate <= RATES[1]:
            raise UsageError(f"--initialization-rate {self.rate}: expected {RATES[0]} to {RATES[1]} MiB/s")

    def settings(self) -> dict[str, str]:
        """Return the content of dask.env. Raises UsageError for a value that a guest would refuse."""
        found = {"DASK_ROLE": str(self.role)}
        if self.role is Role.WORKER:
            found["DASK_SCHEDULER_ADDRESS"] = _address(self.scheduler, tls=bool(self.tls))
        elif self.scheduler:
            raise UsageError(f"--scheduler {self.scheduler}: only a worker has a scheduler")
        if self.tls:
            require_tls(self.tls)
            found["DASK_TLS"] = self.tls
        if self.unhealthy_seconds:
            if self.unhealthy_seconds < LEAST_UNHEALTHY_SECONDS:
                raise UsageError(
                    f"--replace-unhealthy-after: {self.unhealthy_seconds:g} s, expected at least 1min",
                    hint="a container is unhealthy while it starts again",
                )
            found["DASK_GROUP_HEALTH_SECONDS"] = str(round(self.unhealthy_seconds))
        if self.hook:
            if not re.fullmatch(r"[A-Za-z0-9_/-]{1,255}", self.hook):
                raise UsageError(f"--lifecycle-hook {self.hook}: expected a name of A-Z, a-z, 0-9, - _ and /")
            found["DASK_LIFECYCLE_HOOK"] = self.hook
        if not self.profile and (flag := self._needs_role()):
            for_what = f"--tls {self.tls}" if flag == "--tls" else "--group GROUP"
            raise UsageError(
                f"{flag} needs --instance-profile: the instance calls AWS with that role",
                hint=f"`ami-builder iam-policy --instance {for_what}` prints the role's policy",
            )
        return found

    def _needs_role(self) -> str:
        flags = {
            "--tls": self.tls,
            "--replace-unhealthy-after": self.unhealthy_seconds,
            "--lifecycle-hook": self.hook,
        }
        return next((flag for flag, value in flags.items() if value), "")


def require_tls(source: str) -> None:
    """Raise UsageError for a source of certificates that a guest would refuse."""
    if not _TLS.fullmatch(source):
        raise UsageError(
            f"--tls {source}: expected secretsmanager:NAME or ssm:NAME",
            hint="it names the secret or the parameter with the certificates of this role",
        )


def launch_data(
    launch: Launch,
    network: ContainerNetwork,
    *,
    region: str,
    parameter: str,
    root: str,
    tags: Mapping[str, str],
) -> dict[str, Any]:
    """Return the LaunchTemplateData of EC2's requests. Raises UsageError.

    The root volume is named only if a flag needs it: another AMI's root may have another name.
    """
    text = with_settings(launch.settings(), launch.user_data)
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
        "TagSpecifications": tagging.specifications(tags, "instance", "volume"),
    }
    ebs: dict[str, Any] = {}
    if launch.disk:
        ebs["VolumeSize"] = -(-launch.disk // GIB)
    if launch.rate is not None:
        ebs["VolumeInitializationRate"] = launch.rate
    if ebs:
        ebs |= {"VolumeType": "gp3", "DeleteOnTermination": True}
        data["BlockDeviceMappings"] = [{"DeviceName": root, "Ebs": ebs}]
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
        **identity(image, channel, role),
    }


def identity(image: Image, channel: str, role: Role) -> dict[str, str]:
    """Return the tags that tell whose a template is."""
    return {tagging.IMAGE: image.name, tagging.CHANNEL: channel, tagging.ROLE: str(role)}


def _address(scheduler: str, *, tls: bool) -> str:
    """Return a scheduler's address as dask.env has it: without a scheme where the image turns TLS on."""
    if not scheduler:
        raise UsageError(
            "a worker needs its scheduler",
            hint="add --scheduler HOST:8786, or --role scheduler for the scheduler's own template",
        )
    try:
        scheme, address = parse_scheduler(scheduler)
    except ValueError as wrong:
        raise UsageError(f"--scheduler {scheduler}: {wrong}") from wrong
    return f"{scheme}://{address}" if scheme and not tls else address


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
