"""Build, verify and gc as a user runs them, against the loopback EC2."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from ami_builder.aws import matrix
from ami_builder.aws.target import AwsTarget
from ami_builder.build import plugins
from ami_builder.config import loading
from ami_builder.core.records import Measurement
from ami_builder.state.workspace import Workspace
from tests.cloud.flow import SETTINGS, ami_builder, without_ssh
from tests.fake_ec2.server import ACCESS_KEY, Cloud

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ami_builder.verify.machine import MachineResult


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMI_BUILDER_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("AMI_BUILDER_CONFIG", raising=False)
    without_ssh(monkeypatch)


def _built(capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    status = ami_builder("build", "--target", "aws", "--json")
    shown = capsys.readouterr()
    assert status == 0, shown.err
    return json.loads(shown.out)


def test_an_ami_is_baked_verified_and_all_that_is_left(
    cloud: Cloud, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = _built(capsys)
    artifact = answer["artifact"]
    assert artifact["target"] == "aws"
    assert artifact["region"] == "us-east-1"
    ec2 = cloud.client()
    (ami,) = ec2.describe_images(ImageIds=[artifact["location"]])["Images"]
    told = {tag["Key"]: tag["Value"] for tag in ami["Tags"]}
    assert told["ami-builder:run"] == artifact["run_id"]
    assert told["ami-builder:digest"] == artifact["digest"]
    assert told["ami-builder:base-ami"] == cloud.base_ami()
    assert told["ami-builder:verdict"].startswith("passed ")
    assert told["ami-builder:measured"] == "m6i.large=8589934592/1073741824/-/-"
    assert ami["ImdsSupport"] == "v2.0"
    assert ami["Public"] is False
    (disk,) = (m["Ebs"] for m in ami["BlockDeviceMappings"] if "Ebs" in m)
    (snapshot,) = ec2.describe_snapshots(SnapshotIds=[disk["SnapshotId"]])["Snapshots"]
    assert told.items() - {
        (k, v) for k, v in told.items() if k.endswith(("finished", "verdict", "measured"))
    } <= {(tag["Key"], tag["Value"]) for tag in snapshot["Tags"]}
    left = cloud.left()
    assert {kind: len(ids) for kind, ids in left.items()} == {"image": 1, "snapshot": 1}, left


@pytest.mark.parametrize("spot", ["false", "true"])
def test_the_baking_instance_takes_imdsv2_alone(cloud: Cloud, spot: str) -> None:
    assert ami_builder("--set", f"aws.spot={spot}", "build", "--target", "aws") == 0
    launch = "CreateLaunchTemplate" if spot == "true" else "RunInstances"
    if not plugins.has_plugins():
        # 1.6.6 can't ask for it at the launch.
        launch = "ModifyInstanceMetadataOptions"
    call = next(call for call in cloud.calls if call.action == launch)
    given = call.params.get("LaunchTemplateData", call.params)
    given = given.get("MetadataOptions", given)
    assert (given["HttpTokens"], str(given["HttpPutResponseHopLimit"])) == ("required", "1")


def test_an_unchanged_build_asks_a_little_and_makes_nothing(
    cloud: Cloud, capsys: pytest.CaptureFixture[str]
) -> None:
    first = _built(capsys)
    before = len(cloud.calls)
    again = _built(capsys)
    assert again["unchanged"] is True
    assert again["artifact"]["location"] == first["artifact"]["location"]
    assert {call.action for call in cloud.calls[before:]} <= {"DescribeImages"}


def test_another_machine_knows_what_was_measured(
    cloud: Cloud, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ami = _built(capsys)["artifact"]["location"]
    monkeypatch.setenv("AMI_BUILDER_HOME", str(tmp_path / "elsewhere"))
    settings = loading.overrides_from(word for word in SETTINGS if word != "--set")
    image = loading.load(None, environ={}, overrides=settings).select()
    target = AwsTarget.open(image, Workspace.open({"AMI_BUILDER_HOME": str(tmp_path / "elsewhere")}))
    verdict = target.ami(image, ami).verdict
    assert verdict is not None
    assert verdict.passed
    assert verdict.measured == (
        Measurement(machine="m6i.large", phase="boot", total=8 << 30, available=1 << 30),
    )


def test_an_ami_is_verified_again_on_several_types(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    ami = _built(capsys)["artifact"]["location"]
    status = ami_builder(
        "verify", ami, "--instance-type", "m5.large", "--instance-type", "r6i.large", "--json"
    )
    shown = capsys.readouterr()
    assert status == 0, shown.err
    verdict = json.loads(shown.out)["verdict"]
    assert [m["machine"] for m in verdict["measured"]] == ["m5.large", "r6i.large"]
    memory = [m["total"] for m in verdict["measured"]]
    assert memory[0] < memory[1]
    assert {kind: len(ids) for kind, ids in cloud.left().items()} == {"image": 1, "snapshot": 1}


def test_a_name_means_the_local_image_unless_told_otherwise(
    cloud: Cloud, capsys: pytest.CaptureFixture[str]
) -> None:
    ami = _built(capsys)["artifact"]["location"]
    assert ami_builder("verify") == 2
    assert "has not been built yet" in capsys.readouterr().err
    assert ami_builder("verify", "--target", "aws") == 0
    assert capsys.readouterr().out.splitlines()[-1] == ami
    assert ami_builder("list") == 0
    assert f"{ami} (us-east-1)" in capsys.readouterr().out


def test_baking_on_a_spot_instance(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    status = ami_builder("--set", "aws.spot=true", "build", "--target", "aws", "--json")
    shown = capsys.readouterr()
    assert status == 0, shown.err
    assert cloud.count("CreateFleet") == 1
    assert {kind: len(ids) for kind, ids in cloud.left().items()} == {"image": 1, "snapshot": 1}


def test_credentials_are_in_no_file_no_argument_and_no_output(
    cloud: Cloud, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"AWS_SECRET_ACCESS_KEY": "secret-4cd1", "AWS_SESSION_TOKEN": "token-9b7e"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    words = [ACCESS_KEY, *told.values()]
    popen, arguments, given = subprocess.Popen, list[str](), list[str]()

    def started(argv: list[str], **more: Any) -> object:
        arguments.extend(argv)
        given.extend((more.get("env") or {}).values())
        return popen(argv, **more)

    def written() -> str:
        files = (each for each in tmp_path.rglob("*") if each.is_file() and not each.is_symlink())
        return "".join(each.read_text(errors="replace") for each in files)

    during: list[str] = []
    verify_machine: Callable[..., MachineResult] = vars(matrix)["verify_machine"]

    def verified(*args: Any, **more: Any) -> MachineResult:
        during.append(written())
        return verify_machine(*args, **more)

    monkeypatch.setattr(matrix, "verify_machine", verified)
    monkeypatch.setattr(subprocess, "Popen", started)
    assert ami_builder("--debug", "build", "--target", "aws") == 0
    assert set(words) <= set(given), "Packer was given them"
    shown = capfd.readouterr()
    (seen,) = during
    assert "amazon-ebs" in seen
    for word in words:
        for place in (seen, written(), " ".join(arguments), shown.out, shown.err):
            assert word not in place, word


def test_publishing_needs_the_flag(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    status = ami_builder("build", "--target", "aws", "--public", "--json")
    shown = capsys.readouterr()
    assert status == 0, shown.err
    ami = json.loads(shown.out)["artifact"]["location"]
    (image,) = cloud.client().describe_images(ImageIds=[ami])["Images"]
    assert image["Public"] is True
    assert ami_builder("build", "--public") == 2
