"""Settings of an account that would fail a build late: found out before anything is launched."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from ami_builder.aws import account_settings, preflight, quotas, subnets
from ami_builder.aws.session import Account
from ami_builder.build import plugins
from ami_builder.config.types import Destination
from ami_builder.core.errors import UsageError
from ami_builder.core.options import Connect
from ami_builder.core.records import Finding, State
from tests.cloud.faulting import BUILD
from tests.cloud.flow import Ran, captured, in_haste, without_ssh
from tests.cloud.test_base_ami import DEFAULT
from tests.fake_ec2.server import REGION, Cloud
from tests.sample_image import image as guest_image

if TYPE_CHECKING:
    from pathlib import Path

    from ami_builder.config.schema import Image

OTHER = "eu-west-1"
THEIRS = "999999999999"


def configured(**aws: Any) -> Image:
    image = guest_image()
    settings = {"source": DEFAULT, "source_cidrs": ("127.0.0.1/32",), **aws}
    return replace(image, aws=replace(image.aws, **settings))


def found(image: Image) -> dict[str, Finding]:
    return {one.name: one for one in preflight.check(image)}


@pytest.fixture
def home(cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMI_BUILDER_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("AMI_BUILDER_CONFIG", raising=False)
    without_ssh(monkeypatch)
    in_haste(monkeypatch)


def refused(cloud: Cloud, *arguments: str) -> Ran:
    """Run a build that must end before anything is made."""
    ran = captured(*arguments)
    assert ran.status == 2, ran.err
    assert cloud.left() == {}
    made = [call for call in cloud.calls if call.action in ("CreateSecurityGroup", "RunInstances")]
    assert all(call.params.get("DryRun") for call in made)
    return ran


# Encryption -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("home")
def test_an_ami_under_the_default_key_of_aws_is_not_shared(cloud: Cloud) -> None:
    cloud.client().enable_ebs_encryption_by_default()
    share = ("--set", f"aws.share_with={THEIRS}")
    ran = refused(cloud, *share, *BUILD)
    assert "can't be shared" in ran.err
    assert "aws.kms_key" in ran.err
    stopped = found(configured(share_with=(THEIRS,)))["encryption"]
    assert (stopped.state, stopped.exit_code) == (State.STOPS, 2)
    cloud.options.default_ebs_key = f"arn:aws:kms:{REGION}:123456789012:key/ours"
    assert found(configured(share_with=(THEIRS,)))["encryption"].state is State.OK
    assert captured(*share, *BUILD).status == 0


@pytest.mark.usefixtures("home")
def test_an_encrypted_ami_is_not_made_public(cloud: Cloud) -> None:
    cloud.client().enable_ebs_encryption_by_default()
    cloud.options.default_ebs_key = f"arn:aws:kms:{REGION}:123456789012:key/ours"
    ran = refused(cloud, *BUILD, "--public")
    assert "can't be public" in ran.err


@pytest.mark.usefixtures("home")
def test_a_public_ami_where_the_account_blocks_them(cloud: Cloud) -> None:
    cloud.options.block_public_access = "block-new-sharing"
    ran = refused(cloud, *BUILD, "--public")
    assert "block-new-sharing" in ran.err
    cloud.options.block_public_access = "unblocked"
    assert captured(*BUILD, "--public").status == 0


def test_the_default_encryption_of_copies(cloud: Cloud) -> None:
    cloud.client(region=OTHER).enable_ebs_encryption_by_default()
    image = configured(share_with=(THEIRS,), copy_to=(Destination(region=OTHER),))
    assert "encryption" not in found(replace(image, aws=replace(image.aws, share_with=())))
    findings = found(image)
    assert findings["encryption"].state is State.OK
    assert findings[f"encryption in {OTHER}"].state is State.STOPS


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("setting", ["aws.kms_key", "aws.copy_to"])
def test_a_key_of_another_region_or_a_disabled_one(cloud: Cloud, setting: str) -> None:
    region = REGION if setting == "aws.kms_key" else OTHER
    elsewhere = cloud.client("kms", region="us-west-2").create_key()["KeyMetadata"]["KeyId"]
    kms = cloud.client("kms", region=region)
    disabled = kms.create_key()["KeyMetadata"]["KeyId"]
    kms.disable_key(KeyId=disabled)
    for key, says in ((elsewhere, "there is no KMS key"), (disabled, "is Disabled")):
        aws: dict[str, Any] = {"encrypt": True, "kms_key": key}
        if setting == "aws.copy_to":
            aws = {"copy_to": (Destination(region=OTHER, kms_key=key),)}
        name = "KMS key" if setting == "aws.kms_key" else f"KMS key in {OTHER}"
        finding = found(configured(**aws))[name]
        assert (finding.state, finding.exit_code) == (State.STOPS, 2)
        assert says in finding.found
        assert setting in finding.found
    if setting == "aws.kms_key":
        ran = refused(cloud, "--set", "aws.encrypt=true", "--set", f"aws.kms_key={elsewhere}", *BUILD)
        assert "there is no KMS key" in ran.err


# Metadata, Session Manager ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("home")
def test_what_packer_can_not_do_in_the_account(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud.options.imdsv2_enforced, cloud.options.imds_endpoint = True, "disabled"
    monkeypatch.setattr(plugins, "has_plugins", lambda: False)
    of = [one for one in preflight.check(configured()) if one.name == "Packer in this account"]
    assert [(one.state, one.exit_code) for one in of] == [(State.STOPS, 3)] * 2
    cloud.options.imds_default = "required"
    ran = captured(*BUILD)
    assert ran.status == 3, ran.err
    assert "turns instance metadata off" in ran.err
    assert cloud.left() == {}


@pytest.mark.usefixtures("home")
def test_session_manager_and_a_base_without_its_agent(cloud: Cloud) -> None:
    cloud.client("iam").create_instance_profile(InstanceProfileName="ours")
    settings = ("--set", "aws.connect=session-manager", "--set", "aws.instance_profile=ours")
    ran = refused(cloud, *settings, *BUILD)
    assert "has no SSM agent" in ran.err
    image = configured(connect=Connect.SESSION_MANAGER, instance_profile="ours")
    assert found(image)["Session Manager"].state is State.STOPS
    ours = cloud.backend().amis[cloud.base_ami()]
    ours.owner_id = "123456789012"
    image = replace(image, aws=replace(image.aws, source=ours.id))
    assert found(image)["Session Manager"].state is State.OK


# Regions, partitions ----------------------------------------------------------------------------------------


def test_a_region_that_is_not_enabled(cloud: Cloud) -> None:
    image = configured(copy_to=(Destination(region="me-south-1"), Destination(region=OTHER)))
    findings = found(image)
    stopped = findings["copies in me-south-1"]
    assert (stopped.state, stopped.exit_code) == (State.STOPS, 2)
    assert "enable-region" in stopped.hint
    assert findings[f"copies in {OTHER}"].state is State.OK
    assert "encryption in me-south-1" not in findings
    cloud.options.opted_in = {"me-south-1"}
    assert found(image)["copies in me-south-1"].state is State.OK


def test_a_copy_to_where_the_ami_is_baked(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration alone can't tell when the region comes from the environment."""
    monkeypatch.setenv("AWS_REGION", REGION)
    image = configured(region="", copy_to=(Destination(region=REGION),))
    finding = found(image)[f"copies in {REGION}"]
    assert (finding.state, finding.exit_code) == (State.STOPS, 2)


