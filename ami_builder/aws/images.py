"""AMIs of this account and their snapshots: find, wait, finish, record a verdict, deprecate, delete."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from ami_builder.aws import presence
from ami_builder.aws import tags as tagging
from ami_builder.aws.session import DENIED, Account, aws_errors, code_of, look_for
from ami_builder.core.errors import CloudFailed, UsageError
from ami_builder.core.options import Arch
from ami_builder.core.records import Measurement, Outcome
from ami_builder.core.units import GIB
from ami_builder.system import processes

if TYPE_CHECKING:
    from types_boto3_ec2.type_defs import FilterTypeDef, ImageTypeDef

AVAILABLE_SECONDS = 2 * 3600.0
"""How long an AMI may be pending: the snapshots of large, encrypted volumes take long."""
_POLL_SECONDS = 5.0
_SEEN_SECONDS = 300.0
_UNPROTECTED = ("disabled", "")
# EC2 accepts only a time in the future, and drops its seconds.
_SOON = timedelta(minutes=2)
# What EC2 reports of a snapshot that it need not, or must not, be asked to delete again.
_SETTLED = frozenset({"success", "skipped"})
_PENDING = frozenset({"pending", "transient"})
# Errors of the region, its quotas or its network, whatever the AMI.
_UNRELATED = frozenset(
    {
        "InstanceLimitExceeded",
        "InsufficientInstanceCapacity",
        "MissingInput",
        "Unsupported",
        "VPCIdNotSpecified",
        "VcpuLimitExceeded",
    }
)
_VERDICTS = frozenset({Outcome.PASSED, Outcome.FAILED, Outcome.INCONCLUSIVE})


@dataclass(frozen=True, slots=True, kw_only=True)
class Ami:
    """An AMI of this account."""

    id: str
    name: str
    state: str
    """`available`, `pending`, or a state from which it never becomes available."""
    reason: str
    created: datetime | None
    size: int
    """Size of its volumes, in bytes."""
    snapshots: tuple[str, ...]
    encrypted: bool
    public: bool
    protection: str
    """Why EC2 refuses to deregister it, as EC2 names it; empty if it does not."""
    deprecated: datetime | None
    """When it was deprecated, or will be."""
    tags: Mapping[str, str]
    arch: Arch = Arch.AMD64

    @property
    def finished(self) -> bool:
        """True when the build completed it; `gc` may delete an unfinished one."""
        return tagging.FINISHED in self.tags

    @property
    def pending(self) -> bool:
        """True while it may still become available."""
        return self.state in _PENDING

    @property
    def verdict(self) -> tuple[Outcome, str] | None:
        """The outcome of the checks and the digest of those checks; None when they never ran."""
        word, _, digest = self.tags.get(tagging.VERDICT, "").partition(" ")
        if not word:
            return None
        # An unknown word is not a pass.
        return Outcome(word) if word in _VERDICTS else Outcome.FAILED, digest

    @property
    def measured(self) -> tuple[Measurement, ...]:
        """The measurements of its first boots, of as many machines as fit in the tag."""
        return tagging.parse_measurements(self.tags.get(tagging.MEASURED, ""))

    @property
    def revoked(self) -> str | None:
        """Why it was revoked and must not be in a channel again; None when it was not."""
        return self.tags.get(tagging.REVOKED)


def get(account: Account, ami: str) -> Ami | None:
    """Return an AMI by its id; None when it does not exist, or EC2 does not show it yet."""
    found = describe(account, ami)
    return None if found is None else _ami(found)


def describe(account: Account, ami: str) -> ImageTypeDef | None:
    """Return an AMI as EC2 describes it; None when it does not exist, or EC2 does not show it yet."""
    found: list[ImageTypeDef] = []
    with aws_errors(ignore=r"InvalidAMIID\..+"):
        found = account.ec2.describe_images(ImageIds=[ami], IncludeDeprecated=True, IncludeDisabled=True)[
            "Images"
        ]
    return found[0] if found else None


def root_volume(image: ImageTypeDef) -> tuple[str, int]:
    """Return the name of an AMI's root device, and the size of its volume in GiB."""
    root = image.get("RootDeviceName", "")
    mappings = image.get("BlockDeviceMappings", [])
    sizes = (m.get("Ebs", {}).get("VolumeSize", 0) for m in mappings if m.get("DeviceName") == root)
    return root, next(sizes, 0)


