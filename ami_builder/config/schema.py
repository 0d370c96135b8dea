"""Every setting of ami-builder.toml, declared once: type, default and description.

These classes are what the file is validated against and what the rest of the program takes. They are plain
dataclasses, so `replace` and pickle work and importing them costs little; pydantic validates a file against
them (loading), and the shipped ami-builder.toml, the JSON schema and the reference page are made from them
(reference). Sizes are bytes and durations are seconds.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, StrictBool

from ami_builder.config import types as t
from ami_builder.core.options import (
    Arch,
    Connect,
    ContainerNetwork,
    ContainerSource,
    Datasource,
    Listen,
    Network,
    Role,
)
from ami_builder.core.records import TargetKind
from ami_builder.core.units import AUTO_RESERVE, GIB
from ami_builder.system import resources

DEBIAN_USER = "admin"
DEBIAN_ACCOUNT = "136693071363"
"""The account that publishes Debian's AMIs, in the partition `aws`."""
_INSTANCE_TYPES = {
    Arch.AMD64: (("m6i.large",), ("m6i.large", "m5.large", "m7i.large")),
    Arch.ARM64: (("m7g.large",), ("m7g.large", "m6g.large", "m8g.large")),
}
"""Of each architecture: what an AMI is verified on, and what it is baked on."""


def host_arch() -> Arch:
    """Return the architecture of this host, or amd64 if VMs of its own are not supported."""
    return Arch.named(platform.machine()) or Arch.AMD64


