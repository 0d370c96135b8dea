"""The words of the field as frozen values; sizes are bytes and durations seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path

FIRST_BOOT = "boot"
"""The phase in which the checks of a first boot run as well, and whose measurements compare."""

PRESSURE = "pressure"
"""The phase in which a machine that is up runs out of memory, and only the checks of that run."""


class TargetKind(StrEnum):
    """Where an image is baked and booted."""

    QEMU = "qemu"
    AWS = "aws"


class Role(StrEnum):
    """What the one Dask container of a machine does."""

    LOCAL = "local"
    WORKER = "worker"
    SCHEDULER = "scheduler"
    NONE = "none"
    """dask.service starts nothing: user data brings its own Dask."""


class Listen(StrEnum):
    """Where the scheduler of a whole cluster in one container listens."""

    MACHINE = "127.0.0.1"
    NETWORK = "0.0.0.0"  # noqa: S104 - by the user's own choice


class Datasource(StrEnum):
    """How a test machine's cloud-init gets its key and user data."""

    EC2 = "ec2"
    NOCLOUD = "nocloud"


class Network(StrEnum):
    """What a test machine can reach besides this process."""

    ISOLATED = "isolated"
    NAT = "nat"


class ContainerNetwork(StrEnum):
    """What Docker prepares at boot for the network of containers."""

    HOST = "host"
    """Nothing: containers use the machine's own network."""
    BRIDGE = "bridge"
    """Its own bridge and firewall rules, which most of its time to start goes into."""


class Connect(StrEnum):
    """How ssh reaches an instance."""

    SSH = "ssh"
    SESSION_MANAGER = "session-manager"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve:
    """Memory that stays with the system: an amount in bytes, or a percentage of what is available."""

    bytes: int = 0
    percent: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
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
class Container:
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
class Dask:
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
class Bake:
    """The machine that Packer bakes on."""

    memory: int
    cpus: int
    timeout: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verify:
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
class Destination:
    """A region that an AMI is copied to."""

    region: str
    kms_key: str = ""
    """Id, ARN or alias of that region's key for the copy; empty: as aws.encrypt says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aws:
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
class Lifecycle:
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
class Nightly:
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
    base: Base
    container: Container
    reserve: Reserve
    nanny_headroom: int
    """How much less than the container's limit the workers' own limits add up to, in bytes."""
    dask: Dask
    bake: Bake
    verify: Verify
    aws: Aws
    lifecycle: Lifecycle
    nightly: Nightly


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A finished image and where it came from."""

    image: str
    target: TargetKind
    location: str
    """A path, or an AMI id."""
    digest: str
    """sha256 over everything that went in."""
    created: datetime
    run_id: str
    size: int
    region: str = ""
    """Where the AMI is; empty for a path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A booted machine, wherever it runs, as ssh reaches it."""

    address: str
    port: int
    user: str
    console_log: Path
    ports: Mapping[int, int]
    """Port inside the machine -> port at `address` that reaches it."""
    proxy_command: str = ""
    """What ssh connects through instead of the network, as its ProxyCommand; empty for none."""


class Resource(StrEnum):
    """What of ours can stand in an account."""

    INSTANCE = "instance"
    LAUNCH_TEMPLATE = "launch-template"
    VOLUME = "volume"
    IMAGE = "image"
    SNAPSHOT = "snapshot"
    SECURITY_GROUP = "security-group"


class Outcome(StrEnum):
    """How one check ended."""

    PASSED = "passed"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"
    """The host was too busy to tell; it says nothing of the image."""
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """One check on one start of one machine."""

    name: str
    phase: str
    """`boot`, `restart`, `reboot` or `pressure`."""
    machine: str
    """Which machine: its memory (`2 GiB`), or its instance type."""
    outcome: Outcome
    seconds: float
    message: str
    """What is wrong, or why it was skipped or is inconclusive; of a check that passed what it noted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one start of one machine measured."""

    machine: str
    phase: str
    total: int
    """The machine's memory."""
    available: int
    """AVAILABLE_MEMORY_FOR_DASK."""
    ssh_seconds: float | None = None
    """From the start, or from the call to reboot, until a login by ssh; None where nothing booted."""
    dask_seconds: float | None = None
    """From the same start until Dask answered on a system that was up; None when that was not seen."""
    cpu_seconds: float | None = None
    """CPU seconds that the machine used from power-on or the call to reboot until a worker was registered.

    QEMU's own on this host; on EC2 the guest's, from /proc/stat.
    """
    control_seconds: float | None = None
    """CPU seconds of a fixed piece of work on the same machine at rest, right after."""

    @property
    def boot_ratio(self) -> float | None:
        """The boot's CPU seconds in multiples of the control's; None without either.

        It depends neither on how fast the host is nor on how busy.
        """
        if self.cpu_seconds is None or not self.control_seconds:
            return None
        return self.cpu_seconds / self.control_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether an image holds its promise, bound to the digest of what was proved."""

    digest: str
    checks_digest: str
    results: tuple[CheckResult, ...]
    measured: tuple[Measurement, ...]

    @property
    def passed(self) -> bool:
        """True when something ran, and all that ran passed."""
        return self.outcome is Outcome.PASSED

    @property
    def inconclusive(self) -> bool:
        """True when nothing failed, and the host was too busy to judge something."""
        return self.outcome is Outcome.INCONCLUSIVE

    @property
    def outcome(self) -> Outcome:
        """Passed, failed or inconclusive; when nothing ran, failed."""
        ran = {result.outcome for result in self.results} - {Outcome.SKIPPED}
        if not ran or Outcome.FAILED in ran:
            return Outcome.FAILED
        return Outcome.INCONCLUSIVE if Outcome.INCONCLUSIVE in ran else Outcome.PASSED


class RunStatus(StrEnum):
    """Where a run stands."""

    RUNNING = "running"
    PASSED = "passed"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"
    """Nothing failed, but the host was too busy to judge the image."""
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step of a run and how long it took."""

    name: str
    seconds: float
    status: RunStatus
    detail: str = ""
    began: float = 0.0
    """In seconds after the first step did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What one run did, as it stands in its run directory."""

    run_id: str
    command: str
    image: str
    digest: str | None
    status: RunStatus
    started: datetime
    steps: tuple[StepRecord, ...]
    artifact: Artifact | None = None
    verdict: Verdict | None = None
    error: str | None = None


class State(StrEnum):
    """How one point of the check ended."""

    OK = "ok"
    NOTE = "note"
    STOPS = "stops a build"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One point: what was looked at, what was found, what to do."""

    name: str
    state: State
    found: str
    hint: str = ""
    exit_code: int = 0
