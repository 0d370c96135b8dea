"""An AMI in several regions: copied side by side, once whatever happens, shared, and promoted there."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError
from botocore.retries import standard

from ami_builder.aws import channels as adapter
from ami_builder.aws import copies, images
from ami_builder.aws import tags as tagging
from ami_builder.aws.policy import Section, document
from ami_builder.aws.session import Account
from ami_builder.aws.tags import Purpose
from ami_builder.aws.target import AwsTarget, named
from ami_builder.build.channels import promote
from ami_builder.cli import app as cli
from ami_builder.config import loading
from ami_builder.config.schema import Image
from ami_builder.console.progress import Progress, Renderer
from ami_builder.core.errors import CloudFailed, UsageError
from ami_builder.core.records import Outcome
from ami_builder.state.workspace import StoredImage, Workspace
from ami_builder.system.processes import wait_until
from tests.cloud.aws import DIGEST, RUN, make_ami, tags
from tests.cloud.faulting import BOUND
from tests.cloud.stopping import start
from tests.fake_ec2.requests import image, refused
from tests.fake_ec2.server import REGION, Cloud

if TYPE_CHECKING:
    from pathlib import Path

    from ami_builder.build.target import Target

NAME = tagging.ami_name("dask", DIGEST, RUN)
KEY = "AKIALEASTPRIVILEGE00"
TWO = ("eu-west-1", "us-west-2")
TEN = (
    *TWO,
    *("eu-central-1", "eu-north-1", "ap-south-1", "ap-northeast-1", "ap-southeast-2", "sa-east-1"),
    *("ca-central-1", "us-east-2"),
)
OURS = "123456789012"
THEIRS = "999999999999"
ORGANIZATION = f"arn:aws:organizations::{THEIRS}:organization/o-0123456789"
UNIT = f"arn:aws:organizations::{THEIRS}:ou/o-0123456789/ou-ab12-0123456789"

Configure = Callable[..., Image]


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standard.ExponentialBackoff, "delay_amount", lambda *_: 0.01)
    monkeypatch.setattr("ami_builder.aws.session.ATTEMPTS", 3)
    monkeypatch.setattr(copies, "COPYING", timedelta(minutes=5))
    monkeypatch.setattr(images, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(images, "_SEEN_SECONDS", 0.5)
    monkeypatch.setattr(adapter, "_POLL_SECONDS", 0.02)


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """Return what writes the settings of aws; they stand for two regions at first."""
    path = tmp_path / "ami-builder.toml"
    monkeypatch.setenv("AMI_BUILDER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AMI_BUILDER_CONFIG", str(path))

    def write(**settings: object) -> Image:
        told = {"region": REGION, "copy_to": list(TWO), **settings}
        lines = [f"{key} = {json.dumps(value)}" for key, value in told.items()]
        path.write_text("\n".join(["[images.dask.aws]", *lines, ""]))
        return loading.load(path, environ={}, overrides={}).select()

    write()
    return write


def baked(cloud: Cloud, name: str = NAME, *, passed: bool = True, digest: str = DIGEST) -> str:
    """Make a finished AMI of ours, with a tag of its owner's."""
    account = Account.open()
    tagged = tags(Purpose.IMAGE, digest=digest)
    ami = make_ami(cloud, name, **tagged, team="data")
    images.finish(account, ami, tagged)
    images.record_verdict(account, ami, Outcome.PASSED if passed else Outcome.FAILED, "c" * 64)
    return ami


def copied(capsys: pytest.CaptureFixture[str], ami: str, *flags: str, status: int = 0) -> dict[str, str]:
    """Run `copy` and return region -> AMI."""
    capsys.readouterr()
    assert cli.run(["--quiet", "copy", ami, *flags]) == status
    return dict(line.split("\t") for line in capsys.readouterr().out.splitlines())


def mine(cloud: Cloud, region: str) -> list[str]:
    return cloud.left(region).get("image", [])


def opened(configured: Image, tmp_path: Path) -> tuple[AwsTarget, ...]:
    home = AwsTarget.open(configured, Workspace.open({"AMI_BUILDER_HOME": str(tmp_path / "home")}))
    return (home, *home.copies(configured))


def received(target: AwsTarget, configured: Image, stored: StoredImage) -> StoredImage:
    with Progress(Renderer()) as progress, progress.step("receive") as step:
        return target.receive(configured, stored, step)


