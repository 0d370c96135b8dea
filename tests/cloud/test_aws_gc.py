"""Collecting what killed runs left: all of it, and nothing that is somebody else's."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from moto.core.utils import utcnow

from ami_builder import console
from ami_builder.aws import gc, images, instances, machine, network, orphans, session
from ami_builder.aws import tags as tagging
from ami_builder.aws.session import Account
from ami_builder.aws.tags import Purpose
from ami_builder.core.cleanup import Action
from ami_builder.core.errors import CloudFailed
from ami_builder.core.orphans import FoundResource, Orphan, Resource, RunState, plan
from ami_builder.state.ledger import FILE, Ledger, LedgerEntry, read
from ami_builder.state.workspace import Workspace
from tests.cloud.aws import DIGEST, RUN, instance, launch, left_group, make_ami, make_template, tags
from tests.fake_ec2.server import REGION, Cloud

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def account(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> Account:
    monkeypatch.setattr(machine, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(session, "_LOOK_SECONDS", 0.2)
    monkeypatch.setattr(instances, "_SEEN_SECONDS", 2.0)
    return Account.open()


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.jsonl")


def collect(
    account: Account, entries: tuple[LedgerEntry, ...] = (), runs: dict[str, RunState] | None = None
) -> tuple[Orphan, ...]:
    """Do what `gc --apply` does; return its plan."""
    known = {RUN: RunState.ENDED} if runs is None else runs
    decisions = plan(orphans.find(account, entries), known, datetime.now(UTC), 7200.0)
    for decision in decisions:
        if decision.action is Action.DELETE:
            orphans.remove(account, decision)
            orphans.remove(account, decision)
    return decisions


def test_what_a_killed_run_left_goes(cloud: Cloud, account: Account, ledger: Ledger, tmp_path: Path) -> None:
    made = left_group(account, ledger)
    instance(account, ledger, launch(cloud, made), tmp_path / "m").__enter__()
    make_ami(cloud, tagging.ami_name("dask", DIGEST, RUN), **tags(Purpose.IMAGE))
    make_template(cloud, "packer-fleet-launch-template-1", **tags(Purpose.BAKE))
    kinds = {"instance", "launch-template", "volume", "image", "snapshot", "security-group"}
    assert cloud.left().keys() == kinds
    decisions = collect(account)
    assert [left.found.kind for left in decisions] == [
        Resource.INSTANCE,
        Resource.LAUNCH_TEMPLATE,
        Resource.VOLUME,
        Resource.IMAGE,
        Resource.SNAPSHOT,
        Resource.SECURITY_GROUP,
    ]
    assert {left.found.run_id for left in decisions} == {RUN}
    assert all(left.found.created is not None for left in decisions)
    assert cloud.left() == {}
    assert collect(account) == ()


def test_what_has_no_tag_is_found_by_the_ledger(cloud: Cloud, account: Account, ledger: Ledger) -> None:
    ec2 = cloud.client()
    name, group_name = tagging.ami_name("dask", DIGEST, RUN), tagging.group_name(RUN, Purpose.BAKE)
    ledger.intend(Resource.IMAGE, REGION, run=RUN, name=name)
    ledger.intend(Resource.SECURITY_GROUP, REGION, run=RUN, name=group_name)
    entry = ledger.intend(Resource.INSTANCE, REGION, run=RUN)
    make_ami(cloud, name)
    ec2.create_security_group(GroupName=group_name, Description="x")
    launched = ec2.run_instances(ImageId=cloud.base_ami(), InstanceType="m6i.large", MinCount=1, MaxCount=1)
    ledger.made(entry, launched["Instances"][0]["InstanceId"])
    assert collect(account) == ()
    elsewhere = tuple(e for e in read(ledger.path) if e.region != REGION)
    assert collect(account, elsewhere) == ()
    decisions = collect(account, read(ledger.path))
    assert [left.found.kind for left in decisions] == [
        Resource.INSTANCE,
        Resource.IMAGE,
        Resource.SNAPSHOT,
        Resource.SECURITY_GROUP,
    ]
    assert cloud.left() == {}


def test_what_is_not_ours_is_not_touched(cloud: Cloud, account: Account) -> None:
    ec2 = cloud.client()
    make_ami(cloud, "theirs", team="theirs")
    group_id = ec2.create_security_group(GroupName="theirs", Description="x")["GroupId"]
    ec2.run_instances(
        ImageId=cloud.base_ami(),
        InstanceType="m6i.large",
        MinCount=1,
        MaxCount=1,
        SecurityGroupIds=[group_id],
    )
    ec2.create_volume(AvailabilityZone=f"{REGION}a", Size=1)
    make_template(cloud, "packer-fleet-launch-template-2")
    before = cloud.left()
    assert collect(account) == ()
    assert cloud.left() == before
    assert not {c.action for c in cloud.calls if c.action.startswith(("Delete", "Deregister"))}


def test_a_ledger_stays_open_for_a_day_for_what_shows_late(
    cloud: Cloud, account: Account, tmp_path: Path
) -> None:
    workspace = Workspace.open({"AMI_BUILDER_HOME": str(tmp_path / "home")})
    workspace.ensure()
    folder = workspace.runs_dir / RUN
    folder.mkdir()
    (folder / ".alive").touch()
    ledger = Ledger(folder / FILE)
    name = tagging.ami_name("dask", DIGEST, RUN)
    ledger.intend(Resource.IMAGE, REGION, run=RUN, name=name)

    def collected() -> list[str]:
        with console.open_progress(console.choose_mode(quiet=True)) as progress:
            found = gc.find_orphans({account: 7200.0}, workspace, progress)
            gc.remove_orphans(found, {account: 7200.0}, workspace, progress)
        return [one.found.name for one in found if one.action is Action.DELETE]

    assert collected() == []
    # An AMI of Packer 1.6.6, which has no tags yet.
    make_ami(cloud, name)
    assert name in collected()
    os.utime(folder / FILE, (0, 0))
    collected()
    assert all(entry.deleted for entry in read(folder / FILE))


def test_finished_images_living_runs_and_other_machines_keep_theirs(
    cloud: Cloud, account: Account, ledger: Ledger, tmp_path: Path
) -> None:
    ami = make_ami(cloud, "finished", **tags(Purpose.IMAGE))
    images.finish(account, ami, tags(Purpose.IMAGE))
    left_group(account, ledger, run_id="live")
    left_group(account, ledger, run_id="theirs")
    before = cloud.left()
    decisions = collect(account, runs={RUN: RunState.ENDED, "live": RunState.LIVE})
    assert {left.action for left in decisions} == {Action.KEEP}
    assert cloud.left() == before
    # A long time later, nobody can be at work any more.
    later = datetime.now(UTC).replace(year=2099)
    again = plan(orphans.find(account), {"live": RunState.LIVE}, later, 7200.0)
    assert {left.found.run_id: left.action for left in again} == {
        RUN: Action.KEEP,
        "live": Action.KEEP,
        "theirs": Action.DELETE,
    }


def test_a_snapshot_of_ours_in_anothers_ami_stays(cloud: Cloud, account: Account) -> None:
    ami, theirs = make_ami(cloud, "ours", **tags(Purpose.IMAGE)), make_ami(cloud, "theirs")
    found = images.get(account, ami)
    assert found is not None
    account.ec2.create_tags(Resources=list(found.snapshots), Tags=tagging.as_list({tagging.RUN: RUN}))
    amis = cloud.backend().amis
    amis[theirs].mapping = amis[ami].mapping
    del amis[ami]
    (left,) = collect(account)
    assert (left.found.kind, left.action) == (Resource.SNAPSHOT, Action.KEEP)
    assert theirs in left.reason


@pytest.mark.parametrize("known", ["tag", "ledger"])
def test_an_untagged_snapshot_is_known_by_the_instance_that_it_was_made_of(
    cloud: Cloud, account: Account, ledger: Ledger, tmp_path: Path, known: str
) -> None:
    make_ami(cloud, "theirs")
    (theirs,) = cloud.left()["image"]
    entry = ledger.intend(Resource.INSTANCE, REGION, run=RUN)
    ec2 = cloud.client()
    asked = tagging.specifications(tags(), "instance") if known == "tag" else []
    launched = ec2.run_instances(
        ImageId=cloud.base_ami(), InstanceType="m6i.large", MinCount=1, MaxCount=1, TagSpecifications=asked
    )
    made = launched["Instances"][0]["InstanceId"]
    half = ec2.create_image(InstanceId=made, Name="half")["ImageId"]
    # Packer deregisters first, and is killed before it deletes the snapshot.
    for ami in (half, theirs):
        ec2.deregister_image(ImageId=ami)
    assert len(cloud.left()["snapshot"]) == 2
    if known == "ledger":
        ledger.made(entry, made)
        # Instances that have ended are shown for an hour.
        ec2.terminate_instances(InstanceIds=[made])
        cloud.backend().reservations.clear()
    decisions = collect(account, read(ledger.path))
    kinds = {left.found.kind for left in decisions}
    assert Resource.SNAPSHOT in kinds
    assert {left.found.run_id for left in decisions} == {RUN}
    (snapshot,) = cloud.left()["snapshot"]
    assert theirs in cloud.backend().snapshots[snapshot].description


def test_an_orphaned_volume_goes(cloud: Cloud, account: Account) -> None:
    ec2 = cloud.client()
    ec2.create_volume(
        AvailabilityZone=f"{REGION}a", Size=1, TagSpecifications=tagging.specifications(tags(), "volume")
    )
    assert [left.found.kind for left in collect(account)] == [Resource.VOLUME]
    assert cloud.left() == {}


def test_a_spot_instance_that_nobody_could_tag_is_found_by_its_template(
    cloud: Cloud, account: Account
) -> None:
    ours = make_template(cloud, "packer-fleet-launch-template-1", **tags(Purpose.BAKE))
    theirs = make_template(cloud, "theirs")
    for template in (ours, theirs):
        account.ec2.create_fleet(
            Type="instant",
            LaunchTemplateConfigs=[
                {"LaunchTemplateSpecification": {"LaunchTemplateId": template, "Version": "1"}}
            ],
            TargetCapacitySpecification={"TotalTargetCapacity": 1, "DefaultTargetCapacityType": "spot"},
        )
    decisions = collect(account)
    assert [left.found.kind for left in decisions] == [Resource.INSTANCE, Resource.LAUNCH_TEMPLATE]
    assert {left.found.run_id for left in decisions} == {RUN}
    assert cloud.left()["launch-template"] == [theirs]
    assert len(cloud.left()["instance"]) == 1


def test_many_pages_are_read(cloud: Cloud, account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        cloud.client().create_security_group(
            GroupName=f"g{number}",
            Description="x",
            TagSpecifications=tagging.specifications(tags(), "security-group"),
        )
    monkeypatch.setattr(session, "PAGES", dict.fromkeys(session.PAGES, 5))
    assert len(orphans.find(account)) == 12
    assert cloud.count("DescribeSecurityGroups") == 3


@pytest.mark.parametrize(
    "action",
    [
        "DescribeInstances",
        "DescribeLaunchTemplates",
        "DescribeVolumes",
        "DescribeImages",
        "DescribeSnapshots",
        "DescribeSecurityGroups",
    ],
)
def test_where_one_list_fails_nothing_is_planned(
    cloud: Cloud, action: str, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ami_builder.aws.session.ATTEMPTS", 1)
    cloud.faults.add(action, "http500", times=None)
    with pytest.raises(CloudFailed, match=f"ec2:{action}"):
        orphans.find(Account.open())


@pytest.mark.parametrize(
    "action",
    [
        "TerminateInstances",
        "DeleteLaunchTemplate",
        "DeleteVolume",
        "DeregisterImage",
        "DeleteSnapshot",
        "DeleteSecurityGroup",
    ],
)
@pytest.mark.parametrize("fault", ["throttle", "lost_response", "duplicated"])
def test_collecting_through_faults(
    cloud: Cloud, account: Account, ledger: Ledger, tmp_path: Path, action: str, fault: str
) -> None:
    made = left_group(account, ledger)
    instance(account, ledger, launch(cloud, made), tmp_path / "m").__enter__()
    make_ami(cloud, tagging.ami_name("dask", DIGEST, RUN), **tags(Purpose.IMAGE))
    make_template(cloud, "packer-fleet-launch-template-1", **tags(Purpose.BAKE))
    cloud.faults.add(action, fault)
    collect(account)
    assert cloud.left() == {}


def test_what_is_kept_is_never_removed(account: Account) -> None:
    one = FoundResource(kind=Resource.IMAGE, id="ami-1", region=REGION, run_id=RUN)
    with pytest.raises(ValueError, match="because"):
        orphans.remove(account, Orphan(found=one, action=Action.KEEP, reason="because"))


def test_what_does_not_go_is_told(cloud: Cloud, account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orphans, "_RELEASED_SECONDS", 0.2)
    monkeypatch.setattr(network, "_DELETE_SECONDS", 0.2)
    made = cloud.client().run_instances(
        ImageId=cloud.base_ami(), InstanceType="m6i.large", MinCount=1, MaxCount=1
    )
    assert made["Instances"]
    (volume,) = cloud.left()["volume"]
    one = FoundResource(kind=Resource.VOLUME, id=volume, region=REGION, run_id=RUN)
    with pytest.raises(CloudFailed, match=f"{volume} can't be deleted"):
        orphans.remove(account, Orphan(found=one, action=Action.DELETE, reason="because"))


def test_a_copy_that_may_be_going_still_stays(cloud: Cloud, account: Account) -> None:
    # The run that baked its source has ended long ago; whoever copies has no run.
    ami = make_ami(cloud, "copy", **tags(Purpose.IMAGE), **{tagging.COPY_OF: "ami-0123456789abcdef0"})
    (snapshot,) = cloud.left()["snapshot"]
    account.ec2.create_tags(
        Resources=[snapshot], Tags=tagging.as_list(tags(Purpose.IMAGE) | {tagging.COPY_OF: ami})
    )
    for decision in collect(account):
        assert decision.action is Action.KEEP
        assert "it is a copy, and can still be running" in decision.reason
    for thing in (cloud.backend().amis[ami], cloud.backend().snapshots[snapshot]):
        field = "creation_date" if hasattr(thing, "creation_date") else "start_time"
        setattr(thing, field, utcnow() - timedelta(hours=4))
    collect(account)
    assert cloud.left() == {}


def test_a_disabled_ami_needs_its_snapshots(cloud: Cloud, account: Account) -> None:
    ami = make_ami(cloud, "dask-old", **tags(Purpose.IMAGE))
    images.finish(account, ami, tags(Purpose.IMAGE))
    cloud.client().disable_image(ImageId=ami)
    before = cloud.left()
    collect(account)
    assert cloud.left() == before
