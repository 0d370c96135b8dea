"""ami-builder.toml as users write it: one pydantic model a table, every key with a default and a meaning.

No key is ever "unset": each has a value that can be written down, so that any layer can put any default back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from ami_builder.config.types import (
    DEBIAN,
    DEFAULT_REFERENCE,
    Bridges,
    Channel,
    Checksum,
    Cidr,
    ContainerName,
    CopyTo,
    Destination,
    Disk,
    Duration,
    File,
    Form,
    HostPort,
    InstanceProfile,
    InstanceType,
    KmsKey,
    Line,
    Memory,
    Mirror,
    Name,
    Package,
    Pattern,
    Reference,
    Region,
    Reserved,
    Sharer,
    Source,
    SourceAmi,
    Space,
    Subnet,
    Suite,
    Truth,
    Unit,
    User,
    choice,
    count,
    distinct,
    some,
)
from ami_builder.core.options import (
    Connect,
    ContainerNetwork,
    ContainerSource,
    Datasource,
    Listen,
    Network,
    Role,
)
from ami_builder.core.units import GIB, Reserve
from ami_builder.system import resources

DEBIAN_USER = "admin"


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseSettings:
    """The disk that baking starts from: our own Debian recipe, or a cloud image by path or URL."""

    source: str | None
    """Path or http(s) URL of a qcow2 or raw cloud image; None for the Debian recipe."""
    checksum: str | None
    """`sha256:…` or `sha512:…` of `source`; required with a URL."""
    ssh_user: str
    suite: str
    mirror: str
    """APT mirror of the recipe; empty for Debian's own."""
    packages: tuple[str, ...]
    disk_size: int
    security_updates: bool
    """Whether a machine installs security updates at boot, before its memory is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerSettings:
    """The image of the one Dask container: built here as an archive, or pulled from a registry."""

    reference: str
    """Name that Compose uses, such as `ami-builder/dask:2026.8.0`."""
    requirements: Path | None
    """Pinned and hashed requirements to build the archive from; None to pull `reference`."""
    packages: tuple[str, ...]
    """Further Debian packages inside the container."""
    network: ContainerNetwork
    bridge_subnet: str
    """IPv4 network that Docker takes its bridges' addresses from, where it makes any."""
    instance_metadata: bool
    """Whether containers may read the instance's metadata, so its user data and its role's credentials."""
    unlimited: tuple[str, ...]
    """Names of containers without the default memory limit: the system's own, such as agents."""
    insecure_registry: str | None
    """`host:port` of a registry that is spoken to without TLS while baking (tests, closed networks)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DaskSettings:
    """How Dask starts on a machine of this image."""

    role: Role
    listen: Listen
    """Where the scheduler of role `local` listens."""
    workers: int
    threads: int | None
    """Threads a worker; None leaves it to Dask (CPUs / workers)."""
    spill_percent: int
    """How much of the spill disk's free space all workers together may fill."""
    after: tuple[str, ...]
    """Units that must be up before the memory is measured (agents)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BakeSettings:
    """The machine that Packer bakes on."""

    memory: int
    cpus: int
    timeout: float


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifySettings:
    """The machines that the finished image is proved on."""

    memory: tuple[int, ...]
    cpus: int
    disk_size: int
    datasource: Datasource
    network: Network
    checks: tuple[Path, ...]
    """The user's own pytest-testinfra files, run beside ours."""
    timeout: float
    pressure: bool
    """Whether the machines are put under memory pressure in the end."""
    instance_types: tuple[str, ...]
    """The EC2 instances that an AMI is proved on: one of each type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AwsSettings:
    """Where and how an AMI is baked, and reached."""

    region: str
    """Empty: as the AWS chain says (environment, profile)."""
    source: str
    """`owner/name pattern` (the newest wins), `ssm:/parameter`, or an AMI id."""
    instance_types: tuple[str, ...]
    """For baking, tried in turn when EC2 has no capacity."""
    subnets: tuple[str, ...]
    """Tried in turn; none: those of the default VPC."""
    connect: Connect
    instance_profile: str
    """Name or ARN; empty for none."""
    ssh_port: int
    source_cidrs: tuple[str, ...]
    """Who may reach builder and test instances by ssh; none: this machine's public address."""
    encrypt: bool
    kms_key: str
    """Id, ARN or alias of the key that `encrypt` uses; empty for the account's default key."""
    spot: bool
    lifetime: float
    """After these seconds an instance ends itself, whatever happened to us."""
    copy_to: tuple[Destination, ...]
    share_with: tuple[str, ...]
    """Account ids, and ARNs of organizations and organizational units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LifecycleSettings:
    """What becomes of finished images."""

    channels: tuple[str, ...]
    """Where an image can be promoted to."""
    keep: int
    """How many of the newest stay, of those that stood in each channel, and that stood in none."""
    keep_days: int
    """What is younger stays."""
    size: int
    """Nothing local is deleted while all of its name together is no larger; 0: that does not matter."""
    most_deletions: int
    """Of one run."""
    grace_days: int
    """How long an AMI is deprecated before it is deregistered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NightlySettings:
    """Where a night's image goes, and how far it may drift from the one that stands there."""

    channel: str
    memory_drift_percent: int
    """How much less memory may be available at boot."""
    time_drift_percent: int
    """How much more CPU time the first boot may take, in multiples of a fixed piece of work."""
    size_drift_percent: int
    """How much larger the image may be."""
    hold_packages: tuple[str, ...]
    """Patterns (`linux-image-*`) of packages whose change a person decides about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What to build: everything that decides about an image's content and its proof."""

    name: str
    description: str
    base: BaseSettings
    container: ContainerSettings
    reserve: Reserve
    nanny_headroom: int
    """How much less than the container's limit the workers' own limits add up to, in bytes."""
    dask: DaskSettings
    bake: BakeSettings
    verify: VerifySettings
    aws: AwsSettings
    lifecycle: LifecycleSettings
    nightly: NightlySettings


