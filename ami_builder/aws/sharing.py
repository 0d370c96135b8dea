"""Whom an AMI is shared with: accounts by id, organizations and their units by ARN; never everyone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ami_builder.aws import images
from ami_builder.aws.session import Account, translated

if TYPE_CHECKING:
    from types_boto3_ec2.type_defs import LaunchPermissionTypeDef


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What came of sharing an AMI."""

    added: tuple[str, ...]
    """Who may launch it, or use its snapshots, from now on; none when all stood as asked already."""
    extra: tuple[str, ...]
    """Who may launch it too, though nobody asked for it here: left as they are."""


def share(account: Account, ami: images.Ami, share_with: Sequence[str]) -> Shared:
    """Let accounts, organizations and units launch an AMI, and accounts copy its snapshots; adds what lacks.

    Nothing is ever taken back here: whoever runs a cluster from the AMI would be cut off without a word.
    Of an encrypted AMI its key's policy must let them use the key besides. Raises CloudFailed.
    """
    granted = launchers(account, ami.id)
    lacking = [who for who in share_with if who not in granted]
    if lacking:
        with translated():
            account.ec2.modify_image_attribute(
                ImageId=ami.id, LaunchPermission={"Add": [_permission(who) for who in lacking]}
            )
    added = list(lacking)
    accounts = [who for who in share_with if who.isdigit()]
    for snapshot in ami.snapshots if accounts else ():
        with translated():
            shown = account.ec2.describe_snapshot_attribute(
                SnapshotId=snapshot, Attribute="createVolumePermission"
            )
            known = {one.get("UserId") for one in shown["CreateVolumePermissions"]}
            if users := [who for who in accounts if who not in known]:
                account.ec2.modify_snapshot_attribute(
                    SnapshotId=snapshot,
                    Attribute="createVolumePermission",
                    OperationType="add",
                    UserIds=users,
                )
                added += users
    return Shared(added=tuple(dict.fromkeys(added)), extra=tuple(sorted(granted - set(share_with))))


def launchers(account: Account, ami: str) -> frozenset[str]:
    """Return who may launch an AMI besides its own account: ids and ARNs, `all` for everyone."""
    with translated():
        found = account.ec2.describe_image_attribute(ImageId=ami, Attribute="launchPermission")
    return frozenset(str(who) for each in found.get("LaunchPermissions", []) for who in each.values())


def _permission(who: str) -> LaunchPermissionTypeDef:
    if who.isdigit():
        return {"UserId": who}
    return {"OrganizationArn": who} if ":organization/" in who else {"OrganizationalUnitArn": who}
