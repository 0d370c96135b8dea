"""`ami-builder check --target aws`: find what would stop a build, and its cost, without creating anything."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from ami_builder.aws import network, source_ami
from ami_builder.aws import tags as tagging
from ami_builder.aws.session import DENIED, Account, aws_errors, code_of
from ami_builder.aws.tags import Purpose
from ami_builder.core.errors import AmiBuilderError, CloudFailed, UsageError
from ami_builder.core.options import Connect
from ami_builder.core.records import Finding, State
from ami_builder.system import processes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ami_builder.config.schema import AwsSettings, Image

_GIB = 1 << 30
_NO_ID = "0123456789abcdef0"
_TOOLS = {"aws": "the AWS CLI", "session-manager-plugin": "the Session Manager plugin of the AWS CLI"}
_INSTALL = (
    "see docs.aws.amazon.com/systems-manager/latest/userguide/session-manager-working-with-install-plugin"
)

# The Pricing API has endpoints in a few regions only; each has the prices of all regions.
_PRICING_REGION = "us-east-1"
# Prices in us-east-1. Other regions differ by a few cents, which hardly counts next to the instance.
_GP3_GIB_MONTH = 0.08
_SNAPSHOT_GIB_MONTH = 0.05
_HOURS_A_MONTH = 730.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Estimated cost in US dollars."""

    hour: float
    """An hour of the instance, on demand."""
    run: float
    """The instance and its disk for the requested time."""
    month: float
    """A month of the AMI's snapshot, if the disk were full."""


def check(image: Image) -> Iterator[Finding]:
    """Check credentials, base AMI, instance types, network, permissions and cost; create nothing."""
    try:
        account = Account.open(image.aws.region)
        who = account.identity()
    except AmiBuilderError as bad:
        yield _stops("AWS account", bad)
        return
    yield _fine("AWS account", f"{who.arn} in {account.region}")
    try:
        ami: source_ami.BaseAmi | None = source_ami.resolve(account, image.aws.source)
    except AmiBuilderError as bad:
        ami = None
        yield _stops("base AMI", bad)
    else:
        assert ami is not None
        yield _fine("base AMI", f"{ami.id}, {ami.name}, {ami.size / _GIB:g} GiB")
    yield from _instance_types(account, image)
    yield from _network(account, image.aws)
    yield from _tools(image.aws)
    if image.aws.instance_profile:
        yield _instance_profile(account, image.aws)
    if ami is not None:
        yield _permissions(account, image, ami)
    yield from _lifetime(image)
    yield _cost(account, image, ami)


def _fine(name: str, found: str) -> Finding:
    return Finding(name=name, state=State.OK, found=found)


def _note(name: str, found: str, hint: str = "") -> Finding:
    return Finding(name=name, state=State.NOTE, found=found, hint=hint)


def _stops(name: str, bad: AmiBuilderError) -> Finding:
    return Finding(
        name=name, state=State.STOPS, found=bad.message, hint=bad.hint or "", exit_code=bad.exit_code
    )


def _instance_types(account: Account, image: Image) -> Iterator[Finding]:
    baking, verifying = image.aws.instance_types, image.verify.instance_types
    wanted = list(dict.fromkeys([*baking, *verifying]))
    try:
        with aws_errors():
            pages = account.ec2.get_paginator("describe_instance_type_offerings").paginate(
                Filters=[{"Name": "instance-type", "Values": wanted}]
            )
            offered = {one["InstanceType"] for page in pages for one in page["InstanceTypeOfferings"]}
    except CloudFailed as bad:
        yield _stops("instance types", bad)
        return
    for name, kinds, enough in (
        ("instance types to bake on", baking, any),
        ("instance types to verify on", verifying, all),
    ):
        missing = [kind for kind in kinds if kind not in offered]
        if not enough(kind in offered for kind in kinds):
            error = UsageError(
                f"{account.region} does not offer {', '.join(missing)}",
                hint=f"change {'aws' if kinds is baking else 'verify'}.instance_types",
            )
            yield _stops(name, error)
        elif missing:
            yield _note(name, f"{', '.join(kinds)}, but {account.region} does not offer {', '.join(missing)}")
        else:
            yield _fine(name, ", ".join(kinds))


def _network(account: Account, aws: AwsSettings) -> Iterator[Finding]:
    try:
        vpcs = {network.find_vpc(account, subnet) for subnet in aws.subnets or ("",)}
        if len(vpcs) > 1:
            raise UsageError(
                f"aws.subnets are in several VPCs: {', '.join(sorted(vpcs))}",
                hint="use subnets of one VPC, since a security group belongs to one VPC",
            )
        yield _fine("network", ", ".join(aws.subnets or ("the default VPC",)))
        if aws.connect is Connect.SSH:
            cidrs = network.source_cidrs(aws.source_cidrs)
            yield _fine("ssh is open to", f"{', '.join(cidrs)}, port {aws.ssh_port}")
    except AmiBuilderError as bad:
        yield _stops("network", bad)


