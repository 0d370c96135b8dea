"""The AMI that baking starts from, resolved once before the build."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from botocore.exceptions import ClientError

from ami_builder.aws.session import Account, aws_errors, code_of
from ami_builder.core.errors import UsageError

if TYPE_CHECKING:
    from types_boto3_ec2.type_defs import ImageTypeDef

ARCHITECTURE = "x86_64"
_GIB = 1 << 30
_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseAmi:
    """What an AMI that baking starts from is."""

    id: str
    name: str
    owner: str
    root_device: str
    """Its root device's name, such as /dev/xvda."""
    size: int
    """Of its root volume, in bytes."""
    architecture: str
    created: datetime


def resolve(account: Account, source: str) -> BaseAmi:
    """Return the AMI that `aws.source` means now: the newest of a pattern, a parameter's, or the one named.

    Raises UsageError when there is none or it can't be baked from, CloudFailed when AWS refuses.
    """
    if source.startswith("ami-"):
        return _checked(account, _by_id(account, source, source), source)
    if source.startswith("ssm:"):
        return _checked(account, _by_id(account, _parameter(account, source[4:]), source), source)
    owner, _, pattern = source.partition("/")
    return _newest(account, owner, pattern, source)


def _newest(account: Account, owner: str, pattern: str, source: str) -> BaseAmi:
    images = _owned(account, owner, pattern)
    available = [image for image in images if image.get("State") == "available"]
    current = [image for image in available if not _deprecated(image)]
    fitting = [image for image in current if _unfit(image) is None]
    if fitting:
        return _base_ami(max(fitting, key=lambda image: (image.get("CreationDate", ""), image["ImageId"])))
    raise UsageError(
        f"aws.source: no AMI in {account.region} matches {source}" + _why_not(available, current),
        hint=_near(account, owner, pattern),
    )


def _owned(account: Account, owner: str, pattern: str) -> Sequence[ImageTypeDef]:
    with aws_errors():
        pages = account.ec2.get_paginator("describe_images").paginate(
            Owners=[owner], Filters=[{"Name": "name", "Values": [pattern]}], IncludeDeprecated=True
        )
        return [image for page in pages for image in page["Images"]]


def _why_not(available: Sequence[ImageTypeDef], current: Sequence[ImageTypeDef]) -> str:
    if current:
        return f" and can be baked from: {current[0].get('Name', '')} {_unfit(current[0])}"
    if available:
        return f" any more: {available[0].get('Name', '')} is deprecated"
    return ""


def _near(account: Account, owner: str, pattern: str) -> str:
    """Name what the owner has whose name begins alike, the newest first."""
    stem = pattern.split("*")[0].split("?")[0]
    while len(stem) > 1:
        stem = stem[: len(stem) // 2]
        if images := _owned(account, owner, f"{stem}*"):
            newest = sorted(images, key=lambda image: image.get("CreationDate", ""), reverse=True)
            names = list(dict.fromkeys(image.get("Name", "") for image in newest))
            return f"{owner} has, for one: {', '.join(names[:_SHOWN])}"
    return f"is the owner {owner} right, and does it publish in {account.region}?"


def _parameter(account: Account, name: str) -> str:
    try:
        with aws_errors("ssm"):
            try:
                value = account.client("ssm").get_parameter(Name=name)["Parameter"]["Value"]
            except ClientError as error:
                if code_of(error) != "ParameterNotFound":
                    raise
                raise UsageError(
                    f"aws.source: there is no SSM parameter {name} in {account.region}",
                    hint="`aws ssm get-parameters-by-path --recursive --path /aws/service/debian` lists them",
                ) from error
    except KeyError:
        value = ""
    if not str(value).startswith("ami-"):
        raise UsageError(f"aws.source: the SSM parameter {name} holds no AMI id, but {value!r}")
    return str(value)


def _by_id(account: Account, ami: str, source: str) -> ImageTypeDef:
    with aws_errors():
        try:
            images = account.ec2.describe_images(ImageIds=[ami], IncludeDeprecated=True)["Images"]
        except ClientError as error:
            if not code_of(error).startswith("InvalidAMIID"):
                raise
            images = []
    if images:
        return images[0]
    raise UsageError(
        f"aws.source: there is no AMI {ami} in {account.region} that these credentials may use",
        hint="AMI ids differ between regions" if source == ami else None,
    )


def _checked(account: Account, image: ImageTypeDef, source: str) -> BaseAmi:
    if image.get("State") != "available":
        raise UsageError(f"aws.source: {source} is {image.get('State', 'gone')}, not available")
    if _deprecated(image):
        raise UsageError(
            f"aws.source: {source} is deprecated since {image.get('DeprecationTime', '')}",
            hint="an owner/name pattern takes the newest instead",
        )
    if wrong := _unfit(image):
        raise UsageError(f"aws.source: {source} {wrong}")
    return _base_ami(image)


def _deprecated(image: ImageTypeDef) -> bool:
    told = image.get("DeprecationTime")
    return bool(told) and _time(str(told)) <= datetime.now(UTC)


def _unfit(image: ImageTypeDef) -> str | None:
    """Tell why an AMI can't be baked from."""
    if image.get("Architecture") != ARCHITECTURE:
        return f"is for {image.get('Architecture')}, not {ARCHITECTURE}"
    if image.get("RootDeviceType") == "instance-store":
        return "has its root on an instance store, which no AMI can be made from"
    if image.get("Platform"):
        return f"runs {image.get('Platform')}, not Linux"
    return None


def _base_ami(image: ImageTypeDef) -> BaseAmi:
    root = image.get("RootDeviceName", "")
    mappings = image.get("BlockDeviceMappings", [])
    size = next(
        (m.get("Ebs", {}).get("VolumeSize", 0) for m in mappings if m.get("DeviceName") == root),
        0,
    )
    return BaseAmi(
        id=image["ImageId"],
        name=image.get("Name", ""),
        owner=image.get("OwnerId", ""),
        root_device=root,
        size=size * _GIB,
        architecture=image.get("Architecture", ""),
        created=_time(image.get("CreationDate", "")),
    )


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
