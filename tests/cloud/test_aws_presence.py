"""Calls on what is gone or not shown yet, under the printed policy: EC2 answers UnauthorizedOperation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ami_builder.aws import copies, images, instances, network, orphans, presence
from ami_builder.aws import tags as tagging
from ami_builder.aws.presence import once_visible
from ami_builder.aws.session import Account, code_of
from ami_builder.config.types import Destination
from ami_builder.core.cleanup import Action
from ami_builder.core.errors import CloudFailed
from ami_builder.core.orphans import FoundResource, Orphan, Resource
from ami_builder.core.records import Outcome
from ami_builder.state.ledger import Ledger
from tests.cloud.aws import RUN, group, left_group, make_ami, tags
from tests.cloud.test_least_privilege import allowed

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fake_ec2.guard import Enforced
    from tests.fake_ec2.server import Cloud

GONE = {
    Resource.INSTANCE: "i-0123456789abcdef0",
    Resource.LAUNCH_TEMPLATE: "lt-0123456789abcdef0",
    Resource.VOLUME: "vol-0123456789abcdef0",
    Resource.IMAGE: "ami-0123456789abcdef0",
    Resource.SNAPSHOT: "snap-0123456789abcdef0",
    Resource.SECURITY_GROUP: "sg-0123456789abcdef0",
}


@pytest.fixture(autouse=True)
def _in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (instances, network):
        monkeypatch.setattr(module, "_SEEN_SECONDS", 1.0)


@pytest.fixture
def held(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> Enforced:
    settings = ("--set", "aws.spot=true", "--set", "aws.copy_to=eu-west-1")
    return allowed(cloud, monkeypatch, "all", settings=settings)


def launched(cloud: Cloud, **more: str) -> str:
    """Launch an instance with a run's tag, or with other tags, and return its id."""
    spec = tagging.specifications(more or tags(), "instance")
    made = cloud.client().run_instances(
        ImageId=cloud.base_ami(), MinCount=1, MaxCount=1, InstanceType="m6i.large", TagSpecifications=spec
    )
    return str(made["Instances"][0]["InstanceId"])


@pytest.mark.parametrize("kind", GONE)
def test_what_is_gone_is_deleted_without_an_error(cloud: Cloud, held: Enforced, kind: Resource) -> None:
    found = FoundResource(kind=kind, id=GONE[kind], region="us-east-1", run_id=RUN, created=None)
    orphans.remove(Account.open(), Orphan(found=found, action=Action.DELETE, reason="test"))


def test_calls_on_what_is_gone_are_no_denials(cloud: Cloud, held: Enforced) -> None:
    account = Account.open()
    instances.terminate(account, GONE[Resource.INSTANCE])
    assert images.delete_snapshot(account, GONE[Resource.SNAPSHOT])
    network.delete_group(account, GONE[Resource.SECURITY_GROUP])
    orphans.tag(account, GONE[Resource.VOLUME], RUN)
    assert {action for action, _ in held.gone} == {
        "ec2:TerminateInstances", "ec2:DeleteSnapshot", "ec2:DeleteSecurityGroup",
    }  # fmt: skip


def test_a_terminated_instance_that_is_still_shown_is_done(cloud: Cloud, held: Enforced) -> None:
    ended = launched(cloud)
    cloud.client().terminate_instances(InstanceIds=[ended])
    instances.terminate(Account.open(), ended)
    assert cloud.count("TerminateInstances") == 2


def test_a_deregistered_ami_takes_its_snapshots_along(cloud: Cloud, held: Enforced) -> None:
    account, ami = Account.open(), make_ami(cloud, "ours")
    (snapshot,) = cloud.left()["snapshot"]
    cloud.client().create_tags(Resources=[ami, snapshot], Tags=tagging.as_list(tags()))
    images.deregister(account, ami)
    assert cloud.left() == {}
    assert held.refused == []
    assert cloud.count("DeleteSnapshot") == 0, "EC2 has reported that it deleted the snapshot"


def test_a_real_denial_is_reported(cloud: Cloud, held: Enforced) -> None:
    account = Account.open()
    theirs = launched(cloud, Name="theirs")
    calls = (
        lambda: instances.terminate(account, theirs),
        lambda: images.deregister(account, make_ami(cloud, "theirs")),
        lambda: images.delete_snapshot(account, cloud.left()["snapshot"][0]),
        lambda: orphans.tag(account, theirs, RUN),
    )
    for call in calls:
        with pytest.raises(CloudFailed) as caught:
            call()
        assert code_of(caught.value) == "UnauthorizedOperation"
        assert "iam-policy" in str(caught.value.hint)


