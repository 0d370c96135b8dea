"""AMIs of ours: found again, waited for, finished last of all, judged, deregistered with their snapshots."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError
from hypothesis import given
from hypothesis import strategies as st

from ami_builder.aws import images, session
from ami_builder.aws import tags as tagging
from ami_builder.aws.session import Account
from ami_builder.aws.tags import Purpose
from ami_builder.core.errors import CloudFailed, TimedOut, UsageError
from ami_builder.core.records import Measurement, Outcome
from tests.cloud.aws import DIGEST, RUN, make_ami, tags

if TYPE_CHECKING:
    from tests.fake_ec2.server import Cloud

NAME = tagging.ami_name("dask", DIGEST, RUN)


@pytest.fixture
def account(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> Account:
    monkeypatch.setattr(images, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(session, "_LOOK_SECONDS", 0.5)
    return Account.open()


def test_an_ami_is_found_by_its_tags_or_else_by_its_name(cloud: Cloud, account: Account) -> None:
    assert images.find_by_digest(account, "dask", DIGEST) is None
    untagged = make_ami(cloud, NAME)
    found = images.find_by_digest(account, "dask", DIGEST)
    assert found is not None
    assert (found.id, found.name, found.finished, found.verdict) == (untagged, NAME, False, None)
    assert images.find_by_digest(account, "dask", "cd" * 32) is None
    assert images.find_by_digest(account, "das", DIGEST) is None
    tagged = make_ami(cloud, "renamed", **tags(Purpose.IMAGE))
    images.finish(account, tagged, tags(Purpose.IMAGE))
    found = images.find_by_digest(account, "dask", DIGEST)
    assert found is not None
    assert found.id == tagged, "a finished one goes before one that is not"


def test_a_name_that_begins_alike_is_not_enough(cloud: Cloud, account: Account) -> None:
    other = DIGEST[:12] + "0" * 52
    make_ami(cloud, NAME, **{tagging.DIGEST: other})
    assert images.find_by_digest(account, "dask", DIGEST) is None


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
    pending = images.find_by_digest(account, "dask", DIGEST)
    assert pending is not None
    with pytest.raises(TimedOut, match=f"the completion of {ami}"):
        images.wait_available(account, ami, 0.2)


def test_one_that_fails_says_why(cloud: Cloud, account: Account) -> None:
    cloud.options.image_describes = 1
    cloud.options.image_failure = "the volume could not be read"
    ami = make_ami(cloud, NAME)
    with pytest.raises(CloudFailed, match=f"{ami} is failed: the volume could not be read"):
        images.wait_available(account, ami, 30)
    assert images.find_by_digest(account, "dask", DIGEST) is None


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
    for outcome in (Outcome.FAILED, Outcome.INCONCLUSIVE, Outcome.PASSED):
        images.record_verdict(account, ami, outcome, "ef" * 32)
        found = images.get(account, ami)
        assert found is not None
        assert found.tags[tagging.VERDICT] == f"{outcome} {'ef' * 32}"
        assert found.verdict == (outcome, "ef" * 32)


@pytest.mark.parametrize("word", ["skipped", "perfect"])
def test_a_verdict_that_nobody_here_knows_is_no_pass(cloud: Cloud, account: Account, word: str) -> None:
    ami = make_ami(cloud, NAME)
    account.ec2.create_tags(Resources=[ami], Tags=tagging.as_list({tagging.VERDICT: f"{word} {'ef' * 32}"}))
    found = images.get(account, ami)
    assert found is not None
    assert found.verdict == (Outcome.FAILED, "ef" * 32)


def test_the_measurements_stand_on_the_ami_beside_the_verdict(cloud: Cloud, account: Account) -> None:
    ami = make_ami(cloud, NAME)
    one = Measurement(machine="m6i.large", phase="boot", total=8 << 30, available=7 << 30, ssh_seconds=31.25)
    later = replace(one, phase="reboot")
    images.record_verdict(account, ami, Outcome.PASSED, "ef" * 32, (one, later))
    found = images.get(account, ami)
    assert found is not None
    assert found.tags[tagging.MEASURED] == "m6i.large=8589934592/7516192768/31.2/-"
    assert found.measured == (replace(one, ssh_seconds=31.2),)
    assert cloud.count("CreateTags") == 1
    images.record_verdict(account, ami, Outcome.FAILED, "ef" * 32)
    found = images.get(account, ami)
    assert found is not None
    assert found.measured == (), "nothing stays of a verdict before"
    booted = replace(one, cpu_seconds=12.345, control_seconds=0.2346)
    images.record_verdict(account, ami, Outcome.PASSED, "ef" * 32, (booted,))
    found = images.get(account, ami)
    assert found is not None
    assert found.tags[tagging.MEASURED] == "m6i.large=8589934592/7516192768/31.2/-/12.35/0.235"
    assert found.measured == (replace(one, ssh_seconds=31.2, cpu_seconds=12.35, control_seconds=0.235),)


seconds = st.none() | st.integers(0, 999_999).map(lambda tenths: tenths / 10)
kinds = st.from_regex(r"[a-z][a-z0-9-]{1,8}\.[a-z0-9]{4,10}", fullmatch=True)
starts = st.builds(
    Measurement,
    machine=kinds,
    phase=st.just("boot"),
    total=st.integers(1 << 38, 1 << 45),
    available=st.integers(1, 1 << 38),
    ssh_seconds=seconds,
    dask_seconds=seconds,
    cpu_seconds=st.none() | st.integers(0, 9_999_999).map(lambda hundredths: hundredths / 100),
    control_seconds=st.none() | st.integers(0, 9_999_999).map(lambda thousandths: thousandths / 1000),
)


@given(st.lists(starts, unique_by=lambda one: one.machine, max_size=8))
def test_as_many_measurements_as_a_tag_holds(some: list[Measurement]) -> None:
    value = tagging.format_measurements(some)
    assert len(value) <= 256
    assert re.fullmatch(r"[a-z0-9 =/.-]*", value), "of the characters that every service takes in tags"
    found = tagging.parse_measurements(value)
    assert [one for one in some if one in found] == list(found)
    assert len(found) >= min(len(some), 3)


@given(st.text() | st.text("m6i.large=/0123456789- "))
def test_garbage_in_the_tag_is_no_measurement(value: str) -> None:
    for one in tagging.parse_measurements(value):
        assert tagging.parse_measurements(tagging.format_measurements([one])) == (one,)


@pytest.mark.parametrize(
    "entry",
    [
        "m6i.large=8/7/1.0",
        "m6i.large=0/0/1.0/1.0",
        "m6i.large=7/8/1.0/1.0",
        "m6i.large=8/7/1/1.0",
        "m6i.large=8/7/nan/1.0",
        "m6i.large=8/07/1.0/1.0",
        "M6I.large=8/7/1.0/1.0",
        "m6i.large=8/7/1.0/1.0\n",
        "m6i.large=8/٧/1.0/1.0",
    ],
)
def test_only_what_we_write_is_read(entry: str) -> None:
    good = "c6i.large=8/7/1.0/2.0"
    assert [one.machine for one in tagging.parse_measurements(f"{entry} {good}")] == ["c6i.large"]


def test_a_machine_without_an_instance_type_is_left_out() -> None:
    local = Measurement(machine="2 GiB", phase="boot", total=8, available=7)
    assert tagging.format_measurements([local]) == ""


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
