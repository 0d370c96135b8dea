"""Which AMI running instances were launched from, and whether it is current in a channel."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ami_builder.aws import images
from ami_builder.aws import tags as tagging
from ami_builder.aws.session import Account
from ami_builder.core.records import Origin


def find(account: Account, instances: Collection[str]) -> Mapping[str, Origin]:
    """Return the origins of those instances that this account has in its region, by instance id.

    Raises CloudFailed.
    """
    found = account.matching("describe_instances", "Reservations", "instance-id", instances)
    launched = {
        one["InstanceId"]: (one["InstanceType"], one["ImageId"])
        for reservation in found
        for one in reservation["Instances"]
    }
    amis = images.find_by_ids(account, sorted({ami for _, ami in launched.values()}), owned=False)
    folders = {
        ami.id: tagging.channels_of(ami.tags[tagging.IMAGE], ami.arch)
        for ami in amis.values()
        if tagging.IMAGE in ami.tags
    }
    current = {folder: _current(account, folder) for folder in set(folders.values())}
    return {
        instance: _origin(kind, ami, amis.get(ami), current.get(folders.get(ami, ""), {}))
        for instance, (kind, ami) in launched.items()
    }


def _current(account: Account, folder: str) -> Mapping[str, str]:
    """Return the current AMI of each channel."""
    found = account.listed("get_parameters_by_path", "Parameters", service="ssm", Path=folder)
    return {one["Name"].rpartition("/")[2]: one["Value"] for one in found}


def _origin(kind: str, image_id: str, ami: images.Ami | None, current: Mapping[str, str]) -> Origin:
    if ami is None:
        return Origin(instance_type=kind, ami=image_id)
    return Origin(
        instance_type=kind,
        ami=image_id,
        name=ami.name,
        image=ami.tags.get(tagging.IMAGE, ""),
        digest=ami.tags.get(tagging.DIGEST, ""),
        channels=tuple(channel for channel, one in current.items() if one == image_id),
        others=tuple(f"{channel}={one}" for channel, one in current.items() if one != image_id),
        revoked=ami.revoked,
    )