def test_ten_regions_at_once(cloud: Cloud, configure: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    configure(copy_to=TEN)
    ami = baked(cloud)
    # No copy becomes available before all ten were begun: one after the other they would wait for ever.
    cloud.options.copies_together = len(TEN)
    found = copied(capsys, ami)
    assert tuple(found) == TEN
    source = Account.open().ec2.describe_images(ImageIds=[ami])["Images"][0]
    for region, copy in found.items():
        ec2 = cloud.client(region=region)
        shown = image(ec2, copy)
        told = tagging.as_dict(shown["Tags"])
        finished = told.pop(tagging.FINISHED)
        assert finished
        assert told == {
            **{k: v for k, v in tagging.as_dict(source["Tags"]).items() if k != tagging.FINISHED},
            tagging.COPY_OF: ami,
        }
        assert (shown["Name"], shown["ImdsSupport"], shown["Public"]) == (NAME, "v2.0", False)
        (disk,) = (m["Ebs"] for m in shown["BlockDeviceMappings"])
        (snapshot,) = ec2.describe_snapshots(SnapshotIds=[disk["SnapshotId"]])["Snapshots"]
        assert tagging.as_dict(snapshot["Tags"]) == tags(Purpose.IMAGE) | {
            tagging.CREATED: told[tagging.CREATED],
            tagging.COPY_OF: ami,
        }
        last = [c for c in cloud.calls if c.region == region and c.action == "CreateTags"][-1]
        assert [tag["Key"] for tag in last.params["Tags"]] == [tagging.FINISHED]
    assert copied(capsys, ami) == found
    calls = [call for call in cloud.calls if call.action == "CopyImage"]
    assert len(calls) == len(TEN)
    assert {len(call.params["ClientToken"]) for call in calls} == {64}
    assert len({call.params["ClientToken"] for call in calls}) == len(TEN)


@pytest.mark.parametrize("trouble", ["down", "throttled", "full"])
def test_one_region_in_trouble_does_not_keep_the_others(
    cloud: Cloud, configure: Configure, capsys: pytest.CaptureFixture[str], trouble: str
) -> None:
    ami = baked(cloud)
    bad, good = TWO
    said = {
        "down": "AWS did not answer",
        "throttled": "RequestLimitExceeded",
        "full": "ResourceLimitExceeded: Too many image copies",
    }
    match trouble:
        case "down":
            cloud.faults.add("*", "reset", times=None, region=bad)
        case "throttled":
            cloud.faults.add("CopyImage", "throttle", times=None, region=bad)
        case _:
            cloud.options.full_regions = {bad}
    assert cli.run(["--quiet", "copy", ami, "--json"]) == 6
    shown = capsys.readouterr()
    answer = json.loads(shown.out)
    assert [one["region"] for one in answer["copies"]] == [good]
    (failed,) = answer["failed"]
    assert failed["region"] == bad
    assert f"1 of 2 regions failed: {bad}" in shown.err
    assert f"{bad}: AWS" in shown.err
    assert said[trouble] in shown.err
    cloud.faults.clear()
    cloud.options.full_regions = set()
    assert tuple(copied(capsys, ami)) == TWO
    assert [len(mine(cloud, region)) for region in TWO] == [1, 1]


def test_killed_on_the_way_and_run_again(
    cloud: Cloud, configure: Configure, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ami = baked(cloud)
    cloud.options.image_describes = 1 << 30
    environment = {**cloud.environment(), "AMI_BUILDER_CONFIG": os.environ["AMI_BUILDER_CONFIG"]}
    process = start(tmp_path / "home", environment, "copy", ami)
    wait_until(lambda: cloud.count("CopyImage") == 2, what="both copies", timeout=BOUND, interval=0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(BOUND)
    begun = {region: mine(cloud, region) for region in TWO}
    assert [len(each) for each in begun.values()] == [1, 1]
    for region in TWO:
        cloud.backend(region).amis[begun[region][0]].last_describe = 1
    assert copied(capsys, ami) == {region: each[0] for region, each in begun.items()}
    assert cloud.count("CopyImage") == 2


def test_an_unfinished_copy_is_found_by_its_name(
    cloud: Cloud, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    ami, region = baked(cloud), TWO[0]
    copy = copied(capsys, ami)[region]
    cloud.backend(region).tags.pop(copy)
    assert copied(capsys, ami)[region] == copy
    assert cloud.count("CopyImage") == 2
    told = tagging.as_dict(image(cloud.client(region=region), copy)["Tags"])
    assert {tagging.FINISHED, tagging.COPY_OF, tagging.VERDICT, "team"} <= told.keys()
    # Another bake of the same digest is another image.
    other = baked(cloud, f"{NAME}-again")
    assert copied(capsys, other)[region] != copy


@pytest.mark.parametrize("fault", ["lost_response", "duplicated", "throttle", "http500", "reset"])
@pytest.mark.parametrize("action", ["CopyImage", "CreateTags", "DescribeImages"])
def test_copying_through_faults(
    cloud: Cloud, configure: Configure, capsys: pytest.CaptureFixture[str], action: str, fault: str
) -> None:
    configure(copy_to=TWO[:1])
    ami = baked(cloud)
    cloud.options.hidden_describes = 1
    cloud.faults.add(action, fault, region=TWO[0])
    assert copied(capsys, ami) == {TWO[0]: mine(cloud, TWO[0])[0]}
    assert len(mine(cloud, TWO[0])) == 1


def test_a_failed_copy_makes_room_for_another(
    cloud: Cloud, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(copy_to=TWO[:1])
    ami, region = baked(cloud), TWO[0]
    cloud.options.image_describes = 1
    cloud.options.image_failure = "the key is disabled"
    assert cli.run(["--quiet", "copy", ami]) == 6
    assert f"{region}: {mine(cloud, region)[0]} is failed: the key is disabled" in capsys.readouterr().err
    (failed,) = mine(cloud, region)
    cloud.options.image_failure = ""
    found = copied(capsys, ami)
    assert found[region] != failed
    assert cloud.left(region) == {"image": [found[region]], "snapshot": cloud.left(region)["snapshot"]}
    assert len(cloud.left(region)["snapshot"]) == 1
    # Somebody deregisters it: what its token stands for is gone, and another is made.
    cloud.client(region=region).deregister_image(ImageId=found[region])
    again = copied(capsys, ami)
    assert mine(cloud, region) == [again[region]]
    assert again[region] not in (failed, found[region])


def test_copies_are_encrypted_with_each_regions_key(
    cloud: Cloud, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    def disks(found: dict[str, str]) -> list[tuple[bool, str | None]]:
        held = [cloud.backend(region).amis[copy].ebs_snapshot for region, copy in found.items()]
        return [(one.encrypted, one.kms_key_id) for one in held]

    configure(copy_to=["eu-west-1=alias/ours", "us-west-2", "us-east-2"])
    ami = baked(cloud)
    assert disks(copied(capsys, ami, "--region", "eu-west-1", "--region", "us-west-2=k-1")) == [
        (True, "alias/ours"),
        (True, "k-1"),
    ]
    assert disks(copied(capsys, ami, "--region", "us-east-2")) == [(False, None)]
    configure(encrypt=True, copy_to=["us-east-2", "ca-central-1"])
    assert disks(copied(capsys, ami, "--region", "ca-central-1")) == [(True, None)]
    assert cli.run(["--quiet", "copy", ami]) == 6
    assert "us-east-2: the copy" in (said := capsys.readouterr().err)
    assert "is not encrypted" in said


def test_what_copy_refuses(
    cloud: Cloud, configure: Configure, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(copy_to=[])
    ami = baked(cloud)
    for flags, said in (
        ((), "no region to copy to"),
        (("--region", "Ireland"), "--region Ireland: expected a region"),
        (("--region", REGION), f"{REGION} is there twice"),
        (("--region", "eu-west-1", "--region", "eu-west-1=k"), "eu-west-1 is there twice"),
    ):
        assert cli.run(["copy", ami, *flags]) == 2
        assert said in capsys.readouterr().err
    theirs = make_ami(cloud, "theirs")
    assert cli.run(["copy", theirs, "--region", "eu-west-1"]) == 6
    assert f"{theirs} is not a finished AMI of ours in {REGION}" in capsys.readouterr().err
    assert cli.run(["copy"]) == 2
    assert "has not been built yet" in capsys.readouterr().err
    configured = replace(configure(copy_to=["eu-west-1"]), name="dask")
    elsewhere = replace(configured, aws=replace(configured.aws, region=""))
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    with pytest.raises(UsageError, match="or is where the AMI is baked"):
        AwsTarget.open(elsewhere, Workspace.open({})).copies(elsewhere)


def test_a_place_of_its_own(cloud: Cloud, configure: Configure, tmp_path: Path) -> None:
    configured = configure()
    home, *others = opened(configured, tmp_path)
    every: list[Target] = [home, *others]
    assert [target.name for target in every] == [REGION, *TWO]
    ami = baked(cloud)
    stored = home.ami(configured, ami)
    assert others[0].find_copy(configured, stored) is None
    there = received(home, configured, stored)
    assert (there.artifact.location, there.artifact.region) == (ami, REGION)
    copy = received(others[0], configured, there)
    assert copy.artifact.region == TWO[0]
    assert copy.artifact.digest == DIGEST
    assert received(others[0], configured, copy) == copy == others[0].find_copy(configured, stored)
    assert cloud.count("CopyImage") == 1
    promote(others[0].channels(configured), copy, "stable", ("stable",))
    held = cloud.client("ssm", region=TWO[0]).get_parameter(Name="/ami-builder/dask/x86_64/stable")
    assert held["Parameter"]["Value"] == copy.artifact.location
    assert home.channels(configured).entries("stable") == ()
    # Judged again at home, and revoked there: its copies are told.
    images.record_verdict(home.account, ami, Outcome.FAILED, "d" * 64)
    images.revoke(home.account, ami, "leaks")
    again = received(others[0], configured, stored)
    assert again.verdict is not None
    assert not again.verdict.passed
    with pytest.raises(UsageError, match="failed its checks"):
        promote(others[0].channels(configured), again, "testing", ("testing",))
    assert others[0].channels(configured).revoked([copy.artifact.location]) == {
        copy.artifact.location: "leaks"
    }


def test_one_that_can_not_be_launched_there(
    cloud: Cloud, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured = configure()
    home = opened(configured, tmp_path)[0]
    stored = home.ami(configured, baked(cloud))
    tried = [call for call in cloud.calls if call.action == "RunInstances"]
    received(home, configured, stored)
    (dry,) = [c for c in cloud.calls if c.action == "RunInstances" and c not in tried]
    assert dry.params["DryRun"]
    assert dry.outcome == "DryRunOperation"
    cloud.faults.add("RunInstances", "http500", times=None)
    with pytest.raises(CloudFailed, match=f"{REGION}: AWS refused ec2:RunInstances"):
        received(home, configured, stored)
    cloud.faults.clear()
    cloud.backend().amis[stored.artifact.location].state = "failed"
    with pytest.raises(CloudFailed, match=f"{REGION}: {stored.artifact.location} is failed"):
        received(home, configured, stored)


def test_a_launch_that_the_policy_does_not_let_try_is_told_by_describes(
    cloud: Cloud, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run of a launch is in the VPC's own security group, which is no run's."""
    configured = configure()
    ami = baked(cloud)
    held = cloud.enforce(document(Section.ALL, configured.aws), KEY)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    home = opened(configured, tmp_path)[0]
    stored = home.ami(configured, ami)
    received(home, configured, stored)
    assert {action for action, _ in held.refused} == {"ec2:RunInstances"}
    elsewhere = replace(configured, verify=replace(configured.verify, instance_types=("z9z.huge",)))
    with pytest.raises(UsageError, match=r"does not offer z9z\.huge"):
        received(home, elsewhere, stored)


CHANNEL = "/ami-builder/dask/x86_64/stable"


def standing(cloud: Cloud) -> dict[str, str]:
    """Return the AMI that stands in the channel in each region."""
    found = {}
    for region in (REGION, *TWO):
        ssm = cloud.client("ssm", region=region)
        try:
            found[region] = str(ssm.get_parameter(Name=CHANNEL)["Parameter"]["Value"])
        except ssm.exceptions.ParameterNotFound:
            continue
    return found


def moved(capsys: pytest.CaptureFixture[str], *command: str, status: int = 0) -> dict[str, str]:
    """Run a command that moves the channel, and return region -> AMI."""
    capsys.readouterr()
    assert cli.run(["--quiet", *command]) == status
    return dict(line.split("\t") for line in capsys.readouterr().out.splitlines())


def test_a_person_moves_a_channel_in_every_region(
    cloud: Cloud, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = baked(cloud), baked(cloud, f"{NAME}-again", digest="cd" * 32)
    there = {ami: {REGION: ami, **copied(capsys, ami)} for ami in (first, second)}
    for ami in (first, second):
        assert moved(capsys, "promote", ami, "stable") == there[ami] == standing(cloud)
    assert moved(capsys, "rollback", "stable", "--target", "aws") == there[first] == standing(cloud)
    assert moved(capsys, "promote", second, "stable") == there[second]
    assert cli.run(["--quiet", "revoke", second, "--reason", "leaks"]) == 0
    assert standing(cloud) == there[first]
    told = capsys.readouterr().err.splitlines()
    assert told == [f"{region}: channel stable: {ami}" for region, ami in there[first].items()]
    for region, ami in there[second].items():
        alone = ("--set", f"aws.region={region}", "--set", "aws.copy_to=")
        assert cli.run([*alone, "promote", ami, "stable"]) == 2
        assert "can't be promoted again: leaks" in capsys.readouterr().err
    assert cli.run(["history", "stable", "--target", "aws"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    moves = ["promoted", "promoted", "rolled back", "promoted", "revoked"]
    # What was revoked is named beside the word.
    named = [(row[0], row[2].partition(" ami-")[0]) for row in rows]
    assert named == [(r, move) for r in (REGION, *TWO) for move in moves]
    assert cli.run(["history", "stable", "--target", "aws", "--json", "--region", TWO[1]]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["standing"] == there[first][TWO[1]]
    assert [one["region"] for one in answer["regions"]] == [TWO[1]]


def test_a_region_that_lags_is_left_and_one_without_a_copy_is_named(
    cloud: Cloud, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = baked(cloud), baked(cloud, f"{NAME}-again", digest="cd" * 32)
    copies = copied(capsys, first)
    assert moved(capsys, "promote", first, "stable") == {REGION: first, **copies}
    there = copied(capsys, second, "--region", TWO[0])
    # It has no copy in the other one, whose channel stays.
    assert moved(capsys, "promote", second, "stable", status=6) == {REGION: second, **there}
    assert standing(cloud) == {REGION: second, **there, TWO[1]: copies[TWO[1]]}
    # What is rolled back is that image, and no other where it never stood.
    assert moved(capsys, "rollback", "stable", "--target", "aws") == {REGION: first, TWO[0]: copies[TWO[0]]}
    assert standing(cloud) == {REGION: first, **copies}
    for command, said in (
        (("promote", second, "testing", "--region", "eu-north-1"), "the image is not promoted there"),
        (("rollback", "stable", "--region", TWO[0]), TWO[0]),
        (("rollback", "stable", "--target", "aws"), "no image before the current one"),
        (("promote", second, "stabel"), "did you mean stable"),
    ):
        assert cli.run(["--quiet", *command]) == 2
        assert said in capsys.readouterr().err
    assert standing(cloud) == {REGION: first, **copies}
    # One region alone; and one that is down keeps no other.
    assert moved(capsys, "promote", second, "stable", "--region", TWO[0]) == there
    cloud.faults.add("*", "reset", times=None, region=TWO[1])
    assert cli.run(["--quiet", "revoke", first, "--reason", "x", "--json"]) == 6
    answer = json.loads(capsys.readouterr().out)
    assert [one["region"] for one in answer["regions"]] == [REGION, TWO[0]]
    assert [one["region"] for one in answer["failed"]] == [TWO[1]]


def test_a_region_that_is_not_enabled() -> None:
    def asked() -> None:
        answer: Any = {"Error": {"Code": "AuthFailure", "Message": "not able to validate"}}
        with named("ap-east-1"):
            try:
                raise ClientError(answer, "DescribeImages")
            except ClientError as error:
                raise CloudFailed("refused", hint="log in again") from error

    with pytest.raises(CloudFailed, match="ap-east-1: refused") as caught:
        asked()
    assert caught.value.hint == "is ap-east-1 enabled for this account? If so, log in again"


def test_sharing_adds_what_lacks_and_takes_nothing_back(
    cloud: Cloud, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(share_with=[THEIRS, ORGANIZATION, UNIT])
    ami = baked(cloud)
    cloud.client().modify_image_attribute(
        ImageId=ami, LaunchPermission={"Add": [{"UserId": "888888888888"}, {"UserId": THEIRS}]}
    )
    assert cli.run(["--quiet", "share", ami]) == 6
    shown = capsys.readouterr()
    assert shown.out == f"{REGION}\t{ami}\n"
    assert f"{TWO[0]}: there is no copy of {ami}" in shown.err
    found = copied(capsys, ami)
    assert cli.run(["share", ami]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [f"{region}\t{id}" for region, id in {REGION: ami, **found}.items()]
    assert f"{REGION}: 888888888888 may also launch {ami}" in shown.err
    for region, id in {REGION: ami, **found}.items():
        held = cloud.backend(region).amis[id]
        assert {"Group": "all"} not in held.launch_permissions
        for one in ({"UserId": THEIRS}, {"OrganizationArn": ORGANIZATION}, {"OrganizationalUnitArn": UNIT}):
            assert one in held.launch_permissions
        assert held.ebs_snapshot.create_volume_permission_userids == {THEIRS}
    before = len(cloud.calls)
    configure(share_with=[ORGANIZATION])
    assert cli.run(["--quiet", "share", ami, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["shared"]
    assert [one["added"] for one in told] == [[], [], []]
    assert told[1] == {
        "region": TWO[0],
        "ami": found[TWO[0]],
        "added": [],
        "extra": sorted([THEIRS, UNIT]),
    }
    assert not [c for c in cloud.calls[before:] if c.action.startswith("Modify")]


def test_what_is_under_the_default_key_is_not_shared(
    cloud: Cloud, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(copy_to=[], share_with=[THEIRS])
    ami = baked(cloud)
    held = cloud.backend().amis[ami]
    held.mapping[0]["Ebs"]["Encrypted"] = held.ebs_snapshot.encrypted = True
    assert cli.run(["--quiet", "share", ami]) == 6
    stderr = capsys.readouterr().err
    assert f"{REGION}: AWS refused ec2:ModifyImageAttribute" in stderr
    assert "aws.kms_key" in stderr


def test_the_copy_of_an_encrypted_base_s_ami_is_encrypted(
    cloud: Cloud, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(encrypt=False, share_with=[THEIRS], copy_to=["eu-west-1", "us-west-2=alias/ours"])
    ami = baked(cloud)
    held = cloud.backend().amis[ami]
    held.mapping[0]["Ebs"]["Encrypted"] = held.ebs_snapshot.encrypted = True
    assert cli.run(["--quiet", "copy", ami, "--region", "eu-west-1"]) == 0
    (copy,) = mine(cloud, "eu-west-1")
    assert image(cloud.client(region="eu-west-1"), copy)["BlockDeviceMappings"][0]["Ebs"]["Encrypted"]
    assert cli.run(["--quiet", "copy", ami, "--region", "us-west-2"]) == 0
    capsys.readouterr()
    assert cli.run(["--quiet", "share", ami]) == 6
    stderr = capsys.readouterr().err
    assert "aws.copy_to" in stderr
    # The region with a key of its owner's is shared all the same.
    (other,) = mine(cloud, "us-west-2")
    found = cloud.client(region="us-west-2").describe_image_attribute(
        ImageId=other, Attribute="launchPermission"
    )
    assert found["LaunchPermissions"] == [{"UserId": THEIRS}]


def test_least_privilege(
    cloud: Cloud, configure: Configure, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configured = configure(share_with=[THEIRS])
    ami = baked(cloud)
    cloud.options.image_describes = 1
    cloud.options.image_failure = "it failed"
    copied(capsys, ami, "--region", TWO[0], status=6)
    cloud.options.image_failure = ""
    held = cloud.enforce(document(Section.COPY, configured.aws), KEY)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    found = copied(capsys, ami)
    cloud.backend(TWO[0]).tags.pop(found[TWO[0]])
    assert copied(capsys, ami) == found
    assert cli.run(["--quiet", "share", ami]) == 0
    # Whether it can be launched is asked of those only who may launch.
    assert {action for action, _ in held.refused} == {"ec2:RunInstances"}
    assert held.unused == set()
    # Whose the source is can't be asked: CopyImage doesn't support its tags.
    with refused("UnauthorizedOperation"):
        cloud.client(access_key=KEY, region=TWO[0]).copy_image(
            Name="stolen",
            SourceImageId=ami,
            SourceRegion=REGION,
            TagSpecifications=tagging.specifications({"team": "ours"}, "image", "snapshot"),
        )


def test_the_policy_is_limited_to_all_regions_of_the_work(configure: Configure) -> None:
    aws = configure(
        copy_to=["eu-west-1=arn:aws:kms:eu-west-1:123456789012:key/1-2", "us-west-2"],
        subnets=["subnet-11111111", "ap-south-1=subnet-22222222"],
    ).aws
    found = {one["Sid"]: one for one in document(Section.ALL, aws)["Statement"]}
    everywhere = [REGION, "eu-west-1", "us-west-2", "ap-south-1"]
    for sid in ("Make", "MakeImages", "CopyFrom", "MoveChannels", "ChangeImagesOfRuns"):
        assert found[sid]["Condition"]["StringEquals"]["aws:RequestedRegion"] == everywhere, sid
    assert "Condition" not in found["Look"]
    assert found["UseKeyCopies"]["Resource"] == ["arn:aws:kms:eu-west-1:123456789012:key/1-2"]


def test_a_copy_in_a_region_that_is_no_longer_configured_is_revoked(
    cloud: Cloud, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    ami = baked(cloud)
    copy = copied(capsys, ami)["eu-west-1"]
    assert cli.run(["--quiet", "promote", ami, "stable"]) == 0
    configure(copy_to=["us-west-2"])
    capsys.readouterr()
    assert cli.run(["revoke", ami, "--reason", "leaks"]) == 0
    shown = capsys.readouterr()
    assert f"eu-west-1\t{copy}" in shown.out
    with pytest.raises(ClientError, match="ParameterNotFound"):
        cloud.client("ssm", region="eu-west-1").get_parameter(Name="/ami-builder/dask/x86_64/stable")
    there = tagging.as_dict(image(cloud.client(region="eu-west-1"), copy)["Tags"])
    assert there[tagging.REVOKED] == "leaks"


def test_regions_where_copies_can_not_be_looked_for_are_named(
    cloud: Cloud, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    ami = baked(cloud)
    configure(copy_to=[])
    cloud.faults.add("DescribeImages", "http500", times=None, region="eu-west-1")
    assert cli.run(["revoke", ami, "--reason", "leaks"]) == 0
    assert "could not look in eu-west-1" in capsys.readouterr().err


def test_a_region_without_a_route_is_soon_passed_over(
    cloud: Cloud, configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    ami = baked(cloud)
    configure(copy_to=[])
    cloud.faults.add("DescribeImages", "reset", times=None, region="eu-west-1")
    assert cli.run(["revoke", ami, "--reason", "leaks"]) == 0
    assert "could not look in eu-west-1" in capsys.readouterr().err
    asked = [one for one in cloud.calls if one.region == "eu-west-1" and one.action == "DescribeImages"]
    assert len(asked) == 2


@pytest.mark.parametrize("region", [REGION, "us-west-2"])
def test_a_parameter_that_can_not_be_moved_does_not_keep_other_regions_copies_promotable(
    cloud: Cloud, configure: Configure, capsys: pytest.CaptureFixture[str], region: str
) -> None:
    ami = baked(cloud)
    copies_there = {REGION: ami, **copied(capsys, ami)}
    configure(copy_to=["us-west-2"])
    cloud.client("ssm", region=region).put_parameter(
        Name="/ami-builder/dask/x86_64/stable", Value=copies_there[region], Type="String"
    )
    assert cli.run(["revoke", ami, "--reason", "leaks"]) == 2
    said = capsys.readouterr().err
    assert f"in {region} is of another type" in said
    assert "promote the image" not in said
    for where, copy in copies_there.items():
        tagged = tagging.as_dict(image(cloud.client(region=where), copy)["Tags"])
        assert tagged[tagging.REVOKED] == "leaks"


@pytest.mark.parametrize("copy_to", [list(TWO), []], ids=["configured", "no longer configured"])
def test_a_disabled_copy_is_revoked_and_not_promoted(
    cloud: Cloud, configure: Configure, capsys: pytest.CaptureFixture[str], copy_to: list[str]
) -> None:
    ami, region = baked(cloud), TWO[0]
    copy = copied(capsys, ami)[region]
    cloud.backend(region).amis[copy].state = "disabled"
    assert cli.run(["promote", ami, "stable"]) == 6
    assert f"{copy} does not exist any more, or can't be launched" in capsys.readouterr().err
    configure(copy_to=copy_to)
    assert cli.run(["revoke", ami, "--reason", "leaks"]) == 0
    cloud.backend(region).amis[copy].state = "available"
    assert tagging.as_dict(image(cloud.client(region=region), copy)["Tags"])[tagging.REVOKED] == "leaks"