class Table(BaseModel):
    """A table of ami-builder.toml."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class BaseTable(Table):
    """The disk that baking starts from."""

    source: Source = DEBIAN
    """`debian` (made here from packages), or the path or http(s) URL of a qcow2 or raw cloud image."""
    checksum: Checksum = ""
    """`sha256:…` or `sha512:…` of the cloud image; a URL needs it."""
    ssh_user: User = DEBIAN_USER
    """The user that cloud-init gives the key to."""
    suite: Suite = "trixie"
    """The Debian suite of the recipe."""
    mirror: Mirror = ""
    """The APT mirror of the recipe; empty for Debian's own."""
    packages: Annotated[tuple[Package, ...], AfterValidator(distinct)] = Field(
        (), json_schema_extra={"uniqueItems": True}
    )
    """Further Debian packages on the disk, such as agents."""
    disk_size: Disk = 8 * GIB
    """The size of the image's disk."""
    security_updates: Truth = False
    """Whether a machine installs Debian's security updates at each boot, before memory is measured."""


class ContainerTable(Table):
    """The image of the one Dask container."""

    source: Annotated[ContainerSource, choice(ContainerSource)] = ContainerSource.ARCHIVE
    """`archive`: built here from `requirements`, without Docker. `registry`: `reference` is pulled."""
    reference: Reference = DEFAULT_REFERENCE
    """The container's name and tag, as Compose uses it."""
    requirements: File = Field(default_factory=resources.requirements)
    """Pinned and hashed requirements of the archive; by default those that ship with ami-builder."""
    packages: Annotated[tuple[Package, ...], AfterValidator(distinct)] = Field(
        (), json_schema_extra={"uniqueItems": True}
    )
    """Further Debian packages in the archive."""
    network: Annotated[ContainerNetwork, choice(ContainerNetwork)] = ContainerNetwork.HOST
    """`host`: containers use the machine's network. `bridge`: Docker makes bridge and firewall rules too."""
    bridge_subnet: Bridges = "198.18.0.0/16"
    """With `bridge`: the IPv4 network that Docker's bridges take their addresses from."""
    instance_metadata: Truth = False
    """Whether containers may read the instance's metadata: its user data, the credentials of its role."""
    unlimited: Annotated[tuple[ContainerName, ...], AfterValidator(distinct)] = Field(
        (), json_schema_extra={"uniqueItems": True}
    )
    """Names (or patterns) of containers without the default memory limit, such as agents."""
    insecure_registry: HostPort = ""
    """`host:port` of a registry without TLS that `reference` is pulled from."""


