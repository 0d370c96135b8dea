"""Pruning an account: every use is found to the end of its list, or there is no plan at all."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from moto.core.utils import utcnow
from moto.ec2.utils import random_ami_id

from ami_builder.aws import channels as adapter
from ami_builder.aws import cleanup, images, references, session
from ami_builder.aws import tags as tagging
from ami_builder.aws.policy import Section, document
from ami_builder.aws.session import Account
from ami_builder.aws.tags import Purpose
from ami_builder.cli import app as cli
from ami_builder.core.errors import CloudFailed
from ami_builder.core.options import Arch
from ami_builder.core.records import Artifact, Outcome, TargetKind
from ami_builder.state.workspace import Workspace
from tests.cloud.aws import make_ami, tags
from tests.fake_ec2.fake_image import FakeImage
from tests.fake_ec2.requests import refused
from tests.fake_ec2.server import REGION, Cloud

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

KEY = "AKIALEASTPRIVILEGE00"
LISTS = (
    "DescribeImages",
    "DescribeInstances",
    "DescribeLaunchTemplates",
    "DescribeLaunchTemplateVersions",
    "DescribeLaunchConfigurations",
    "DescribeAutoScalingGroups",
    "DescribeSpotInstanceRequests",
    "DescribeSpotFleetRequests",
    "DescribeFleets",
    "DescribeParameters",
    "GetParameters",
    "GetParameterHistory",
    "GetParametersByPath",
    "DescribeSnapshots",
)
POLICY = f'[images.dask.aws]\nregion = "{REGION}"\n[images.dask.lifecycle]\nkeep = 0\nkeep_days = 10\n'


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ami-builder.toml").write_text(POLICY)
    monkeypatch.setenv("AMI_BUILDER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AMI_BUILDER_CONFIG", str(tmp_path / "ami-builder.toml"))
    monkeypatch.setattr(adapter, "_POLL_SECONDS", 0.02)


def aged(cloud: Cloud, name: str, days: float = 100, *, deprecated: float | None = None) -> str:
    """Make a finished and verified AMI of ours that looks old."""
    account = Account.open()
    ami = make_ami(cloud, f"dask-{name}", **tags(Purpose.IMAGE))
    images.finish(account, ami, tags(Purpose.IMAGE))
    images.record_verdict(account, ami, Outcome.PASSED, "c" * 64)
    image = cloud.backend().amis[ami]
    image.creation_date = utcnow() - timedelta(days=days)
    if deprecated is not None:
        image.deprecation_time = _stamp(deprecated)
    return ami


def _stamp(days: float) -> str:
    return (datetime.now(UTC) - timedelta(days=days)).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def pruned(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, tuple[str, str]]:
    """Return what `prune` says of each AMI: action, reason."""
    capsys.readouterr()
    status = cli.run(["--quiet", "prune", "--target", "aws", "--json", *flags])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    found = json.loads(shown.out)["plan"]
    return {d["candidate"]["id"]: (d["action"], d["reason"]) for d in found}


def orphan(cloud: Cloud, *, days: float = 100, region: str = REGION, name: str = "dask") -> str:
    """Make a snapshot of ours that looks old, and whose AMI is gone."""
    ec2 = cloud.client(region=region)
    volume = ec2.create_volume(AvailabilityZone=f"{region}a", Size=8)["VolumeId"]
    told = tags(Purpose.IMAGE) | {tagging.IMAGE: name}
    snapshot = ec2.create_snapshot(
        VolumeId=volume, TagSpecifications=tagging.specifications(told, "snapshot")
    )
    ec2.delete_volume(VolumeId=volume)
    id = str(snapshot["SnapshotId"])
    cloud.backend(region).snapshots[id].start_time = utcnow() - timedelta(days=days)
    return id


def _instance(cloud: Cloud, ami: str) -> str:
    ec2 = cloud.client()
    made = ec2.run_instances(ImageId=ami, InstanceType="t3.small", MinCount=1, MaxCount=1)
    id = made["Instances"][0]["InstanceId"]
    ec2.stop_instances(InstanceIds=[id])
    return "(stop"


def _old_template_version(cloud: Cloud, ami: str) -> str:
    ec2 = cloud.client()
    data = {"ImageId": ami}
    made = ec2.create_launch_template(LaunchTemplateName="workers", LaunchTemplateData=data)
    for _ in range(20):
        ec2.create_launch_template_version(
            LaunchTemplateId=made["LaunchTemplate"]["LaunchTemplateId"],
            LaunchTemplateData={"ImageId": cloud.base_ami()},
        )
    ec2.modify_launch_template(LaunchTemplateName="workers", DefaultVersion="20")
    return "used by launch template workers"


def _configuration(cloud: Cloud, ami: str) -> str:
    cloud.client("autoscaling").create_launch_configuration(
        LaunchConfigurationName="old", ImageId=ami, InstanceType="t3.small"
    )
    return "used by launch configuration old"


def _parameter(cloud: Cloud, ami: str) -> str:
    for number in range(60):
        cloud.client("ssm").put_parameter(Name=f"/many/{number}", Value="x", Type="String")
    told = json.dumps({"worker": {"image": ami}})
    cloud.client("ssm").put_parameter(Name="TheirOwnName", Value=told, Type="String")
    return "named by SSM parameter TheirOwnName"


def _label(cloud: Cloud, ami: str) -> str:
    ssm = cloud.client("ssm")
    for value in (ami, cloud.base_ami()):
        ssm.put_parameter(Name="/t/i", Value=value, Type="String", DataType="aws:ec2:image", Overwrite=True)
    ssm.label_parameter_version(Name="/t/i", ParameterVersion=1, Labels=["blue"])
    return "named by SSM parameter /t/i, version 1"


def _pinned(cloud: Cloud, ami: str) -> str:
    ssm = cloud.client("ssm")
    for value in (ami, cloud.base_ami()):
        ssm.put_parameter(Name="/t/i", Value=value, Type="String", DataType="aws:ec2:image", Overwrite=True)
    cloud.client().create_launch_template(
        LaunchTemplateName="pins", LaunchTemplateData={"ImageId": "resolve:ssm:/t/i:1"}
    )
    return "version 1 through SSM parameter /t/i:1"


def _resolving(selector: str, name: str = "/t/i") -> Callable[[Cloud, str], str]:
    """Use an AMI in a version of a `text` parameter whose current value names none."""

    def use(cloud: Cloud, ami: str) -> str:
        ssm = cloud.client("ssm")
        for value in (ami, "nothing now"):
            ssm.put_parameter(Name="/t/i", Value=value, Type="String", Overwrite=True)
        ssm.label_parameter_version(Name="/t/i", ParameterVersion=1, Labels=["blue"])
        data = {"ImageId": f"resolve:ssm:{name}{selector}"}
        cloud.client().create_launch_template(LaunchTemplateName="pins", LaunchTemplateData=data)
        return f"through SSM parameter {name}{selector}"

    return use


def _spot_request(cloud: Cloud, ami: str) -> str:
    made = cloud.client().request_spot_instances(
        Type="persistent", LaunchSpecification={"ImageId": ami, "InstanceType": "t3.small"}
    )["SpotInstanceRequests"][0]
    for instance in cloud.backend().all_instances():
        instance.terminate()
    return f"used by spot request {made['SpotInstanceRequestId']} ("


def _spot_fleet(cloud: Cloud, ami: str) -> str:
    made = cloud.client().request_spot_fleet(
        SpotFleetRequestConfig={
            "TargetCapacity": 1,
            "AllocationStrategy": "lowestPrice",
            "SpotPrice": "1",
            "IamFleetRole": "arn:aws:iam::123456789012:role/fleet",
            "LaunchSpecifications": [{"ImageId": ami, "InstanceType": "t3.small", "SpotPrice": "1"}],
        }
    )
    for instance in cloud.backend().all_instances():
        instance.terminate()
    for request in cloud.backend().spot_instance_requests.values():
        request.state = "closed"
    return f"used by Spot Fleet {made['SpotFleetRequestId']}"


class _Fleet:
    """What moto keeps of an EC2 Fleet that launches from a template, and overrides its AMI."""

    def __init__(self, ami: str) -> None:
        self.id = self.fleet_id = "fleet-0123456789abcdef0"
        self.state = self.fleet_state = "active"
        self.tags: list[Any] = []
        self.launch_template_configs = [{"Overrides": [{"ImageId": ami}]}]


def _fleet(cloud: Cloud, ami: str) -> str:
    cloud.backend().fleets["fleet-0123456789abcdef0"] = _Fleet(ami)
    return "used by EC2 Fleet fleet-0123456789abcdef0"


def _group(cloud: Cloud, ami: str) -> str:
    ec2 = cloud.client()
    data = {"ImageId": cloud.base_ami(), "InstanceType": "t3.small"}
    ec2.create_launch_template(LaunchTemplateName="workers", LaunchTemplateData=data)
    template = {"LaunchTemplateName": "workers", "Version": "1"}
    cloud.client("autoscaling").create_auto_scaling_group(
        AutoScalingGroupName="workers",
        MinSize=0,
        MaxSize=0,
        AvailabilityZones=[f"{REGION}a"],
        MixedInstancesPolicy={
            "LaunchTemplate": {"LaunchTemplateSpecification": template, "Overrides": [{"ImageId": ami}]}
        },
    )
    return "used by Auto Scaling group workers"


def _snapshot(cloud: Cloud, ami: str) -> str:
    return str(cloud.backend().amis[ami].mapping[0]["Ebs"]["SnapshotId"])


def _disk_of_its_snapshot(cloud: Cloud, ami: str) -> str:
    snapshot = _snapshot(cloud, ami)
    return f"its snapshot {snapshot} is {_disk_of_a_template(cloud, snapshot)}"


def _lent_disk(cloud: Cloud, ami: str) -> str:
    return _lent_snapshot(cloud, _snapshot(cloud, ami))


def _shared(cloud: Cloud, ami: str) -> str:
    cloud.client().modify_image_attribute(ImageId=ami, LaunchPermission={"Add": [{"UserId": "999999999999"}]})
    return "shared with 999999999999"


def _public(cloud: Cloud, ami: str) -> str:
    cloud.client().modify_image_attribute(ImageId=ami, LaunchPermission={"Add": [{"Group": "all"}]})
    return "public"


def _protected(cloud: Cloud, ami: str) -> str:
    cloud.client().enable_image_deregistration_protection(ImageId=ami)
    return "protected from deregistration"


def _channel(cloud: Cloud, ami: str) -> str:
    assert cli.run(["promote", ami, "stable"]) == 0
    return "in channel stable"


def _predecessor(cloud: Cloud, ami: str) -> str:
    assert cli.run(["promote", ami, "stable"]) == 0
    assert cli.run(["promote", aged(cloud, "next"), "stable"]) == 0
    return "channel stable would roll back to it"


@pytest.mark.parametrize(
    "use",
    [
        _instance,
        _old_template_version,
        _configuration,
        _parameter,
        _label,
        _pinned,
        _resolving(":1"),
        _resolving(":blue"),
        _resolving(":1", f"arn:aws:ssm:{REGION}:123456789012:parameter/t/i"),
        _resolving(":blue", f"arn:aws:ssm:{REGION}:123456789012:parameter/t/i"),
        _spot_request,
        _spot_fleet,
        _fleet,
        _group,
        _disk_of_its_snapshot,
        _lent_disk,
        _shared,
        _public,
        _protected,
        _channel,
        _predecessor,
    ],
)
def test_what_is_used_stays(
    cloud: Cloud, capsys: pytest.CaptureFixture[str], use: Callable[[Cloud, str], str]
) -> None:
    ami, free = aged(cloud, "used", deprecated=50), aged(cloud, "free", deprecated=50)
    reason = use(cloud, ami)
    plan = pruned(capsys, "--apply")
    assert plan[ami][0] == "keep"
    assert reason in plan[ami][1]
    assert plan[free][0] == "delete"
    assert ami in cloud.left()["image"]
    assert free not in cloud.left()["image"]


def test_deprecated_first_and_deregistered_after_the_grace(
    cloud: Cloud, capsys: pytest.CaptureFixture[str]
) -> None:
    ami, young, theirs = aged(cloud, "old"), aged(cloud, "young", 1), make_ami(cloud, "theirs")
    before = cloud.left()
    assert pruned(capsys) == {
        ami: ("deprecate", "100 days old, and nothing needs it; it can be deleted 7 days from now"),
        young: ("keep", "younger than 10 days"),
    }
    assert not {c.action for c in cloud.calls if c.action.startswith(("Deregister", "Enable"))}
    pruned(capsys, "--apply")
    image = cloud.backend().amis[ami]
    assert image.deprecation_time is not None
    assert pruned(capsys, "--apply")[ami][0] == "keep"
    assert cloud.left() == before
    image.deprecation_time = _stamp(8)
    assert pruned(capsys, "--apply")[ami][0] == "delete"
    left = cloud.left()
    assert sorted(left["image"]) == sorted([young, theirs])
    assert len(left["snapshot"]) == 2


def test_an_image_of_another_architecture_has_no_rules(
    cloud: Cloud, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, graviton = aged(cloud, "amd64"), aged(cloud, "arm64")
    cloud.backend().amis[graviton].architecture = "arm64"
    plan = pruned(capsys)
    assert plan[ours][0] == "deprecate"
    assert plan[graviton] == ("keep", "no policy: ami-builder.toml has this image for amd64")


@pytest.mark.parametrize("action", LISTS)
def test_where_one_list_fails_nothing_is_planned(
    cloud: Cloud, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    ami = aged(cloud, "old", deprecated=50)
    cloud.client().create_launch_template(LaunchTemplateName="t", LaunchTemplateData={"KeyName": "k"})
    before = cloud.left()
    monkeypatch.setattr("ami_builder.aws.session.ATTEMPTS", 1)
    cloud.faults.add(action, "http500", times=None)
    assert cli.run(["--quiet", "prune", "--target", "aws", "--apply"]) == 6
    assert action in capsys.readouterr().err
    assert cloud.left() == before
    assert ami in before["image"]


def _disk_of_a_template(cloud: Cloud, snapshot: str) -> str:
    disk = {"DeviceName": "/dev/sdb", "Ebs": {"SnapshotId": snapshot}}
    data = {"BlockDeviceMappings": [disk]}
    cloud.client().create_launch_template(LaunchTemplateName="data", LaunchTemplateData=data)
    return "used by launch template data"


def _disk_of_a_configuration(cloud: Cloud, snapshot: str) -> str:
    disk = {"DeviceName": "/dev/sdb", "Ebs": {"SnapshotId": snapshot}}
    cloud.client("autoscaling").create_launch_configuration(
        LaunchConfigurationName="data",
        ImageId=cloud.base_ami(),
        InstanceType="t3.small",
        BlockDeviceMappings=[disk],
    )
    return "used by launch configuration data"


def _named(cloud: Cloud, snapshot: str) -> str:
    cloud.client("ssm").put_parameter(Name="/data", Value=f"from {snapshot}", Type="String")
    return "named by SSM parameter /data"


def _lent_snapshot(cloud: Cloud, snapshot: str) -> str:
    cloud.client().modify_snapshot_attribute(
        SnapshotId=snapshot, Attribute="createVolumePermission", OperationType="add", UserIds=["9" * 12]
    )
    return f"shared with {'9' * 12}"


def _incomplete(cloud: Cloud, snapshot: str) -> str:
    cloud.backend().snapshots[snapshot].status = "pending"
    return "not complete"


def _young(cloud: Cloud, snapshot: str) -> str:
    cloud.backend().snapshots[snapshot].start_time = utcnow() - timedelta(days=9)
    return "younger than 10 days"


@pytest.mark.parametrize(
    "use", [_disk_of_a_template, _disk_of_a_configuration, _named, _lent_snapshot, _incomplete, _young]
)
def test_an_orphan_that_is_needed_stays(
    cloud: Cloud, capsys: pytest.CaptureFixture[str], use: Callable[[Cloud, str], str]
) -> None:
    snapshot, free = orphan(cloud), orphan(cloud)
    reason = use(cloud, snapshot)
    plan = pruned(capsys, "--apply")
    assert plan[snapshot][0] == "keep"
    assert reason in plan[snapshot][1]
    assert plan[free] == ("delete", "its AMI does not exist any more; 100 days old, and nothing needs it")
    assert cloud.left()["snapshot"] == [snapshot]


def test_orphans_are_those_of_ours_that_no_ami_uses(
    cloud: Cloud, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = POLICY.replace("keep_days = 10", "keep_days = 0\nmost_deletions = 2")
    (tmp_path / "ami-builder.toml").write_text(text)
    found = [orphan(cloud, days=100 - number) for number in range(4)]
    other = orphan(cloud, name="other")
    fresh = orphan(cloud, days=0.5)
    disk = aged(cloud, "used", deprecated=0)
    cloud.client().create_snapshot(VolumeId=cloud.client().create_volume(
        AvailabilityZone=f"{REGION}a", Size=8)["VolumeId"])  # fmt: skip
    disabled = aged(cloud, "disabled", deprecated=50)
    cloud.client().disable_image(ImageId=disabled)
    # One that another account's AMI has, which was lent to us.
    lent = orphan(cloud)
    theirs = cloud.backend().amis[make_ami(cloud, "theirs")]
    theirs.owner_id = "999999999999"
    theirs.launch_permissions.append({"UserId": "123456789012"})
    theirs.mapping[0]["Ebs"]["SnapshotId"] = lent
    before = cloud.left()["snapshot"]
    plan = pruned(capsys, "--apply")
    assert set(plan) == {*found, other, fresh, disk, disabled}
    assert plan[disabled][0] == "keep"
    assert plan[disabled][1].startswith("disabled")
    assert [plan[one][0] for one in found] == ["delete", "delete", "keep", "keep"]
    assert "a later run deletes it: this one deletes 2 at most" in plan[found[2]][1]
    assert "no policy" in plan[other][1]
    assert plan[fresh] == ("keep", "its AMI does not exist any more; younger than 24 h")
    assert sorted(cloud.left()["snapshot"]) == sorted(set(before) - set(found[:2]))


def test_each_region_is_planned_by_itself(
    cloud: Cloud, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ami_builder.aws.session.ATTEMPTS", 1)
    there = "eu-west-1"
    (tmp_path / "ami-builder.toml").write_text(
        POLICY.replace(f'region = "{REGION}"', f'region = "{REGION}"\ncopy_to = ["{there}"]')
    )
    ami, kept = aged(cloud, "old"), aged(cloud, "current")
    for each in (ami, kept):
        assert cli.run(["--quiet", "copy", each]) == 0
    lines = capsys.readouterr().out.splitlines()
    copy, other = (line.split("\t")[1] for line in lines)
    for one in (copy, other):
        cloud.backend(there).amis[one].creation_date = utcnow() - timedelta(days=50)
    # What stands in the channel here is free there, and the other way round.
    assert cli.run(["promote", kept, "stable", "--region", REGION]) == 0
    cloud.client("ssm", region=there).put_parameter(
        Name="/ami-builder/dask/x86_64/stable", Value=copy, Type="String", DataType="aws:ec2:image"
    )
    lost = orphan(cloud, region=there)
    plan = pruned(capsys, "--apply")
    assert {id: action for id, (action, _) in plan.items()} == {
        ami: "deprecate", kept: "keep", copy: "keep", other: "deprecate", lost: "delete",
    }  # fmt: skip
    assert plan[copy][1].startswith("in channel stable")
    assert cloud.backend(there).amis[other].deprecation_time is not None
    assert lost not in cloud.left(there)["snapshot"]
    # A region that can't be read stops the plan of all.
    cloud.faults.add("*", "reset", times=None, region=there)
    assert cli.run(["--quiet", "prune", "--target", "aws", "--apply"]) == 6


def test_the_record_of_a_deleted_ami_goes_with_it(
    cloud: Cloud, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    workspace = Workspace.open({"AMI_BUILDER_HOME": str(tmp_path / "home")})
    deprecated, kept = aged(cloud, "old", deprecated=40), aged(cloud, "current", days=1)
    for ami, letter in ((deprecated, "a"), (kept, "b")):
        artifact = Artifact(
            image="dask", target=TargetKind.AWS, location=ami, region=REGION, digest=letter * 64,
            created=datetime.now(UTC), run_id="", size=1, arch=Arch.AMD64,
        )  # fmt: skip
        workspace.store_remote(artifact, None)
    assert pruned(capsys, "--apply")[deprecated][0] == "delete"
    assert [one.artifact.location for one in workspace.images()] == [kept]


@pytest.mark.long
def test_ten_thousand_images_take_no_more_calls_than_pages(
    cloud: Cloud, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = cloud.backend()
    template = backend.amis[aged(cloud, "first", 1000)]
    for number in range(9_999):
        copy: Any = FakeImage.__new__(FakeImage)
        copy.__dict__ |= vars(template) | {
            "id": random_ami_id(),
            "creation_date": utcnow() - timedelta(hours=number),
        }
        backend.amis[copy.id] = copy
        backend.tags[copy.id] = dict(backend.tags[template.id])
    before = len(cloud.calls)
    plan = pruned(capsys)
    assert len(plan) == 10_000
    assert sum(action == "deprecate" for action, _ in plan.values()) == 10
    made = [call.action for call in cloud.calls[before:]]
    counted = {action: made.count(action) for action in set(made)}
    assert counted.pop("DescribeImages") == 10
    # Whom they are shared with is asked of the ten that would go.
    assert counted.pop("DescribeImageAttribute") == 10
    assert counted.pop("DescribeSnapshotAttribute") == 10
    assert max(counted.values()) <= 2, counted


def test_no_more_calls_than_pages(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    ec2, ssm = cloud.client(), cloud.client("ssm")
    for number in range(12):
        ec2.run_instances(ImageId=cloud.base_ami(), InstanceType="t3.small", MinCount=1, MaxCount=1)
        ec2.create_launch_template(
            LaunchTemplateName=f"t{number}", LaunchTemplateData={"ImageId": cloud.base_ami()}
        )
        ssm.put_parameter(Name=f"/p/{number}", Value="x", Type="String")
        cloud.client("autoscaling").create_launch_configuration(
            LaunchConfigurationName=f"c{number}", ImageId=cloud.base_ami(), InstanceType="t3.small"
        )
    monkeypatch.setattr(session, "PAGES", dict.fromkeys(session.PAGES, 5))
    before = len(cloud.calls)
    found = references.find(Account.open())
    # Debian's parameter is the 13th, and names the base.
    assert len(found) == 12 * 3 + 1
    made = [call.action for call in cloud.calls[before:]]
    assert {action: made.count(action) for action in sorted(set(made))} == {
        "DescribeAutoScalingGroups": 1,
        "DescribeFleets": 1,
        "DescribeInstances": 3,
        "DescribeLaunchConfigurations": 3,
        "DescribeLaunchTemplateVersions": 12,
        "DescribeLaunchTemplates": 3,
        "DescribeParameters": 2,  # moto's pages are of 10, whatever is asked for
        "DescribeSpotFleetRequests": 1,
        "DescribeSpotInstanceRequests": 1,
        "GetParameterHistory": 1,
        "GetParameters": 2,
    }


def test_least_privilege(
    cloud: Cloud, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    aged(cloud, "old")
    gone = aged(cloud, "older", 200, deprecated=50)
    current = aged(cloud, "current")
    assert cli.run(["promote", current, "stable"]) == 0
    cloud.client().create_launch_template(LaunchTemplateName="t", LaunchTemplateData={"KeyName": "k"})
    theirs = make_ami(cloud, "theirs")
    lost = orphan(cloud)
    held = cloud.enforce(document(Section.PRUNE), KEY)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    plan = pruned(capsys, "--apply")
    assert sorted(action for action, _ in plan.values()) == ["delete", "delete", "deprecate", "keep"]
    assert lost not in cloud.left()["snapshot"]
    assert gone not in cloud.left()["image"]
    assert held.refused == []
    assert held.unused == set()
    with refused("UnauthorizedOperation"):
        cloud.client(access_key=KEY).deregister_image(ImageId=theirs)


def test_an_unreadable_account_is_an_error(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud.enforce(document(Section.CHECK), KEY)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    with pytest.raises(CloudFailed, match="AccessDenied"):
        references.find(Account.open())


def _after_the_plan(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    planned = cleanup.plan_cleanup

    def then(*arguments: Any) -> Any:
        found = planned(*arguments)
        monkeypatch.setattr(cleanup, "plan_cleanup", planned)
        happens()
        return found

    monkeypatch.setattr(cleanup, "plan_cleanup", then)


def test_an_ami_that_is_promoted_after_the_plan_stays(
    cloud: Cloud, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ami, free = aged(cloud, "late", 200, deprecated=50), aged(cloud, "free", 100, deprecated=50)
    named = {"Value": ami, "Type": "String", "DataType": "aws:ec2:image"}
    put = cloud.client("ssm").put_parameter
    _after_the_plan(monkeypatch, lambda: put(Name="/ami-builder/dask/x86_64/stable", **named))
    plan = pruned(capsys, "--apply")
    assert plan[ami] == ("keep", "named by SSM parameter /ami-builder/dask/x86_64/stable")
    assert plan[free][0] == "delete"
    assert cloud.left()["image"] == [ami]


@pytest.mark.parametrize("use", [_disk_of_its_snapshot, _lent_disk])
def test_an_ami_whose_snapshot_is_used_after_the_plan_stays(
    cloud: Cloud,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    use: Callable[[Cloud, str], str],
) -> None:
    ami = aged(cloud, "late", deprecated=50)
    reasons: list[str] = []
    _after_the_plan(monkeypatch, lambda: reasons.append(use(cloud, ami)))
    action, reason = pruned(capsys, "--apply")[ami]
    assert action == "keep"
    assert reasons[0] in reason
    assert cloud.left()["image"] == [ami]


def test_what_another_prune_deleted_is_gone_already(
    cloud: Cloud, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, free = aged(cloud, "old", 200, deprecated=50), aged(cloud, "new"), aged(cloud, "free")
    lost = orphan(cloud)

    def elsewhere() -> None:
        for ami in (old, new):
            cloud.client().deregister_image(ImageId=ami, DeleteAssociatedSnapshots=True)
        cloud.client().delete_snapshot(SnapshotId=lost)

    _after_the_plan(monkeypatch, elsewhere)
    plan = pruned(capsys, "--apply")
    gone = ("keep", "gone already")
    assert (plan[old], plan[new], plan[lost]) == (gone, gone, gone)
    assert plan[free][0] == "deprecate"


@pytest.mark.parametrize("action", ["DescribeImageAttribute", "DescribeSnapshotAttribute"])
def test_what_goes_during_the_plan_does_not_end_it(
    cloud: Cloud, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    ami, lost, free = aged(cloud, "old", 200, deprecated=50), orphan(cloud), aged(cloud, "free")
    find = references.find

    def then_gone(*arguments: Any) -> Any:
        found = find(*arguments)
        monkeypatch.setattr(references, "find", find)
        if action == "DescribeImageAttribute":
            cloud.client().deregister_image(ImageId=ami, DeleteAssociatedSnapshots=True)
        else:
            del cloud.backend().snapshots[_snapshot(cloud, ami)]
            cloud.client().delete_snapshot(SnapshotId=lost)
        return found

    monkeypatch.setattr(references, "find", then_gone)
    plan = pruned(capsys)
    assert plan[ami][0] == "delete"
    assert plan[free][0] == "deprecate"


def test_a_shared_ami_that_is_made_public_after_the_plan_stays(
    cloud: Cloud, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "ami-builder.toml").write_text(POLICY + "shared_days = 50\n")
    ami, shared = aged(cloud, "public", deprecated=50), aged(cloud, "shared", deprecated=50)
    for one in (ami, shared):
        _shared(cloud, one)
    _after_the_plan(monkeypatch, lambda: _public(cloud, ami))
    plan = pruned(capsys, "--apply")
    assert plan[ami] == ("keep", "public")
    assert plan[shared][0] == "delete"
    assert cloud.left()["image"] == [ami]


def test_an_orphan_that_is_shared_after_the_plan_stays(
    cloud: Cloud, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = orphan(cloud)
    _after_the_plan(monkeypatch, lambda: _lent_snapshot(cloud, lost))
    assert pruned(capsys, "--apply")[lost] == ("keep", f"shared with {'9' * 12}")
    assert cloud.left()["snapshot"] == [lost]


def test_a_long_look_for_uses_is_not_repeated_for_each_deletion(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, seconds = references.Watch(Account.open()), [0.0]
    find = references.find

    def slow(*arguments: Any) -> Any:
        seconds[0] += 90
        return find(*arguments)

    monkeypatch.setattr(references, "find", slow)
    monkeypatch.setattr("ami_builder.aws.references.time.monotonic", lambda: seconds[0])
    for _ in range(3):
        assert watch.of("ami-0123456789abcdef0") == ""
    assert seconds[0] == 90
    seconds[0] += 61
    watch.of("ami-0123456789abcdef0")
    assert seconds[0] == 90 + 61 + 90


def test_uses_are_read_again_before_each_deletion(
    cloud: Cloud, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    amis = [aged(cloud, f"n{number}", 200 - number, deprecated=50) for number in range(3)]
    deregister = images.deregister

    def then_used(account: Account, ami: str) -> None:
        deregister(account, ami)
        if ami == amis[0]:
            _instance(cloud, amis[1])
            _shared(cloud, amis[2])

    monkeypatch.setattr(images, "deregister", then_used)
    plan = pruned(capsys, "--apply")
    assert [plan[ami][0] for ami in amis] == ["delete", "keep", "keep"]
    assert "used by instance" in plan[amis[1]][1]
    assert "shared with" in plan[amis[2]][1]
    assert sorted(cloud.left()["image"]) == sorted(amis[1:])


def test_what_another_host_may_be_verifying_stays(
    cloud: Cloud, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "ami-builder.toml").write_text(
        POLICY.replace("keep_days = 10", "keep_days = 0\ngrace_days = 0")
    )
    account = Account.open()
    ami = make_ami(cloud, "dask-new", **tags(Purpose.IMAGE))
    images.finish(account, ami, tags(Purpose.IMAGE))
    plan = pruned(capsys, "--apply")
    assert plan[ami][0] == "keep"
    assert "not verified yet" in plan[ami][1]
    images.record_verdict(account, ami, Outcome.FAILED, "c" * 64)
    assert pruned(capsys, "--apply")[ami][0] == "delete"


def test_shared_amis_have_an_age_limit_of_their_own(
    cloud: Cloud, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "ami-builder.toml").write_text(POLICY + "shared_days = 180\n")
    old, young, public = (
        aged(cloud, n, days, deprecated=50) for n, days in (("a", 200), ("b", 100), ("c", 300))
    )
    for ami in (old, young):
        _shared(cloud, ami)
    _public(cloud, public)
    plan = pruned(capsys, "--apply")
    assert plan[young] == ("keep", "shared with 999999999999, and younger than 180 days")
    assert plan[public] == ("keep", "public")
    assert plan[old][0] == "delete"
    assert "shared with 999999999999, and older than 180 days" in plan[old][1]


def test_a_deprecated_ami_that_was_lent_to_us_needs_its_snapshots(
    cloud: Cloud, capsys: pytest.CaptureFixture[str]
) -> None:
    lent = orphan(cloud)
    theirs = cloud.backend().amis[make_ami(cloud, "theirs")]
    theirs.owner_id = "999999999999"
    theirs.launch_permissions.append({"UserId": "123456789012"})
    theirs.mapping[0]["Ebs"]["SnapshotId"] = lent
    theirs.deprecation_time = _stamp(1)
    pruned(capsys, "--apply")
    assert lent in cloud.left()["snapshot"]


def test_protection_lasts_a_day_longer_with_a_cooldown(
    cloud: Cloud, capsys: pytest.CaptureFixture[str]
) -> None:
    ami = aged(cloud, "protected", deprecated=50)
    ec2 = cloud.client()
    ec2.enable_image_deregistration_protection(ImageId=ami, WithCooldown=True)
    reason = pruned(capsys)[ami][1]
    assert "enabled-with-cooldown" in reason
    assert "24 hours" in reason
    ec2.disable_image_deregistration_protection(ImageId=ami)
    with refused("OperationNotPermitted"):
        ec2.deregister_image(ImageId=ami)
    action, reason = pruned(capsys, "--apply")[ami]
    assert action == "keep"
    assert "24 hours" in reason
    assert ami in cloud.left()["image"]
