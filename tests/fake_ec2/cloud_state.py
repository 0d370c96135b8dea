"""What the cloud remembers beside moto's backends, and what a test can set about its behaviour."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from moto.ec2.models import ec2_backends
from moto.ec2.models.instances import Instance, InstanceState
from moto.ec2.utils import EC2_PREFIX_TO_RESOURCE, get_prefix
from moto.ssm.models import Parameter, ssm_backends

from tests.fake_ec2.api_call import ApiCall, Refused
from tests.fake_ec2.fake_image import NEWEST, FakeImage, debian

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable

_ID = re.compile(r"\b(?:ami|snap|i|sg)-[0-9a-f]{17}\b")
DEBIAN_PARAMETER = "/aws/service/debian/release/13/latest/amd64"


@dataclass(slots=True, kw_only=True)
class CloudOptions:
    """How the cloud behaves; a test sets what it needs, `Cloud.reset` takes it back."""

    image_describes: int = 0
    """How many describes show a new image as pending before it is available."""
    image_seconds: float = 0.0
    """How long a new image is pending at least."""
    image_failure: str = ""
    """When set, new images end as failed, with this as StateReason."""
    copies_together: int = 0
    """How many copies must have been begun before the first of them can become available."""
    full_regions: set[str] = field(default_factory=set)
    """Regions that take no further copy."""
    hidden_describes: int = 0
    """How many calls don't find what was just made: describes, and calls that name it."""
    flapping: bool = False
    """Whether about every third call that names something by its id does not find it."""
    parameter_rest: int = 0
    """How many creations of a parameter are lost after its deletion."""
    parameter_rest_refused: bool = False
    """Whether those are refused rather than lost."""
    parameter_reads: int = 0
    """How many reads of parameters still see what stood before in one that names an AMI."""
    no_capacity: set[tuple[str, str]] = field(default_factory=set)
    """(instance type, subnet id or zone or `*`) without capacity."""
    spot_shortage: tuple[str, str] = (
        "InsufficientInstanceCapacity",
        "There is no Spot capacity available that matches your request.",
    )
    """Code and message of a fleet's error where there is no spot capacity, as in hashicorp/packer#8740."""
    spot_role: bool = True
    """Whether the account has EC2's service-linked role for spot instances."""
    other_codes: dict[str, str] = field(default_factory=dict)
    """Error code -> what is answered in its place, for a cloud that differs on purpose."""
    left_out: set[str] = field(default_factory=set)
    """XML elements that no answer of EC2 has."""
    launch_refusal: tuple[str, str] = ("", "")
    """Code and message with which launches are refused, as by a quota, an SCP or a tag policy."""
    imdsv2_enforced: bool = False
    """Whether the account refuses launches that leave IMDSv1 on (HttpTokensEnforced)."""
    imds_default: str = "no-preference"
    """The account's default of HttpTokens."""
    expired_after: str = ""
    """The action after whose first call all credentials have expired."""
    pending_changes: int = 0
    """How many changes of metadata options still find their instance pending."""
    memory: dict[str, int] = field(default_factory=dict)
    """Instance type -> MiB, where it differs from EC2's."""
    default_ebs_key: str = "alias/aws/ebs"
    """The key of EBS encryption by default, and of encryption without a key."""
    block_public_access: str = "unblocked"
    """`block-new-sharing` where AMIs can't be made public."""
    imds_endpoint: str = ""
    """The account's default for the endpoint of instance metadata, `enabled` or `disabled`; empty: none."""
    opted_in: set[str] = field(default_factory=set)
    """Regions that have to be enabled, and are."""
    vcpu_quotas: dict[str, float] = field(default_factory=lambda: {"L-1216C47A": 64.0, "L-34B43A08": 64.0})
    """Service Quotas of EC2: vCPUs of standard instances that run at once, on demand and on spot."""
    seconds_ahead: float = 0.0
    """How far the time of Auto Scaling groups is ahead, so that no test waits for a hook."""
    not_valid: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Parameters of launch templates that are not valid, by name, with the code and the message of each."""
    region_prices: dict[str, str] = field(
        default_factory=lambda: {
            "t3.small": "0.0208", "m5.large": "0.0960", "m6i.large": "0.0960", "m7i.large": "0.1008",
        }
    )  # fmt: skip
    """Instance type -> US dollars an hour on demand, in every region."""


class Hypervisor(Protocol):
    """What runs the instances; all calls return at once."""

    port: int
    """Where ssh answers, at each instance's address."""
    in_vpc: bool
    """Whether instances have their addresses in the VPC, public ones too; else each has one of loopback."""
    lock: threading.RLock
    """The cloud's own; held whenever something of moto's is changed."""

    def clear(self) -> None:
        """End all instances and forget all disks; the caller must not hold the lock."""

    def launch(self, backend: Any, instance: Instance, image: FakeImage) -> None:
        """Boot the instance."""

    def stop(self, instance: Instance) -> None:
        """Power the guest off by ACPI."""

    def start(self, instance: Instance) -> None:
        """Boot a stopped instance again."""

    def reboot(self, instance: Instance) -> None:
        """Reset the guest."""

    def terminate(self, instance: Instance) -> None:
        """End the instance and remove its disk."""

    def capture(self, instance: Instance, image: FakeImage) -> None:
        """Keep the instance's disk as the image's; `image.captured` is set when that is done."""

    def copy(self, source: FakeImage, image: FakeImage) -> None:
        """Let a copy of an image have the same disk."""

    def memory_of(self, kind: str, mib: int) -> int:
        """Return how many MiB a type has here, where EC2's has `mib`."""

    def drop(self, snapshot_id: str) -> None:
        """Forget the disk of a deleted snapshot."""

    def announce(self, instance_id: str, path: str, value: str) -> None:
        """Set a value of the instance's metadata."""

    def console(self, instance_id: str) -> bytes:
        """Return what the guest wrote to its serial console."""