class MemoryTable(Table):
    """What Dask may use of the machine's memory."""

    # By the experiment: README, "What the limit changes".
    reserve: Reserved = Reserve(percent=2.0)
    """What stays with the system out of what is available when Dask starts: a size or a percentage."""
    nanny_headroom: Space = 0
    """How much less than the container's limit the workers' own limits add up to.

    So that the nanny, which lives in the container too, restarts a worker before the kernel kills it.
    """


class DaskTable(Table):
    """How Dask starts on a machine of this image."""

    role: Annotated[Role, choice(Role)] = Role.LOCAL
    """`local`: a whole cluster in one container. `worker`: joins a scheduler. `scheduler`: is one.

    `none`: dask.service starts nothing, because user data brings its own Dask.
    """
    listen: Annotated[Listen, choice(Listen)] = Listen.MACHINE
    """Where role `local` listens: for this machine alone, or (`0.0.0.0`) for all that reach it."""
    workers: Annotated[int, count(1, 1024)] = 1
    """Worker processes in the container, which share its memory limit."""
    threads: Annotated[int | None, count(1, 1024, auto=True)] = None
    """Threads of each worker; `auto` for the machine's CPUs divided by the workers."""
    spill_percent: Annotated[int, count(1, 100)] = 80
    """How much of the disk's free space all workers together may fill with spilled data, in percent."""
    after: Annotated[tuple[Unit, ...], AfterValidator(distinct)] = Field(
        (), json_schema_extra={"uniqueItems": True}
    )
    """Units (agents) that must be up before the available memory is measured."""


class BakeTable(Table):
    """The machine that Packer bakes on."""

    memory: Memory = 2 * GIB
    """Its memory."""
    cpus: Annotated[int, count(1, 255)] = 2
    """Its CPUs."""
    timeout: Duration = 30 * 60.0
    """How long baking may take; generous, because a machine without KVM is emulated."""


class VerifyTable(Table):
    """The machines that the finished image is proved on."""

    memory: Annotated[tuple[Memory, ...], AfterValidator(distinct), AfterValidator(some)] = Field(
        (2 * GIB,), json_schema_extra={"uniqueItems": True, "minItems": 1}
    )
    """The memory of each machine: one is booted for every size."""
    cpus: Annotated[int, count(1, 255)] = 2
    """The CPUs of each machine."""
    disk_size: Disk = 10 * GIB
    """The disk of each machine; larger than the image's, it proves that the root file system grows."""
    datasource: Annotated[Datasource, choice(Datasource)] = Datasource.EC2
    """How cloud-init gets key and user data: as on EC2, or from a NoCloud disk."""
    network: Annotated[Network, choice(Network)] = Network.ISOLATED
    """`isolated`: the machine reaches nothing outside. `nat`: it reaches what this machine reaches."""
    checks: Annotated[tuple[File, ...], AfterValidator(distinct)] = Field(
        (), json_schema_extra={"uniqueItems": True}
    )
    """Your own pytest-testinfra files, run beside those that ship with ami-builder."""
    timeout: Duration = 15 * 60.0
    """How long one machine may take to boot, and its checks to run."""
    pressure: Truth = True
    """Whether each machine is put under memory pressure in the end: minutes on an emulated one."""
    instance_types: Annotated[tuple[InstanceType, ...], AfterValidator(distinct), AfterValidator(some)] = (
        Field(("m6i.large",), json_schema_extra={"uniqueItems": True, "minItems": 1})
    )
    """The EC2 instances that an AMI is proved on: one of each type, side by side."""


