"""Snapshots of ours whose AMI is gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from ami_builder.aws import images
from ami_builder.aws import tags as tagging
from ami_builder.aws.session import Account, translated

_GIB = 1 << 30
_PAGE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A snapshot of this account."""

    id: str
    created: datetime | None
    size: int
    """Of the volume, in bytes."""
    complete: bool
    tags: Mapping[str, str]


def orphans(account: Account, owned: Sequence[images.Ami]) -> list[Snapshot]:
    """Return the snapshots with our run tag that no AMI uses, neither one of `owned` nor one lent to us.

    `owned` must be every AMI of the account. Raises CloudFailed when any of it can't be listed.
    """
    used = {snapshot for ami in owned for snapshot in ami.snapshots}
    with translated():
        pages = account.ec2.get_paginator("describe_snapshots").paginate(
            OwnerIds=["self"],
            Filters=[{"Name": "tag-key", "Values": [tagging.RUN]}],
            PaginationConfig={"PageSize": _PAGE},
        )
        shown = [one for page in pages for one in page["Snapshots"] if one["SnapshotId"] not in used]
    if shown:
        lent = {snapshot for ami in images.lent(account) for snapshot in ami.snapshots}
        shown = [one for one in shown if one["SnapshotId"] not in lent]
    return [
        Snapshot(
            id=one["SnapshotId"],
            created=one.get("StartTime"),
            size=one.get("VolumeSize", 0) * _GIB,
            complete=one.get("State") == "completed",
            tags=tagging.as_dict(one.get("Tags", [])),
        )
        for one in shown
    ]


def shared_with(account: Account, snapshot: str) -> str:
    """Return whom a snapshot is shared with, in words; empty for nobody."""
    with translated():
        found = account.ec2.describe_snapshot_attribute(
            SnapshotId=snapshot, Attribute="createVolumePermission"
        )
    with_whom = sorted(str(who) for each in found["CreateVolumePermissions"] for who in each.values())
    return f"shared with {', '.join(with_whom)}" if with_whom else ""
