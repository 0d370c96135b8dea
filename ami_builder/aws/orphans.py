"""Orphaned resources: find by tag and by ledger what runs left in an account, and delete that only."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from ami_builder.aws import images, instances, network, presence
from ami_builder.aws import tags as tagging
from ami_builder.aws.session import Account
from ami_builder.core.cleanup import Action
from ami_builder.core.errors import CloudFailed
from ami_builder.core.orphans import FoundResource, Orphan, Resource
from ami_builder.state.ledger import LedgerEntry

_RELEASED_SECONDS = 300.0
_IN_USE = "VolumeInUse|IncorrectState"
_ENDED = frozenset({"terminated"})
# EC2's description of a snapshot that CreateImage made.
_MADE_FROM = re.compile(r"Created by CreateImage\((i-[0-9a-f]+)\)")


def find(account: Account, entries: Sequence[LedgerEntry] = ()) -> list[FoundResource]:
    """Return the resources of this region that carry a run's tag, or are open in the ledgers' `entries`.

    Raises CloudFailed when any list can't be read, since a plan needs all of them.
    """
    open_entries = [entry for entry in entries if not entry.deleted and entry.region == account.region]
    found: dict[tuple[Resource, str], FoundResource] = {}
    templates = list(_templates(account))
    instances = list(_instances(account, open_entries, templates))
    made_from = _by_id(open_entries, Resource.INSTANCE) | {one.id: one.run_id for one, _ in instances}
    for one in (
        *(one for one, state in instances if state not in _ENDED),
        *templates,
        *_volumes(account),
        *_images_and_snapshots(account, open_entries, made_from),
        *_groups(account, open_entries),
    ):
        found.setdefault((one.kind, one.id), one)
    return list(found.values())


def remove(account: Account, decision: Orphan) -> None:
    """Delete a resource as planned, and wait until it is deleted; it may be missing already.

    Raises CloudFailed when it can't be deleted.
    """
    one = decision.found
    if decision.action is not Action.DELETE:
        raise ValueError(f"the plan keeps {one.id}: {decision.reason}")
    # Most of what an instance or an AMI had went with it; CloudTrail need not show refused calls for that.
    if presence.is_gone(account, one.id):
        return
    match one.kind:
        case Resource.INSTANCE:
            if (described := instances.describe(account, one.id)) is not None:
                if tagging.RUN not in tagging.as_dict(described.get("Tags", [])):
                    tag(account, one.id, one.run_id)
                instances.terminate(account, one.id)
        case Resource.LAUNCH_TEMPLATE:
            _delete_template(account, one.id)
        case Resource.VOLUME:
            _delete_volume(account, one.id)
        case Resource.IMAGE:
            delete_image(account, one.id, one.run_id)
        case Resource.SNAPSHOT:
            _tag_snapshot(account, one.id, one.run_id)
            if not images.delete_snapshot(account, one.id):
                raise CloudFailed(f"snapshot {one.id} can't be deleted: an AMI uses it")
        case Resource.SECURITY_GROUP:
            network.delete_group(account, one.id)


def tag(account: Account, resource: str, run_id: str, *, appears: float = 0.0) -> None:
    """Put a run's tag on a resource, which may be missing already, or be shown only after `appears` seconds.

    Permissions to delete depend on that tag, and a resource that only a name, a template or a ledger ties to
    the run may lack it.
    """
    run = tagging.as_list({tagging.RUN: run_id})
    presence.if_present(
        account, resource, lambda: account.ec2.create_tags(Resources=[resource], Tags=run), appears=appears
    )


def delete_image(account: Account, ami: str, run_id: str) -> None:
    """Tag an AMI and its snapshots with their run where they lack it, and deregister and delete them.

    The snapshots first: an AMI is not deregistered unless its snapshots can be deleted.
    """
    if (found := images.get(account, ami)) is None:
        return
    for snapshot in found.snapshots:
        _tag_snapshot(account, snapshot, run_id)
    if tagging.RUN not in found.tags:
        tag(account, ami, run_id)
    images.deregister(account, ami)


def delete_templates(account: Account, run_id: str) -> None:
    """Delete the launch templates that Packer makes for a run's spot instances."""
    for one in account.matching(
        "describe_launch_templates", "LaunchTemplates", f"tag:{tagging.RUN}", [run_id]
    ):
        _delete_template(account, one["LaunchTemplateId"])


def _tag_snapshot(account: Account, snapshot: str, run_id: str) -> None:
    for one in images.describe_snapshots(account, [snapshot]):
        if tagging.RUN not in tagging.as_dict(one.get("Tags", [])):
            tag(account, snapshot, run_id)


def _delete_template(account: Account, template: str) -> None:
    presence.if_present(
        account, template, lambda: account.ec2.delete_launch_template(LaunchTemplateId=template)
    )


def _instances(
    account: Account, entries: Sequence[LedgerEntry], templates: Sequence[FoundResource]
) -> Iterable[tuple[FoundResource, str]]:
    """Yield instances of runs with their state, terminated ones too.

    Packer tags a spot instance only once it runs, but EC2 tags it with its launch template at once.
    """
    ids = _by_id(entries, Resource.INSTANCE)
    runs = {one.id: one.run_id for one in templates}
    for reservation in (
        *_tagged(account, "describe_instances", "Reservations"),
        *account.matching("describe_instances", "Reservations", "instance-id", ids),
        *account.matching("describe_instances", "Reservations", f"tag:{tagging.LAUNCH_TEMPLATE}", runs),
    ):
        for one in reservation["Instances"]:
            template = tagging.as_dict(one.get("Tags", [])).get(tagging.LAUNCH_TEMPLATE, "")
            run = ids.get(one["InstanceId"]) or runs.get(template, "")
            found = _found(
                account, Resource.INSTANCE, one["InstanceId"], one, run, created=one.get("LaunchTime")
            )
            yield found, one["State"]["Name"]


