"""Settings that belong to one region: subnets and keys, wherever an AMI is launched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ami_builder.config.schema import AwsSettings
from ami_builder.config.types import Destination
from tests.cloud.faulting import BUILD
from tests.cloud.flow import captured, in_haste, without_ssh
from tests.fake_ec2.server import REGION, Cloud

if TYPE_CHECKING:
    from pathlib import Path

OTHER = "eu-west-1"
THIRD = "us-west-2"


@pytest.fixture(autouse=True)
def _home(cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMI_BUILDER_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("AMI_BUILDER_CONFIG", raising=False)
    without_ssh(monkeypatch)
    in_haste(monkeypatch)


def subnets(cloud: Cloud, region: str) -> list[str]:
    return [each["SubnetId"] for each in cloud.client(region=region).describe_subnets()["Subnets"]]


def key(cloud: Cloud, region: str) -> str:
    return str(cloud.client("kms", region=region).create_key()["KeyMetadata"]["KeyId"])


def places(cloud: Cloud, *, dry: bool = False) -> set[tuple[str, str]]:
    """Return (region, subnet) of everything that was launched by ami-builder, not by Packer."""
    return {
        (call.region, call.params.get("SubnetId", ""))
        for call in cloud.calls
        if call.action == "RunInstances" and not call.packer and bool(call.params.get("DryRun")) is dry
    }


def disk_keys(cloud: Cloud) -> set[tuple[str, bool, str]]:
    """Return (region, whether the disk is encrypted, key) of what ami-builder launched."""
    found: set[tuple[str, bool, str]] = set()
    for call in cloud.calls:
        if call.action == "RunInstances" and not call.packer and not call.params.get("DryRun"):
            ebs: dict[str, Any] = call.params["BlockDeviceMappings"][0]["Ebs"]
            found.add((call.region, bool(ebs.get("Encrypted")), ebs.get("KmsKeyId", "")))
    return found


def test_each_region_has_its_own_subnets_and_key(cloud: Cloud) -> None:
    home, there = subnets(cloud, REGION)[1], subnets(cloud, OTHER)[1]
    ours, theirs = key(cloud, REGION), key(cloud, OTHER)
    settings = (
        *("--set", f"aws.subnets={home},{OTHER}={there}"),
        *("--set", "aws.encrypt=true", "--set", f"aws.kms_key={ours}"),
        *("--set", f"aws.copy_to={OTHER}={theirs},{THIRD}"),
    )
    built = captured(*settings, *BUILD)
    assert built.status == 0, built.err
    ami = built.out.splitlines()[-1]
    copied = captured(*settings, "copy", ami)
    assert copied.status == 0, copied.err
    ran = captured(*settings, "verify", ami, *(f"--region={one}" for one in (REGION, OTHER, THIRD)))
    assert ran.status == 0, ran.err
    assert places(cloud) == {(REGION, home), (OTHER, there), (THIRD, "")}
    assert disk_keys(cloud) == {(REGION, True, ours), (OTHER, True, theirs), (THIRD, True, "")}
    assert {(OTHER, there), (THIRD, "")} <= places(cloud, dry=True)
    asked = [call for call in cloud.calls if call.action == "DescribeSubnets" and "Filters" in call.params]
    named = {(call.region, *call.params["Filters"][0]["Values"]) for call in asked}
    assert named == {(REGION, home), (OTHER, there)}


@pytest.mark.parametrize("word", ["of the image", "of the AMI"])
def test_a_copy_alone_is_verified_in_its_own_region(cloud: Cloud, word: str) -> None:
    """Subnets without a region are those of aws.region, not those of the flag."""
    settings = ("--set", f"aws.subnets={subnets(cloud, REGION)[0]}", "--set", f"aws.copy_to={OTHER}")
    built = captured(*settings, *BUILD, "--no-verify")
    assert built.status == 0, built.err
    copied = captured(*settings, "copy")
    assert copied.status == 0, copied.err
    copy = copied.out.split()[-1]
    named = (copy,) if word == "of the AMI" else ("--target", "aws")
    ran = captured(*settings, "verify", *named, "--region", OTHER)
    assert ran.status == 0, ran.err
    assert ran.out.split()[-1] == copy
    assert places(cloud) == {(OTHER, "")}


def test_the_flag_alone_says_where(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any region configured, the subnets are of the only one that is known."""
    subnet = subnets(cloud, REGION)[1]
    built = captured(*BUILD, "--no-verify")
    assert built.status == 0, built.err
    ami = built.out.splitlines()[-1]
    monkeypatch.delenv("AWS_REGION")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    ran = captured(
        *("--set", "aws.region=", "--set", f"aws.subnets={subnet}", "verify", ami, "--region", REGION)
    )
    assert ran.status == 0, ran.err
    assert places(cloud) == {(REGION, subnet)}


def test_what_a_region_of_a_copy_has() -> None:
    aws = AwsSettings(
        region=REGION,
        subnets=("subnet-00000001", f"{OTHER}=subnet-00000002", f"{REGION}=subnet-00000003"),
        copy_to=(Destination(region=OTHER, kms_key="alias/theirs"), Destination(region=THIRD)),
    )
    home = aws.at(REGION, REGION)
    assert (home.subnets, home.kms_key, home.encrypt) == (("subnet-00000001", "subnet-00000003"), "", False)
    assert home.at(REGION, REGION) == home
    there = aws.at(OTHER, REGION)
    assert (there.region, there.subnets) == (OTHER, ("subnet-00000002",))
    assert (there.kms_key, there.encrypt) == ("alias/theirs", True)
    assert aws.at(THIRD, REGION).subnets == ()