def find_by_digest(account: Account, image: str, digest: str) -> Ami | None:
    """Return our AMI of this digest, available or pending; prefer finished ones, then the newest.

    Its name is searched too: a build that is killed may leave the AMI without tags.
    """
    tagged = _search(account, _tagged(tagging.IMAGE, image), _tagged(tagging.DIGEST, digest))
    named = _search(account, {"Name": "name", "Values": [tagging.ami_name_pattern(image, digest)]})
    fitting = [
        ami
        for ami in [*tagged, *named]
        if ami.tags.get(tagging.DIGEST, digest) == digest and ami.state in {"available", *_PENDING}
    ]
    return max(fitting, key=lambda ami: (ami.finished, ami.state == "available", _age(ami)), default=None)


def find_by_name(account: Account, name: str) -> Ami | None:
    """Return the AMI of a name, in any state; a name is unique within an account and region."""
    return next(iter(_search(account, {"Name": "name", "Values": [name]})), None)


def find_by_ids(account: Account, ids: Sequence[str], *, owned: bool = True) -> dict[str, Ami]:
    """Return those of the AMIs that exist, by id; of this account only if `owned`."""
    who: Any = {"Owners": ["self"]} if owned else {"IncludeDeprecated": True}
    found = account.matching("describe_images", "Images", "image-id", ids, IncludeDisabled=True, **who)
    return {one["ImageId"]: _ami(one) for one in found}


def list_owned(account: Account) -> list[Ami]:
    """Return every AMI of this account, disabled ones too, whatever created it."""
    return _listed(account, Owners=["self"], IncludeDisabled=True)


def list_orphan_snapshots(account: Account, owned: Sequence[Ami]) -> Sequence[Mapping[str, Any]]:
    """Return the snapshots with a run's tag that no AMI uses, neither one of `owned` nor one shared with us.

    `owned` must be every AMI of the account. Raises CloudFailed when a list can't be read.
    """
    used = {snapshot for ami in owned for snapshot in ami.snapshots}
    found = account.matching("describe_snapshots", "Snapshots", "tag-key", [tagging.RUN], OwnerIds=["self"])
    if found := [one for one in found if one["SnapshotId"] not in used]:
        # Others' deprecated AMIs are only listed when asked for.
        lent = _listed(account, ExecutableUsers=["self"], IncludeDeprecated=True, IncludeDisabled=True)
        used = {snapshot for ami in lent for snapshot in ami.snapshots}
    return [one for one in found if one["SnapshotId"] not in used]


def find_copies(account: Account, source: str, name: str) -> list[Ami]:
    """Return the copies of another region's AMI, by tag or by name, in any state."""
    tagged = _search(account, _tagged(tagging.COPY_OF, source))
    named = _search(account, {"Name": "name", "Values": [name]})
    found = {ami.id: ami for ami in [*tagged, *named] if ami.tags.get(tagging.COPY_OF, source) == source}
    return list(found.values())


def deprecate(account: Account, ami: str) -> None:
    """Deprecate an AMI, which may be missing already: searches no longer list it, but it can be launched."""
    presence.if_present(
        account,
        ami,
        lambda: account.ec2.enable_image_deprecation(ImageId=ami, DeprecateAt=datetime.now(UTC) + _SOON),
    )


def wait_visible(account: Account, ami: str, seconds: float = math.inf) -> Ami:
    """Wait until EC2 shows a new AMI, in any state; raises TimedOut."""
    return processes.wait_until(
        lambda: get(account, ami),
        what=f"the appearance of {ami}",
        timeout=min(seconds, _SEEN_SECONDS),
        interval=_POLL_SECONDS,
    )


