"""`ami-builder check --target aws`: find what would stop a build, and its cost, without creating anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from ami_builder.aws import (
    account_settings,
    instances,
    needs,
    network,
    packer_limits,
    permissions,
    prices,
    quotas,
    root_device,
    source_ami,
    subnets,
)
from ami_builder.aws.bake import SOURCE
from ami_builder.aws.session import DENIED, NOT_ENABLED, Account, aws_errors, code_of
from ami_builder.build.preflight import found, stops
from ami_builder.config.schema import Image
from ami_builder.core.errors import AmiBuilderError, CloudFailed, MissingTool, UsageError
from ami_builder.core.options import Connect
from ami_builder.core.records import Finding, State
from ami_builder.core.units import GIB
from ami_builder.system import processes

_SHOWN = 5
_TOOLS = {"aws": "the AWS CLI", "session-manager-plugin": "the Session Manager plugin of the AWS CLI"}
_INSTALL = (
    "see docs.aws.amazon.com/systems-manager/latest/userguide/session-manager-working-with-install-plugin"
)


@dataclass(slots=True, kw_only=True)
class _Known:
    """What the probes have found out so far; later ones do with what there is."""

    account: Account
    arn: str
    image: Image
    """With the settings of the region that it is baked in."""
    base: source_ami.BaseAmi | None = None
    offered: list[str] = field(default_factory=list)
    """The types of aws.instance_types that the region has."""
    subnets: list[subnets.Subnet] = field(default_factory=list)
    role: str = ""
    """The ARN of the role in aws.instance_profile."""
    default_keys: dict[str, str] = field(default_factory=dict)
    """Region -> the user's own key of EBS encryption by default there."""
    regions: list[str] = field(default_factory=list)
    """The regions of aws.copy_to that can be used."""

    def place(self, region: str) -> needs.Place:
        """Return what is known of a region."""
        _, partition, _, _, number, _ = self.arn.split(":", 5)
        image = self.image.at(region, self.account.region)
        key = self.default_keys.get(region, "")
        if region != self.account.region:
            return needs.Place(
                partition=partition, account=number, region=region, image=image, default_key=key
            )
        first = next(iter(self.subnets), None)
        return needs.Place(
            partition=partition,
            account=number,
            region=region,
            image=image,
            base_ami=self.base.id if self.base is not None else "",
            subnet=first.id if first is not None else "",
            vpc=first.vpc if first is not None else "",
            role=self.role,
            default_key=key,
        )


def check(image: Image) -> Iterator[Finding]:
    """Check credentials, base AMI, instance types, network, account, permissions and cost; create nothing.

    A probe that fails is a finding of its own, and hides no other.
    """
    opened: list[_Known] = []

    def account() -> str:
        here = Account.open(image.aws.region)
        arn = _identity(here)
        opened.append(_Known(account=here, arn=arn, image=image.at(here.region, here.region)))
        return f"{arn} in {here.region}"

    yield found("AWS account", account)
    for known in opened:
        for name, look in _probes(known):
            yield from _guarded(name, look, known)


_PACKER = "Packer in this account"
_Look = Callable[[_Known], Iterable[Finding]]


def _probes(known: _Known) -> Iterator[tuple[str, _Look]]:
    aws = known.image.aws
    yield _PACKER, _packer
    if aws.copy_to:
        yield "regions", _regions
    yield "base AMI", _base
    yield "root device", _root_device
    yield "newer AMIs, passed over", _passed_over
    yield "instance types", _instance_types
    yield "network", _network
    yield "ssh is open to", _ssh
    if aws.connect is Connect.SESSION_MANAGER:
        yield "tools", _tools
    if aws.instance_profile:
        yield "instance profile", _instance_profile
    yield "account", _account
    yield "quota of vCPUs", _quota
    yield "copies", _copies
    yield "encryption by default", _default_keys
    yield permissions.NAME, _permissions
    yield "lifetime", _lifetime
    yield "cost", _cost


def _guarded(name: str, look: _Look, known: _Known) -> Iterator[Finding]:
    try:
        yield from look(known)
    except AmiBuilderError as failed:
        yield stops(name, failed)


def _identity(account: Account) -> str:
    """Return who the credentials belong to. Raises UsageError in a region that is not enabled."""
    try:
        return account.identity()
    except CloudFailed as failed:
        main = next((one for one in account.regions_of("ec2") if one in _MAIN), account.region)
        if code_of(failed) not in NOT_ENABLED or main == account.region:
            raise
        try:
            account.in_region(main).identity()
        except CloudFailed:
            raise failed from None
        raise UsageError(
            f"these credentials are valid in {main}, but not in {account.region}: it is not enabled",
            hint=f"`aws account enable-region --region-name {account.region}`, or change aws.region",
        ) from failed


