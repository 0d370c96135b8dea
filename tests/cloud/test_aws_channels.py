"""Channels in an account: parameters that are read back, a history of their own, and what was revoked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ami_builder.aws import channels as adapter
from ami_builder.aws import images
from ami_builder.aws.channels import ChannelParameters
from ami_builder.aws.policy import Section, document
from ami_builder.aws.session import Account
from ami_builder.aws.tags import Purpose
from ami_builder.aws.target import AwsTarget
from ami_builder.build.channels import all_current, promote, revoke, rollback
from ami_builder.cli import app as cli
from ami_builder.config.schema import Image
from ami_builder.core.channels import Move
from ami_builder.core.errors import CloudFailed, UsageError
from ami_builder.core.options import Arch
from ami_builder.core.records import Outcome
from ami_builder.state.workspace import StoredImage, Workspace
from tests.cloud.aws import DIGEST, make_ami, tags
from tests.fake_ec2.requests import refused
from tests.sample_image import image as guest_image

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fake_ec2.server import Cloud

KNOWN = ("testing", "stable")
NAME = "/ami-builder/dask/x86_64/stable"
KEY = "AKIALEASTPRIVILEGE00"


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_POLL_SECONDS", 0.02)


@pytest.fixture
def configured() -> Image:
    return Image(**{name: getattr(guest_image(), name) for name in Image.__slots__} | {"name": "dask"})


@pytest.fixture
def opened(cloud: Cloud, tmp_path: Path, configured: Image) -> Callable[[], ChannelParameters]:
    def channels() -> ChannelParameters:
        workspace = Workspace.open({"AMI_BUILDER_HOME": str(tmp_path / "home")})
        return AwsTarget(account=Account.open(), workspace=workspace, home="us-east-1").channels(configured)

    return channels


@pytest.fixture
def channels(opened: Callable[[], ChannelParameters]) -> ChannelParameters:
    return opened()


def verified(
    cloud: Cloud, channels: ChannelParameters, name: str, *, outcome: Outcome | None = Outcome.PASSED
) -> StoredImage:
    """Return a finished AMI whose checks ended like that; None: they never ran."""
    account = channels.account
    ami = make_ami(cloud, f"dask-{name}", **tags(Purpose.IMAGE))
    images.finish(account, ami, tags(Purpose.IMAGE))
    if outcome is not None:
        images.record_verdict(account, ami, outcome, "c" * 64)
    return channels.ami(ami)


def held(cloud: Cloud, name: str = NAME) -> str | None:
    ssm = cloud.client("ssm")
    try:
        return str(ssm.get_parameter(Name=name)["Parameter"]["Value"])
    except ssm.exceptions.ParameterNotFound:
        return None


def test_a_channel_is_a_parameter_that_holds(cloud: Cloud, channels: ChannelParameters) -> None:
    first, second = verified(cloud, channels, "a"), verified(cloud, channels, "b")
    promote(channels, first, "stable", KNOWN, "the first")
    assert held(cloud) == first.artifact.location
    (parameter,) = (
        one for one in cloud.client("ssm").describe_parameters()["Parameters"] if one["Name"] == NAME
    )
    assert (parameter["Type"], parameter["DataType"]) == ("String", "aws:ec2:image")
    promote(channels, second, "stable", KNOWN)
    assert promote(channels, second, "stable", KNOWN).entries == ()
    rollback(channels, "stable", KNOWN, "slow: very")
    assert held(cloud) == first.artifact.location
    moves = [(e.move, e.id, e.reason) for e in channels.entries("stable")]
    assert moves == [
        (Move.PROMOTED, first.artifact.location, "the first"),
        (Move.PROMOTED, second.artifact.location, ""),
        (Move.ROLLED_BACK, first.artifact.location, "slow: very"),
    ]
    assert all_current(channels) == {first.artifact.location: ("stable",)}
    with pytest.raises(UsageError, match="no image before the current one"):
        rollback(channels, "stable", KNOWN)
    assert channels.entries("testing") == ()


def test_a_channel_is_for_one_architecture(cloud: Cloud, channels: ChannelParameters) -> None:
    one = verified(cloud, channels, "one")
    graviton = replace(channels, arch=Arch.ARM64)
    assert graviton.folder == "/ami-builder/dask/arm64/"
    with pytest.raises(UsageError, match="is for amd64, but the channels of 'dask' are for arm64"):
        graviton.id_of(one)
    cloud.backend().amis[one.artifact.location].architecture = "arm64"
    assert graviton.id_of(one) == one.artifact.location
    with pytest.raises(UsageError, match="is for arm64"):
        channels.id_of(one)


def test_an_update_is_waited_for(cloud: Cloud, channels: ChannelParameters) -> None:
    cloud.options.parameter_reads = 3
    for name in "ab":
        one = verified(cloud, channels, name)
        promote(channels, one, "stable", KNOWN)
        assert held(cloud) == one.artifact.location


def test_what_ssm_drops_without_a_word_is_told(
    cloud: Cloud, channels: ChannelParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = verified(cloud, channels, "a"), verified(cloud, channels, "b")
    promote(channels, first, "stable", KNOWN)
    monkeypatch.setattr(adapter, "_UPDATE_SECONDS", 0.5)
    monkeypatch.setattr(ChannelParameters, "id_of", lambda *_: second.artifact.location)
    cloud.client().deregister_image(ImageId=second.artifact.location)
    monkeypatch.setattr(ChannelParameters, "revoked", lambda *_: {})
    monkeypatch.setattr(ChannelParameters, "find", lambda *_: second)
    with pytest.raises(CloudFailed, match="the channel is unchanged"):
        promote(channels, second, "stable", KNOWN)
    assert held(cloud) == first.artifact.location


def test_more_versions_than_ssm_keeps_never_block(cloud: Cloud, channels: ChannelParameters) -> None:
    pair = [verified(cloud, channels, name) for name in "ab"]
    promote(channels, pair[0], "stable", KNOWN)
    ssm = cloud.client("ssm")
    written = {"Name": NAME, "Value": pair[0].artifact.location, "DataType": "aws:ec2:image"}
    for _ in range(99):
        ssm.put_parameter(**written, Overwrite=True)
    with refused("ParameterMaxVersionLimitExceeded"):
        ssm.put_parameter(**written, Overwrite=True)
    for number in range(1, 4):
        promote(channels, pair[number % 2], "stable", KNOWN)
    assert len(channels.entries("stable")) == 100
    (labelled,) = (
        one for page in ssm.get_paginator("get_parameter_history").paginate(Name=NAME)
        for one in page["Parameters"] if one["Labels"]
    )  # fmt: skip
    assert (labelled["Version"], labelled["Labels"]) == (103, ["current"])
    oldest = ssm.get_parameter_history(Name=NAME, MaxResults=1)["Parameters"][0]["Version"]
    ssm.label_parameter_version(Name=NAME, ParameterVersion=oldest, Labels=["theirs"])
    with pytest.raises(CloudFailed, match="put a label on the oldest") as caught:
        promote(channels, pair[0], "stable", KNOWN)
    assert NAME in str(caught.value.hint)


def test_a_move_by_somebody_else_is_seen(
    cloud: Cloud, channels: ChannelParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = verified(cloud, channels, "a"), verified(cloud, channels, "b")
    promote(channels, first, "stable", KNOWN)
    real = adapter._read_back

    def meanwhile(*told: Any) -> int:
        cloud.client("ssm").put_parameter(
            Name=NAME, Value=first.artifact.location, DataType="aws:ec2:image", Overwrite=True,
            Description="by hand",
        )  # fmt: skip
        return real(*told)

    monkeypatch.setattr(adapter, "_read_back", meanwhile)
    with pytest.raises(CloudFailed, match=r"moved to .* by someone else"):
        promote(channels, second, "stable", KNOWN)
    assert (channels.entries("stable")[-1].move, channels.entries("stable")[-1].reason) == (
        Move.PROMOTED,
        "by hand",
    )


@pytest.mark.parametrize("fault", ["throttle", "http500", "lost_response", "duplicated", "reset"])
@pytest.mark.parametrize("action", ["PutParameter", "LabelParameterVersion", "GetParameter"])
def test_moving_through_faults(cloud: Cloud, channels: ChannelParameters, action: str, fault: str) -> None:
    first, second = verified(cloud, channels, "a"), verified(cloud, channels, "b")
    for one in (first, second):
        cloud.faults.add(action, fault)
        promote(channels, one, "stable", KNOWN)
        assert held(cloud) == one.artifact.location
    rollback(channels, "stable", KNOWN)
    assert held(cloud) == first.artifact.location


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (None, "has not been verified"),
        (Outcome.FAILED, "failed its checks"),
        (Outcome.INCONCLUSIVE, "its verification was inconclusive"),
    ],
)
def test_what_was_not_proved_is_refused(
    cloud: Cloud, channels: ChannelParameters, outcome: Outcome | None, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        promote(channels, verified(cloud, channels, "a", outcome=outcome), "stable", KNOWN)
    assert held(cloud) is None


def test_only_finished_images_of_this_name(cloud: Cloud, channels: ChannelParameters) -> None:
    one = verified(cloud, channels, "a")
    account = channels.account
    account.ec2.create_tags(
        Resources=[one.artifact.location], Tags=[{"Key": "ami-builder:image", "Value": "other"}]
    )
    with pytest.raises(UsageError, match="is an image of 'other', not of 'dask'"):
        promote(channels, one, "stable", KNOWN)
    account.ec2.delete_tags(Resources=[one.artifact.location], Tags=[{"Key": "ami-builder:finished"}])
    with pytest.raises(UsageError, match="is not a finished AMI of ours"):
        promote(channels, one, "stable", KNOWN)


def test_what_was_revoked_never_comes_back(cloud: Cloud, channels: ChannelParameters) -> None:
    first, second, third = (verified(cloud, channels, name) for name in "abc")
    for one in (first, second, third):
        promote(channels, one, "stable", KNOWN)
    promote(channels, third, "testing", KNOWN)
    revoke(channels, third, "leaks")
    assert held(cloud) == second.artifact.location
    assert held(cloud, NAME.replace("stable", "testing")) is None
    with pytest.raises(UsageError, match="can't be promoted again: leaks"):
        promote(channels, third, "stable", KNOWN)
    assert revoke(channels, third, "again").entries == ()
    # One that was deregistered is not gone back to either.
    promote(channels, verified(cloud, channels, "d"), "stable", KNOWN)
    cloud.client().deregister_image(ImageId=second.artifact.location)
    rollback(channels, "stable", KNOWN)
    assert held(cloud) == first.artifact.location
    assert len(channels.entries("stable")) == 6


def test_a_revocation_that_was_killed_is_taken_up(
    cloud: Cloud, channels: ChannelParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (verified(cloud, channels, name) for name in "ab")
    for one in (first, second):
        promote(channels, one, "stable", KNOWN)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ChannelParameters, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        revoke(channels, second, "leaks")
    monkeypatch.undo()
    assert held(cloud) == second.artifact.location
    monkeypatch.setenv("AWS_ENDPOINT_URL", cloud.url)
    revoke(channels, second, "leaks")
    assert held(cloud) == first.artifact.location


def test_a_channel_that_was_emptied_a_moment_ago_takes_an_image(
    cloud: Cloud, channels: ChannelParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "_DELETED_SECONDS", 0.3)
    cloud.options.parameter_rest = 1
    first, second = (verified(cloud, channels, name) for name in "ab")
    promote(channels, first, "stable", KNOWN)
    revoke(channels, first, "leaks")
    assert held(cloud) is None
    promote(channels, second, "stable", KNOWN)
    assert held(cloud) == second.artifact.location


def test_least_privilege(
    cloud: Cloud, opened: Callable[[], ChannelParameters], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = opened()
    first, second = (verified(cloud, free, name) for name in "ab")
    allowed = cloud.enforce(document(Section.PROMOTE), KEY)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    channels = opened()
    for one in (first, second):
        promote(channels, one, "stable", KNOWN)
    promote(channels, second, "testing", KNOWN)
    rollback(channels, "stable", KNOWN)
    revoke(channels, second, "leaks")
    assert held(cloud, NAME.replace("stable", "testing")) is None
    assert allowed.refused == []
    assert allowed.unused == set()
    with refused("AccessDeniedException"):
        channels.account.client("ssm").put_parameter(Name="/theirs", Value="x", Type="String")


def test_the_commands(
    cloud: Cloud,
    channels: ChannelParameters,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("AMI_BUILDER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AMI_BUILDER_CONFIG", str(Path(__file__).parents[2] / "ami-builder.toml"))
    first, second = verified(cloud, channels, "a"), verified(cloud, channels, "b")
    # One that this machine has built is known by its name, any other by its id.
    channels.workspace.store_remote(first.artifact, None)
    assert cli.run(["promote", "dask", "stable", "--target", "aws"]) == 0
    assert cli.run(["promote", second.artifact.location, "stable"]) == 0
    assert capsys.readouterr().out.split() == [first.artifact.location, second.artifact.location]
    assert cli.run(["rollback", "stable", "--target", "aws", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["artifact"]["location"] == first.artifact.location
    assert answer["artifact"]["digest"] == DIGEST
    assert cli.run(["revoke", first.artifact.location, "--reason", "x"]) == 0
    assert "no image is current" in capsys.readouterr().err
    assert cli.run(["history", "stable", "--target", "aws"]) == 0
    assert cli.run(["promote", "ami-0123456789abcdef0", "stable"]) == 2
    assert "there is no AMI" in capsys.readouterr().err


@pytest.mark.parametrize("same", [True, False], ids=["this AMI", "something else"])
@pytest.mark.parametrize("kind", ["String", "StringList", "SecureString"])
def test_a_parameter_of_another_type_is_found_before_anything_moves(
    cloud: Cloud, channels: ChannelParameters, kind: str, same: bool
) -> None:
    stored = verified(cloud, channels, "a")
    value = stored.artifact.location if same else "someone's"
    cloud.client("ssm").put_parameter(Name=NAME, Value=value, Type=kind)
    with pytest.raises(UsageError, match=f"{NAME} .*another type") as caught:
        promote(channels, stored, "stable", KNOWN)
    assert "delete-parameter" in str(caught.value.hint)
    assert cloud.count("LabelParameterVersion") == 0
    assert cloud.count("PutParameter") == 1


def test_a_parameter_that_was_just_deleted_is_made_again(cloud: Cloud, channels: ChannelParameters) -> None:
    cloud.options.parameter_rest, cloud.options.parameter_rest_refused = 3, True
    first, second = verified(cloud, channels, "a"), verified(cloud, channels, "b")
    promote(channels, first, "stable", KNOWN)
    revoke(channels, first, "slow")
    assert held(cloud) is None
    promote(channels, second, "stable", KNOWN)
    assert held(cloud) == second.artifact.location
    assert cloud.count("PutParameter") == 5


def test_an_ami_that_is_deleted_while_it_is_promoted_is_an_error(
    cloud: Cloud, channels: ChannelParameters
) -> None:
    stored = verified(cloud, channels, "a")
    label, deregistered = adapter._label, list[object]()

    def label_late(account: Account, name: str, version: int) -> None:
        label(account, name, version)
        if not deregistered:
            deregistered.append(cloud.client().deregister_image(ImageId=stored.artifact.location))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "_label", label_late)
        with pytest.raises(CloudFailed, match="was deleted while it was promoted"):
            promote(channels, stored, "stable", KNOWN)


@pytest.mark.parametrize("how", ["promote", "rollback"])
def test_a_parameter_that_names_a_deregistered_ami_is_set_to_the_newest_that_exists(
    cloud: Cloud, channels: ChannelParameters, how: str
) -> None:
    first, second, third = (verified(cloud, channels, name) for name in "abc")
    for one in (first, second, third):
        promote(channels, one, "stable", KNOWN)
    cloud.client().deregister_image(ImageId=third.artifact.location)
    if how == "promote":
        moved = promote(channels, second, "stable", KNOWN)
    else:
        moved = rollback(channels, "stable", KNOWN)
    assert moved.stored.artifact.location == second.artifact.location
    assert held(cloud) == second.artifact.location
    assert promote(channels, second, "stable", KNOWN).entries == ()
    rollback(channels, "stable", KNOWN)
    assert held(cloud) == first.artifact.location


def test_a_deregistered_ami_is_rolled_back_from_when_one_other_is_left(
    cloud: Cloud, channels: ChannelParameters
) -> None:
    first, second = (verified(cloud, channels, name) for name in "ab")
    for one in (first, second):
        promote(channels, one, "stable", KNOWN)
    cloud.client().deregister_image(ImageId=second.artifact.location)
    rollback(channels, "stable", KNOWN)
    assert held(cloud) == first.artifact.location
    cloud.client().deregister_image(ImageId=first.artifact.location)
    with pytest.raises(UsageError, match="no image is current in channel stable"):
        rollback(channels, "stable", KNOWN)


def test_a_revoked_ami_leaves_the_other_channels_when_one_can_not_be_moved(
    cloud: Cloud, channels: ChannelParameters
) -> None:
    stored = verified(cloud, channels, "a")
    theirs, ours = (NAME.replace("stable", channel) for channel in ("a-text", "stable"))
    promote(channels, stored, "stable", KNOWN)
    cloud.client("ssm").put_parameter(Name=theirs, Value=stored.artifact.location, Type="String")
    with pytest.raises(UsageError, match=f"{theirs} .*another type") as caught:
        revoke(channels, stored, "leaks")
    assert "promote the image" not in str(caught.value.hint)
    assert held(cloud, theirs) == stored.artifact.location
    assert held(cloud, ours) is None


def test_a_disabled_ami_can_be_revoked_but_not_promoted(cloud: Cloud, channels: ChannelParameters) -> None:
    stored = verified(cloud, channels, "a")
    promote(channels, stored, "stable", KNOWN)
    cloud.backend().amis[stored.artifact.location].state = "disabled"
    with pytest.raises(UsageError, match="can't be launched"):
        promote(channels, stored, "testing", KNOWN)
    revoke(channels, stored, "leaks")
    assert held(cloud) is None
    cloud.backend().amis[stored.artifact.location].state = "available"
    with pytest.raises(UsageError, match="was revoked"):
        promote(channels, stored, "stable", KNOWN)
