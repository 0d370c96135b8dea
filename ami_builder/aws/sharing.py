"""Sharing an AMI with accounts (ids), and with organizations and their units (ARNs); never with everyone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ami_builder.aws import presence
from ami_builder.aws.images import Ami
from ami_builder.aws.session import Account, aws_errors, code_of
from ami_builder.build.target import Shared
from ami_builder.core.errors import CloudFailed

if TYPE_CHECKING:
    from types_boto3_ec2.type_defs import LaunchPermissionTypeDef


_DEFAULT_KEY = (
    "an AMI under AWS's own key (aws/ebs) can't be shared, whether aws.encrypt, its base or the region's"
    " default encrypts it: set aws.kms_key, or the key of a region in aws.copy_to, to one of your own,"
    " deregister this AMI, and build or copy it again"
)


def share(account: Account, ami: Ami, share_with: Sequence[str]) -> Shared:
    """Add the missing permissions to launch an AMI and, for accounts, to copy its snapshots.

    It never removes a permission, since a running cluster may depend on it. The key's policy of an encrypted
    AMI must allow the others to use the key. Raises CloudFailed.
    """
    try:
        return _share(account, ami, share_with)
    except CloudFailed as failed:
        if not ami.encrypted or failed.hint or not code_of(failed).startswith("InvalidParameter"):
            raise
        raise CloudFailed(failed.message, hint=_DEFAULT_KEY, tail=failed.tail) from failed


def _share(account: Account, ami: Ami, share_with: Sequence[str]) -> Shared:
    granted = image_users(account, ami.id)
    missing = [user for user in share_with if user not in granted]
    if missing:
        permissions = [_permission(user) for user in missing]
        presence.once_visible(
            account,
            ami.id,
            lambda: account.ec2.modify_image_attribute(ImageId=ami.id, LaunchPermission={"Add": permissions}),
        )
    added = list(missing)
    accounts = [user for user in share_with if user.isdigit()]
    for snapshot in ami.snapshots if accounts else ():
        known = snapshot_users(account, snapshot)
        if users := [user for user in accounts if user not in known]:
            presence.once_visible(
                account,
                snapshot,
                partial(
                    account.ec2.modify_snapshot_attribute,
                    SnapshotId=snapshot,
                    Attribute="createVolumePermission",
                    OperationType="add",
                    UserIds=users,
                ),
            )
            added += users
    return Shared(added=tuple(dict.fromkeys(added)), extra=tuple(sorted(granted - set(share_with))))


def image_users(account: Account, ami: str) -> frozenset[str]:
    """Return who can launch an AMI besides its own account: ids and ARNs; `all` means everyone.

    Nobody can when EC2 does not show it.
    """
    with aws_errors(ignore=r"InvalidAMIID\.(NotFound|Unavailable)"):
        found = account.ec2.describe_image_attribute(ImageId=ami, Attribute="launchPermission")
        return _users(found.get("LaunchPermissions", []))
    return frozenset()


def snapshot_users(account: Account, snapshot: str) -> frozenset[str]:
    """Return who can use a snapshot besides its own account: ids; `all` means everyone.

    Nobody can when EC2 does not show it.
    """
    with aws_errors(ignore=r"InvalidSnapshot\.NotFound"):
        found = account.ec2.describe_snapshot_attribute(
            SnapshotId=snapshot, Attribute="createVolumePermission"
        )
        return _users(found["CreateVolumePermissions"])
    return frozenset()


def _users(permissions: Iterable[Any]) -> frozenset[str]:
    return frozenset(str(user) for permission in permissions for user in permission.values())


def _permission(user: str) -> LaunchPermissionTypeDef:
    if user.isdigit():
        return {"UserId": user}
    return {"OrganizationArn": user} if ":organization/" in user else {"OrganizationalUnitArn": user}