_MAIN = ("us-east-1", "us-gov-west-1", "cn-north-1", "eusc-de-east-1")
"""The regions of each partition that need not be enabled."""


def _regions(known: _Known) -> Iterator[Finding]:
    account, wanted = known.account, [one.region for one in known.image.aws.copy_to]
    status = account_settings.opt_in(account)
    for region in wanted:
        if region == account.region:
            twice = UsageError(
                f"aws.copy_to: {region} is where the AMI is baked",
                hint="aws.region, or else AWS_REGION or the profile, says where that is",
            )
            yield stops(f"copies in {region}", twice)
            continue
        finding = found(f"copies in {region}", partial(account_settings.require_region, region, status))
        if finding.state is State.OK:
            known.regions.append(region)
        yield finding


def _packer(known: _Known) -> Iterator[Finding]:
    """Yield what this host's Packer can't do in the account."""
    try:
        limits = [*packer_limits.limits(known.account, known.image.aws, SOURCE.plugin)]
    except MissingTool:
        # Reported with the other tools.
        return
    yield from (stops(_PACKER, limit) for limit in limits)


def _base(known: _Known) -> Iterator[Finding]:
    ami = source_ami.resolve(known.account, known.image.aws.source, known.image.arch)
    known.base = ami
    text = f"{ami.id}, {ami.name} of {ami.created[:10]}, {ami.size / GIB:g} GiB"
    if not ami.other_names:
        yield Finding(name="base AMI", state=State.OK, found=text)
        return
    yield Finding(
        name="base AMI",
        state=State.NOTE,
        found=f"{text}; aws.source also matches {', '.join(ami.other_names)}",
        hint="to take one kind alone, write digits as #: "
        + " or ".join(source_ami.exact(name) for name in (ami.name, *ami.other_names)),
    )


def _root_device(known: _Known) -> Iterator[Finding]:
    """Yield what the AMI's root device will be, which launchers name to change its disk's size."""
    if (base := known.base) is None:
        return
    wanted = known.image.aws.root_device
    registered = root_device.differs(base, wanted)
    text = f"{wanted}, registered from Packer's snapshot: the base's is {base.root_device}"
    yield Finding(name="root device", state=State.OK, found=text if registered else base.root_device)


def _passed_over(known: _Known) -> Iterator[Finding]:
    if known.base is None:
        return
    if over := source_ami.passed_over(known.account, known.image.aws.source, known.base):
        more = f" and {len(over) - _SHOWN} more" if len(over) > _SHOWN else ""
        yield Finding(name="newer AMIs, passed over", state=State.OK, found=", ".join(over[:_SHOWN]) + more)


def _instance_types(known: _Known) -> Iterator[Finding]:
    account, image = known.account, known.image
    baking, verifying = image.aws.instance_types, image.verify.instance_types
    call, wanted = "describe_instance_type_offerings", dict.fromkeys([*baking, *verifying])
    listed = account.matching(call, "InstanceTypeOfferings", "instance-type", wanted)
    offered = {one["InstanceType"] for one in listed}
    known.offered = [kind for kind in baking if kind in offered]
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


def _network(known: _Known) -> Iterator[Finding]:
    account, aws = known.account, known.image.aws
    known.subnets = subnets.get(account, aws.subnets) if aws.subnets else subnets.default(account)
    if not aws.subnets:
        # EC2 chooses one: those of an account as it was made are all public.
        known.subnets = [one for one in known.subnets if one.public] or known.subnets
    vpcs = {one.vpc for one in known.subnets}
    if len(vpcs) > 1:
        raise UsageError(
            f"aws.subnets are in several VPCs: {', '.join(sorted(vpcs))}",
            hint="use subnets of one VPC, since a security group belongs to one VPC",
        )
    text = ", ".join(aws.subnets or ("the default VPC",))
    if aws.connect is Connect.SSH:
        text += f", {subnets.require_reachable(account, known.subnets)}"
    yield Finding(name="network", state=State.OK, found=text)
    if closed := subnets.without_way_out(account, known.subnets):
        yield Finding(
            name="way out",
            state=State.NOTE,
            found=f"no route leads out of {', '.join(closed)}: instances there reach no package archive",
            hint="add a NAT gateway, or use base AMI, container and mirrors that need nothing from outside",
        )


def _ssh(known: _Known) -> Iterator[Finding]:
    aws = known.image.aws
    if aws.connect is Connect.SSH and known.subnets:
        allowed = network.allowed_sources(known.account, aws, known.subnets)
        yield Finding(
            name="ssh is open to", state=State.OK, found=f"{', '.join(allowed)}, port {aws.ssh_port}"
        )