class AwsTable(Table):
    """Where and how an AMI is baked, and how its instances are reached."""

    region: Region = ""
    """The region; empty: as the AWS chain says (AWS_REGION, profile)."""
    source: SourceAmi = "136693071363/debian-13-amd64-*"
    """What baking starts from: `owner/name pattern` (the newest wins), `ssm:/parameter`, or `ami-…`."""
    instance_types: Annotated[tuple[InstanceType, ...], AfterValidator(distinct), AfterValidator(some)] = (
        Field(("m6i.large", "m5.large", "m7i.large"), json_schema_extra={"uniqueItems": True, "minItems": 1})
    )
    """What baking runs on, tried in turn when EC2 has no capacity."""
    subnets: Annotated[tuple[Subnet, ...], AfterValidator(distinct)] = Field(
        (), json_schema_extra={"uniqueItems": True}
    )
    """Where instances run, tried in turn; empty: in the default VPC."""
    connect: Annotated[Connect, choice(Connect)] = Connect.SSH
    """`ssh`, or `session-manager`, which opens no port and needs `instance_profile`."""
    instance_profile: InstanceProfile = ""
    """Instance profile (name or ARN); Session Manager needs one with AmazonSSMManagedInstanceCore."""
    ssh_port: Annotated[int, count(1, 65535)] = 22
    """The port that ssh answers at."""
    source_cidrs: Annotated[tuple[Cidr, ...], AfterValidator(distinct)] = Field(
        (), json_schema_extra={"uniqueItems": True}
    )
    """Who may reach the instances by ssh; empty: this machine's public address only."""
    encrypt: Truth = False
    """Whether the AMI's snapshot is encrypted."""
    kms_key: KmsKey = ""
    """The KMS key that `encrypt` uses (id, alias/… or ARN); empty: the account's default key."""
    spot: Truth = False
    """Whether baking runs on a spot instance."""
    lifetime: Duration = 2 * 3600.0
    """After this time an instance ends itself, whatever happened to this machine."""
    copy_to: Annotated[tuple[CopyTo, ...], AfterValidator(distinct)] = Field(
        (), json_schema_extra={"uniqueItems": True}
    )
    """Regions that the AMI is copied to; `region=KEY` encrypts the copy with that region's KMS key."""
    share_with: Annotated[tuple[Sharer, ...], AfterValidator(distinct)] = Field(
        (), json_schema_extra={"uniqueItems": True}
    )
    """Accounts (12 digits), organizations and organizational units (ARNs) that may launch the AMI."""


class LifecycleTable(Table):
    """What becomes of finished images."""

    channels: Annotated[tuple[Name, ...], AfterValidator(distinct), AfterValidator(some)] = Field(
        ("testing", "stable"), json_schema_extra={"uniqueItems": True, "minItems": 1}
    )
    """Where an image can be promoted to."""
    keep: Annotated[int, count(0, 1000)] = 3
    """How many of the newest images stay: of those that stood in each channel, and that stood in none."""
    keep_days: Annotated[int, count(0, 3650)] = 14
    """Images and caches that are younger stay, in days."""
    size: Space = 0
    """Nothing local goes while all images of this name together are no larger; 0: that does not matter."""
    most_deletions: Annotated[int, count(1, 1000)] = 10
    """How many images one run of `prune` deletes at most, and how many it deprecates."""
    grace_days: Annotated[int, count(0, 365)] = 7
    """How long an AMI is deprecated before it is deregistered, in days."""


class NightlyTable(Table):
    """Where the image of `ami-builder nightly` goes, and what holds it back from there."""

    channel: Channel = ""
    """The channel that a night promotes to, one of lifecycle.channels; empty: the first of them."""
    memory_drift_percent: Annotated[int, count(0, 100)] = 3
    """The promotion is held when so much less memory is available at boot than on the promoted image."""
    time_drift_percent: Annotated[int, count(0, 1000)] = 50
    """The promotion is held when the first boot takes so much more CPU time, relative to fixed work."""
    size_drift_percent: Annotated[int, count(0, 1000)] = 20
    """The promotion is held when the image is so much larger."""
    hold_packages: Annotated[tuple[Pattern, ...], AfterValidator(distinct)] = Field(
        (), json_schema_extra={"uniqueItems": True}
    )
    """The promotion is held when one of these packages has changed: names, or patterns such as `linux-*`."""