class _Table:
    """A table of ami-builder.toml: unknown keys are mistakes."""

    __slots__ = ()
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseSettings(_Table):
    """The disk that baking starts from."""

    source: t.Source = None
    """`debian` builds it here from Debian packages; otherwise the path or http(s) URL of a qcow2 or raw cloud
    image."""
    checksum: t.Checksum = None
    """`sha256:…` or `sha512:…` of the cloud image. Required for a URL."""
    ssh_user: t.User = DEBIAN_USER
    """The user that cloud-init gives the key to, such as `debian` or `ubuntu` in a cloud image."""
    suite: t.Suite = "trixie"
    """The Debian suite that `debian` installs."""
    mirror: t.Mirror = ""
    """The APT mirror that `debian` installs from. Empty: Debian's own."""
    packages: t.Many[t.Package] = ()
    """More Debian packages for the disk, such as agents."""
    disk_size: t.Disk = 8 * GIB
    """The size of the image's disk."""
    security_updates: StrictBool = False
    """Whether a machine installs Debian's security updates at each boot, before memory is measured. The
    machine must reach a mirror."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerSettings(_Table):
    """The image of the one Dask container."""

    source: ContainerSource = ContainerSource.AUTO
    """`archive` builds it on this host from `requirements`, without Docker; `machine` builds the same on the
    machine that bakes, which must reach Debian's packages and PyPI; `registry` pulls `reference`. `auto`:
    `archive` for disk images, `machine` for AMIs."""
    reference: t.Reference = t.DEFAULT_REFERENCE
    """The container's name and tag, as Compose uses it."""
    requirements: t.Requirements = None
    """Pinned and hashed requirements of the archive. Empty: those that ship with ami-builder."""
    packages: t.Many[t.Package] = ()
    """More Debian packages for the archive."""
    network: ContainerNetwork = ContainerNetwork.HOST
    """`host`: containers use the machine's network. `bridge`: Docker also makes its bridge and firewall
    rules, which takes most of the time that Docker needs to start."""
    bridge_subnet: t.Bridges = "198.18.0.0/16"
    """With `bridge`: the IPv4 network that Docker's bridges take their addresses from. Docker's own default
    would hide 172.17.0.0/16."""
    instance_metadata: StrictBool = False
    """Whether containers can read the instance's metadata: its user data and the credentials of its role."""
    unlimited: t.Many[t.ContainerName] = ()
    """Names or patterns of containers without the default memory limit, such as agents."""
    insecure_registry: t.HostPort = None
    """`host:port` of a registry without TLS that `reference` is pulled from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySettings(_Table):
    """How much of the machine's memory Dask can use."""

    reserve: t.Reserved = AUTO_RESERVE
    """How much of the memory that is available when Dask starts is left to the system. `auto`: 2 % of it,
    or 64 MiB minus 1.5 % of it if that is less: 16 MiB on a machine of 1 GiB, 35 MiB on 2 GiB, 10 MiB on 4
    GiB, and nothing from about 5 GiB on. Tried beside an agent that grows by 4 % of the machine. For more
    growth, or for several workers beside it, set a percentage."""
    nanny_headroom: t.Headroom = None
    """How much less than the container's limit the workers' own limits add up to, so that the nanny, which
    runs in the container too, restarts a worker before the kernel kills it. `auto`: below a limit of 1.5
    GiB what the nanny, and the scheduler of role `local`, need beyond the 5 % above the nanny's threshold;
    else none."""
    follow: StrictBool = False
    """Whether the limit of Dask and of its container goes down when the system has outgrown its reserve, and
    up again when it has shrunk, while Dask runs. Never below five fourths of what the container holds, nor
    below half of the limit at the start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DaskSettings(_Table):
    """How Dask starts on a machine of this image."""

    role: Role = Role.LOCAL
    """`local`: a whole cluster in one container. `worker`: joins a scheduler. `scheduler`: is one. `none`:
    starts nothing, because user data brings its own Dask."""
    listen: Listen = Listen.MACHINE
    """Where role `local` listens: `127.0.0.1` for the machine itself, `0.0.0.0` for all who reach it."""
    workers: Annotated[int, t.count(1, 1024)] = 1
    """Worker processes in the container, which share its memory limit."""
    threads: Annotated[int | None, t.count(1, 1024, word="auto")] = None
    """Threads of each worker. `auto`: the machine's CPUs divided by the workers."""
    spill_percent: Annotated[int, t.count(1, 100, example=50)] = 80
    """How much of the disk's free space all workers together can fill with spilled data, in percent."""
    instance_store: StrictBool = True
    """Whether the machine's instance-store disks, if it has any, are formatted at each boot and take spilled
    data. A disk with partitions, or with any other file system than that of an earlier boot, is never
    touched."""
    after: t.Many[t.SystemdUnit] = ()
    """Units, such as agents, that must be up before the available memory is measured."""
    retire_on_rebalance: StrictBool = False
    """Whether workers retire when EC2 recommends to replace their spot instance. They retire in any case when
    EC2 interrupts it, or its Auto Scaling group terminates it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BakeSettings(_Table):
    """The machine that Packer bakes on."""

    memory: t.Memory = 2 * GIB
    """Its memory."""
    cpus: t.Cpus = 2
    """Its CPUs."""
    timeout: t.Duration = 30 * 60.0
    """How long baking can take. Generous, because without KVM the machine is emulated. In AWS, EC2 may
    take two hours more to make the AMI."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifySettings(_Table):
    """The machines that the finished image is verified on."""

    memory: t.Some[t.Memory] = (2 * GIB,)
    """The memory of each machine: one machine is booted for every size."""
    cpus: t.Cpus = 2
    """The CPUs of each machine."""
    disk_size: t.Disk = 10 * GIB
    """The disk of each machine. Larger than the image's, it verifies that the root file system grows."""
    datasource: Datasource = Datasource.EC2
    """How cloud-init gets the key and user data: `ec2` as on EC2, `nocloud` from a small disk."""
    network: Network = Network.ISOLATED
    """`isolated`: the machine reaches nothing outside. `nat`: it reaches what this host reaches."""
    checks: t.Many[t.File] = ()
    """Your own pytest-testinfra files, run beside those that ship with ami-builder."""
    timeout: t.Duration = 15 * 60.0
    """How long one machine can take to boot and to run its checks."""
    pressure: StrictBool = True
    """Whether each machine finally runs out of memory, to verify what happens then. Takes minutes on an
    emulated machine."""
    instance_types: t.Many[t.InstanceType] = ()
    """The EC2 instance types that an AMI is verified on: one instance of each, at the same time. Empty:
    m6i.large, or m7g.large for arm64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AwsSettings(_Table):
    """Where and how `--target aws` bakes an AMI, and how its instances are reached."""

    region: t.Region = ""
    """The region. Empty: the one of the AWS chain (AWS_REGION, profile)."""
    source: t.SourceAmi = ""
    """What baking starts from: `owner/name pattern` (the newest AMI), `ssm:/parameter` or `ami-…`. In a
    pattern, `#` is one digit. Empty: Debian's own, 136693071363/debian-13-amd64-########-#### or the same of
    arm64."""
    instance_types: t.Many[t.InstanceType] = ()
    """What baking runs on, tried in turn when EC2 has no capacity. Empty: m6i.large, m5.large and m7i.large,
    or m7g.large, m6g.large and m8g.large for arm64."""
    subnets: t.Many[t.Subnet] = ()
    """Where instances run, tried in turn. `REGION=subnet-…` is one of another region than aws.region, where
    copies are verified. A region without any: its default VPC's subnets."""
    connect: Connect = Connect.SSH
    """`ssh`, or `session-manager`, which opens no port and needs `instance_profile`."""
    instance_profile: t.InstanceProfile = ""
    """Name or ARN of an instance profile. Session Manager needs one with AmazonSSMManagedInstanceCore."""
    ssh_port: Annotated[int, t.count(1, 65535, example=2222)] = 22
    """The port that ssh uses."""
    source_cidrs: t.Many[t.Cidr] = ()
    """Who can reach the instances by ssh. Empty: only this host's public address."""
    encrypt: StrictBool = False
    """Whether the AMI's snapshot is encrypted."""
    kms_key: t.KmsKey = ""
    """The KMS key for `encrypt`: id, alias/… or ARN. Empty: the account's default key. Other regions have
    those of `copy_to`."""
    root_device: t.RootDevice = "/dev/sda1"
    """The name of the AMI's root device, which launchers map to set its disk's size: dask-cloudprovider's
    EC2Cluster maps /dev/sda1. Empty: the base's, which is /dev/xvda for Debian."""
    spot: StrictBool = False
    """Whether baking runs on a spot instance. `instance_types` are tried in order, in each subnet."""
    lifetime: t.Duration = 2 * 3600.0
    """How long after a boot an instance powers itself off, and so terminates, without this host: by a timer
    that cloud-init starts. `ami-builder gc` finds instances that have none."""
    tags: t.Many[t.OwnTag] = ()
    """Tags of your own, as KEY=VALUE, on everything that is made in the account, from the call that makes it.
    Packer 1.6.6 tags AMIs and spot instances only after they exist."""
    copy_to: t.Many[t.CopyTo] = ()
    """Regions that the AMI is copied to. `region=KEY` encrypts the copy with that region's KMS key."""
    share_with: t.Many[t.Sharer] = ()
    """Accounts (12 digits), organizations and organizational units (ARNs) that can launch the AMI."""

    def at(self, region: str, home: str) -> AwsSettings:
        """Return the settings for work in a region, where images are baked in the region `home`.

        Its subnets are those of the region, and its key is the one that the AMI has there.
        """
        named = [one.rpartition("=") for one in self.subnets]
        subnets = tuple(subnet for of, _, subnet in named if (of or home) == region)
        key, encrypt = self.kms_key, self.encrypt
        if region != home:
            key = next((one.kms_key for one in self.copy_to if one.region == region), "")
            encrypt = encrypt or bool(key)
        return replace(self, region=region, subnets=subnets, kms_key=key, encrypt=encrypt)