def _tools(aws: AwsSettings) -> Iterator[Finding]:
    for tool, name in _TOOLS.items() if aws.connect is Connect.SESSION_MANAGER else ():
        try:
            yield _fine(tool, str(processes.find(tool)))
        except AmiBuilderError as bad:
            yield Finding(
                name=tool,
                state=State.STOPS,
                found=f"{name} is not installed",
                hint=_INSTALL,
                exit_code=bad.exit_code,
            )


def _instance_profile(account: Account, aws: AwsSettings) -> Finding:
    name = aws.instance_profile.rpartition("/")[2]
    try:
        with aws_errors("iam"):
            try:
                found = account.client("iam").get_instance_profile(InstanceProfileName=name)
            except ClientError as error:
                if code_of(error) in DENIED:
                    return _note("instance profile", f"{name}; these credentials are not allowed to read it")
                if code_of(error) != "NoSuchEntity":
                    raise
                raise UsageError(
                    f"aws.instance_profile: there is no instance profile {name}",
                    hint="create it, or change aws.instance_profile",
                ) from error
    except AmiBuilderError as bad:
        return _stops("instance profile", bad)
    roles = [role["RoleName"] for role in found["InstanceProfile"]["Roles"]]
    return _fine("instance profile", f"{name} with role {', '.join(roles) or '(none)'}")


def _permissions(account: Account, image: Image, ami: source_ami.BaseAmi) -> Finding:
    """Try each call that changes something with DryRun, which needs no existing resource."""
    refused = []
    tries = _tries(account, image, ami)
    try:
        for action, call in tries:
            try:
                with aws_errors():
                    _try(call)
            except CloudFailed as bad:
                cause = bad.__cause__
                if not isinstance(cause, ClientError) or code_of(cause) not in DENIED:
                    raise
                refused.append(action)
    except AmiBuilderError as bad:
        return _stops("permissions", bad)
    if refused:
        error = CloudFailed(
            f"these credentials do not allow: {', '.join(refused)}",
            hint="`ami-builder iam-policy` prints a policy that does",
        )
        return _stops("permissions", error)
    return _fine("permissions", f"{len(tries)} calls tried with DryRun, all are allowed")


def _try(call: Callable[[], object]) -> None:
    try:
        call()
    except ClientError as error:
        # EC2's answers to an allowed call: by design, or for ids that do not exist.
        if code_of(error) == "DryRunOperation" or "NotFound" in code_of(error):
            return
        raise