def test_what_is_not_shown_yet_is_waited_for(cloud: Cloud, held: Enforced, tmp_path: Path) -> None:
    account, ledger = Account.open(), Ledger(tmp_path / "ledger.jsonl")
    cloud.options.hidden_describes = 3
    with group(account, ledger) as made:
        (shown,) = account.ec2.describe_security_groups(GroupIds=[made])["SecurityGroups"]
        assert shown["IpPermissions"]
    new = launched(cloud)
    assert ("ec2:AuthorizeSecurityGroupIngress", new) not in held.refused
    instances.terminate(account, new)
    cloud.options.hidden_describes = 0
    assert cloud.left() == {}
    assert {action for action, _ in held.gone} == {
        "ec2:AuthorizeSecurityGroupIngress", "ec2:TerminateInstances",
    }  # fmt: skip


def test_an_instance_is_launched_once_its_group_is_shown(
    cloud: Cloud, held: Enforced, tmp_path: Path
) -> None:
    account, ledger = Account.open(), Ledger(tmp_path / "ledger.jsonl")
    cloud.options.hidden_describes = 2
    # As for Session Manager, which opens no port.
    with group(account, ledger, cidrs=()) as made:
        (shown,) = account.ec2.describe_security_groups(GroupIds=[made])["SecurityGroups"]
        assert shown["IpPermissions"] == []
    assert held.gone == []


def test_one_describe_that_misses_a_resource_is_no_deletion(
    cloud: Cloud, held: Enforced, tmp_path: Path
) -> None:
    cloud.options.hidden_describes = 1
    made = left_group(Account.open(), Ledger(tmp_path / "ledger.jsonl"))
    kind = Resource.SECURITY_GROUP
    found = FoundResource(kind=kind, id=made, region="us-east-1", run_id=RUN, created=None)
    orphans.remove(Account.open(), Orphan(found=found, action=Action.DELETE, reason="test"))
    cloud.options.hidden_describes = 0
    assert cloud.left() == {}


def test_a_new_group_that_could_not_be_opened_is_deleted(
    cloud: Cloud, held: Enforced, tmp_path: Path
) -> None:
    account, ledger = Account.open(), Ledger(tmp_path / "ledger.jsonl")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presence, "once_visible", interrupted)
        cloud.options.hidden_describes = 2
        with pytest.raises(KeyboardInterrupt), group(account, ledger):
            pass
    assert cloud.left() == {}


def test_what_exists_but_is_never_shown_is_an_error(cloud: Cloud, held: Enforced) -> None:
    account = Account.open()
    cloud.options.hidden_describes = 1000
    new = launched(cloud)
    with pytest.raises(CloudFailed, match=new):
        once_visible(account, new, lambda: account.ec2.stop_instances(InstanceIds=[new]), seconds=1.0)


def test_a_used_group_is_waited_for_and_then_reported(
    cloud: Cloud, held: Enforced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = Account.open()
    used = left_group(Account.open(), Ledger(tmp_path / "ledger.jsonl"))
    cloud.client().run_instances(
        ImageId=cloud.base_ami(), MinCount=1, MaxCount=1, InstanceType="m6i.large", SecurityGroupIds=[used]
    )
    monkeypatch.setattr(network, "_DELETE_SECONDS", 1.0)
    with pytest.raises(CloudFailed, match="still in use"):
        network.delete_group(account, used)


def test_calls_that_do_not_find_what_was_just_shown_are_repeated(
    cloud: Cloud, held: Enforced, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_POLL_SECONDS", 0.05)
    account, there = Account.open(), Account.open("eu-west-1")
    ami = make_ami(cloud, "dask-flapping", **tags())
    cloud.client().create_tags(Resources=cloud.left()["snapshot"], Tags=tagging.as_list(tags()))
    cloud.options.flapping = True
    finished = images.finish(account, ami, tags())
    images.record_verdict(account, ami, Outcome.PASSED, "c" * 64)
    copied = copies.copy(finished, account.region, there, Destination(region=there.region))
    assert copied.finished
    images.revoke(account, ami, "test")
    images.deprecate(account, ami)
    cloud.options.flapping = False
    found = images.get(account, ami)
    assert found is not None
    assert found.revoked == "test"
    assert found.deprecated is not None
    assert found.verdict == (Outcome.PASSED, "c" * 64)
