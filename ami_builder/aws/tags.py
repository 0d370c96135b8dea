"""Names and tags of what we make in an account: the one place that knows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING

from ami_builder import __version__

if TYPE_CHECKING:
    from types_boto3_ec2.literals import ResourceTypeType
    from types_boto3_ec2.type_defs import TagSpecificationTypeDef, TagTypeDef

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
LAUNCH_TEMPLATE = "aws:ec2launchtemplate:id"
"""EC2's own, on whatever was launched from a template."""
COPY_OF = f"{PREFIX}copy-of"
"""The AMI, in another region, that this is a copy of."""

LONGEST = 256
"""Characters that EC2 takes as a tag's value."""
_DIGEST_IN_NAME = 12


class Purpose(StrEnum):
    """What a thing in the account is for."""

    BAKE = "bake"
    VERIFY = "verify"
    IMAGE = "image"


def tags(
    image: str, digest: str, run_id: str, purpose: Purpose, more: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the tags of one thing, all of them from the call that makes it."""
    return {
        NAME: image if purpose is Purpose.IMAGE else f"ami-builder {purpose} {image}",
        IMAGE: image,
        DIGEST: digest,
        RUN: run_id,
        PURPOSE: str(purpose),
        VERSION: __version__,
        CREATED: now(),
        **(more or {}),
    }


def now() -> str:
    """Return the time as it stands in tags, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def ami_name(image: str, digest: str, run_id: str) -> str:
    """Return the name under which an AMI is registered: unique, and found again without a tag."""
    return f"{image}-{digest[:_DIGEST_IN_NAME]}-{run_id}"


def ami_name_pattern(image: str, digest: str) -> str:
    """Return the pattern of `ami_name` over all runs."""
    return f"{image}-{digest[:_DIGEST_IN_NAME]}-*"


def group_name(run_id: str, purpose: Purpose) -> str:
    """Return the name of a run's security group."""
    return f"ami-builder-{purpose}-{run_id}"


def as_list(tags: Mapping[str, str]) -> list[TagTypeDef]:
    """Return tags as EC2 takes them."""
    return [{"Key": key, "Value": value} for key, value in tags.items()]


def as_dict(tags: Sequence[TagTypeDef]) -> dict[str, str]:
    """Return tags as EC2 gives them."""
    return {tag.get("Key", ""): tag.get("Value", "") for tag in tags}


def specifications(tags: Mapping[str, str], *kinds: ResourceTypeType) -> list[TagSpecificationTypeDef]:
    """Return what a call that makes things takes, so that nothing exists without its tags."""
    return [{"ResourceType": kind, "Tags": as_list(tags)} for kind in kinds]