class CloudState:
    """Everything that `Cloud.reset` clears."""

    def __init__(self) -> None:
        self.options = CloudOptions()
        self.machines: Hypervisor | None = None
        self.parameter: Callable[[], object] | None = None
        """The write of a parameter that is to be done once `parameter_reads` have passed."""
        self.deleted_parameters: dict[tuple[str, str], int] = {}
        """(region, name) -> how many creations of it are still lost."""
        self.announced: dict[str, dict[str, str]] = {}
        """Instance -> what its metadata have beside what it was launched with, by path."""
        self.answers: dict[str, Any] = {}
        """What the calls of client tokens answered, where ids don't say it all."""
        self.copies: list[FakeImage] = []
        self.chance = random.Random(0)
        """Decides which calls do not find what they name, while `flapping`."""
        self.reads = 0
        """Of parameters, that it still waits for."""
        self._expired = False
        self._addresses: set[str] = set()
        self._furnished: set[tuple[str, str]] = set()
        self._hidden: dict[str, int] = {}
        self._tokens: dict[tuple[str, ...], tuple[Any, list[str]]] = {}
        self._pages: dict[str, tuple[str, list[str]]] = {}

    def backend(self, account: str, region: str) -> Any:
        """Return moto's backend of a region, with Debian's images in it."""
        backend: Any = ec2_backends[account][region]
        if (account, region) not in self._furnished:
            self._furnished.add((account, region))
            backend.describe_tags = _direct(backend)
            _let_out(backend)
            images = debian(backend)
            backend.amis |= {image.id: image for image in images}
            newest = images[0].id
            parameters: Any = ssm_backends[account][region]
            parameters._parameters[DEBIAN_PARAMETER].append(
                Parameter(  # type: ignore[abstract] # moto makes them so too
                    account_id=account,
                    name=DEBIAN_PARAMETER,
                    value=newest,
                    parameter_type="String",
                    description=None,
                    allowed_pattern=None,
                    keyid=None,
                    last_modified_date=backend.amis[newest].creation_date,
                    version=1,
                    data_type="aws:ec2:image",
                )
            )
        return backend

    def address(self, instance: Instance, subnet: Any) -> str:
        """Return an address for a new instance in a subnet that leads nowhere off this machine.

        Without a network of instances it is one on loopback, which no instance has had before.
        """
        if self.machines is not None and self.machines.in_vpc:
            return str(subnet.get_available_subnet_ip(instance))
        while True:
            address = f"127.77.{secrets.randbelow(256)}.{secrets.randbelow(254) + 1}"
            if address not in self._addresses:
                self._addresses.add(address)
                return address

    def announce(self, instance_id: str, path: str, value: str) -> None:
        """Set a value of an instance's metadata, below meta-data/."""
        self.announced.setdefault(instance_id, {})[path] = value
        if self.machines is not None:
            self.machines.announce(instance_id, path, value)

    def describe(self, instance: Instance) -> None:
        """Let an instance's metadata have its tags, if it was launched so, and its role's credentials."""
        # behaviour: tags-in-metadata
        if instance.metadata_options.instance_metadata_tags == "enabled":
            for tag in instance.get_tags():
                self.announce(instance.id, f"tags/instance/{tag['key']}", tag["value"])
        backend: Any = instance.ec2_backend
        if (found := backend.iam_instance_profile_associations.get(instance.id)) is not None:
            for role in found.iam_instance_profile.roles:
                # behaviour: role-credentials-in-metadata
                credentials = {
                    "Code": "Success",
                    "LastUpdated": "2026-01-01T00:00:00Z",
                    "Type": "AWS-HMAC",
                    "AccessKeyId": role_key(role.name),
                    "SecretAccessKey": "secret",
                    "Token": "token",
                    "Expiration": "2036-01-01T00:00:00Z",
                }
                self.announce(instance.id, f"iam/security-credentials/{role.name}", json.dumps(credentials))

    def require_valid(self, call: ApiCall) -> None:
        """Raise Refused for credentials that have expired by now."""
        if self._expired and self.options.expired_after:
            # behaviour: expired-credentials
            raise Refused("RequestExpired", "Request has expired.")
        self._expired = call.action == self.options.expired_after

    def made(self, *ids: str) -> None:
        """Say that these were made just now: describes may not find them for a while."""
        if self.options.hidden_describes > 0:
            self._hidden |= dict.fromkeys(ids, self.options.hidden_describes)

    def hidden(self, ids: Iterable[str]) -> set[str]:
        """Return those of `ids` that this describe doesn't find yet."""
        found = {each for each in ids if self._hidden.get(each, 0) > 0}
        for each in found:
            self._hidden[each] -= 1
        return found

    def unseen(self, call: ApiCall) -> set[str]:
        """Return the ids that a call other than a describe names, and that EC2 doesn't show yet."""
        # behaviour: eventual-consistency
        if self.options.flapping and "Filters" not in call.params and self.chance.random() < 0.3:
            return set(_ID.findall(json.dumps(call.params, default=str)))
        if call.action.startswith("Describe"):
            return set()
        named = json.dumps(call.params, default=str)
        return self.hidden(each for each in self._hidden if f'"{each}"' in named)

    def once(self, scope: tuple[str, ...], params: Any, make: Callable[[], list[str]]) -> list[str]:
        """Return the ids that `make` returns, or those that it returned for the same client token.

        `scope` ends in the token; without one, each call makes new ids. Raises Refused for other parameters.
        """
        if not scope[-1]:
            return make()
        # behaviour: client-token
        if scope in self._tokens:
            before, ids = self._tokens[scope]
            if before != params:
                raise Refused(
                    "IdempotentParameterMismatch", "this client token was used with other parameters"
                )
            return ids
        ids = make()
        self._tokens[scope] = (params, ids)
        return ids

    def page(self, action: str, ids: list[str], size: int | None, token: str | None) -> tuple[list[str], str]:
        """Return the ids of this page and the token of the next one, empty at the end."""
        if token:
            made_for, ids = self._pages.get(token, ("", []))
            if made_for != action:
                raise Refused("InvalidPaginationToken", "the pagination token is not valid, or has expired")
        if size is None or len(ids) <= size:
            return ids, ""
        following = secrets.token_urlsafe(48)
        self._pages[following] = (action, ids[size:])
        return ids[:size], following


