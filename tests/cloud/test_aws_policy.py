"""Least privilege: each part of the work under its own policy, nothing of it missing, nothing too much."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ami_builder.aws import images, instances, machine, orphans, preflight, root_device, session
from ami_builder.aws import tags as tagging
from ami_builder.aws.policy import LONGEST, Section, document, parts, size
from ami_builder.aws.session import Account
from ami_builder.aws.tags import Purpose
from ami_builder.build import plugins
from ami_builder.cli import app as cli
from ami_builder.config.types import Destination
from ami_builder.core.cleanup import Action
from ami_builder.core.errors import CloudFailed
from ami_builder.core.options import Connect
from ami_builder.core.orphans import Resource, RunState, plan
from ami_builder.core.records import Outcome, State
from ami_builder.state.ledger import Ledger, read
from tests.cloud.aws import DIGEST, RUN, group, instance, launch, left_group, make_ami, make_template, tags
from tests.fake_ec2.server import ACCESS_KEY, REGION, Cloud
from tests.sample_image import image as guest_image

if TYPE_CHECKING:
    from collections.abc import Callable

    from ami_builder.config.schema import Image
    from tests.fake_ec2.guard import Enforced

KEY = "AKIALEASTPRIVILEGE00"
# What `check` will read of an account.
SETTINGS = {
    *(f"ec2:GetEbs{what}" for what in ("EncryptionByDefault", "DefaultKmsKeyId")),
    *("ec2:GetImageBlockPublicAccessState", "ec2:GetInstanceMetadataDefaults"),
    "servicequotas:GetServiceQuota",
}
BASE = "136693071363/debian-13-amd64-########-####"


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(images, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(instances, "_SEEN_SECONDS", 1.0)
    monkeypatch.setattr(session, "_LOOK_SECONDS", 0.2)


@pytest.fixture
def configured() -> Image:
    image = guest_image()
    return replace(image, aws=replace(image.aws, source=BASE, source_cidrs=("127.0.0.1/32",)))


def enforced(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, section: Section, **more: Any
) -> tuple[Enforced, Account]:
    """Return an account that may do what a section of the policy allows."""
    held = cloud.enforce(document(section, **more), KEY)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    return held, Account.open()


def test_verifying(cloud: Cloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ami = make_ami(cloud, "ours", **tags(Purpose.IMAGE))
    held, account = enforced(cloud, monkeypatch, Section.VERIFY)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with group(account, ledger) as made:
        subject = instance(account, ledger, launch(cloud, made, ami=ami), tmp_path / "m")
        with subject:
            subject.save_console()
    images.record_verdict(account, ami, Outcome.PASSED, DIGEST)
    assert held.refused == []
    assert held.unused == set()


def test_building(cloud: Cloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    held, account = enforced(cloud, monkeypatch, Section.BUILD)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with group(account, ledger) as made:
        # What Packer does, call by call.
        subject = instance(account, ledger, launch(cloud, made), tmp_path / "m")
        with subject:
            instances.require_imdsv2(account, subject.instance_id)
            account.ec2.stop_instances(InstanceIds=[subject.instance_id])
            name = root_device.baked_name(tagging.ami_name("dask", DIGEST, RUN))
            ami = account.ec2.create_image(InstanceId=subject.instance_id, Name=name)["ImageId"]
            half = account.ec2.create_image(InstanceId=subject.instance_id, Name="half")["ImageId"]
    baked = images.wait_available(account, ami, 10)
    ami = root_device.renamed(account, ledger, baked, "/dev/sda1", tags(Purpose.IMAGE)).id
    images.finish(account, ami, tags(Purpose.IMAGE))
    # As after Ctrl-C.
    orphans.delete_image(account, half, RUN)
    assert list(cloud.left()["image"]) == [ami]
    assert len(cloud.left()["snapshot"]) == 1
    assert held.refused == []
    assert held.unused <= SETTINGS


def test_collecting_what_was_left(cloud: Cloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    everything = Account.open()
    made = left_group(everything, ledger)
    instance(everything, ledger, launch(cloud, made), tmp_path / "m").__enter__()
    cloud.client().create_volume(
        AvailabilityZone=f"{REGION}a", Size=1, TagSpecifications=tagging.specifications(tags(), "volume")
    )
    make_ami(cloud, "tagged", **tags(Purpose.IMAGE))
    make_template(cloud, "packer", **tags(Purpose.BAKE))
    # Killed before Packer 1.6.6 had tagged it: only the ledger knows of it.
    name = tagging.ami_name("dask", DIGEST, RUN)
    ledger.intend(Resource.IMAGE, REGION, run=RUN, name=name)
    make_ami(cloud, name)
    held, account = enforced(cloud, monkeypatch, Section.LIFECYCLE)
    found = orphans.find(account, read(ledger.path))
    for decision in plan(found, {RUN: RunState.ENDED}, datetime.now(UTC), 7200.0):
        assert decision.action is Action.DELETE
        orphans.remove(account, decision)
    assert cloud.left() == {}
    assert held.refused == []
    assert held.unused == set()


def test_checking_makes_nothing(cloud: Cloud, monkeypatch: pytest.MonkeyPatch, configured: Image) -> None:
    before = cloud.left()
    held, _ = enforced(cloud, monkeypatch, Section.CHECK)
    found = {one.name: one for one in preflight.check(configured)}
    refused = found["permissions to build"]
    assert refused.state is State.STOPS
    assert "ec2:RunInstances" in refused.found
    assert "ami-builder iam-policy" in refused.hint
    # What a plain configuration does not ask, and a user has no role.
    later = {"ec2:GetInstanceMetadataDefaults"} if plugins.has_plugins() else set()
    asked = {"GetInstanceMetadataDefaults", "GetEbsEncryptionByDefault"}
    unasked = SETTINGS - {f"ec2:{each}" for each in asked} - {"servicequotas:GetServiceQuota"}
    assert held.unused == unasked | later | {"iam:GetRole"}
    enforced(cloud, monkeypatch, Section.ALL)
    found = {one.name: one for one in preflight.check(configured)}
    assert found["permissions"].state is State.OK, found["permissions"]
    assert cloud.left() == before


def test_nothing_of_others_can_be_touched(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, configured: Image
) -> None:
    theirs = make_ami(cloud, "theirs", Name="theirs", team="theirs")
    (snapshot,) = cloud.left()["snapshot"]
    cloud.client().create_tags(Resources=[snapshot], Tags=[{"Key": "Name", "Value": "theirs"}])
    template = make_template(cloud, "theirs")
    ec2 = cloud.client()
    launched = ec2.run_instances(ImageId=cloud.base_ami(), InstanceType="m6i.large", MinCount=1, MaxCount=1)
    instance_id = launched["Instances"][0]["InstanceId"]
    made = ec2.create_security_group(GroupName="theirs", Description="x")["GroupId"]
    (volume,) = cloud.left()["volume"]
    # Their machines, launched from a template or not, are no spot instances of ours.
    spot = replace(configured.aws, spot=True)
    _, account = enforced(cloud, monkeypatch, Section.ALL, aws=spot)
    calls: list[Callable[[], object]] = [
        lambda: account.ec2.terminate_instances(InstanceIds=[instance_id]),
        lambda: account.ec2.stop_instances(InstanceIds=[instance_id]),
        lambda: account.ec2.create_image(InstanceId=instance_id, Name="stolen"),
        lambda: account.ec2.delete_volume(VolumeId=volume),
        lambda: account.ec2.deregister_image(ImageId=theirs),
        lambda: orphans.delete_image(account, theirs, RUN),
        lambda: account.ec2.create_tags(Resources=[snapshot], Tags=tagging.as_list(tags())),
        lambda: account.ec2.delete_snapshot(SnapshotId=snapshot),
        lambda: account.ec2.delete_launch_template(LaunchTemplateId=template),
        lambda: account.ec2.create_launch_template(
            LaunchTemplateName="untagged", LaunchTemplateData={"ImageId": theirs}
        ),
        lambda: _fleet(account, template),
        lambda: account.ec2.delete_security_group(GroupId=made),
        lambda: account.ec2.modify_image_attribute(ImageId=theirs, ImdsSupport={"Value": "v2.0"}),
        lambda: images.record_verdict(account, theirs, Outcome.PASSED, DIGEST),
        lambda: account.ec2.create_tags(Resources=[theirs], Tags=[{"Key": "team", "Value": "ours"}]),
        lambda: account.ec2.create_tags(Resources=[instance_id], Tags=tagging.as_list(tags())),
        # Without a run's tag, or into a group of others.
        lambda: account.ec2.create_security_group(GroupName="untagged", Description="x"),
        lambda: account.ec2.run_instances(
            ImageId=cloud.base_ami(), InstanceType="m6i.large", MinCount=1, MaxCount=1
        ),
        lambda: instance(
            account, Ledger(tmp_path / "l"), launch(cloud, made), tmp_path / "m"
        ).__enter__(),
    ]  # fmt: skip
    before = cloud.left()
    for call in calls:
        with pytest.raises((CloudFailed, account.ec2.exceptions.ClientError), match="UnauthorizedOperation"):
            call()
    assert cloud.left() == before


EVERYTHING = {
    "aws.region": "ap-southeast-2",
    "aws.copy_to": "eu-west-1=arn:aws:kms:eu-west-1:123456789012:key/1-2,us-west-2",
    "aws.source": "ssm:/aws/service/debian/release/13/latest/amd64",
    "aws.connect": "session-manager",
    "aws.instance_profile": "ours",
    "aws.encrypt": "true",
    "aws.kms_key": "alias/ours",
    "aws.spot": "true",
    "aws.tags": "Owner=us,CostCenter=1",
}


def test_a_policy_that_is_too_long_to_attach_is_said_to_be(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AMI_BUILDER_CONFIG", raising=False)
    flags = [part for key, value in EVERYTHING.items() for part in ("--set", f"{key}={value}")]
    sizes = {}
    for settings, section in [((), "all"), *((flags, section) for section in Section)]:
        assert cli.run([*settings, "iam-policy", section]) == 0
        printed, said = capsys.readouterr()
        sizes[len(settings), section] = size = len("".join(printed.split()))
        assert (str(LONGEST) in said and "--directory" in said) is (size > LONGEST), section
    assert sizes[0, "all"] < LONGEST
    assert sizes[len(flags), Section.ALL] > LONGEST


def test_a_long_policy_is_written_in_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AMI_BUILDER_CONFIG", raising=False)
    to = tmp_path / "policies"
    to.mkdir()
    (to / "ami-builder-99.json").write_text("of an earlier call")
    other = to / "ami-builder-1-backup.json"
    other.write_text("of somebody else")
    flags = [part for key, value in EVERYTHING.items() for part in ("--set", f"{key}={value}")]
    assert cli.run([*flags, "iam-policy", "--directory", str(to)]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert paths == [to / f"ami-builder-{number}.json" for number in range(1, len(paths) + 1)]
    assert sorted(to.iterdir()) == sorted([*paths, other])
    assert len(paths) == 2
    (to / "file").write_text("")
    assert cli.run([*flags, "iam-policy", "--directory", str(to / "file")]) == 2


@pytest.mark.parametrize("count", [1, 40, 100])
def test_parts_fit_for_any_number_of_regions_and_keys(configured: Image, count: int) -> None:
    names = [f"xx-region-{number}" for number in range(count)]
    aws = replace(
        configured.aws,
        region="us-east-1",
        copy_to=tuple(
            Destination(region=name, kms_key=f"arn:aws:kms:{name}:123456789012:key/{'1' * 36}")
            for name in names
        ),
        connect=Connect.SESSION_MANAGER,
        instance_profile="ours",
        spot=True,
    )
    whole = document(Section.ALL, aws)
    divided = parts(whole)
    assert all(size(one) <= LONGEST for one in divided)
    sids = [statement["Sid"] for one in divided for statement in one["Statement"]]
    assert len(set(sids)) == len(sids)

    def granted(policies: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
        return {
            (action, arn, json.dumps(s.get("Condition", {}), sort_keys=True))
            for one in policies for s in one["Statement"] for action in s["Action"] for arn in s["Resource"]
        }  # fmt: skip

    if count < 100:
        assert granted(divided) == granted([whole])


def _fleet(account: Account, template: str) -> object:
    return account.ec2.create_fleet(
        Type="instant",
        LaunchTemplateConfigs=[
            {"LaunchTemplateSpecification": {"LaunchTemplateId": template, "Version": "1"}}
        ],
        TargetCapacitySpecification={"TotalTargetCapacity": 1, "DefaultTargetCapacityType": "spot"},
    )


def test_what_settings_need_is_added(configured: Image) -> None:
    aws = replace(
        configured.aws,
        region="cn-north-1",
        source="ssm:/aws/service/debian/release/13/latest/amd64",
        connect=Connect.SESSION_MANAGER,
        instance_profile="ours",
        encrypt=True,
        kms_key="alias/ours",
        spot=True,
    )
    narrow = document(Section.ALL, aws)
    sids = [statement["Sid"] for statement in narrow["Statement"]]
    assert len(set(sids)) == len(sids)
    added = {"ReadBaseParameter", "PassInstanceProfile", "Connect", "UseKey", "SpotFleet", "TagSpotInstances"}
    assert added <= set(sids)
    arns = [arn for s in narrow["Statement"] for arn in s["Resource"] if arn != "*"]
    assert all(arn.startswith("arn:aws-cn:") for arn in arns)
    assert "arn:aws-cn:ssm:*::parameter/aws/service/debian/release/13/latest/amd64" in arns
    plain = [statement["Sid"] for statement in document(Section.ALL, configured.aws)["Statement"]]
    assert not added & set(plain)
    exact = replace(aws, kms_key="arn:aws-cn:kms:cn-north-1:123456789012:key/1-2")
    keys = next(s for s in document("build", exact)["Statement"] if s["Sid"] == "UseKey")
    assert keys["Resource"] == [exact.kms_key]
    assert ACCESS_KEY not in str(narrow)
