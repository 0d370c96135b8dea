"""The name of an AMI's root device: register Packer's AMI again under the name that launchers map.

A launcher that enlarges the root by its block device mappings names it itself: dask-cloudprovider's
EC2Cluster maps /dev/sda1, whatever the AMI has, and Debian's have /dev/xvda. A mapping of another name makes
a second, empty disk. An instance's root keeps the name of its AMI, and of an existing mapping CreateImage
changes DeleteOnTermination alone; RegisterImage takes any name with the same snapshot. Sources:
https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_CreateImage.md and
https://docs.aws.amazon.com/cli/v1/reference/ec2/register-image.html

Packer's AMI has a name of its own, so that after a kill at any point either the next build or `gc` finds both
AMIs: by name, by tag, and by the ledger. It is deregistered, without its snapshots, before the other one
counts as finished.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ami_builder.aws import images, presence
from ami_builder.aws import tags as tagging
from ami_builder.aws.session import Account, aws_errors, code_of, look_for
from ami_builder.aws.source_ami import BaseAmi
from ami_builder.core.errors import CloudFailed, UsageError
from ami_builder.core.orphans import Resource
from ami_builder.state.ledger import Ledger

if TYPE_CHECKING:
    from types_boto3_ec2.type_defs import ImageTypeDef

_BAKED = "-baked"
_KEEP = 'set aws.root_device to "", which keeps the name of the base\'s root device'
# What a registered AMI must have as Packer's has it. The last three say what instances are billed as.
_SAME = (
    "Architecture",
    "VirtualizationType",
    "EnaSupport",
    "SriovNetSupport",
    "BootMode",
    "TpmSupport",
    "PlatformDetails",
    "UsageOperation",
    "ProductCodes",
)
_GIVEN = _SAME[:6]
# EC2 takes these from the snapshot, and refuses them beside it.
_OF_SNAPSHOT = frozenset({"Encrypted", "KmsKeyId", "OutpostArn", "AvailabilityZone", "AvailabilityZoneId"})
_UEFI = frozenset({"uefi", "uefi-preferred"})
_NO_UEFI_DATA = r"Unsupported\w*|InvalidRequest|InvalidParameter\w*"


def differs(base: BaseAmi, wanted: str) -> bool:
    """Return whether the AMI that Packer bakes from a base has another root device name than `wanted`.

    Raises UsageError when the base has another disk of that name.
    """
    if not wanted or wanted == base.root_device:
        return False
    if wanted in base.other_devices:
        raise UsageError(
            f"aws.root_device: {wanted} is another disk of {base}, whose root is {base.root_device}",
            hint=f'set it to "{base.root_device}", or to ""',
        )
    return True


def baked_name(name: str) -> str:
    """Return the name of Packer's AMI when the AMI `name` is registered from it."""
    return f"{name}{_BAKED}"


def final_name(name: str) -> str:
    """Return the name of the AMI that is the result, which Packer's may be already."""
    return name.removesuffix(_BAKED)


def renamed(
    account: Account, ledger: Ledger, ami: images.Ami, root: str, tags: Mapping[str, str]
) -> images.Ami:
    """Return an available AMI of ours with its final name and root device; Packer's is deregistered.

    `ami` is any of the two, tagged or not. Raises CloudFailed when EC2 registers something else than Packer's
    AMI under another root device, or when an AMI that is not of this build has the final name; TimedOut.
    """
    if ami.name == final_name(ami.name):
        baked = images.find_by_name(account, baked_name(ami.name)) if root else None
        if baked is None:
            return ami
        final = _ours(ami, tags)
    else:
        baked = ami
        # The policy allows to register a snapshot with a run's tag alone.
        images.tag(account, [baked.id, *baked.snapshots], tags)
        final = _registered(account, ledger, baked, root, tags)
    images.wait_available(account, final.id, images.AVAILABLE_SECONDS)
    _require_same(account, baked, final, root)
    images.deregister(account, baked.id, with_snapshots=False)
    return final


def _registered(
    account: Account, ledger: Ledger, baked: images.Ami, root: str, tags: Mapping[str, str]
) -> images.Ami:
    """Register Packer's snapshots under the final name, or return the AMI that an earlier call registered."""
    name = final_name(baked.name)
    if (found := images.find_by_name(account, name)) is not None:
        return _ours(found, tags)
    entry = ledger.intend(Resource.IMAGE, account.region, run=tags[tagging.RUN], name=name)
    parameters = _parameters(account, _described(account, baked.id), root)

    def call() -> str:
        return account.ec2.register_image(
            Name=name, TagSpecifications=tagging.specifications(tags, "image"), **parameters
        )["ImageId"]

    try:
        made = presence.once_visible(account, baked.snapshots, call)
    except CloudFailed as failed:
        # RegisterImage has no client token: the answer to an earlier attempt may have been lost.
        found = look_for(lambda: images.find_by_name(account, name)) if _is_taken(failed) else None
        if found is None:
            raise
        try:
            made = _ours(found, tags).id
        except CloudFailed:
            # `gc` finds by the ledger what has the name: it must not take the other's AMI for ours.
            ledger.deleted(entry)
            raise
    ledger.made(entry, made)
    return images.wait_visible(account, made)