def _let_out(backend: Any) -> None:
    """Give the default VPC its internet gateway, and a route to it, which moto leaves out."""
    # behaviour: default-vpc
    for vpc in backend.vpcs.values():
        if str(vpc.is_default).lower() == "true":
            gateway = backend.create_internet_gateway()
            backend.attach_internet_gateway(gateway.id, vpc.id)
            (table,) = [one for one in backend.route_tables.values() if one.vpc_id == vpc.id]
            backend.create_route(table.id, "0.0.0.0/0", gateway_id=gateway.id)


def base_ami(backend: Any) -> str:
    """Return the id of the newest Debian 13 image for amd64."""
    return str(next(image.id for image in backend.amis.values() if image.name == NEWEST))


def role_key(role: str) -> str:
    """Return the access key that instances with a role get."""
    return f"ASIA{base64.b32encode(hashlib.sha256(role.encode()).digest()[:10]).decode()}"


def end(instance: Instance, *, code: str, message: str) -> None:
    """Write down that a guest has powered itself off: stopped or terminated, as it was launched to."""
    if instance.state in ("stopped", "shutting-down", "terminated"):
        return
    if instance.instance_initiated_shutdown_behavior == "terminate" and instance.state != "stopping":
        instance.terminate()
    else:
        instance.stop()
    instance.state_reason.code, instance.state_reason.message = code, message


def set_state(instance: Instance, name: str, code: int) -> None:
    """Put an instance into a state."""
    instance._state = InstanceState(name, code)


def _direct(backend: Any) -> Callable[..., list[dict[str, str]]]:
    """Return moto's look-up of tags, without its walk through all tags for one resource's."""
    whole = backend.describe_tags

    def kind(resource_id: str) -> str:
        return str(EC2_PREFIX_TO_RESOURCE.get(get_prefix(resource_id), ""))

    def describe_tags(filters: dict[str, list[str]] | None = None) -> list[dict[str, str]]:
        ids = (filters or {}).get("resource-id", ["*"])
        if filters is None or len(filters) > 1 or any("*" in each or "?" in each for each in ids):
            found: list[dict[str, str]] = whole(filters)
            return found
        wanted = {each: backend.tags[each] for each in ids if each in backend.tags}
        return [
            {"resource_id": each, "key": key, "value": value, "resource_type": kind(each)}
            for each, tags in wanted.items()
            for key, value in tags.items()
        ]

    return describe_tags
