"""Resolve `aws.source` to the AMI that a bake starts from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ami_builder.aws import images
from ami_builder.aws.session import Account, aws_errors, code_of
from ami_builder.config.schema import DEBIAN_ACCOUNT
from ami_builder.core.errors import CloudFailed, UsageError
from ami_builder.core.options import Arch
from ami_builder.core.units import GIB

if TYPE_CHECKING:
    from types_boto3_ec2.type_defs import ImageTypeDef

_SHOWN = 5
_WILDCARD = re.compile(r"[*?#]")


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseAmi:
    """The AMI that a bake starts from."""

    id: str
    name: str
    created: str
    """When it was created, as ISO 8601; empty if EC2 does not say."""
    other_names: tuple[str, ...] = ()
    """Of AMIs that the same pattern matches, the newest of each other kind of name: digits don't count."""
    root_device: str
    """Name of its root device, such as /dev/xvda."""
    other_devices: tuple[str, ...] = ()
    """Names of its other disks."""
    size: int
    """Size of its root volume, in bytes."""
    by_debian: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.id})"


def resolve(account: Account, source: str, arch: Arch) -> BaseAmi:
    """Return the AMI that `aws.source` is now: an id, the value of an SSM parameter, or a pattern's newest.

    In a pattern, `#` is one digit, and `*` and `?` are EC2's wildcards.
    Raises UsageError when there is none or it can't be the base of an image of `arch`, CloudFailed.
    """
    if source.startswith("ami-"):
        return _checked(account, source, source, arch)
    if source.startswith("ssm:"):
        return _checked(account, _parameter(account, source[4:]), source, arch)
    owner, _, pattern = source.partition("/")
    return _newest(account, owner, pattern, source, arch)


def passed_over(account: Account, source: str, base: BaseAmi) -> list[str]:
    """Return the names of the owner's AMIs that begin as the pattern does and are newer, the newest first."""
    owner, slash, pattern = source.partition("/")
    if not slash or source.startswith("ssm:"):
        return []
    stem = _WILDCARD.split(pattern)[0]
    newer = [
        image for image in _owned(account, owner, f"{stem}*") if image.get("CreationDate", "") > base.created
    ]
    newer.sort(key=lambda image: image.get("CreationDate", ""), reverse=True)
    return [image.get("Name", "") for image in newer if image["ImageId"] != base.id]


def exact(name: str) -> str:
    """Return the pattern of a name's series: dates and builds may differ, but not a number of a release."""
    return re.sub(r"[0-9]{4,}", lambda digits: "#" * len(digits[0]), name)


def _newest(account: Account, owner: str, pattern: str, source: str, arch: Arch) -> BaseAmi:
    available = [image for image in _owned(account, owner, pattern) if image.get("State") == "available"]
    current = [image for image in available if not _deprecated(image)]
    fitting = [image for image in current if _unfit(image, arch) is None]
    if fitting:
        fitting.sort(key=lambda image: (image.get("CreationDate", ""), image["ImageId"]), reverse=True)
        kinds: dict[str, str] = {}
        for image in fitting:
            kinds.setdefault(re.sub(r"[0-9]+", "#", image.get("Name", "")), image.get("Name", ""))
        return _base_ami(fitting[0], tuple(kinds.values())[1:])
    raise UsageError(
        f"aws.source: no AMI in {account.region} matches {source}" + _why_not(available, current, arch),
        hint=_near(account, owner, pattern),
    )


def _owned(account: Account, owner: str, pattern: str) -> Sequence[ImageTypeDef]:
    # EC2 has no wildcard for digits, and its `?` also matches no character.
    named = [{"Name": "name", "Values": [pattern.replace("#", "?")]}]
    found: Sequence[ImageTypeDef] = account.listed(
        "describe_images", "Images", Owners=[owner], Filters=named, IncludeDeprecated=True
    )
    wildcards = {"#": "[0-9]", "*": ".*", "?": ".?"}
    exact = re.compile("".join(wildcards.get(character) or re.escape(character) for character in pattern))
    return [image for image in found if exact.fullmatch(image.get("Name", ""))]