def _ours(found: images.Ami, tags: Mapping[str, str]) -> images.Ami:
    """Return an AMI that this build registered, with these tags in the same call; raises CloudFailed."""
    if all(found.tags.get(key) == tags[key] for key in (tagging.RUN, tagging.DIGEST)):
        return found
    raise CloudFailed(
        f"the name {found.name} is taken by {found.id}, which this build did not register",
        hint=f"if nobody needs {found.id}, deregister it, and run the command again",
    )


def _is_taken(failed: CloudFailed) -> bool:
    return code_of(failed) == "InvalidAMIName.Duplicate"


def _parameters(account: Account, baked: ImageTypeDef, root: str) -> dict[str, Any]:
    """Return what RegisterImage needs to make the same AMI with another root device."""
    found: dict[str, Any] = {key: baked[key] for key in _GIVEN if baked.get(key)}  # type: ignore[literal-required]
    if description := baked.get("Description"):
        found["Description"] = description
    if baked.get("BootMode") in _UEFI and (data := _uefi_data(account, baked["ImageId"])):
        found["UefiData"] = data
    return {
        **found,
        "ImdsSupport": "v2.0",
        "RootDeviceName": root,
        "BlockDeviceMappings": [_mapping(one, baked, root) for one in baked["BlockDeviceMappings"]],
    }


def _mapping(disk: Mapping[str, Any], baked: ImageTypeDef, root: str) -> dict[str, Any]:
    """Return a disk of Packer's AMI as RegisterImage takes it; the root gets its new name."""
    is_root = disk["DeviceName"] == baked["RootDeviceName"]
    ebs = {key: value for key, value in disk.get("Ebs", {}).items() if key not in _OF_SNAPSHOT}
    return {
        **disk,
        **({"Ebs": ebs | ({"DeleteOnTermination": True} if is_root else {})} if ebs else {}),
        "DeviceName": root if is_root else disk["DeviceName"],
    }


def _uefi_data(account: Account, ami: str) -> str:
    """Return an AMI's UEFI variables, such as keys of Secure Boot; empty if it has none."""

    def call() -> str:
        with aws_errors(ignore=_NO_UEFI_DATA):
            found = account.ec2.describe_image_attribute(ImageId=ami, Attribute="uefiData")
            return found.get("UefiData", {}).get("Value", "")
        return ""

    return presence.once_visible(account, ami, call)


def _require_same(account: Account, baked: images.Ami, final: images.Ami, root: str) -> None:
    """Raise CloudFailed, and deregister the final AMI, unless it is Packer's with another root device."""
    wanted, found = _described(account, baked.id), _described(account, final.id)
    differences = [
        f"{key} is {found.get(key, 'missing')}, but must be {wanted.get(key, 'missing')}"
        for key in _SAME
        if (found.get(key) or None) != (wanted.get(key) or None)
    ]
    if found.get("RootDeviceName") != root:
        differences.append(f"RootDeviceName is {found.get('RootDeviceName')}, but must be {root}")
    if (disks := _disks(found)) != (expected := _disks(wanted)):
        differences.append(f"its disks are {disks}, but must be {expected}")
    if not differences:
        return
    images.deregister(account, final.id, with_snapshots=False)
    raise CloudFailed(
        f"EC2 registered {final.id} from {baked.id} with differences, so it was deregistered",
        tail=tuple(differences),
        hint=_KEEP,
    )


def _disks(image: ImageTypeDef) -> list[tuple[Any, ...]]:
    """Return what an AMI has as disks, the root first, by everything but the root's name."""
    root, found = image.get("RootDeviceName"), list[tuple[Any, ...]]()
    for one in image.get("BlockDeviceMappings", []):
        ebs, name = one.get("Ebs", {}), one.get("DeviceName", "")
        kinds = ("SnapshotId", "VolumeSize", "VolumeType", "Encrypted")
        found.append(("" if name == root else name, *(ebs.get(kind) for kind in kinds)))
    return sorted(found, key=lambda disk: str(disk[0]))


def _described(account: Account, ami: str) -> ImageTypeDef:
    # Another describe has shown it just before.
    if (found := look_for(lambda: images.describe(account, ami))) is None:
        raise CloudFailed(f"EC2 does not show {ami} in {account.region} any more")
    return found
