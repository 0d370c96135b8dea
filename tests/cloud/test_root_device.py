"""An AMI is registered again under the root device's name that launchers map, whatever happens in between."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from ami_builder.aws import images, orphans, preflight, root_device, source_ami
from ami_builder.aws import tags as tagging
from ami_builder.aws.session import Account
from ami_builder.aws.tags import Purpose
from ami_builder.core.cleanup import Action
from ami_builder.core.errors import CloudFailed, UsageError
from ami_builder.core.orphans import Resource, RunState, plan
from ami_builder.core.records import State
from ami_builder.state.ledger import Ledger, read
from tests.cloud.aws import DIGEST, RUN, tags
from tests.cloud.faulting import BUILD, fresh, only_the_ami
from tests.cloud.flow import captured
from tests.sample_image import image as sample

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from tests.cloud.faulting import Place
    from tests.fake_ec2.server import Cloud

NAME = tagging.ami_name("dask", DIGEST, RUN)
BAKED = f"{NAME}-baked"
ROOT = "/dev/sda1"


@pytest.fixture
def account(cloud: Cloud) -> Account:
    return Account.open()


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.jsonl")


def bake(cloud: Cloud, account: Account, *, tagged: bool = True, **more: Any) -> images.Ami:
    """Return an AMI as Packer leaves it."""
    ec2 = cloud.client()
    root = {"DeviceName": "/dev/xvda", "Ebs": {"VolumeSize": 9, "VolumeType": "gp3", **more}}
    launched = ec2.run_instances(
        ImageId=cloud.base_ami(), InstanceType="m6i.large", MinCount=1, MaxCount=1, BlockDeviceMappings=[root]
    )["Instances"][0]["InstanceId"]
    given = tagging.specifications(tags(Purpose.IMAGE), "image", "snapshot") if tagged else []
    made = ec2.create_image(InstanceId=launched, Name=BAKED, Description="words", TagSpecifications=given)
    ec2.terminate_instances(InstanceIds=[launched])
    return images.wait_available(account, made["ImageId"], 600)


def rename(account: Account, ledger: Ledger, ami: images.Ami) -> images.Ami:
    return root_device.renamed(account, ledger, ami, ROOT, tags(Purpose.IMAGE))


def described(account: Account, ami: str) -> dict[str, Any]:
    found = images.describe(account, ami)
    assert found is not None
    return dict(found)


def kinds(cloud: Cloud) -> dict[str, int]:
    return {kind: len(ids) for kind, ids in cloud.left().items() if kind in ("image", "snapshot")}


@pytest.mark.parametrize("encrypted", [False, True])
def test_all_but_the_name_stays(cloud: Cloud, account: Account, ledger: Ledger, encrypted: bool) -> None:
    baked = bake(cloud, account, Encrypted=encrypted)
    mine = cloud.backend().amis[baked.id]
    mine.tpm_support, mine.uefi_data, mine.boot_mode = "v2.0", "QU1aTlVFRkk=", "uefi-preferred"
    mine.architecture = "arm64"
    mine.mapping.append({"DeviceName": "/dev/sdb", "VirtualName": "ephemeral0"})
    before = described(account, baked.id)
    made = rename(account, ledger, baked)
    after = described(account, made.id)
    changes = {"ImageId", "Name", "ImageLocation", "CreationDate", "RootDeviceName", "SourceInstanceId"}
    changes |= {"BlockDeviceMappings", "ImdsSupport", "Tags"}
    assert {k: v for k, v in after.items() if k not in changes} == {
        k: v for k, v in before.items() if k not in changes
    }
    assert (after["Name"], after["RootDeviceName"], after["ImdsSupport"]) == (NAME, ROOT, "v2.0")
    root, other = after["BlockDeviceMappings"]
    assert root == {"DeviceName": ROOT, "Ebs": before["BlockDeviceMappings"][0]["Ebs"]}
    assert root["Ebs"]["Encrypted"] is encrypted
    assert other == {"DeviceName": "/dev/sdb", "VirtualName": "ephemeral0"}
    assert cloud.backend().amis[made.id].uefi_data == "QU1aTlVFRkk="
    assert made.tags.keys() == tags(Purpose.IMAGE).keys()
    assert made.tags[tagging.RUN] == RUN
    assert images.get(account, baked.id) is None
    assert kinds(cloud) == {"image": 1, "snapshot": 1}
    (gone,) = (call.params for call in cloud.calls if call.action == "DeregisterImage")
    assert gone == {"ImageId": baked.id}
    (entry,) = read(ledger.path)
    assert (entry.kind, entry.id, entry.find) == (Resource.IMAGE, made.id, {"run": RUN, "name": NAME})


def test_an_answer_that_is_lost(cloud: Cloud, account: Account, ledger: Ledger) -> None:
    baked = bake(cloud, account)
    cloud.faults.add("RegisterImage", "lost_response")
    made = rename(account, ledger, baked)
    assert made.name == NAME
    assert kinds(cloud) == {"image": 1, "snapshot": 1}


@pytest.mark.parametrize("more", [{}, {tagging.RUN: RUN}, {tagging.DIGEST: DIGEST}, {tagging.RUN: "another"}])
@pytest.mark.parametrize("late", [False, True], ids=["before", "in between"])
def test_a_name_that_somebody_else_took(
    cloud: Cloud,
    account: Account,
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
    more: Mapping[str, str],
    late: bool,
) -> None:
    baked = bake(cloud, account)
    taken = []

    def take() -> None:
        ec2 = cloud.client()
        other = ec2.run_instances(ImageId=cloud.base_ami(), InstanceType="m6i.large", MinCount=1, MaxCount=1)
        made = ec2.create_image(InstanceId=other["Instances"][0]["InstanceId"], Name=NAME)
        if more:
            ec2.create_tags(Resources=[made["ImageId"]], Tags=tagging.as_list(more))
        taken.append(made["ImageId"])

    register = account.ec2.register_image

    def taken_first(**given: Any) -> Any:
        if not taken:
            take()
        return register(**given)

    if late:
        monkeypatch.setattr(account.ec2, "register_image", taken_first)
    else:
        take()
    for _ in range(2):
        with pytest.raises(CloudFailed, match=rf"{NAME} is taken by ami-\w+, which this build") as failed:
            rename(account, ledger, baked)
        assert taken[0] in failed.value.message
    assert {one.id for one in images.list_owned(account)} == {baked.id, *taken}
    # `gc` does not take it for ours either.
    assert [one for one in read(ledger.path) if not one.deleted] == []


def test_of_two_amis_the_other_is_not_ours(cloud: Cloud, account: Account, ledger: Ledger) -> None:
    baked = bake(cloud, account)
    disk = {"DeviceName": ROOT, "Ebs": {"SnapshotId": baked.snapshots[0]}}
    cloud.client().register_image(Name=NAME, RootDeviceName=ROOT, BlockDeviceMappings=[disk])
    other = images.find_by_name(account, NAME)
    assert other is not None
    with pytest.raises(CloudFailed, match="is taken by"):
        rename(account, ledger, other)
    assert {one.id for one in images.list_owned(account)} == {baked.id, other.id}


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda made: setattr(made, "root_device_name", "/dev/xvda"), "RootDeviceName is /dev/xvda"),
        (lambda made: setattr(made, "architecture", "i386"), "Architecture is i386"),
        (lambda made: setattr(made, "boot_mode", None), "BootMode is missing"),
        (lambda made: setattr(made, "usage_operation", "RunInstances:0010"), "UsageOperation is RunInst"),
        (lambda made: made.mapping[0]["Ebs"].update(VolumeType="gp2"), "its disks are"),
    ],
)
def test_what_is_registered_otherwise_is_no_result(
    cloud: Cloud,
    account: Account,
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Any], None],
    wrong: str,
) -> None:
    baked = bake(cloud, account)
    register = account.ec2.register_image

    def otherwise(**given: Any) -> Any:
        answer = register(**given)
        change(cloud.backend().amis[answer["ImageId"]])
        return answer

    monkeypatch.setattr(account.ec2, "register_image", otherwise)
    with pytest.raises(CloudFailed) as failed:
        rename(account, ledger, baked)
    assert wrong in "\n".join(failed.value.tail)
    assert "aws.root_device" in (failed.value.hint or "")
    # The snapshot is still there for Packer's AMI, which `gc` finds.
    assert [one.id for one in images.list_owned(account)] == [baked.id]
    assert kinds(cloud) == {"image": 1, "snapshot": 1}


class Killed(BaseException):
    """What ends a process between two calls."""


@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize(
    "call", ["create_tags", "register_image", "describe_images", "deregister_image", "modify_image_attribute"]
)
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("then", ["finish", "gc"])
def test_killed_at_any_call(
    cloud: Cloud,
    account: Account,
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    done: bool,
    then: str,
    tagged: bool,
) -> None:
    baked = bake(cloud, account, tagged=tagged)
    # As the bake wrote it before Packer began.
    ledger.intend(Resource.IMAGE, account.region, run=RUN, name=BAKED)
    made = getattr(account.ec2, call)

    def killed(**given: Any) -> None:
        if done:
            made(**given)
        raise Killed

    with monkeypatch.context() as at:
        at.setattr(account.ec2, call, killed)
        with pytest.raises(Killed):
            images.finish(account, rename(account, ledger, baked).id, tags(Purpose.IMAGE))
    if then == "gc":
        for decision in plan(
            orphans.find(account, read(ledger.path)), {RUN: RunState.ENDED}, datetime.now(UTC), 7200.0
        ):
            assert decision.action is Action.DELETE
            orphans.remove(account, decision)
        assert kinds(cloud) == {}
        return
    found = images.find_by_digest(account, "dask", DIGEST)
    assert found is not None
    images.finish(account, rename(account, ledger, found).id, tags(Purpose.IMAGE))
    assert kinds(cloud) == {"image": 1, "snapshot": 1}
    (final,) = images.list_owned(account)
    assert (final.name, final.finished) == (NAME, True)
    assert described(account, final.id)["RootDeviceName"] == ROOT


def test_gc_keeps_the_snapshot_of_a_finished_ami(cloud: Cloud, account: Account, ledger: Ledger) -> None:
    baked = bake(cloud, account)
    cloud.faults.add("DeregisterImage", "http500", times=None)
    with pytest.raises(CloudFailed):
        rename(account, ledger, baked)
    cloud.faults.clear()
    final = images.find_by_name(account, NAME)
    assert final is not None
    images.finish(account, final.id, tags(Purpose.IMAGE))
    for decision in plan(orphans.find(account), {RUN: RunState.ENDED}, datetime.now(UTC), 7200.0):
        if decision.action is Action.DELETE:
            assert decision.found.id == baked.id
            orphans.remove(account, decision)
    assert [one.id for one in images.list_owned(account)] == [final.id]
    assert kinds(cloud) == {"image": 1, "snapshot": 1}


def test_a_build_has_it(cloud: Cloud, places: Sequence[Place], tmp_path: Path) -> None:
    fresh(cloud, tmp_path / "home")
    built = captured(*BUILD, "--json")
    assert built.status == 0, built.err
    ami = json.loads(built.out)["artifact"]["location"]
    (found,) = cloud.client().describe_images(ImageIds=[ami])["Images"]
    assert found["RootDeviceName"] == ROOT
    assert not found["Name"].endswith("-baked")
    ebs = found["BlockDeviceMappings"][0]["Ebs"]
    assert (ebs["VolumeType"], ebs["DeleteOnTermination"]) == ("gp3", True)
    only_the_ami(cloud)


def test_a_build_that_keeps_the_bases(cloud: Cloud, places: Sequence[Place], tmp_path: Path) -> None:
    fresh(cloud, tmp_path / "home")
    built = captured("--set", "aws.root_device=", *BUILD)
    assert built.status == 0, built.err
    assert cloud.count("RegisterImage") == 0
    (found,) = cloud.client().describe_images(ImageIds=[built.out.split()[-1]])["Images"]
    assert found["RootDeviceName"] == "/dev/xvda"


def test_check_tells_it(cloud: Cloud, account: Account) -> None:
    image = sample()
    image = replace(image, aws=replace(image.aws, source=cloud.base_ami(), source_cidrs=("127.0.0.1/32",)))

    def judged(root: str) -> tuple[State, str]:
        findings = preflight.check(replace(image, aws=replace(image.aws, root_device=root)))
        one = next(one for one in findings if one.name == "root device")
        return one.state, one.found

    assert judged(ROOT) == (State.OK, "/dev/sda1, registered from Packer's snapshot: the base's is /dev/xvda")
    assert judged("/dev/xvda") == judged("") == (State.OK, "/dev/xvda")
    base = cloud.backend().amis[cloud.base_ami()]
    base.mapping.append({"DeviceName": ROOT, "Ebs": dict(base.mapping[0]["Ebs"])})
    state, found = judged(ROOT)
    assert state is State.STOPS
    assert "/dev/sda1 is another disk of" in found
    with pytest.raises(UsageError, match="another disk"):
        root_device.differs(source_ami.resolve(account, base.id, image.arch), ROOT)