def _tools(known: _Known) -> Iterator[Finding]:
    del known
    yield from (found(tool, partial(_tool, tool)) for tool in _TOOLS)


def _tool(tool: str) -> str:
    try:
        return str(processes.find(tool))
    except MissingTool as missing:
        raise MissingTool(f"{_TOOLS[tool]} is not installed", hint=_INSTALL) from missing


def _instance_profile(known: _Known) -> Iterator[Finding]:
    name = known.image.aws.instance_profile.rpartition("/")[2]
    try:
        with aws_errors("iam"):
            profile = known.account.client("iam").get_instance_profile(InstanceProfileName=name)
    except CloudFailed as failed:
        if code_of(failed) in DENIED:
            text = f"{name}; these credentials are not allowed to read it"
            yield Finding(name="instance profile", state=State.NOTE, found=text)
            return
        if code_of(failed) != "NoSuchEntity":
            raise
        raise UsageError(
            f"aws.instance_profile: there is no instance profile {name}",
            hint="create it, or change aws.instance_profile",
        ) from failed
    roles = profile["InstanceProfile"]["Roles"]
    known.role = next((role["Arn"] for role in roles), "")
    text = f"{name} with role {', '.join(role['RoleName'] for role in roles) or '(none)'}"
    yield Finding(name="instance profile", state=State.OK, found=text)


def _account(known: _Known) -> Iterator[Finding]:
    probes = account_settings.of_build(known.account, known.image, known.base, public=False)
    yield from (_told(name, probe) for name, probe in probes)


def _default_keys(known: _Known) -> Iterator[Finding]:
    """Yield the user's own keys of EBS encryption by default, which the printed policy can't know."""
    home = known.account.region
    for region in (home, *known.regions):
        if known.image.aws.at(region, home).kms_key:
            continue
        name = f"encryption by default in {region}"
        try:
            key = account_settings.default_key(known.account.in_region(region))
        except CloudFailed as failed:
            text = f"unknown: {failed.message}"
            yield Finding(name=name, state=State.NOTE, found=text, hint=failed.hint or "")
            continue
        if not key:
            continue
        known.default_keys[region] = key
        named = "aws.encrypt and aws.kms_key" if region == home else f"{region}=KEY in aws.copy_to"
        yield Finding(
            name=name,
            state=State.NOTE,
            found=f"with {key}, which these credentials must be allowed to use",
            hint=f"`ami-builder iam-policy` names it with {named}",
        )


def _quota(known: _Known) -> Iterator[Finding]:
    yield _told("quota of vCPUs", partial(quotas.vcpus, known.account, known.image))


def _copies(known: _Known) -> Iterator[Finding]:
    home = known.account.region
    for region in known.regions:
        aws = known.image.aws.at(region, home)
        probes = account_settings.of_copy(known.account.in_region(region), aws)
        yield from (_told(name, probe) for name, probe in probes)


def _told(name: str, probe: Callable[[], str]) -> Finding:
    """Return what a probe returns; what the account does not tell is a note."""
    try:
        return Finding(name=name, state=State.OK, found=probe())
    except CloudFailed as failed:
        return Finding(
            name=name, state=State.NOTE, found=f"unknown: {failed.message}", hint=failed.hint or ""
        )
    except AmiBuilderError as failed:
        return stops(name, failed)


def _permissions(known: _Known) -> Iterator[Finding]:
    home = known.place(known.account.region)
    wanted = list(needs.at_home(home))
    for region in known.regions:
        wanted += needs.of_copies(known.place(region), home)
    yield from permissions.findings(known.account, known.arn, wanted)
    ami = known.base.id if known.base is not None else ""
    kind = next(iter(known.offered), "")
    yield from permissions.tried(known.account, known.image, ami=ami, kind=kind, vpc=home.vpc)


def _lifetime(known: _Known) -> Iterator[Finding]:
    image = known.image
    longest = max(image.bake.timeout, image.verify.timeout)
    if image.aws.lifetime <= longest:
        yield Finding(
            name="lifetime",
            state=State.NOTE,
            found=f"instances power off after {image.aws.lifetime:.0f} s, but may need {longest:.0f} s",
            hint="set aws.lifetime above bake.timeout and verify.timeout",
        )


def _cost(known: _Known) -> Iterator[Finding]:
    image = known.image
    kinds = known.offered or image.aws.instance_types
    size = known.base.size if known.base is not None else 0
    image = replace(image, aws=replace(image.aws, instance_types=tuple(kinds)))
    yield found("cost", lambda: prices.cost(known.account, image, max(image.base.disk_size, size)))