def _tries(
    account: Account, image: Image, ami: source_ami.BaseAmi
) -> Sequence[tuple[str, Callable[[], object]]]:
    ec2: Any = account.ec2
    tags = tagging.resource_tags(image.name, "0" * 64, "check", Purpose.BAKE)
    subnet = {"SubnetId": image.aws.subnets[0]} if image.aws.subnets else {}
    instance, group = f"i-{_NO_ID}", f"sg-{_NO_ID}"
    snapshot, volume, own = f"snap-{_NO_ID}", f"vol-{_NO_ID}", f"ami-{_NO_ID}"

    def of(name: str, **parameters: Any) -> tuple[str, Callable[[], object]]:
        action = "".join(word.capitalize() for word in name.split("_"))
        return f"ec2:{action}", lambda: getattr(ec2, name)(DryRun=True, **parameters)

    template = f"lt-{_NO_ID}"
    spot = [
        of(
            "create_launch_template",
            LaunchTemplateName=tagging.group_name("check", Purpose.BAKE),
            LaunchTemplateData={"ImageId": ami.id},
            TagSpecifications=tagging.specifications(tags, "launch-template"),
        ),
        of(
            "create_fleet",
            Type="instant",
            LaunchTemplateConfigs=[
                {"LaunchTemplateSpecification": {"LaunchTemplateId": template, "Version": "1"}}
            ],
            TargetCapacitySpecification={"TotalTargetCapacity": 1, "DefaultTargetCapacityType": "spot"},
        ),
    ]
    return [
        *(spot if image.aws.spot else ()),
        of(
            "run_instances",
            ImageId=ami.id,
            InstanceType=image.aws.instance_types[0],
            MinCount=1,
            MaxCount=1,
            SecurityGroupIds=[group],
            TagSpecifications=tagging.specifications(tags, "instance", "volume"),
            **subnet,
        ),
        of(
            "create_security_group",
            GroupName=tagging.group_name("check", Purpose.BAKE),
            Description="ami-builder check",
            VpcId=network.find_vpc(account, *image.aws.subnets[:1]),
            TagSpecifications=tagging.specifications(tags, "security-group"),
        ),
        of(
            "authorize_security_group_ingress",
            GroupId=group,
            IpPermissions=[network.ingress_rule(["127.0.0.1/32"], image.aws.ssh_port)],
        ),
        of("stop_instances", InstanceIds=[instance]),
        of("modify_instance_metadata_options", InstanceId=instance, HttpTokens="required"),
        of("get_console_output", InstanceId=instance),
        of("create_image", InstanceId=instance, Name=tagging.ami_name(image.name, "0" * 64, "check")),
        of("create_tags", Resources=[own], Tags=tagging.as_list(tags)),
        of("modify_image_attribute", ImageId=own, ImdsSupport={"Value": "v2.0"}),
        of(
            "copy_image",
            Name=tagging.ami_name(image.name, "0" * 64, "check"),
            SourceImageId=own,
            SourceRegion=account.region,
            TagSpecifications=tagging.specifications(tags, "image", "snapshot"),
        ),
        of(
            "modify_snapshot_attribute",
            SnapshotId=snapshot,
            Attribute="createVolumePermission",
            OperationType="add",
            UserIds=["0" * 12],
        ),
        of("terminate_instances", InstanceIds=[instance]),
        of("enable_image_deprecation", ImageId=own, DeprecateAt=datetime.now(UTC) + timedelta(days=1)),
        of("deregister_image", ImageId=own),
        of("delete_snapshot", SnapshotId=snapshot),
        of("delete_launch_template", LaunchTemplateId=template),
        of("delete_volume", VolumeId=volume),
        of("delete_security_group", GroupId=group),
    ]


def _lifetime(image: Image) -> Iterator[Finding]:
    longest = max(image.bake.timeout, image.verify.timeout)
    if image.aws.lifetime <= longest:
        yield _note(
            "lifetime",
            f"instances power off after {image.aws.lifetime:.0f} s, but may need {longest:.0f} s",
            "set aws.lifetime above bake.timeout and verify.timeout",
        )


def _cost(account: Account, image: Image, ami: source_ami.BaseAmi | None) -> Finding:
    disk = max(image.base.disk_size, ami.size if ami is not None else 0) / _GIB
    stages = [(image.aws.instance_types[0], image.bake.timeout, disk)]
    stages += [
        (kind, image.verify.timeout, image.verify.disk_size / _GIB) for kind in image.verify.instance_types
    ]
    costs = [estimate_cost(account, kind, seconds / 3600, size) for kind, seconds, size in stages]
    known = [one for one in costs if one is not None]
    if len(known) < len(costs):
        return _note("cost", "unknown: the Pricing API returned no price to these credentials")
    kept = known[0].month
    run = sum(one.run for one in known)
    return _fine(
        "cost", f"at most about ${run:.2f} per run on demand, and ${kept:.2f} per month to keep the AMI"
    )


def estimate_cost(account: Account, instance_type: str, hours: float, disk_gib: float) -> Cost | None:
    """Return the cost of an instance with a disk for some hours; None when its price is unknown."""
    wanted = {
        "instanceType": instance_type,
        "regionCode": account.region,
        "operatingSystem": "Linux",
        "preInstalledSw": "NA",
        "tenancy": "Shared",
        "capacitystatus": "Used",
    }
    try:
        client = account.client("pricing", _PRICING_REGION, attempts=2)
        with aws_errors("pricing"):
            answer = client.get_products(
                ServiceCode="AmazonEC2",
                Filters=[{"Type": "TERM_MATCH", "Field": k, "Value": v} for k, v in wanted.items()],
            )
    except CloudFailed:
        return None
    hour = next((price for text in answer["PriceList"] if (price := _on_demand(json.loads(text)))), None)
    if hour is None:
        return None
    disk = disk_gib * _GP3_GIB_MONTH / _HOURS_A_MONTH
    return Cost(hour=hour, run=hours * (hour + disk), month=disk_gib * _SNAPSHOT_GIB_MONTH)


def _on_demand(product: dict[str, Any]) -> float | None:
    for term in product.get("terms", {}).get("OnDemand", {}).values():
        for dimension in term.get("priceDimensions", {}).values():
            price = float(dimension.get("pricePerUnit", {}).get("USD", 0))
            if price > 0:
                return price
    return None
