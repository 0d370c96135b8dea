"""AMIs of ours: found again, waited for, finished last of all, judged, deregistered with their snapshots."""

from __future__ import annotations

from typing import Any

import pytest
from botocore.exceptions import ClientError

from ami_builder.adapters.aws import images
from ami_builder.adapters.aws import tags as tagging
from ami_builder.adapters.aws.session import Account
from ami_builder.adapters.aws.tags import Purpose
from ami_builder.errors import CloudFailed, TimedOut, UsageError

from .aws import DIGEST, RUN, make_ami, tags
from .server import Cloud

NAME = tagging.ami_name("dask", DIGEST, RUN)


@pytest.fixture
def account(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> Account:
    monkeypatch.setattr(images, "_POLL_SECONDS", 0.02)
    return Account.open()


def test_an_ami_is_found_by_its_tags_or_else_by_its_name(cloud: Cloud, account: Account) -> None:
    assert images.find(account, "dask", DIGEST) is None
    untagged = make_ami(cloud, NAME)
    found = images.find(account, "dask", DIGEST)
    assert found is not None
    assert (found.id, found.name, found.finished, found.verdict) == (untagged, NAME, False, None)
    assert images.find(account, "dask", "cd" * 32) is None
    assert images.find(account, "das", DIGEST) is None
    tagged = make_ami(cloud, "renamed", **tags(Purpose.IMAGE))
    images.finish(account, tagged, tags(Purpose.IMAGE))
    found = images.find(account, "dask", DIGEST)
    assert found is not None
    assert found.id == tagged, "a finished one goes before one that is not"


def test_a_name_that_begins_alike_is_not_enough(cloud: Cloud, account: Account) -> None:
    other = DIGEST[:12] + "0" * 52
    make_ami(cloud, NAME, **{tagging.DIGEST: other})
    assert images.find(account, "dask", DIGEST) is None


def test_pending_ones_are_found_and_waited_for(cloud: Cloud, account: Account) -> None:
    cloud.options.image_describes = 4
    cloud.options.hidden_describes = 2
    ami = make_ami(cloud, NAME)
    told: list[str] = []
    found = images.wait_available(account, ami, 30, told.append)
    assert found.state == "available"
    assert told
    assert told[0].startswith("snapshot ")
    cloud.options.image_describes = 10**6
    ami = make_ami(cloud, f"{NAME}-2", **tags(Purpose.IMAGE))
    pending = images.find(account, "dask", DIGEST)
    assert pending is not None
    with pytest.raises(TimedOut, match=f"the completion of {ami}"):
        images.wait_available(account, ami, 0.2)


def test_one_that_fails_says_why(cloud: Cloud, account: Account) -> None:
    cloud.options.image_describes = 1
    cloud.options.image_failure = "the volume could not be read"
    ami = make_ami(cloud, NAME)
    with pytest.raises(CloudFailed, match=f"{ami} is failed: the volume could not be read"):
        images.wait_available(account, ami, 30)
    assert images.find(account, "dask", DIGEST) is None


def test_finishing_tags_everything_and_says_so_last(cloud: Cloud, account: Account) -> None:
    ami = make_ami(cloud, NAME)
    wanted = tags(Purpose.IMAGE) | {tagging.BASE_AMI: cloud.base_ami()}
    found = images.finish(account, ami, wanted)
    assert found.finished
    assert not found.public
    assert found.size == 8 << 30
    assert wanted.items() <= found.tags.items()
    (snapshot,) = account.ec2.describe_snapshots(SnapshotIds=list(found.snapshots))["Snapshots"]
    assert tagging.as_dict(snapshot["Tags"]) == wanted
    assert account.ec2.describe_images(ImageIds=[ami])["Images"][0].get("ImdsSupport") == "v2.0"
    changes = [c for c in cloud.calls if c.action in {"CreateTags", "ModifyImageAttribute"}]
    assert [tag["Key"] for tag in changes[-1].params["Tags"]] == [tagging.FINISHED]
    again = images.finish(account, ami, wanted)
    assert again == found


@pytest.mark.parametrize("action", ["DescribeImages", "CreateTags", "ModifyImageAttribute"])
@pytest.mark.parametrize("fault", ["throttle", "http500", "reset", "lost_response", "duplicated"])
def test_finishing_through_faults(cloud: Cloud, account: Account, action: str, fault: str) -> None:
    ami = make_ami(cloud, NAME)
    cloud.faults.add(action, fault)
    assert images.finish(account, ami, tags(Purpose.IMAGE)).finished


def test_published_only_by_a_word_that_says_so(cloud: Cloud, account: Account) -> None:
    ami = make_ami(cloud, NAME)
    assert images.finish(account, ami, tags(Purpose.IMAGE), public=True).public
    assert not images.finish(account, ami, tags(Purpose.IMAGE)).public
    cloud.backend().amis[ami].mapping[0]["Ebs"]["Encrypted"] = True
    with pytest.raises(UsageError, match="is encrypted"):
        images.finish(account, ami, tags(Purpose.IMAGE), public=True)


def test_the_verdict_stands_on_the_ami(cloud: Cloud, account: Account) -> None:
    ami = make_ami(cloud, NAME)
    for passed in (False, True):
        images.record_verdict(account, ami, passed, "ef" * 32)
        found = images.get(account, ami)
        assert found is not None
        assert found.verdict == (passed, "ef" * 32)


@pytest.mark.parametrize("fault", [None, "throttle", "lost_response", "duplicated"])
@pytest.mark.parametrize("action", ["DeregisterImage", "DeleteSnapshot"])
def test_deregistering_leaves_nothing(cloud: Cloud, account: Account, action: str, fault: str | None) -> None:
    ami = make_ami(cloud, NAME)
    if fault:
        cloud.faults.add(action, fault)
    images.deregister(account, ami)
    images.deregister(account, ami)
    assert cloud.left() == {}
    with pytest.raises(CloudFailed, match=f"there is no AMI {ami}"):
        images.finish(account, ami, tags(Purpose.IMAGE))


def test_a_snapshot_that_another_ami_uses_stays(
    cloud: Cloud, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    ami, other = make_ami(cloud, NAME), make_ami(cloud, f"{NAME}-2")
    amis = cloud.backend().amis
    amis[other].mapping = amis[ami].mapping
    found = images.get(account, ami)
    assert found is not None
    in_use: Any = {"Error": {"Code": "InvalidSnapshot.InUse", "Message": "…"}}

    def delete(**_: object) -> None:
        raise ClientError(in_use, "DeleteSnapshot")

    monkeypatch.setattr(account.ec2, "delete_snapshot", delete)
    images.deregister(account, ami)
    assert found.snapshots[0] in cloud.left()["snapshot"]