def test_a_region_that_there_is_not(cloud: Cloud) -> None:
    finding = found(configured(copy_to=(Destination(region="eu-west-9"),)))["copies in eu-west-9"]
    assert (finding.state, finding.exit_code) == (State.STOPS, 2)


def test_the_default_base_is_of_one_partition(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = cloud.backend("us-gov-west-1")
    backend.amis.clear()
    findings = found(configured(region="us-gov-west-1"))
    assert findings["base AMI"].state is State.STOPS
    assert "aws-us-gov" in findings["base AMI"].hint
    # The partition has no endpoint of the Pricing API.
    assert findings["cost"].state is State.NOTE


# Networks ---------------------------------------------------------------------------------------------------


@pytest.fixture
def private(cloud: Cloud) -> str:
    """A subnet without public addresses, in a network that this host is not in; with a NAT gateway."""
    ec2 = cloud.client()
    vpc = ec2.create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    subnet: str = ec2.create_subnet(VpcId=vpc, CidrBlock="10.9.1.0/24")["Subnet"]["SubnetId"]
    (table,) = ec2.describe_route_tables(Filters=[{"Name": "vpc-id", "Values": [vpc]}])["RouteTables"]
    nat = ec2.create_nat_gateway(SubnetId=subnet, ConnectivityType="private")["NatGateway"]["NatGatewayId"]
    ec2.create_route(RouteTableId=table["RouteTableId"], DestinationCidrBlock="0.0.0.0/0", NatGatewayId=nat)
    return subnet


@pytest.mark.usefixtures("home")
def test_a_private_subnet_and_a_host_outside(
    cloud: Cloud, private: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subnets, "source_address", lambda network: "192.0.2.7")
    ran = refused(cloud, "--set", "aws.source_cidrs=", "--set", f"aws.subnets={private}", *BUILD)
    assert "get no public address" in ran.err
    assert "aws.source_cidrs" in ran.err
    finding = found(configured(subnets=(private,), source_cidrs=()))["ssh is open to"]
    assert (finding.state, finding.exit_code) == (State.STOPS, 2)
    assert found(configured(subnets=(private,)))["ssh is open to"].found == "127.0.0.1/32, port 22"


@pytest.mark.usefixtures("home")
def test_a_private_subnet_and_a_host_inside(
    cloud: Cloud, private: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subnets, "source_address", lambda network: "10.9.200.7")
    ran = captured("--set", "aws.source_cidrs=", "--set", f"aws.subnets={private}", *BUILD)
    assert ran.status == 0, ran.err
    opened = [call.params for call in cloud.calls if call.action == "AuthorizeSecurityGroupIngress"]
    assert opened
    for call in opened:
        assert call["IpPermissions"][0]["IpRanges"][0]["CidrIp"] == "10.9.200.7/32"
    findings = found(configured(subnets=(private,), source_cidrs=()))
    assert findings["ssh is open to"].found == "10.9.200.7/32, port 22"
    assert findings["network"].found == f"{private}, private addresses in {private}"
    assert "way out" not in findings


def test_the_address_that_this_host_sends_from() -> None:
    assert subnets.source_address("127.0.0.0/8") == "127.0.0.1"


def test_a_subnet_without_a_way_out(cloud: Cloud, private: str) -> None:
    ec2 = cloud.client()
    for table in ec2.describe_route_tables()["RouteTables"]:
        if any(route.get("NatGatewayId") for route in table["Routes"]):
            ec2.delete_route(RouteTableId=table["RouteTableId"], DestinationCidrBlock="0.0.0.0/0")
    finding = found(configured(subnets=(private,)))["way out"]
    assert finding.state is State.NOTE
    assert private in finding.found


def test_public_addresses_without_an_internet_gateway(cloud: Cloud, private: str) -> None:
    cloud.client().modify_subnet_attribute(SubnetId=private, MapPublicIpOnLaunch={"Value": True})
    finding = found(configured(subnets=(private,)))["network"]
    assert (finding.state, finding.exit_code) == (State.STOPS, 2)
    assert "no internet gateway" in finding.found


def test_a_firewall_before_the_internet_gateway() -> None:
    """https://docs.aws.amazon.com/network-firewall/latest/developerguide/arch-single-zone-igw.html"""
    gateways = {"igw-0123456789abcdef0": "internet gateway", "vpce-0123456789abcdef0": "internet gateway"}
    for gateway, way in gateways.items():
        route: Any = {"DestinationCidrBlock": "0.0.0.0/0", "GatewayId": gateway, "State": "active"}
        assert subnets.way_out({"Routes": [route]}) == way
    local: Any = {"DestinationCidrBlock": "10.9.0.0/16", "GatewayId": "local", "State": "active"}
    assert subnets.way_out({"Routes": [local]}) == ""


def test_one_default_subnet_without_public_addresses(cloud: Cloud) -> None:
    ec2 = cloud.client()
    first = ec2.describe_subnets()["Subnets"][0]["SubnetId"]
    ec2.modify_subnet_attribute(SubnetId=first, MapPublicIpOnLaunch={"Value": False})
    findings = found(configured(source_cidrs=()))
    assert findings["network"].state is State.OK


@pytest.mark.usefixtures("home")
def test_a_subnet_for_ipv6_alone(cloud: Cloud, private: str) -> None:
    cloud.backend().get_subnet(private).ipv6_native = True
    ran = refused(cloud, "--set", f"aws.subnets={private}", *BUILD)
    assert "IPv6 alone" in ran.err
    assert found(configured(subnets=(private,)))["network"].state is State.STOPS


@pytest.mark.usefixtures("home")
def test_an_account_without_a_default_vpc(cloud: Cloud) -> None:
    for subnet in cloud.client().describe_subnets()["Subnets"]:
        cloud.client().delete_subnet(SubnetId=subnet["SubnetId"])
    for vpc in cloud.backend().vpcs.values():
        vpc.is_default = "false"
    ran = refused(cloud, *BUILD)
    assert "no default VPC" in ran.err
    findings = found(configured())
    assert findings["network"].state is State.STOPS
    assert {"permissions", "cost", "quota of vCPUs"} <= findings.keys()


# Quotas -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("home")
def test_more_vcpus_than_the_account_may_run(cloud: Cloud) -> None:
    types = ("--set", "verify.instance_types=m6i.large,m5.large,m7i.large")
    cloud.options.vcpu_quotas["L-1216C47A"] = 5
    ran = refused(cloud, *types, *BUILD)
    assert "6 vCPUs on demand of 5" in ran.err
    cloud.options.vcpu_quotas["L-1216C47A"] = 6
    assert captured(*types, *BUILD).status == 0
    image = configured()
    image = replace(
        image, verify=replace(image.verify, instance_types=("m6i.large", "m5.large", "m7i.large"))
    )
    assert quotas.vcpus(Account.open(), image) == "6 vCPUs on demand of 6, 0 are in use"
    cloud.client().run_instances(ImageId=cloud.base_ami(), MinCount=1, MaxCount=1, InstanceType="m6i.large")
    assert "6, 2 are in use: too many to fit beside them now" in quotas.vcpus(Account.open(), image)
    cloud.options.vcpu_quotas["L-1216C47A"] = 5
    with pytest.raises(UsageError, match="6 vCPUs on demand of 5") as caught:
        quotas.vcpus(Account.open(), image)
    assert "request-service-quota-increase" in str(caught.value.hint)
    larger = replace(image.aws, instance_types=("m6i.large", "m6i.16xlarge"))
    fitting = replace(image, aws=larger, verify=replace(image.verify, instance_types=("m6i.large",)))
    assert "2 vCPUs on demand of 5" in quotas.vcpus(Account.open(), fitting), "the first type is enough"


def test_spot_instances_have_a_quota_of_their_own(cloud: Cloud) -> None:
    cloud.options.vcpu_quotas["L-34B43A08"] = 1
    assert found(configured())["quota of vCPUs"].state is State.OK
    assert found(configured(spot=True))["quota of vCPUs"].state is State.STOPS


@pytest.mark.usefixtures("home")
def test_what_the_account_does_not_tell_stops_nothing(cloud: Cloud) -> None:
    cloud.options.vcpu_quotas.clear()
    finding = found(configured())["quota of vCPUs"]
    assert finding.state is State.NOTE
    assert finding.found.startswith("unknown")
    cloud.faults.add("GetEbsEncryptionByDefault", "http500", times=None)
    built = captured(*BUILD)
    assert built.status == 0, built.err
    assert json.loads(captured("check", "--target", "aws", "--json").out)["ready"]
    assert account_settings.public_access(Account.open()) == "allowed"
