"""Network access to instances: this host's public address, the VPC, and a security group for each run."""

from __future__ import annotations

import ipaddress
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

from botocore.exceptions import ClientError

from ami_builder.aws import tags as tagging
from ami_builder.aws.session import Account, aws_errors, code_of, is_definite, look_for, poll_call
from ami_builder.core.errors import CloudFailed, UsageError
from ami_builder.core.orphans import Resource

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from types_boto3_ec2.type_defs import FilterTypeDef, IpPermissionUnionTypeDef

    from ami_builder.state.ledger import Ledger, LedgerEntry

CHECKIP_URL = "https://checkip.amazonaws.com"

_CHECKIP_SECONDS = 15.0
_SEEN_SECONDS = 60.0
_DELETE_SECONDS = 300.0


def source_cidrs(configured: Sequence[str]) -> tuple[str, ...]:
    """Return the configured networks, or this host's public address when there are none.

    Raises CloudFailed when that address can't be determined.
    """
    if configured:
        return tuple(configured)
    try:
        with urllib.request.urlopen(CHECKIP_URL, timeout=_CHECKIP_SECONDS) as answer:
            return (str(ipaddress.ip_network(answer.read(64).decode("ascii").strip())),)
    except (OSError, ValueError) as wrong:
        raise CloudFailed(
            f"this host's public address can't be determined with {CHECKIP_URL}: {wrong}",
            hint="set aws.source_cidrs to the address that instances see, such as 203.0.113.7/32",
        ) from wrong


def find_vpc(account: Account, subnet: str = "") -> str:
    """Return the VPC of a subnet, or the default one; raises UsageError when there is none."""
    with aws_errors():
        if subnet:
            try:
                return account.ec2.describe_subnets(SubnetIds=[subnet])["Subnets"][0]["VpcId"]
            except ClientError as error:
                if not code_of(error).startswith("InvalidSubnetID"):
                    raise
                raise UsageError(
                    f"aws.subnets: there is no subnet {subnet} in {account.region}",
                    hint="check the id and the region",
                ) from error
        vpcs = account.ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    if not vpcs:
        raise UsageError(
            f"there is no default VPC in {account.region}", hint="set aws.subnets to the subnets to launch in"
        )
    return vpcs[0]["VpcId"]


class SecurityGroup:
    """A context manager that creates a run's security group, returns its id, and deletes it when unused.

    It allows TCP from `cidrs` to `port`, and nothing when `cidrs` is empty. Entering raises UsageError,
    CloudFailed.
    """

    def __init__(
        self,
        account: Account,
        ledger: Ledger,
        *,
        run_id: str,
        purpose: tagging.Purpose,
        tags: Mapping[str, str],
        cidrs: Sequence[str],
        port: int = 22,
        subnet: str = "",
    ) -> None:
        self._account, self._ledger = account, ledger
        self._run_id, self._tags = run_id, tags
        self._name = tagging.group_name(run_id, purpose)
        self._cidrs, self._port, self._subnet = tuple(cidrs), port, subnet
        self._entry: LedgerEntry | None = None

    def __enter__(self) -> str:
        vpc = find_vpc(self._account, self._subnet)
        self._entry = self._ledger.intend(
            Resource.SECURITY_GROUP, self._account.region, run=self._run_id, name=self._name, vpc=vpc
        )
        try:
            self._entry = self._ledger.made(self._entry, self._create(vpc))
            if self._cidrs:
                self._open(self._entry.id)
        except BaseException as error:
            if is_definite(error) and not self._entry.id:
                self._entry = self._ledger.deleted(self._entry)
            self.__exit__(type(error), error, None)
            raise
        return self._entry.id

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._remove()
        except CloudFailed:
            # The group is in the ledger; the first error matters more.
            if error is None:
                raise

    def _create(self, vpc: str) -> str:
        with aws_errors():
            try:
                return self._account.ec2.create_security_group(
                    GroupName=self._name,
                    Description=f"ami-builder, run {self._run_id}",
                    VpcId=vpc,
                    TagSpecifications=tagging.specifications(self._tags, "security-group"),
                )["GroupId"]
            except ClientError as error:
                if code_of(error) != "InvalidGroup.Duplicate":
                    raise
                # An earlier attempt of this call created it, but its answer was lost.
                if (found := self._look()) is None:
                    raise
                return found

    def _open(self, group: str) -> None:
        rules = [ingress_rule(self._cidrs, self._port)]
        done = poll_call(
            lambda: self._account.ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=rules),
            retry=r"InvalidGroup\.NotFound",
            ignore=r"InvalidPermission\.Duplicate",
            seconds=_SEEN_SECONDS,
        )
        if not done:
            raise CloudFailed(
                f"EC2 did not show the new security group {group} within {_SEEN_SECONDS:.0f} s",
                hint="run the command again",
            )

    def _look(self) -> str | None:
        return look_for(lambda: find_group(self._account, self._name, self._run_id))

    def _remove(self) -> None:
        if self._entry is None or self._entry.deleted:
            return
        if not self._entry.id:
            if (found := self._look()) is None:
                return
            self._entry = self._ledger.made(self._entry, found)
        delete_group(self._account, self._entry.id)
        self._entry = self._ledger.deleted(self._entry)


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


def find_group(account: Account, name: str, run_id: str) -> str | None:
    """Return the id of a run's security group, found by name and tag, or None."""
    filters: list[FilterTypeDef] = [
        {"Name": "group-name", "Values": [name]},
        {"Name": f"tag:{tagging.RUN}", "Values": [run_id]},
    ]
    with aws_errors():
        groups = account.ec2.describe_security_groups(Filters=filters)["SecurityGroups"]
    return groups[0]["GroupId"] if groups else None


def delete_group(account: Account, group: str) -> None:
    """Wait until nothing uses a security group and delete it; it may be missing already.

    Raises CloudFailed when it is still used after 5 minutes.
    """
    done = poll_call(
        lambda: account.ec2.delete_security_group(GroupId=group),
        retry=r"DependencyViolation|InvalidGroup\.InUse",
        ignore=r"InvalidGroup(Id)?\.NotFound",
        seconds=_DELETE_SECONDS,
    )
    if not done:
        raise CloudFailed(
            f"security group {group} can't be deleted: it is still in use",
            hint="`ami-builder gc` lists what is left; with --apply it tries again",
        )