def _why_not(available: Sequence[ImageTypeDef], current: Sequence[ImageTypeDef], arch: Arch) -> str:
    if current:
        return f" and is usable: {current[0].get('Name', '')} {_unfit(current[0], arch)}"
    if available:
        return f": {available[0].get('Name', '')} is deprecated"
    return ""


def _near(account: Account, owner: str, pattern: str) -> str:
    """Return a hint with the owner's newest AMIs whose names begin alike."""
    stem = _WILDCARD.split(pattern)[0]
    while len(stem) > 1:
        stem = stem[: len(stem) // 2]
        if similar := _owned(account, owner, f"{stem}*"):
            newest = sorted(similar, key=lambda image: image.get("CreationDate", ""), reverse=True)
            names = list(dict.fromkeys(image.get("Name", "") for image in newest))
            return f"AMIs of {owner} with a similar name: {', '.join(names[:_SHOWN])}"
    if owner == DEBIAN_ACCOUNT and (there := account.partition) != "aws":
        return f"{owner} is Debian's account in the partition aws: set aws.source to an AMI in {there}"
    return f"check the owner {owner}, and whether it publishes in {account.region}"


def _parameter(account: Account, name: str) -> str:
    try:
        with aws_errors("ssm"):
            value = str(account.client("ssm").get_parameter(Name=name)["Parameter"].get("Value", ""))
    except CloudFailed as failed:
        if code_of(failed) != "ParameterNotFound":
            raise
        raise UsageError(
            f"aws.source: there is no SSM parameter {name} in {account.region}",
            hint="`aws ssm get-parameters-by-path --recursive --path /aws/service/debian` lists them",
        ) from failed
    if not value.startswith("ami-"):
        raise UsageError(
            f"aws.source: the SSM parameter {name} is {value!r}, but must be an AMI id (ami-...)"
        )
    return value


def _checked(account: Account, ami: str, source: str, arch: Arch) -> BaseAmi:
    if (image := images.describe(account, ami)) is None:
        raise UsageError(
            f"aws.source: there is no AMI {ami} in {account.region} that these credentials can use",
            hint="AMI ids differ between regions" if source == ami else None,
        )
    if image.get("State") != "available":
        raise UsageError(f"aws.source: {source} is {image.get('State', 'missing')}, but must be available")
    if _deprecated(image):
        raise UsageError(
            f"aws.source: {source} has been deprecated since {image.get('DeprecationTime', '')}",
            hint="use an owner/name pattern, which selects the newest AMI",
        )
    if wrong := _unfit(image, arch):
        raise UsageError(f"aws.source: {source} {wrong}")
    return _base_ami(image)


def _deprecated(image: ImageTypeDef) -> bool:
    when = image.get("DeprecationTime")
    return bool(when) and datetime.fromisoformat(str(when)) <= datetime.now(UTC)


def _unfit(image: ImageTypeDef, arch: Arch) -> str | None:
    """Return why an AMI can't be the base of an image, or None."""
    if image.get("Architecture") != arch.ec2:
        return f"is for {image.get('Architecture')}, not {arch.ec2}: change aws.source or arch"
    if image.get("RootDeviceType") == "instance-store":
        return "has its root on an instance store, but EBS is needed"
    if image.get("Platform"):
        return f"runs {image.get('Platform')}, not Linux"
    return None


def _base_ami(image: ImageTypeDef, other_names: Sequence[str] = ()) -> BaseAmi:
    root, size = images.root_volume(image)
    return BaseAmi(
        id=image["ImageId"],
        name=image.get("Name", ""),
        created=image.get("CreationDate", ""),
        other_names=tuple(other_names),
        root_device=root,
        other_devices=tuple(
            name
            for one in image.get("BlockDeviceMappings", [])
            if (name := one.get("DeviceName", "")) != root
        ),
        size=size * GIB,
        by_debian=image.get("OwnerId") == DEBIAN_ACCOUNT,
    )