class ImageTable(Table):
    """The settings of an image."""

    description: Line = ""
    """One line for people."""
    base: BaseTable = Field(default_factory=BaseTable)
    container: ContainerTable = Field(default_factory=ContainerTable)
    memory: MemoryTable = Field(default_factory=MemoryTable)
    dask: DaskTable = Field(default_factory=DaskTable)
    bake: BakeTable = Field(default_factory=BakeTable)
    verify: VerifyTable = Field(default_factory=VerifyTable)
    aws: AwsTable = Field(default_factory=AwsTable)
    lifecycle: LifecycleTable = Field(default_factory=LifecycleTable)
    nightly: NightlyTable = Field(default_factory=NightlyTable)

    def overlaid(self, upper: ImageTable) -> ImageTable:
        """Return these settings with those that `upper` sets itself; a list replaces a list."""
        return _overlaid(self, upper)

    def sets(self, key: str) -> bool:
        """Tell whether `memory.reserve`, say, was written here rather than a default."""
        table, _, name = key.rpartition(".")
        return name in (getattr(self, table) if table else self).model_fields_set

    def shown(self) -> dict[str, object]:
        """Return every setting as `memory.reserve` -> the value as one writes it in TOML."""
        values = self.model_dump(mode="json")
        return {key: values[t][n] if t else values[n] for key in FIELDS for t, _, n in [key.rpartition(".")]}

    def image(self, name: str) -> Image:
        """Return the image that these settings describe; `conflicts.find` must have found nothing."""
        own, pulled = self.base.source == DEBIAN, self.container.source is ContainerSource.REGISTRY
        base = _values(self.base) | {
            "source": None if own else self.base.source,
            "checksum": None if own else self.base.checksum or None,
        }
        if self.base.security_updates and "unattended-upgrades" not in self.base.packages:
            base["packages"] = (*self.base.packages, "unattended-upgrades")
        container = _values(self.container) | {
            "requirements": None if pulled else self.container.requirements,
            "insecure_registry": self.container.insecure_registry or None,
        }
        del container["source"]
        return Image(
            name=name,
            description=self.description,
            base=BaseSettings(**base),
            container=ContainerSettings(**container),
            reserve=self.memory.reserve,
            nanny_headroom=self.memory.nanny_headroom,
            dask=DaskSettings(**_values(self.dask)),
            bake=BakeSettings(**_values(self.bake)),
            verify=VerifySettings(**_values(self.verify)),
            aws=AwsSettings(**_values(self.aws)),
            lifecycle=LifecycleSettings(**_values(self.lifecycle)),
            nightly=NightlySettings(
                **_values(self.nightly) | {"channel": self.nightly.channel or self.lifecycle.channels[0]}
            ),
        )


class FileTable(Table):
    """ami-builder.toml: the VM images to build for Dask."""

    default_image: Name = ""
    """The image that commands mean when none is named; needed only with several."""
    defaults: ImageTable = Field(default_factory=ImageTable)
    """Settings of all images, unless an image has its own."""
    images: dict[Name, ImageTable] = Field(default_factory=dict)
    """The images by name; an empty table is a complete image."""


def _values(table: Table) -> dict[str, Any]:
    return {name: getattr(table, name) for name in type(table).model_fields}


AnyTable = TypeVar("AnyTable", bound=Table)


def _overlaid(lower: AnyTable, upper: AnyTable) -> AnyTable:
    update = {}
    for name in upper.model_fields_set:
        value, below = getattr(upper, name), getattr(lower, name)
        update[name] = _overlaid(below, value) if isinstance(value, Table) else value
    return lower.model_copy(update=update)


def _fields() -> dict[str, FieldInfo]:
    found: dict[str, FieldInfo] = {}
    for name, field in ImageTable.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Table):
            found |= {f"{name}.{key}": inner for key, inner in field.annotation.model_fields.items()}
        else:
            found[name] = field
    return found


FIELDS: Mapping[str, FieldInfo] = _fields()
"""Every setting of an image by its key, such as `memory.reserve`."""


def from_text(key: str, text: str) -> object:
    """Return the value of `key` as TOML would hold it, from an environment variable or a flag.

    Lists are separated by commas.
    """
    field, text = FIELDS[key], text.strip()
    if get_origin(field.annotation) is tuple:
        return [part.strip() for part in text.split(",") if part.strip()]
    forms = [m for m in field.metadata if isinstance(m, Form)]
    if any(form.truth for form in forms):
        return {"true": True, "false": False}.get(text, text)
    whole = any(form.whole for form in forms)
    return int(text) if whole and re.fullmatch(r"[+-]?[0-9]{1,20}", text) else text


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of ami-builder.toml as users write it, for editors."""
    schema = FileTable.model_json_schema()
    schema["properties"]["images"]["additionalProperties"] = False
    del schema["properties"]["default_image"]["default"]
    for key, value in ImageTable().shown().items():
        table, _, name = key.rpartition(".")
        model = ImageTable.model_fields[table].annotation if table else ImageTable
        field = schema["$defs"][getattr(model, "__name__", "")]["properties"][name]
        if "default" in field:  # as one writes it, not as it is held
            field["default"] = value
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def schema_text() -> str:
    """Return the JSON schema as it stands in config/ami-builder.schema.json."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
