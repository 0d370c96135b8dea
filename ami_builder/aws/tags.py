"""Names and tags of the resources in an account, and the formats of their values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING

from ami_builder import __version__
from ami_builder.core.options import Arch
from ami_builder.core.records import FIRST_BOOT, Measurement

if TYPE_CHECKING:
    from types_boto3_ec2.literals import ResourceTypeType
    from types_boto3_ec2.type_defs import TagSpecificationTypeDef, TagTypeDef

    from ami_builder.config.schema import AwsSettings, Image

CHANNELS = "/ami-builder/"
"""The beginning of the names of channels' SSM parameters."""
PREFIX = "ami-builder:"
NAME = "Name"
IMAGE = f"{PREFIX}image"
DIGEST = f"{PREFIX}digest"
RUN = f"{PREFIX}run"
PURPOSE = f"{PREFIX}purpose"
BASE_AMI = f"{PREFIX}base-ami"
VERSION = f"{PREFIX}version"
CREATED = f"{PREFIX}created"
FINISHED = f"{PREFIX}finished"
VERDICT = f"{PREFIX}verdict"
MEASURED = f"{PREFIX}measured"
REVOKED = f"{PREFIX}revoked"
CHANNEL = f"{PREFIX}channel"
"""On launch templates, their instances and volumes: the channel whose image they launch."""
ROLE = f"{PREFIX}role"
"""On the same: what Dask does there, such as `worker`."""
LAUNCH_TEMPLATE = "aws:ec2launchtemplate:id"
"""EC2 sets it on instances that were launched from a template."""
SELFTEST = f"{PREFIX}selftest"
"""On everything that selftests make; the value is the name of the selftest's image."""
SCALING_GROUP = "aws:autoscaling:groupName"
"""EC2 Auto Scaling sets it on a group's instances."""
COPY_OF = f"{PREFIX}copy-of"
"""The AMI in another region that this one was copied from."""

LONGEST = 256
"""The most characters in a tag's value (EC2's limit)."""
_DIGEST_IN_NAME = 12

# A tag's entry is `m6i.large=8589934592/8143204352/31.2/58.1/12.35/0.235`: total and available memory,
# seconds to ssh and to Dask, CPU seconds of the boot and of the control. The last two may be missing.
_SIZE = r"([1-9][0-9]{0,14})"
_SECONDS = r"([0-9]{1,5}\.[0-9]|-)"
_CPU = r"(?:/([0-9]{1,5}\.[0-9]{2}|-)/([0-9]{1,4}\.[0-9]{3}|-))?"
_MEASUREMENT = re.compile(rf"([a-z0-9][a-z0-9.-]{{0,31}})={_SIZE}/{_SIZE}/{_SECONDS}/{_SECONDS}{_CPU}")


class Purpose(StrEnum):
    """What a resource in the account is for."""

    BAKE = "bake"
    VERIFY = "verify"
    IMAGE = "image"


def resource_tags(
    image: Image, digest: str, run_id: str, purpose: Purpose, more: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the tags of one resource; the call that creates it sets all of them."""
    return {
        **own_tags(image.aws),
        NAME: image.name if purpose is Purpose.IMAGE else f"ami-builder {purpose} {image.name}",
        IMAGE: image.name,
        DIGEST: digest,
        RUN: run_id,
        PURPOSE: str(purpose),
        VERSION: __version__,
        CREATED: now(),
        **(more or {}),
    }


def own_tags(aws: AwsSettings) -> dict[str, str]:
    """Return the user's own tags."""
    return {tag.key: tag.value for tag in aws.tags}


def now() -> str:
    """Return the current time in the format of tags, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def ami_name(image: str, digest: str, run_id: str) -> str:
    """Return the unique name of an AMI, by which it can be found before it is tagged."""
    return f"{image}-{digest[:_DIGEST_IN_NAME]}-{run_id}"


def ami_name_pattern(image: str, digest: str) -> str:
    """Return a pattern that matches `ami_name` of any run."""
    return f"{image}-{digest[:_DIGEST_IN_NAME]}-*"


def group_name(run_id: str, purpose: Purpose) -> str:
    """Return the name of a run's security group."""
    return f"ami-builder-{purpose}-{run_id}"


def channels_of(image: str, arch: Arch) -> str:
    """Return the beginning of the names of an image's channels, with EC2's name of the architecture."""
    return f"{CHANNELS}{image}/{arch.ec2}/"


def as_list(tags: Mapping[str, str]) -> list[TagTypeDef]:
    """Return tags in the format of EC2's requests."""
    return [{"Key": key, "Value": value} for key, value in tags.items()]


def as_dict(tags: Sequence[TagTypeDef]) -> dict[str, str]:
    """Return the tags of an EC2 response as a dictionary."""
    return {tag.get("Key", ""): tag.get("Value", "") for tag in tags}


def specifications(tags: Mapping[str, str], *kinds: ResourceTypeType) -> list[TagSpecificationTypeDef]:
    """Return TagSpecifications, so that a resource has its tags from the moment it exists."""
    return [{"ResourceType": kind, "Tags": as_list(tags)} for kind in kinds]


def format_measurements(measured: Iterable[Measurement]) -> str:
    """Return the first boots as one tag's value: in order, as many machines as fit in it."""
    value = ""
    for one in measured:
        entry = f"{one.machine}={one.total}/{one.available}"
        entry += f"/{_format(one.ssh_seconds, 1)}/{_format(one.dask_seconds, 1)}"
        if one.cpu_seconds is not None or one.control_seconds is not None:
            entry += f"/{_format(one.cpu_seconds, 2)}/{_format(one.control_seconds, 3)}"
        longer = f"{value} {entry}".lstrip()
        if one.phase == FIRST_BOOT and _MEASUREMENT.fullmatch(entry) and len(longer) <= LONGEST:
            value = longer
    return value


def parse_measurements(value: str) -> tuple[Measurement, ...]:
    """Return the measurements in a tag's value; entries of any other format are ignored."""
    found: dict[str, Measurement] = {}
    for entry in value.split(" "):
        parts = _MEASUREMENT.fullmatch(entry)
        if parts is None or int(parts[3]) > int(parts[2]):
            continue
        ssh, dask, cpu, control = (_parse(text) for text in parts.groups()[3:])
        one = Measurement(
            machine=parts[1],
            phase=FIRST_BOOT,
            total=int(parts[2]),
            available=int(parts[3]),
            ssh_seconds=ssh,
            dask_seconds=dask,
            cpu_seconds=cpu,
            control_seconds=control,
        )
        found.setdefault(one.machine, one)
    return tuple(found.values())


def _format(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _parse(text: str | None) -> float | None:
    return None if text in (None, "-") else float(text)
