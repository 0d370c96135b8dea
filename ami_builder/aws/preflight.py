"""`ami-builder check --target aws`: find what would stop a build, and its cost, without creating anything."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from ami_builder.aws import instances, network, packer_limits, source_ami
from ami_builder.aws import tags as tagging
from ami_builder.aws.bake import SOURCE
from ami_builder.aws.session import DENIED, Account, aws_errors, code_of
from ami_builder.aws.tags import Purpose
from ami_builder.build.preflight import found, stops
from ami_builder.config.schema import AwsSettings, Image
from ami_builder.core.errors import AmiBuilderError, CloudFailed, MissingTool, UsageError
from ami_builder.core.options import Connect
from ami_builder.core.records import Finding, State
from ami_builder.system import processes

_GIB = 1 << 30
_SHOWN = 5
_NO_ID = "0123456789abcdef0"
_TOOLS = {"aws": "the AWS CLI", "session-manager-plugin": "the Session Manager plugin of the AWS CLI"}
_INSTALL = (
    "see docs.aws.amazon.com/systems-manager/latest/userguide/session-manager-working-with-install-plugin"
)

# The Pricing API has endpoints in a few regions only; each has the prices of all regions.
_PRICING_REGION = "us-east-1"
# Prices in us-east-1. Other regions differ by a few cents, which hardly counts next to the instance.
GP3_GIB_MONTH = 0.08
SNAPSHOT_GIB_MONTH = 0.05
HOURS_A_MONTH = 730.0


def check(image: Image) -> Iterator[Finding]:
    """Check credentials, base AMI, instance types, network, permissions and cost; create nothing."""
    aws = image.aws
    accounts: list[Account] = []
    bases: list[source_ami.BaseAmi] = []

    def account() -> str:
        accounts.append(Account.open(aws.region))
        return f"{accounts[0].identity()} in {accounts[0].region}"

    def base() -> str | Finding:
        ami = source_ami.resolve(here, aws.source, image.arch)
        bases.append(ami)
        text = f"{ami.id}, {ami.name} of {ami.created[:10]}, {ami.size / _GIB:g} GiB"
        if not ami.other_names:
            return text
        return Finding(
            name="base AMI",
            state=State.NOTE,
            found=f"{text}; aws.source also matches {', '.join(ami.other_names)}",
            hint="to take one kind alone, write digits as #: "
            + " or ".join(source_ami.exact(name) for name in (ami.name, *ami.other_names)),
        )

    yield (opened := found("AWS account", account))
    if opened.state is State.STOPS:
        return
    here = accounts[0]
    yield from _packer(here, aws)
    yield found("base AMI", base)
    for ami in bases:
        if over := source_ami.passed_over(here, aws.source, ami):
            more = f" and {len(over) - _SHOWN} more" if len(over) > _SHOWN else ""
            text = ", ".join(over[:_SHOWN]) + more
            yield Finding(name="newer AMIs, passed over", state=State.OK, found=text)
    yield from _instance_types(here, image)
    yield (network_found := found("network", lambda: _network(here, aws)))
    if aws.connect is Connect.SSH and network_found.state is State.OK:
        cidrs = network.source_cidrs
        yield found("ssh is open to", lambda: f"{', '.join(cidrs(aws.source_cidrs))}, port {aws.ssh_port}")
    if aws.connect is Connect.SESSION_MANAGER:
        yield from (found(tool, partial(_tool, tool)) for tool in _TOOLS)
    if aws.instance_profile:
        yield found("instance profile", lambda: _instance_profile(here, aws))
    if bases:
        yield found("permissions", lambda: _permissions(here, image, bases[0]))
    longest = max(image.bake.timeout, image.verify.timeout)
    if aws.lifetime <= longest:
        yield Finding(
            name="lifetime",
            state=State.NOTE,
            found=f"instances power off after {aws.lifetime:.0f} s, but may need {longest:.0f} s",
            hint="set aws.lifetime above bake.timeout and verify.timeout",
        )
    disk = max([image.base.disk_size, *(ami.size for ami in bases)])
    yield found("cost", lambda: _cost(here, image, disk))


def _packer(account: Account, aws: AwsSettings) -> Iterator[Finding]:
    """Yield what this host's Packer can't do in the account."""
    name = "Packer in this account"
    try:
        yield from [stops(name, limit) for limit in packer_limits.limits(account, aws, SOURCE.plugin)]
    except MissingTool:
        # Reported with the other tools.
        return
    except CloudFailed as failed:
        yield stops(name, failed)


def _instance_types(account: Account, image: Image) -> Iterator[Finding]:
    baking, verifying = image.aws.instance_types, image.verify.instance_types
    try:
        call, wanted = "describe_instance_type_offerings", dict.fromkeys([*baking, *verifying])
        known = account.matching(call, "InstanceTypeOfferings", "instance-type", wanted)
        offered = {one["InstanceType"] for one in known}
    except CloudFailed as bad:
        yield stops("instance types", bad)
        return
    for name, setting, kinds, enough in (
        ("instance types to bake on", "aws", baking, any),
        ("instance types to verify on", "verify", verifying, all),
    ):
        try:
            instances.require_arch(
                account, offered.intersection(kinds), image.arch, f"{setting}.instance_types"
            )
        except AmiBuilderError as wrong:
            yield stops(name, wrong)
            continue
        missing = ", ".join(kind for kind in kinds if kind not in offered)
        if not enough(kind in offered for kind in kinds):
            hint = f"change {setting}.instance_types"
            yield stops(name, UsageError(f"{account.region} does not offer {missing}", hint=hint))
        elif missing:
            text = f"{', '.join(kinds)}, but {account.region} does not offer {missing}"
            yield Finding(name=name, state=State.NOTE, found=text)
        else:
            yield Finding(name=name, state=State.OK, found=", ".join(kinds))


def _network(account: Account, aws: AwsSettings) -> str:
    vpcs = {network.find_vpc(account, subnet) for subnet in aws.subnets or ("",)}
    if len(vpcs) > 1:
        raise UsageError(
            f"aws.subnets are in several VPCs: {', '.join(sorted(vpcs))}",
            hint="use subnets of one VPC, since a security group belongs to one VPC",
        )
    return ", ".join(aws.subnets or ("the default VPC",))


def _tool(tool: str) -> str:
    try:
        return str(processes.find(tool))
    except MissingTool as missing:
        raise MissingTool(f"{_TOOLS[tool]} is not installed", hint=_INSTALL) from missing


def _instance_profile(account: Account, aws: AwsSettings) -> str | Finding:
    name = aws.instance_profile.rpartition("/")[2]
    try:
        with aws_errors("iam"):
            profile = account.client("iam").get_instance_profile(InstanceProfileName=name)["InstanceProfile"]
    except CloudFailed as failed:
        if code_of(failed) in DENIED:
            text = f"{name}; these credentials are not allowed to read it"
            return Finding(name="instance profile", state=State.NOTE, found=text)
        if code_of(failed) != "NoSuchEntity":
            raise
        raise UsageError(
            f"aws.instance_profile: there is no instance profile {name}",
            hint="create it, or change aws.instance_profile",
        ) from failed
    return f"{name} with role {', '.join(role['RoleName'] for role in profile['Roles']) or '(none)'}"


def _permissions(account: Account, image: Image, ami: source_ami.BaseAmi) -> str:
    """Try each call that changes something with DryRun, which needs no existing resource."""
    refused = []
    tries = _tries(account, image, ami)
    for name, parameters in tries:
        try:
            # EC2's answers to an allowed call: by design, or for ids that do not exist.
            with aws_errors(ignore=".*NotFound.*|DryRunOperation"):
                getattr(account.ec2, name)(DryRun=True, **parameters)
        except CloudFailed as failed:
            if code_of(failed) not in DENIED:
                raise
            refused.append("ec2:" + "".join(word.capitalize() for word in name.split("_")))
    if refused:
        raise CloudFailed(
            f"these credentials do not allow: {', '.join(refused)}",
            hint="`ami-builder iam-policy` prints a policy that does",
        )
    return f"{len(tries)} calls tried with DryRun, all are allowed"


def _tries(account: Account, image: Image, ami: source_ami.BaseAmi) -> Sequence[tuple[str, dict[str, Any]]]:
    """Return the calls to try, with their parameters."""
    tags = tagging.resource_tags(image, "0" * 64, "check", Purpose.BAKE)
    subnet = {"SubnetId": image.aws.subnets[0]} if image.aws.subnets else {}
    instance, group, template = f"i-{_NO_ID}", f"sg-{_NO_ID}", f"lt-{_NO_ID}"
    group_name = tagging.group_name("check", Purpose.BAKE)
    ami_name = tagging.ami_name(image.name, "0" * 64, "check")
    from_template = {"LaunchTemplateSpecification": {"LaunchTemplateId": template, "Version": "1"}}
    snapshot, volume, own = f"snap-{_NO_ID}", f"vol-{_NO_ID}", f"ami-{_NO_ID}"

    def of(name: str, **parameters: Any) -> tuple[str, dict[str, Any]]:
        return name, parameters

    spot = [
        of(
            "create_launch_template",
            LaunchTemplateName=group_name,
            LaunchTemplateData={"ImageId": ami.id},
            TagSpecifications=tagging.specifications(tags, "launch-template"),
        ),
        of(
            "create_fleet",
            Type="instant",
            LaunchTemplateConfigs=[from_template],
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
            GroupName=group_name,
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
        of("create_image", InstanceId=instance, Name=ami_name),
        of("create_tags", Resources=[own], Tags=tagging.as_list(tags)),
        of("modify_image_attribute", ImageId=own, ImdsSupport={"Value": "v2.0"}),
        of(
            "copy_image",
            Name=ami_name,
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


def _cost(account: Account, image: Image, disk: int) -> str | Finding:
    """Return what a run costs, and what its AMI does, with a disk of that many bytes, were it full."""
    verify = image.verify
    stages = [(image.aws.instance_types[0], image.bake.timeout, disk)]
    stages += [(kind, verify.timeout, verify.disk_size) for kind in verify.instance_types]
    run = 0.0
    for kind, seconds, size in stages:
        if (price := hourly_price(account, kind)) is None:
            text = "unknown: the Pricing API returned no price to these credentials"
            return Finding(name="cost", state=State.NOTE, found=text)
        run += seconds / 3600 * (price + size / _GIB * GP3_GIB_MONTH / HOURS_A_MONTH)
    kept = disk / _GIB * SNAPSHOT_GIB_MONTH
    return f"at most about ${run:.2f} per run on demand, and ${kept:.2f} per month to keep the AMI"


def hourly_price(account: Account, instance_type: str) -> float | None:
    """Return the price of an instance type on demand, in US dollars per hour; None when it is unknown."""
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
    return next((price for text in answer["PriceList"] if (price := _on_demand(json.loads(text)))), None)


def _on_demand(product: dict[str, Any]) -> float | None:
    for term in product.get("terms", {}).get("OnDemand", {}).values():
        for dimension in term.get("priceDimensions", {}).values():
            price = float(dimension.get("pricePerUnit", {}).get("USD", 0))
            if price > 0:
                return price
    return None