def wait_available(
    account: Account, ami: str, seconds: float, on_progress: Callable[[str], None] = lambda _: None
) -> Ami:
    """Wait until an AMI is available.

    Raises CloudFailed with EC2's reason when its creation failed, TimedOut after `seconds`.
    """
    wait_visible(account, ami, seconds)

    def settled() -> Ami | None:
        found = get(account, ami)
        if found is None:
            return None
        if found.pending:
            on_progress(f"snapshot {_progress(account, found)}")
            return None
        return found

    found = processes.wait_until(
        settled, what=f"the completion of {ami}", timeout=seconds, interval=_POLL_SECONDS
    )
    if found.state != "available":
        raise CloudFailed(f"{ami} is {found.state}" + (f": {found.reason}" if found.reason else ""))
    return found


def finish(account: Account, ami: str, tags: Mapping[str, str], *, public: bool = False) -> Ami:
    """Tag an available AMI and its snapshots, require IMDSv2, make it private or `public`, mark it finished.

    Calling it again changes nothing. Raises UsageError for a public AMI that is encrypted, CloudFailed.
    """
    found = _existing(account, ami)
    if public and found.encrypted:
        raise UsageError(
            f"{ami} is encrypted, so it can't be public",
            hint="build without aws.encrypt, or without --public; an AMI is also encrypted if its base is, or"
            " if the region encrypts EBS by default",
        )
    tag(account, [ami, *found.snapshots], tags)
    _modify(account, ami, ImdsSupport={"Value": "v2.0"})
    if public != found.public:
        _modify(account, ami, LaunchPermission={"Add" if public else "Remove": [{"Group": "all"}]})
    if not found.finished:
        tag(account, ami, {tagging.FINISHED: tagging.now()})
    return _existing(account, ami)


def record_verdict(
    account: Account, ami: str, outcome: Outcome, checks_digest: str, measured: Sequence[Measurement] = ()
) -> None:
    """Tag an AMI with the outcome of the checks of `checks_digest` and with its first boots' measurements.

    This replaces an earlier verdict.
    """
    verdict = {
        tagging.VERDICT: f"{outcome} {checks_digest}",
        tagging.MEASURED: tagging.format_measurements(measured),
    }
    tag(account, ami, verdict)


def revoke(account: Account, ami: str, reason: str) -> None:
    """Tag an AMI as revoked, with the reason; an earlier reason is kept."""
    if _existing(account, ami).revoked is None:
        tag(account, ami, {tagging.REVOKED: reason[: tagging.LONGEST]})


def deregister(account: Account, ami: str, *, with_snapshots: bool = True) -> None:
    """Deregister an AMI, which may be missing already, and delete its snapshots that no other AMI uses."""
    if not with_snapshots:
        presence.if_present(account, ami, lambda: account.ec2.deregister_image(ImageId=ami))
        return
    found = get(account, ami)
    if found is None:
        return
    codes: dict[str, str] = {}

    def call() -> None:
        answer = account.ec2.deregister_image(ImageId=ami, DeleteAssociatedSnapshots=True)
        for one in answer.get("DeleteSnapshotResults", []):
            codes[one["SnapshotId"]] = one["ReturnCode"]

    presence.if_present(account, ami, call)
    for snapshot in found.snapshots:
        if codes.get(snapshot) not in _SETTLED:
            delete_snapshot(account, snapshot)


def tag(account: Account, resources: str | Sequence[str], tags: Mapping[str, str]) -> None:
    """Tag AMIs or snapshots that exist but may not be shown to every call yet; raises CloudFailed."""
    ids = [resources] if isinstance(resources, str) else list(resources)
    presence.once_visible(
        account, ids, lambda: account.ec2.create_tags(Resources=ids, Tags=tagging.as_list(tags))
    )


def describe_snapshots(account: Account, snapshots: Sequence[str]) -> Sequence[Mapping[str, Any]]:
    """Return snapshots as EC2 describes them; none unless EC2 shows all of them."""
    if snapshots:
        with aws_errors(ignore="InvalidSnapshot.NotFound"):
            return account.ec2.describe_snapshots(SnapshotIds=list(snapshots))["Snapshots"]
    return ()


