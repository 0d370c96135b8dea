"""`check --target aws`: what would stop a build, what would be taken, about what it costs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from ami_builder.aws import preflight, prices
from ami_builder.aws.session import Account
from ami_builder.build import plugins
from ami_builder.config.types import Destination
from ami_builder.core.options import Arch, Connect
from ami_builder.core.records import Finding, State
from tests.fake_ec2.server import REGION, Cloud
from tests.fake_programs import fake
from tests.sample_image import image as guest_image

if TYPE_CHECKING:
    from pathlib import Path

    from ami_builder.config.schema import Image

BASE = "136693071363/debian-13-amd64-########-####"


def configured(**aws: Any) -> Image:
    image = guest_image()
    return replace(image, aws=replace(image.aws, source=BASE, source_cidrs=("127.0.0.1/32",), **aws))


def found(image: Image) -> dict[str, Finding]:
    findings = list(preflight.check(image))
    return {one.name: one for one in findings}


def test_all_is_well_and_nothing_is_made(cloud: Cloud) -> None:
    findings = found(configured())
    assert {one.state for one in findings.values()} == {State.OK}
    assert findings["AWS account"].found.startswith("arn:aws:iam::123456789012:user/")
    assert findings["AWS account"].found.endswith(f"in {REGION}")
    assert cloud.base_ami() in findings["base AMI"].found
    assert findings["network"].found == "the default VPC, public addresses"
    assert findings["ssh is open to"].found == "127.0.0.1/32, port 22"
    assert findings["permissions"].found.endswith("all are allowed")
    assert findings["cost"].found.startswith("at most about $0.0")
    assert cloud.left() == {}
    changing = [c for c in cloud.calls if not c.action.startswith(("Describe", "Get", "Simulate"))]
    assert {c.action for c in changing} == {"RunInstances", "CreateSecurityGroup"}
    assert all(str(c.params.get("DryRun")).lower() == "true" for c in changing)


def test_what_a_spot_instance_needs_is_tried_too(cloud: Cloud) -> None:
    assert found(configured(spot=True))["permissions"].state is State.OK
    tried = {call.action for call in cloud.calls if call.params.get("DryRun")}
    assert tried == {"RunInstances", "CreateSecurityGroup", "CreateLaunchTemplate"}
    asked = {a for c in cloud.calls if c.action.startswith("Simulate") for a in c.params["ActionNames"]}
    assert {"ec2:CreateFleet", "ec2:DeleteLaunchTemplate"} <= asked
    assert cloud.left() == {}


def test_without_credentials_nothing_else_is_asked(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    (only,) = preflight.check(configured())
    assert (only.name, only.state, only.exit_code) == ("AWS account", State.STOPS, 6)


def test_what_is_wrong_is_named_each_by_itself(cloud: Cloud) -> None:
    image = configured(
        instance_types=("m6i.large", "z9z.huge"),
        subnets=("subnet-0123456789abcdef0",),
        instance_profile="nobodys",
        lifetime=60.0,
    )
    image = replace(
        image,
        aws=replace(image.aws, source="136693071363/debian-99-*"),
        verify=replace(image.verify, instance_types=("z9z.huge",)),
    )
    findings = found(image)
    stops = {name for name, one in findings.items() if one.state is State.STOPS}
    assert stops == {"base AMI", "instance types to verify on", "network", "instance profile"}
    assert findings["instance types to bake on"].state is State.NOTE
    assert "not offer z9z.huge" in findings["instance types to bake on"].found
    assert "verify.instance_types" in findings["instance types to verify on"].hint
    assert "aws.lifetime" in findings["lifetime"].hint
    assert findings["cost"].state is State.NOTE
    assert findings["permissions"].state is State.OK


def test_instance_types_of_another_architecture(cloud: Cloud) -> None:
    image = replace(configured(instance_types=("m7g.large", "m6g.large")), arch=Arch.ARM64)
    image = replace(image, aws=replace(image.aws, source="136693071363/debian-13-arm64-########-####"))
    findings = found(image)
    assert findings["base AMI"].state is State.OK
    assert findings["instance types to bake on"].state is State.OK
    wrong = findings["instance types to verify on"]
    assert (wrong.state, wrong.exit_code) == (State.STOPS, 2)
    assert "m6i.large runs x86_64" in wrong.found
    image = replace(image, verify=replace(image.verify, instance_types=("m7g.large",)))
    assert found(image)["instance types to verify on"].state is State.OK


def test_session_manager_needs_its_tools(
    cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud.client("iam").create_instance_profile(InstanceProfileName="ours")
    image = configured(connect=Connect.SESSION_MANAGER, instance_profile="ours")
    monkeypatch.setenv("PATH", str(tmp_path))
    findings = found(image)
    assert findings["aws"].state is State.STOPS
    assert "plugin" in findings["session-manager-plugin"].found
    assert findings["session-manager-plugin"].exit_code == 3
    assert "ssh is open to" not in findings
    assert findings["instance profile"].found == "ours with role (none)"
    for tool in ("aws", "session-manager-plugin"):
        fake(tmp_path, tool, "")
    assert found(image)["aws"].state is State.OK


def test_subnets_of_two_networks(cloud: Cloud) -> None:
    ec2 = cloud.client()
    vpc = ec2.create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    other = ec2.create_subnet(VpcId=vpc, CidrBlock="10.9.1.0/24")["Subnet"]["SubnetId"]
    first = ec2.describe_subnets()["Subnets"][0]["SubnetId"]
    assert "several VPCs" in found(configured(subnets=(first, other)))["network"].found


@pytest.mark.parametrize(
    ("action", "name"),
    [
        ("DescribeInstanceTypeOfferings", "instance types"),
        ("DescribeImages", "base AMI"),
        ("DescribeSubnets", "network"),
        ("DescribeRegions", "regions"),
        ("GetEbsEncryptionByDefault", "encryption"),
        ("GetInstanceMetadataDefaults", "Packer in this account"),
        ("GetServiceQuota", "quota of vCPUs"),
        ("SimulatePrincipalPolicy", "permissions"),
        ("CreateSecurityGroup", "dry run of ec2:CreateSecurityGroup"),
        ("GetProducts", "cost"),
        ("GetInstanceProfile", "instance profile"),
    ],
)
def test_one_failing_probe_hides_no_other(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, action: str, name: str
) -> None:
    monkeypatch.setattr("ami_builder.aws.session.ATTEMPTS", 1)
    cloud.client("iam").create_instance_profile(InstanceProfileName="ours")
    image = configured(copy_to=(Destination(region="eu-west-1"),), instance_profile="ours")
    image = replace(image, aws=replace(image.aws, share_with=("999999999999",)))
    monkeypatch.setattr(plugins, "has_plugins", lambda: False)
    whole = found(image)
    cloud.faults.add(action, "http500", times=None)
    findings = found(image)
    assert findings[name].state is not State.OK
    assert whole.keys() - findings.keys() <= {
        "newer AMIs, passed over",
        "root device",
        "instance types to bake on",
        "instance types to verify on",
        "ssh is open to",
        "copies in eu-west-1",
        "encryption in eu-west-1",
    }
    assert findings["lifetime" if "lifetime" in whole else "cost"]


def test_prices(cloud: Cloud) -> None:
    account = Account.open()
    assert prices.hourly_price(account, "m6i.large") == pytest.approx(0.096)
    assert prices.hourly_price(account, "z9z.huge") is None
    cloud.faults.add("GetProducts", "reset", times=None)
    assert prices.hourly_price(account, "m6i.large") is None
