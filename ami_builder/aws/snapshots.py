"""Snapshots of this account: list those of runs, describe, delete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from ami_builder.aws import tags as tagging
from ami_builder.aws.session import Account, aws_errors, code_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from types_boto3_ec2.type_defs import SnapshotTypeDef

_GIB = 1 << 30
_PAGE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A snapshot of this account."""

    id: str
    created: datetime | None
    size: int
    """Size of the volume, in bytes."""
    complete: bool
    tags: Mapping[str, str]


def list_tagged(account: Account) -> list[Snapshot]:
    """Return the snapshots that carry a run's tag. Raises CloudFailed."""
    with aws_errors():
        pages = account.ec2.get_paginator("describe_snapshots").paginate(
            OwnerIds=["self"],
            Filters=[{"Name": "tag-key", "Values": [tagging.RUN]}],
            PaginationConfig={"PageSize": _PAGE},
        )
        return [
            Snapshot(
                id=one["SnapshotId"],
                created=one.get("StartTime"),
                size=one.get("VolumeSize", 0) * _GIB,
                complete=one.get("State") == "completed",
                tags=tagging.as_dict(one.get("Tags", [])),
            )
            for page in pages
            for one in page["Snapshots"]
        ]


def describe(account: Account, snapshots: Sequence[str]) -> list[SnapshotTypeDef]:
    """Return snapshots as EC2 describes them; an empty list unless EC2 shows all of them."""
    found: list[SnapshotTypeDef] = []
    if snapshots:
        with aws_errors(ignore="InvalidSnapshot.NotFound"):
            found = account.ec2.describe_snapshots(SnapshotIds=list(snapshots))["Snapshots"]
    return found


def ids_of(described: Mapping[str, Any]) -> list[str]:
    """Return the ids of the snapshots in the block device mappings of an AMI or a launch template."""
    disks = (mapping.get("Ebs", {}) for mapping in described.get("BlockDeviceMappings", []))
    return [disk["SnapshotId"] for disk in disks if disk.get("SnapshotId")]


def delete(account: Account, snapshot: str) -> bool:
    """Delete a snapshot, which may be missing already; return False when an AMI uses it."""
    with aws_errors():
        try:
            account.ec2.delete_snapshot(SnapshotId=snapshot)
        except ClientError as error:
            if code_of(error) == "InvalidSnapshot.InUse":
                return False
            if code_of(error) != "InvalidSnapshot.NotFound":
                raise
    return True