def snapshot_ids(described: Mapping[str, Any]) -> list[str]:
    """Return the ids of the snapshots in the block device mappings of an AMI or a launch template."""
    disks = (mapping.get("Ebs", {}) for mapping in described.get("BlockDeviceMappings", []))
    return [disk["SnapshotId"] for disk in disks if disk.get("SnapshotId")]


def delete_snapshot(account: Account, snapshot: str) -> bool:
    """Delete a snapshot, which may be missing already; return False when an AMI uses it."""
    try:
        presence.if_present(account, snapshot, lambda: account.ec2.delete_snapshot(SnapshotId=snapshot))
    except CloudFailed as failed:
        if code_of(failed) != "InvalidSnapshot.InUse":
            raise
        return False
    return True


def dry_run_launch(
    account: Account, ami: str, instance_type: str, tags: Mapping[str, str], subnet: str = ""
) -> str:
    """Check with a dry run that an AMI can be launched in a subnet, or in the default VPC.

    Returns why the dry run was inconclusive, such as missing permissions or no default VPC; else "".
    Raises CloudFailed when the AMI can't be launched.
    """
    where: Any = {"SubnetId": subnet} if subnet else {}
    try:
        with aws_errors(ignore="DryRunOperation"):
            account.ec2.run_instances(
                DryRun=True,
                ImageId=ami,
                InstanceType=instance_type,  # type: ignore[arg-type] # EC2 has more than the stubs know
                MinCount=1,
                MaxCount=1,
                TagSpecifications=tagging.specifications(tags, "instance", "volume"),
                **where,
            )
    except CloudFailed as failed:
        code = code_of(failed)
        if code in DENIED:
            return "these credentials do not allow it"
        if code not in _UNRELATED:
            raise
        return code
    return ""


def _modify(account: Account, ami: str, **attribute: Any) -> None:
    presence.once_visible(account, ami, lambda: account.ec2.modify_image_attribute(ImageId=ami, **attribute))


def _search(account: Account, *filters: FilterTypeDef) -> list[Ami]:
    return _listed(account, Owners=["self"], IncludeDisabled=True, Filters=list(filters))


def _listed(account: Account, **which: Any) -> list[Ami]:
    return [_ami(image) for image in account.listed("describe_images", "Images", **which)]


def _tagged(key: str, value: str) -> FilterTypeDef:
    return {"Name": f"tag:{key}", "Values": [value]}


def _existing(account: Account, ami: str) -> Ami:
    # Another describe may have shown it just before.
    if (found := look_for(lambda: get(account, ami))) is None:
        raise CloudFailed(f"there is no AMI {ami} in {account.region}", hint="check the id and the region")
    return found


def _progress(account: Account, ami: Ami) -> str:
    found = describe_snapshots(account, ami.snapshots)
    return ", ".join(one.get("Progress") or "0%" for one in found) or "not started"


def _ami(image: ImageTypeDef) -> Ami:
    disks = [mapping["Ebs"] for mapping in image.get("BlockDeviceMappings", []) if "Ebs" in mapping]
    created, deprecated = image.get("CreationDate", ""), image.get("DeprecationTime", "")
    return Ami(
        id=image["ImageId"],
        name=image.get("Name", ""),
        state=image.get("State", "available"),
        reason=image.get("StateReason", {}).get("Message", ""),
        created=datetime.fromisoformat(created) if created else None,
        size=sum(disk.get("VolumeSize", 0) for disk in disks) * GIB,
        snapshots=tuple(snapshot_ids(image)),
        encrypted=any(disk.get("Encrypted", False) for disk in disks),
        public=image.get("Public", False),
        protection=_protection(image.get("DeregistrationProtection", "")),
        deprecated=datetime.fromisoformat(deprecated) if deprecated else None,
        tags=tagging.as_dict(image.get("Tags", [])),
        arch=Arch.named(image.get("Architecture", "")) or Arch.AMD64,
    )


def _protection(state: str) -> str:
    return "" if state in _UNPROTECTED else state


def _age(ami: Ami) -> datetime:
    return ami.created or datetime.min.replace(tzinfo=UTC)
