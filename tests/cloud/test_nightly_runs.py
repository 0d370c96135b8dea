"""Nights on AWS: three regions, killed after every entry of the journal, and with a region that is down."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from ami_builder.aws import images, session
from ami_builder.aws import tags as tagging
from ami_builder.aws.session import Account
from ami_builder.state.journal import NightlyJournal, NightlyStep, unfinished
from ami_builder.state.workspace import Workspace
from tests.cloud.aws import make_ami
from tests.cloud.faulting import BOUND
from tests.cloud.flow import captured, in_haste, without_ssh
from tests.cloud.stopping import DIES_AFTER, start
from tests.fake_ec2.faults import Fault
from tests.fake_ec2.server import REGION, Cloud

if TYPE_CHECKING:
    from pathlib import Path

COPIES = ("eu-west-1", "eu-central-1")
PARAMETER = "/ami-builder/dask/x86_64/testing"
NIGHT = ("--set", f"aws.copy_to={','.join(COPIES)}", "nightly", "--target", "aws")


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    home = tmp_path / "home"
    monkeypatch.setenv("AMI_BUILDER_HOME", str(home))
    monkeypatch.delenv("AMI_BUILDER_CONFIG", raising=False)
    without_ssh(monkeypatch)
    in_haste(monkeypatch)
    return Workspace.open({"AMI_BUILDER_HOME": str(home)})


def nightly_run(*flags: str, status: int = 0) -> dict[str, Any]:
    ran = captured(*flags, *NIGHT, "--json")
    assert ran.status == status, ran.err
    (found,) = json.loads(ran.out)["nights"]
    return dict(found)


def standing(cloud: Cloud) -> dict[str, str]:
    """Return the AMI that stands in each region."""
    found = {}
    for region in (REGION, *COPIES):
        ssm = cloud.client("ssm", region=region)
        try:
            found[region] = ssm.get_parameter(Name=PARAMETER)["Parameter"]["Value"]
        except ssm.exceptions.ParameterNotFound:
            continue
    return found


def owned(cloud: Cloud, region: str) -> list[str]:
    images = cloud.client(region=region).describe_images(Owners=["self"])["Images"]
    return sorted(image["ImageId"] for image in images)


def test_a_night_brings_one_ami_to_every_region_and_the_next_does_nothing(
    cloud: Cloud, workspace: Workspace
) -> None:
    first = nightly_run()
    assert first["ending"] == "promoted"
    there = standing(cloud)
    assert set(there) == {REGION, *COPIES}
    assert all(owned(cloud, region) == [ami] for region, ami in there.items())
    before = len(cloud.calls)
    assert nightly_run()["ending"] == "unchanged"
    asked = Counter(call.action for call in cloud.calls[before:])
    assert not [action for action in asked if not action.startswith(("Describe", "Get", "List"))]
    assert standing(cloud) == there
    # Whom it is shared with is no part of the digest.
    shared = nightly_run("--set", f"aws.share_with={'9' * 12}")
    assert shared["ending"] == "unchanged"
    assert {one["text"] for one in shared["places"]} == {f"already current; now shared with {'9' * 12}"}
    for region, ami in there.items():
        ec2 = cloud.client(region=region)
        found = ec2.describe_image_attribute(ImageId=ami, Attribute="launchPermission")
        assert found["LaunchPermissions"] == [{"UserId": "9" * 12}]


@pytest.mark.parametrize("trouble", ["down", "throttled", "full"])
def test_a_region_in_trouble_is_named_and_the_next_night_brings_it_up(
    cloud: Cloud, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    monkeypatch.setattr(session, "ATTEMPTS", 3)
    bad = COPIES[1]
    match trouble:
        case "down":
            cloud.faults.add("*", Fault.RESET, times=None, region=bad)
        case "throttled":
            cloud.faults.add("CopyImage", Fault.THROTTLE, times=None, region=bad)
        case _:
            cloud.options.full_regions = {bad}
    partly = nightly_run(status=6)
    assert partly["ending"] == "partly"
    endings = {one["place"]: one["ending"] for one in partly["places"]}
    assert endings == {REGION: "promoted", COPIES[0]: "promoted", bad: "failed"}
    assert bad in partly["error"]
    cloud.faults.clear()
    cloud.options.full_regions = set()
    assert set(standing(cloud)) == {REGION, COPIES[0]}
    baked = cloud.count("CreateImage")
    assert nightly_run()["ending"] == "promoted"
    assert set(standing(cloud)) == {REGION, *COPIES}
    assert cloud.count("CreateImage") == baked


def test_a_region_that_a_person_rolled_back_is_on_hold_and_the_others_are_not(
    cloud: Cloud, workspace: Workspace
) -> None:
    bad = COPIES[0]
    for size in ("8GiB", "9GiB"):
        assert nightly_run("--set", f"base.disk_size={size}")["ending"] == "promoted"
    there = standing(cloud)
    ran = captured(*NIGHT[:2], "rollback", "testing", "--target", "aws", "--region", bad)
    assert ran.status == 0, ran.err
    held = nightly_run("--set", "base.disk_size=9GiB", status=9)
    assert held["ending"] == "partly"
    endings = {one["place"]: one["ending"] for one in held["places"]}
    assert endings == {REGION: "unchanged", bad: "held", COPIES[1]: "unchanged"}
    text = (workspace.nightly_dir / "dask.aws" / "latest" / "summary.md").read_text()
    assert f"PARTLY promoted to testing, in 2 of 3 regions; ON HOLD in {bad}" in text
    assert f"`ami-builder promote {there[bad]} testing --region {bad} " in text


def test_two_machines_that_begin_the_same_night_leave_one_image_in_each_channel(
    cloud: Cloud, workspace: Workspace, tmp_path: Path
) -> None:
    homes = [tmp_path / name for name in ("one", "two")]

    def nights() -> list[str]:
        """Return what those said that did not end well."""
        going = [start(home, cloud.environment(), *NIGHT) for home in homes]
        for process in going:
            process.join(BOUND)
        ends = zip(going, [(home / "out").read_text() for home in homes], strict=True)
        return [said for process, said in ends if process.exitcode != 0]

    # No lock is common to them: each bakes and finishes its own, and who comes too late to a channel says so.
    unwell = [said for said in nights() if "by someone else at the same time" not in said]
    assert not unwell, "\n".join(unwell)
    there = standing(cloud)
    assert set(there) == {REGION, *COPIES}
    baked = cloud.count("CreateImage")
    assert nights() == []
    assert standing(cloud) == there
    assert cloud.count("CreateImage") == baked
    assert set(cloud.left()) <= {"image", "snapshot"}
    owned_here = owned(cloud, REGION)
    assert len(owned_here) == baked
    assert all(
        tagging.FINISHED in one.tags for one in images.find_by_ids(Account.open(), owned_here).values()
    )


@pytest.mark.long
def test_a_night_that_is_killed_after_any_entry_goes_on_where_it_was(
    cloud: Cloud, workspace: Workspace
) -> None:
    home = workspace.state.parent

    def run(number: int, dies_after: int = 0) -> int:
        environment = cloud.environment() | {DIES_AFTER: str(dies_after or "")}
        process = start(home, environment, "--set", f"memory.reserve={number + 1}MiB", *NIGHT)
        process.join(BOUND)
        assert process.exitcode is not None
        assert process.exitcode in (0, -9), (home / "out").read_text()
        return process.exitcode

    assert run(0) == 0
    entries = len((workspace.nightly_dir / "dask.aws" / "latest" / "journal.jsonl").read_text().splitlines())
    # Brought and promoted in each of three places.
    assert entries == len(NightlyStep) + 4
    for number in range(1, entries + 1):
        made = {action: cloud.count(action) for action in ("CreateImage", "CopyImage")}
        assert run(number, number) == -9
        cut_off = [journal.id for journal in unfinished(workspace)]
        assert len(cut_off) == (number < entries)
        assert run(number) == 0
        assert not list(unfinished(workspace))
        latest = NightlyJournal((workspace.nightly_dir / "dask.aws" / "latest").resolve())
        assert latest.id in cut_off or number == entries
        assert {action: cloud.count(action) - count for action, count in made.items()} == {
            "CreateImage": 1,
            "CopyImage": len(COPIES),
        }
        there = standing(cloud)
        assert len(there) == 1 + len(COPIES)
        assert all(len(owned(cloud, region)) == number + 1 for region in there)
    assert set(cloud.left()) <= {"image", "snapshot"}


def test_an_unchanged_image_that_can_not_be_shared_everywhere_is_still_current_everywhere(
    cloud: Cloud, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "ATTEMPTS", 3)
    nightly_run()
    there = standing(cloud)
    bad = COPIES[1]
    cloud.faults.add("ModifyImageAttribute", Fault.THROTTLE, times=None, region=bad)
    found = nightly_run("--set", f"aws.share_with={'9' * 12}", status=6)
    assert found["ending"] == "unshared"
    endings = {one["place"]: (one["ending"], one["id"]) for one in found["places"]}
    assert endings == {
        region: ("unshared" if region == bad else "unchanged", ami) for region, ami in there.items()
    }
    assert bad in found["error"]
    assert standing(cloud) == there


def test_a_channel_that_names_a_deregistered_ami_gets_the_unchanged_image_again(
    cloud: Cloud, workspace: Workspace
) -> None:
    nightly_run()
    there = standing(cloud)
    theirs = make_ami(cloud, "theirs")
    baked = cloud.count("CreateImage")
    cloud.client("ssm").put_parameter(
        Name=PARAMETER, Value=theirs, DataType="aws:ec2:image", Overwrite=True, Description="by hand"
    )
    cloud.client().deregister_image(ImageId=theirs)
    assert standing(cloud)[REGION] == theirs
    found = nightly_run()
    assert {one["place"]: one["ending"] for one in found["places"]} == {
        REGION: "promoted", **dict.fromkeys(COPIES, "unchanged"),
    }  # fmt: skip
    assert standing(cloud) == there
    assert cloud.count("CreateImage") == baked
