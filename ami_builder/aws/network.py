"""Network access to instances: this host's public address, the VPC, and a security group for each run."""

from __future__ import annotations

import http.client
import ipaddress
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from ami_builder.aws import presence
from ami_builder.aws import tags as tagging
from ami_builder.aws.session import Account, aws_errors, code_of, is_definite, look_for
from ami_builder.aws.subnets import Subnet, host_cidr
from ami_builder.aws.subnets import get as get_subnets
from ami_builder.config.schema import AwsSettings
from ami_builder.core.errors import CloudFailed, UsageError
from ami_builder.core.options import Connect
from ami_builder.core.orphans import Resource
from ami_builder.state.ledger import Ledger

if TYPE_CHECKING:
    from types_boto3_ec2.type_defs import FilterTypeDef, IpPermissionUnionTypeDef

CHECKIP_URL = "https://checkip.amazonaws.com"

_CHECKIP_SECONDS = 15.0
_SEEN_SECONDS = 60.0
_DELETE_SECONDS = 300.0
_IN_USE = r"DependencyViolation|InvalidGroup\.InUse"


def source_cidrs(configured: Sequence[str]) -> tuple[str, ...]:
    """Return the configured networks, or this host's public address when there are none.

    Raises CloudFailed when that address can't be determined.
    """
    if configured:
        return tuple(configured)
    try:
        with urllib.request.urlopen(CHECKIP_URL, timeout=_CHECKIP_SECONDS) as answer:
            return (str(ipaddress.ip_network(answer.read(64).decode("ascii").strip())),)
    except (OSError, ValueError, http.client.HTTPException) as wrong:
        why = getattr(wrong, "reason", wrong)
        raise CloudFailed(
            f"this host's public address can't be determined with {CHECKIP_URL}: {why}",
            hint="set aws.source_cidrs to the address that instances see, such as 203.0.113.7/32",
        ) from wrong


def allowed_sources(account: Account, aws: AwsSettings, subnets: Sequence[Subnet]) -> tuple[str, ...]:
    """Return the networks that may reach instances of these subnets by ssh.

    That is nobody with Session Manager, else aws.source_cidrs, else this host's address: its public one, or
    where instances have no public addresses its own in their VPC. Raises UsageError, CloudFailed.
    """
    if aws.connect is Connect.SESSION_MANAGER:
        return ()
    private = [subnet for subnet in subnets if not subnet.public]
    if aws.source_cidrs or not private:
        return source_cidrs(aws.source_cidrs)
    found = [host_cidr(account, subnet) for subnet in private]
    if len(private) < len(subnets):
        found += source_cidrs(())
    return tuple(dict.fromkeys(found))


def find_vpc(account: Account, subnet: str = "") -> str:
    """Return the VPC of a subnet, or the default one; raises UsageError when there is none."""
    if subnet:
        return get_subnets(account, [subnet])[0].vpc
    with aws_errors():
        vpcs = account.ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    if not vpcs:
        raise UsageError(
            f"there is no default VPC in {account.region}",
            hint=f"set aws.subnets to the subnets to launch in, {account.region}=subnet-… for another region",
        )
    return vpcs[0]["VpcId"]


@contextmanager
def security_group(
    account: Account,
    ledger: Ledger,
    aws: AwsSettings,
    *,
    run_id: str,
    purpose: tagging.Purpose,
    tags: Mapping[str, str],
    subnets: Sequence[str] = (),
) -> Iterator[str]:
    """Create a run's security group in the VPC of subnets, yield its id, and delete it once nothing uses it.

    It allows TCP to the port of ssh from `allowed_sources`. Raises UsageError, CloudFailed.
    """
    name = tagging.group_name(run_id, purpose)
    where = get_subnets(account, subnets)
    vpc = where[0].vpc if where else find_vpc(account)
    cidrs = allowed_sources(account, aws, where)
    entry = ledger.intend(Resource.SECURITY_GROUP, account.region, run=run_id, name=name, vpc=vpc)

    def remove(appears: float = 0.0) -> None:
        nonlocal entry
        if entry.deleted:
            return
        if not entry.id:
            if (found := _look(account, name, run_id)) is None:
                return
            entry = ledger.made(entry, found)
        delete_group(account, entry.id, appears=appears)
        ledger.deleted(entry)

    try:
        try:
            entry = ledger.made(entry, _create(account, name, run_id, vpc, tags))
        except BaseException as error:
            if is_definite(error):
                entry = ledger.deleted(entry)
            raise
        if cidrs:
            _open(account, entry.id, ingress_rule(cidrs, aws.ssh_port))
        else:
            presence.wait_shown(account, entry.id, seconds=_SEEN_SECONDS)
        yield entry.id
    except BaseException:
        # The group is in the ledger; the first error matters more.
        with suppress(CloudFailed):
            remove(appears=_SEEN_SECONDS)
        raise
    remove()


def _create(account: Account, name: str, run_id: str, vpc: str, tags: Mapping[str, str]) -> str:
    try:
        with aws_errors():
            return account.ec2.create_security_group(
                GroupName=name,
                Description=f"ami-builder, run {run_id}",
                VpcId=vpc,
                TagSpecifications=tagging.specifications(tags, "security-group"),
            )["GroupId"]
    except CloudFailed as failed:
        # An earlier attempt of this call created it, but its answer was lost.
        found = _look(account, name, run_id) if code_of(failed) == "InvalidGroup.Duplicate" else None
        if found is None:
            raise
        return found


def _look(account: Account, name: str, run_id: str) -> str | None:
    """Return the id of a run's security group, found by name and tag, or None."""
    filters: list[FilterTypeDef] = [
        {"Name": "group-name", "Values": [name]},
        {"Name": f"tag:{tagging.RUN}", "Values": [run_id]},
    ]

    def find() -> str | None:
        with aws_errors():
            groups = account.ec2.describe_security_groups(Filters=filters)["SecurityGroups"]
        return groups[0]["GroupId"] if groups else None

    return look_for(find)


def _open(account: Account, group: str, rule: IpPermissionUnionTypeDef) -> None:
    def call() -> None:
        with aws_errors(ignore=r"InvalidPermission\.Duplicate"):
            account.ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[rule])

    presence.once_visible(account, group, call, seconds=_SEEN_SECONDS)


def ingress_rule(cidrs: Sequence[str], port: int) -> IpPermissionUnionTypeDef:
    """Return a rule that allows IPv4 and IPv6 `cidrs` to reach a TCP port."""
    networks = [ipaddress.ip_network(cidr) for cidr in cidrs]
    return {
        "IpProtocol": "tcp",
        "FromPort": port,
        "ToPort": port,
        "IpRanges": [{"CidrIp": str(n), "Description": "ssh of a run"} for n in networks if n.version == 4],
        "Ipv6Ranges": [
            {"CidrIpv6": str(n), "Description": "ssh of a run"} for n in networks if n.version == 6
        ],
    }


def delete_group(account: Account, group: str, *, appears: float = 0.0) -> None:
    """Wait until nothing uses a security group and delete it; it may be missing already.

    A new one may take `appears` seconds until EC2 shows it. Raises CloudFailed when it is still used after
    5 minutes.
    """
    presence.if_present(
        account,
        group,
        lambda: account.ec2.delete_security_group(GroupId=group),
        appears=appears,
        busy=_IN_USE,
        frees=_DELETE_SECONDS,
    )
