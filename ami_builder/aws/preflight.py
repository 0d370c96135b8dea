"""What would stop a build or a verification in an account, found without making anything there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from botocore.exceptions import ClientError

from ami_builder.aws import network, source_ami
from ami_builder.aws import tags as tagging
from ami_builder.aws.session import DENIED, Account, aws_errors, code_of
from ami_builder.aws.tags import Purpose
from ami_builder.config.schema import AwsSettings, Image
from ami_builder.core.errors import AmiBuilderError, CloudFailed, UsageError
from ami_builder.core.options import Connect
from ami_builder.core.records import Finding, State
from ami_builder.system import processes

_GIB = 1 << 30
_NOBODY = "0123456789abcdef0"
_TOOLS = {"aws": "the AWS CLI", "session-manager-plugin": "the Session Manager plugin of the AWS CLI"}
_INSTALL = (
    "see docs.aws.amazon.com/systems-manager/latest/userguide/session-manager-working-with-install-plugin"
)

# The Pricing API lives in a few regions only, and tells about all.
_PRICING_REGION = "us-east-1"
# us-east-1's, which others differ from by a few cents: next to the instance they hardly count.
_GP3_GIB_MONTH = 0.08
_SNAPSHOT_GIB_MONTH = 0.05
_HOURS_A_MONTH = 730.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """US dollars."""

    hour: float
    """An instance's, on demand."""
    run: float
    """The instance and its disk, for as long as was asked."""
    month: float
    """Keeping the AMI's snapshot for a month, if it were full."""


def check(image: Image) -> Iterator[Finding]:
    """Look at credentials, base AMI, instance types, network, permissions and cost; nothing is made."""
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
    baking, proving = image.aws.instance_types, image.verify.instance_types
    wanted = list(dict.fromkeys([*baking, *proving]))
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
        ("instance types to verify on", proving, all),
    ):
        lacking = [kind for kind in kinds if kind not in offered]
        if not enough(kind in offered for kind in kinds):
            missing = UsageError(
                f"{account.region} does not offer {', '.join(lacking)}",
                hint=f"change {'aws' if kinds is baking else 'verify'}.instance_types",
            )
            yield _stops(name, missing)
        elif lacking:
            yield _note(name, f"{', '.join(kinds)}, of which {', '.join(lacking)} is not offered")
        else:
            yield _fine(name, ", ".join(kinds))


def _network(account: Account, aws: AwsSettings) -> Iterator[Finding]:
    try:
        vpcs = {network.find_vpc(account, subnet) for subnet in aws.subnets or ("",)}
        if len(vpcs) > 1:
            raise UsageError(
                f"aws.subnets are of several VPCs: {', '.join(sorted(vpcs))}",
                hint="name subnets of one VPC, where a security group can be used in all of them",
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
                    return _note("instance profile", f"{name}; these credentials may not look at it")
                if code_of(error) != "NoSuchEntity":
                    raise
                raise UsageError(f"aws.instance_profile: there is no instance profile {name}") from error
    except AmiBuilderError as bad:
        return _stops("instance profile", bad)
    roles = [role["RoleName"] for role in found["InstanceProfile"]["Roles"]]
    return _fine("instance profile", f"{name} with role {', '.join(roles) or '(none)'}")


def _permissions(account: Account, image: Image, ami: source_ami.BaseAmi) -> Finding:
    """Try each call that changes something with DryRun; what it would change need not exist for that."""
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
        lacking = CloudFailed(
            f"these calls would be refused: {', '.join(refused)}",
            hint="`ami-builder iam-policy` prints all that is needed",
        )
        return _stops("permissions", lacking)
    return _fine("permissions", f"{len(tries)} calls tried, none would be refused")


def _try(call: Callable[[], object]) -> None:
    try:
        call()
    except ClientError as error:
        # What EC2 says of ids that nobody has, once it has found the call allowed.
        if code_of(error) == "DryRunOperation" or "NotFound" in code_of(error):
            return
        raise


def _tries(
    account: Account, image: Image, ami: source_ami.BaseAmi
) -> Sequence[tuple[str, Callable[[], object]]]:
    ec2: Any = account.ec2
    tags = tagging.resource_tags(image.name, "0" * 64, "check", Purpose.BAKE)
    subnet = {"SubnetId": image.aws.subnets[0]} if image.aws.subnets else {}
    instance, group = f"i-{_NOBODY}", f"sg-{_NOBODY}"
    snapshot, volume, own = f"snap-{_NOBODY}", f"vol-{_NOBODY}", f"ami-{_NOBODY}"

    def of(name: str, **parameters: Any) -> tuple[str, Callable[[], object]]:
        action = "".join(word.capitalize() for word in name.split("_"))
        return f"ec2:{action}", lambda: getattr(ec2, name)(DryRun=True, **parameters)

    template = f"lt-{_NOBODY}"
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
            f"instances end themselves after {image.aws.lifetime:.0f} s, but may need {longest:.0f} s",
            "make aws.lifetime longer than bake.timeout and verify.timeout",
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
        return _note("cost", "unknown: the Pricing API does not tell these credentials")
    kept = known[0].month
    run = sum(one.run for one in known)
    return _fine("cost", f"at most about ${run:.2f} a run on demand, and ${kept:.2f} a month to keep the AMI")


def estimate_cost(account: Account, instance_type: str, hours: float, disk_gib: float) -> Cost | None:
    """Return what an instance with a disk costs for some hours; None where nobody tells the price."""
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
