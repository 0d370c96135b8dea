"""The subnets that instances are launched in, and how this host reaches instances there."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ami_builder.aws.session import Account, aws_errors
from ami_builder.core.errors import UsageError

if TYPE_CHECKING:
    from types_boto3_ec2.type_defs import RouteTableTypeDef, RouteTypeDef, SubnetTypeDef

_ANYWHERE = "0.0.0.0/0"
_WAYS = ("NatGatewayId", "TransitGatewayId", "NetworkInterfaceId", "InstanceId", "VpcPeeringConnectionId")
_REACH = 'use a subnet with public addresses, aws.connect = "session-manager", or set aws.source_cidrs'


@dataclass(frozen=True, slots=True, kw_only=True)
class Subnet:
    """A subnet."""

    id: str
    vpc: str
    network: str
    """Its IPv4 network; empty if it has none."""
    public: bool
    """Whether instances get a public address."""


def get(account: Account, ids: Sequence[str]) -> list[Subnet]:
    """Return the subnets with these ids. Raises UsageError when one is missing or has no IPv4 network."""
    found = {
        one["SubnetId"]: one for one in account.matching("describe_subnets", "Subnets", "subnet-id", ids)
    }
    if missing := [one for one in ids if one not in found]:
        raise UsageError(
            f"aws.subnets: there is no subnet {', '.join(missing)} in {account.region}",
            hint=f"check the id and the region; one of another region is written REGION={missing[0]}",
        )
    return [_subnet(found[one]) for one in ids]


def default(account: Account) -> list[Subnet]:
    """Return the default VPC's subnets that a launch may take. Raises UsageError when there are none."""
    found = account.listed(
        "describe_subnets", "Subnets", Filters=[{"Name": "default-for-az", "Values": ["true"]}]
    )
    if not found:
        raise UsageError(
            f"there is no default VPC with subnets in {account.region}",
            hint=f"set aws.subnets to the subnets to launch in, {account.region}=subnet-… for another region",
        )
    return [_subnet(one) for one in found]


def _subnet(found: SubnetTypeDef) -> Subnet:
    if found.get("Ipv6Native"):
        raise UsageError(
            f"aws.subnets: {found['SubnetId']} is for IPv6 alone, which is not supported",
            hint="use a subnet with an IPv4 network",
        )
    return Subnet(
        id=found["SubnetId"],
        vpc=found["VpcId"],
        network=found.get("CidrBlock", ""),
        public=bool(found.get("MapPublicIpOnLaunch")),
    )


def host_cidr(account: Account, subnet: Subnet) -> str:
    """Return this host's address, as instances with private addresses see it.

    Raises UsageError when this host is not in the subnet's VPC: how it reaches such instances is unknown.
    """
    with aws_errors():
        (vpc,) = account.ec2.describe_vpcs(VpcIds=[subnet.vpc])["Vpcs"]
    blocks = vpc.get("CidrBlockAssociationSet") or [{"CidrBlock": vpc.get("CidrBlock", "")}]
    inside = [ipaddress.ip_network(block["CidrBlock"]) for block in blocks if block.get("CidrBlock")]
    address = source_address(subnet.network)
    if address is None or not any(ipaddress.ip_address(address) in network for network in inside):
        here = f"this host ({address})" if address else "this host"
        raise UsageError(
            f"instances in {subnet.id} get no public address, and {here} is not in its VPC {subnet.vpc}",
            hint=_REACH,
        )
    return f"{address}/32"


def source_address(network: str) -> str | None:
    """Return the address that this host sends from to a network; None without a route there."""
    there = str(next(ipaddress.ip_network(network).hosts()))
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            # Sends nothing: it only asks the kernel for the route.
            probe.connect((there, 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def ways_out(account: Account, subnets: Sequence[Subnet]) -> Mapping[str, str]:
    """Return what leads out of each subnet, by its id: the type of the gateway, or nothing."""
    vpcs = list(dict.fromkeys(one.vpc for one in subnets))
    tables = account.matching("describe_route_tables", "RouteTables", "vpc-id", vpcs)
    return {one.id: way_out(_table_of(one, tables)) for one in subnets}


def _table_of(subnet: Subnet, tables: Sequence[RouteTableTypeDef]) -> RouteTableTypeDef | None:
    of_vpc = [table for table in tables if table.get("VpcId") == subnet.vpc]
    for table in of_vpc:
        if any(one.get("SubnetId") == subnet.id for one in table.get("Associations", [])):
            return table
    return next((t for t in of_vpc if any(one.get("Main") for one in t.get("Associations", []))), None)


def way_out(table: RouteTableTypeDef | None) -> str:
    """Return what the routes of a subnet lead to outside: the type of the gateway, or nothing."""
    routes = table.get("Routes", []) if table is not None else []
    active = [route for route in routes if route.get("State", "active") == "active"]
    found = [_gateway(route) for route in active if route.get("DestinationCidrBlock") == _ANYWHERE]
    return next(filter(None, found), "")


def _gateway(route: RouteTypeDef) -> str:
    # A firewall's endpoint stands before the internet gateway, whose route is in another table.
    if str(route.get("GatewayId", "")).startswith(("igw-", "vpce-")):
        return "internet gateway"
    return next((name.removesuffix("Id") for name in _WAYS if route.get(name)), "gateway")


def require_reachable(account: Account, subnets: Sequence[Subnet]) -> str:
    """Return how ssh reaches instances in subnets. Raises UsageError when it can't."""
    ways = ways_out(account, subnets)
    for subnet in subnets:
        if subnet.public and ways[subnet.id] != "internet gateway":
            raise UsageError(
                f"instances in {subnet.id} get a public address, but its routes lead to no internet gateway",
                hint="turn off public addresses there to use the private ones, or add the route",
            )
    private = [subnet for subnet in subnets if not subnet.public]
    return f"private addresses in {', '.join(one.id for one in private)}" if private else "public addresses"


def without_way_out(account: Account, subnets: Sequence[Subnet]) -> list[str]:
    """Return the subnets whose instances reach nothing outside, not even through NAT."""
    return [subnet for subnet, way in ways_out(account, subnets).items() if not way]