@dataclass(frozen=True, slots=True, kw_only=True)
class LifecycleSettings(_Table):
    """What happens to finished images."""

    channels: t.Some[t.Name] = ("testing", "stable")
    """The channels that `ami-builder promote` can promote a verified image to."""
    keep: Annotated[int, t.count(0, 1000)] = 3
    """How many of the newest images `ami-builder prune` keeps, of each channel and of those in none."""
    keep_days: Annotated[int, t.count(0, 3650, example=30)] = 14
    """How many days images and caches are kept in any case."""
    size: t.Space = 0
    """No local image is deleted while all images of this name together are no larger. 0: no such limit."""
    most_deletions: Annotated[int, t.count(1, 1000)] = 10
    """How many images one run of `prune` deletes at most, and how many it deprecates."""
    grace_days: Annotated[int, t.count(0, 365, example=14)] = 7
    """How many days an AMI is deprecated before it is deregistered with its snapshots."""
    shared_days: Annotated[int, t.count(0, 3650, example=180)] = 0
    """After how many days `prune` may delete an AMI that is shared with other accounts, whose use of it can't
    be seen. 0: never. A public AMI is never deleted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NightlySettings(_Table):
    """Where `ami-builder nightly` promotes a verified image to, and what puts the promotion on hold."""

    channel: t.Channel = ""
    """The channel to promote to, one of lifecycle.channels. Empty: the first of them."""
    memory_drift_percent: Annotated[int, t.count(0, 100)] = 3
    """How many percent less memory can be available at boot than on the current image. Even less puts the
    promotion on hold."""
    time_drift_percent: Annotated[int, t.count(0, 1000)] = 50
    """How many percent more CPU time the first boot can take, in multiples of a fixed piece of work."""
    size_drift_percent: Annotated[int, t.count(0, 1000)] = 20
    """How many percent larger the image can be."""
    hold_packages: t.Many[t.PackagePattern] = ()
    """Packages whose change puts the promotion on hold: names or patterns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSettings(_Table):
    """The settings of an image."""

    description: t.Line = ""
    """One line for people."""
    arch: t.Architecture = None
    """The architecture of the machines: `amd64` (x86-64) or `arm64` (such as Graviton). Empty: this host's
    for a local image, amd64 on AWS. A local image of another architecture than this host's is emulated."""
    base: BaseSettings = BaseSettings()
    container: ContainerSettings = ContainerSettings()
    memory: MemorySettings = MemorySettings()
    dask: DaskSettings = DaskSettings()
    bake: BakeSettings = BakeSettings()
    verify: VerifySettings = VerifySettings()
    aws: AwsSettings = AwsSettings()
    lifecycle: LifecycleSettings = LifecycleSettings()
    nightly: NightlySettings = NightlySettings()

    def get(self, key: str) -> object:
        """Return the value of `memory.reserve`, for example."""
        table, _, name = key.rpartition(".")
        return getattr(getattr(self, table) if table else self, name)

    def overlaid(self, values: Mapping[str, object]) -> ImageSettings:
        """Return these settings with those in `values`, which are by key."""
        changed: dict[str, Any] = {}
        for key, value in values.items():
            table, _, name = key.rpartition(".")
            if table:
                changed[table] = replace(changed.get(table, getattr(self, table)), **{name: value})
            else:
                changed[name] = value
        return replace(self, **changed)

    def image(self, name: str, target: TargetKind = TargetKind.QEMU) -> Image:
        """Return the image with what follows from its settings and target.

        That is its architecture and the defaults that depend on it, where the container is built, files,
        packages and channel.
        """
        arch = self.arch or (Arch.AMD64 if target is TargetKind.AWS else host_arch())
        verify_on, bake_on = _INSTANCE_TYPES[arch]
        base, container = self.base, self.container
        if base.security_updates and "unattended-upgrades" not in base.packages:
            base = replace(base, packages=(*base.packages, "unattended-upgrades"))
        source = container.source
        if source is ContainerSource.AUTO:
            source = ContainerSource.MACHINE if target is TargetKind.AWS else ContainerSource.ARCHIVE
        pulled = source is ContainerSource.REGISTRY
        requirements = None if pulled else container.requirements or resources.requirements()
        channel = self.nightly.channel or self.lifecycle.channels[0]
        aws, verify = self.aws, self.verify
        whole = replace(
            self,
            arch=arch,
            base=base,
            container=replace(container, source=source, requirements=requirements),
            verify=replace(verify, instance_types=verify.instance_types or verify_on),
            aws=replace(
                aws,
                source=aws.source or f"{DEBIAN_ACCOUNT}/debian-13-{arch}-########-####",
                instance_types=aws.instance_types or bake_on,
            ),
            nightly=replace(self.nightly, channel=channel),
        )
        return Image(name=name, **{one.name: getattr(whole, one.name) for one in fields(whole)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Image(ImageSettings):
    """What to build: the name, and everything that decides about an image's content and its verification.

    `container.source` is never `auto`, and `container.requirements` is None when the container is pulled.
    """

    name: str
    arch: Arch = field(default_factory=host_arch)

    def at(self, region: str, home: str) -> Image:
        """Return the image with the AWS settings for work in a region; `home` is where images are baked."""
        return replace(self, aws=self.aws.at(region, home))


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFile(_Table):
    """ami-builder.toml: the VM images to build for Dask."""

    default_image: t.Name = ""
    """The image that commands use when none is named. Needed only with several images."""
    defaults: ImageSettings = ImageSettings()
    """Settings of all images, unless an image has its own."""
    images: dict[t.Name, ImageSettings] = field(default_factory=dict)
    """The images by name. An empty table is a complete image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting of an image, as it is declared."""

    table: str
    """Such as `memory`; empty for `description`."""
    name: str
    default: object
    type: t.ValueType | type[StrEnum] | type[bool]
    """The type of the value, or of each item of a list."""
    is_list: bool

    @property
    def expected(self) -> str:
        """What to write, such as `a duration`, as the value or as an item of a list."""
        if isinstance(self.type, t.ValueType):
            return self.type.expected
        return "true or false" if self.type is bool else ", ".join(f"`{one}`" for one in self._options)

    @property
    def example(self) -> object:
        """A value other than the default, as TOML has it."""
        if isinstance(self.type, t.ValueType):
            return [self.type.example] if self.is_list else self.type.example
        if self.type is bool:
            return not self.default
        return str(next(one for one in reversed(self._options) if one is not self.default))

    @property
    def _options(self) -> tuple[StrEnum, ...]:
        return tuple(self.type) if isinstance(self.type, type) and issubclass(self.type, StrEnum) else ()

    def dump(self, value: object) -> object:
        """Return a value as TOML has it."""
        if isinstance(value, tuple):
            return [self.dump(item) for item in value]
        if isinstance(self.type, t.ValueType):
            return self.type.dump(value)
        return value if isinstance(value, bool) else str(value)

    def from_text(self, text: str) -> object:
        """Return the text of an environment variable or a flag as TOML has it; commas separate items."""
        text = text.strip()
        if self.is_list:
            return [part.strip() for part in text.split(",") if part.strip()]
        if isinstance(self.type, t.ValueType):
            return self.type.from_text(text)
        return {"true": True, "false": False}.get(text, text) if self.type is bool else text


def _declared(table: str, cls: type[_Table]) -> dict[str, Setting]:
    found: dict[str, Setting] = {}
    hints = get_type_hints(cls, include_extras=True)
    for one in fields(cls):  # type: ignore[arg-type]
        if isinstance(one.default, _Table):
            found |= _declared(one.name, type(one.default))
            continue
        annotation, is_list = hints[one.name], False
        if get_origin(annotation) is Annotated and get_origin(get_args(annotation)[0]) is tuple:
            annotation, is_list = get_args(get_args(annotation)[0])[0], True
        types = [part for part in get_args(annotation) if isinstance(part, t.ValueType)]
        kind = types[0] if types else get_args(annotation)[0] if get_args(annotation) else annotation
        assert one.default is not MISSING, "every setting has a default"
        key = f"{table}.{one.name}" if table else one.name
        found[key] = Setting(table=table, name=one.name, default=one.default, type=kind, is_list=is_list)
    return found


TABLES = tuple(one.name for one in fields(ImageSettings) if isinstance(one.default, _Table))
SETTINGS: Mapping[str, Setting] = MappingProxyType(_declared("", ImageSettings))
"""Every setting of an image by its key, such as `memory.reserve`."""