def _templates(account: Account) -> Iterable[FoundResource]:
    for one in _tagged(account, "describe_launch_templates", "LaunchTemplates"):
        template, name, created = one["LaunchTemplateId"], one["LaunchTemplateName"], one.get("CreateTime")
        yield _found(account, Resource.LAUNCH_TEMPLATE, template, one, name=name, created=created)


def _volumes(account: Account) -> Iterable[FoundResource]:
    for one in _tagged(account, "describe_volumes", "Volumes"):
        yield _found(account, Resource.VOLUME, one["VolumeId"], one, created=one.get("CreateTime"))


def _images_and_snapshots(
    account: Account, entries: Sequence[LedgerEntry], instances: Mapping[str, str]
) -> Iterable[FoundResource]:
    """Yield AMIs and snapshots of runs; an untagged snapshot is a run's when its AMI or its instance is.

    Packer may be killed between deregistering an AMI and deleting its snapshots.
    """
    ids, names = _by_id(entries, Resource.IMAGE), _by_name(entries, Resource.IMAGE)
    using: dict[str, list[str]] = defaultdict(list)
    ours: dict[str, FoundResource] = {}
    # A disabled AMI uses its snapshots too.
    for image in account.listed("describe_images", "Images", Owners=["self"], IncludeDisabled=True):
        for snapshot in images.snapshot_ids(image):
            using[snapshot].append(image["ImageId"])
        name, created = image.get("Name", ""), _time(image.get("CreationDate"))
        run = ids.get(image["ImageId"]) or names.get(name, "")
        found = _found(account, Resource.IMAGE, image["ImageId"], image, run, name=name, created=created)
        if found.run_id:
            ours[found.id] = found
    yield from ours.values()
    made_from = {f"Created by CreateImage({instance})*": run for instance, run in instances.items()}
    of_ours = {
        snapshot: ours[image].run_id for snapshot, used in using.items() for image in used if image in ours
    }
    for one in (
        *_tagged(account, "describe_snapshots", "Snapshots", OwnerIds=["self"]),
        *account.matching("describe_snapshots", "Snapshots", "snapshot-id", of_ours, OwnerIds=["self"]),
        *account.matching("describe_snapshots", "Snapshots", "description", made_from, OwnerIds=["self"]),
    ):
        if match := _MADE_FROM.match(one.get("Description", "")):
            of_ours.setdefault(one["SnapshotId"], instances.get(match[1], ""))
        used = using.get(one["SnapshotId"], [])
        yield _found(
            account,
            Resource.SNAPSHOT,
            one["SnapshotId"],
            one,
            of_ours.get(one["SnapshotId"], ""),
            created=one.get("StartTime"),
            images=tuple(used),
            used_by=next((image for image in used if image not in ours), ""),
        )


def _groups(account: Account, entries: Sequence[LedgerEntry]) -> Iterable[FoundResource]:
    ids, names = _by_id(entries, Resource.SECURITY_GROUP), _by_name(entries, Resource.SECURITY_GROUP)
    for one in (
        *_tagged(account, "describe_security_groups", "SecurityGroups"),
        *account.matching("describe_security_groups", "SecurityGroups", "group-id", ids),
        *account.matching("describe_security_groups", "SecurityGroups", "group-name", names),
    ):
        group, name = one["GroupId"], one["GroupName"]
        run = ids.get(group) or names.get(name, "")
        # EC2 keeps no creation date of a security group.
        created = _time(tagging.as_dict(one.get("Tags", [])).get(tagging.CREATED))
        yield _found(account, Resource.SECURITY_GROUP, group, one, run, name=name, created=created)


def _tagged(account: Account, call: str, key: str, **more: Any) -> list[Any]:
    """Return the resources that carry a run's tag."""
    return account.matching(call, key, "tag-key", [tagging.RUN], **more)


def _found(
    account: Account,
    kind: Resource,
    resource_id: str,
    described: Mapping[str, Any],
    run_id: str = "",
    *,
    created: datetime | None,
    name: str = "",
    images: tuple[str, ...] = (),
    used_by: str = "",
) -> FoundResource:
    """Return a resource; a tag of its own overrides `run_id`."""
    tags = tagging.as_dict(described.get("Tags", []))
    return FoundResource(
        kind=kind,
        id=resource_id,
        region=account.region,
        run_id=tags.get(tagging.RUN) or run_id,
        name=name or tags.get(tagging.NAME, ""),
        created=created,
        finished=kind is Resource.IMAGE and tagging.FINISHED in tags,
        images=images,
        used_by=used_by,
        copied=tagging.COPY_OF in tags,
    )


def _by_id(entries: Sequence[LedgerEntry], kind: Resource) -> dict[str, str]:
    return {entry.id: entry.find.get("run", "") for entry in entries if entry.kind is kind and entry.id}


def _by_name(entries: Sequence[LedgerEntry], kind: Resource) -> dict[str, str]:
    named = ((entry.find.get("name", ""), entry) for entry in entries if entry.kind is kind)
    return {name: entry.find.get("run", "") for name, entry in named if name}


def _time(text: str | None) -> datetime | None:
    try:
        return datetime.fromisoformat(text) if text else None
    except ValueError:
        return None


def _delete_volume(account: Account, volume: str) -> None:
    # Its instance, which deletes it too, may still be shutting down.
    presence.if_present(
        account,
        volume,
        lambda: account.ec2.delete_volume(VolumeId=volume),
        busy=_IN_USE,
        frees=_RELEASED_SECONDS,
    )
