"""What a run records: artifacts, results, verdicts, steps. Sizes are bytes, durations seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from ami_builder.core.options import Arch

FIRST_BOOT = "boot"
"""The phase that includes the checks of a first boot; its measurements are compared between images."""

PRESSURE = "pressure"
"""The phase in which the machine runs out of memory, with its own checks."""


class TargetKind(StrEnum):
    """Where an image is baked and booted."""

    QEMU = "qemu"
    AWS = "aws"


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A finished image and where it came from."""

    image: str
    target: TargetKind
    location: str
    """A path, or an AMI id."""
    digest: str
    """sha256 of all inputs."""
    created: datetime
    run_id: str
    size: int
    region: str = ""
    """Where the AMI is; empty for a path."""
    arch: Arch = Arch.AMD64
    """Older records have none: all images were for amd64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """How ssh reaches a booted machine."""

    address: str
    port: int
    user: str
    console_log: Path
    proxy_command: str = ""
    """ssh's ProxyCommand; empty for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The AMI that a running EC2 instance was launched from."""

    instance_type: str
    ami: str
    name: str = ""
    """Empty if the AMI was deregistered since, or belongs to an account that no longer shares it."""
    image: str = ""
    """The image's name in ami-builder.toml; empty for an AMI that is not of this account's ami-builder."""
    digest: str = ""
    channels: tuple[str, ...] = ()
    """Those in which the AMI is current."""
    others: tuple[str, ...] = ()
    """What is current in the other channels of its image, as CHANNEL=AMI."""
    revoked: str | None = None
    """Why it was revoked; None when it was not."""


class Outcome(StrEnum):
    """How one check ended."""

    PASSED = "passed"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"
    """The host was too busy for a result: it says nothing about the image."""
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """One check on one start of one machine."""

    name: str
    phase: str
    """`boot`, `restart`, `reboot` or `pressure`."""
    machine: str
    """Its memory (`2 GiB`) or its instance type."""
    outcome: Outcome
    seconds: float
    message: str
    """What failed, why it was skipped or is inconclusive, or what a passed check noted."""


def outcome_of(results: Sequence[CheckResult]) -> Outcome:
    """Return passed, failed or inconclusive; failed if no check ran."""
    ran = {result.outcome for result in results} - {Outcome.SKIPPED}
    if not ran or Outcome.FAILED in ran:
        return Outcome.FAILED
    return Outcome.INCONCLUSIVE if Outcome.INCONCLUSIVE in ran else Outcome.PASSED


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What was measured on one start of one machine."""

    machine: str
    phase: str
    total: int
    """The machine's memory."""
    available: int
    """AVAILABLE_MEMORY_FOR_DASK."""
    ssh_seconds: float | None = None
    """From the start or the call to reboot until a login by ssh; None if nothing booted."""
    dask_seconds: float | None = None
    """From the same start until Dask answered; None if that was not observed."""
    cpu_seconds: float | None = None
    """CPU seconds from power-on or the call to reboot until a worker was registered: QEMU's on this host, on
    EC2 the guest's from /proc/stat."""
    control_seconds: float | None = None
    """CPU seconds of a fixed piece of work on the same machine at rest, right afterwards."""

    @property
    def boot_ratio(self) -> float | None:
        """The boot's CPU seconds divided by the control's, so that hosts compare; None without them."""
        if self.cpu_seconds is None or not self.control_seconds:
            return None
        return self.cpu_seconds / self.control_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The result of verifying an image, bound to the digest of its inputs."""

    digest: str
    checks_digest: str
    results: tuple[CheckResult, ...]
    measured: tuple[Measurement, ...]

    @property
    def passed(self) -> bool:
        """True if checks ran and all of them passed."""
        return self.outcome is Outcome.PASSED

    @property
    def inconclusive(self) -> bool:
        """True if no check failed, but the host was too busy for some."""
        return self.outcome is Outcome.INCONCLUSIVE

    @property
    def outcome(self) -> Outcome:
        """The outcome of all results together."""
        return outcome_of(self.results)


class RunStatus(StrEnum):
    """The state of a run."""

    RUNNING = "running"
    PASSED = "passed"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"
    """Nothing failed, but the host was too busy to verify the image."""
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step of a run and how long it took."""

    name: str
    seconds: float
    status: RunStatus
    detail: str = ""
    began: float = 0.0
    """Seconds after the first step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What one run did, as saved in its run directory."""

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
    base: str = ""
    """Name and id of the base AMI; empty for a disk, and in older records."""

    @property
    def own_steps(self) -> tuple[StepRecord, ...]:
        """The steps of the run's own image: the record also has those of images that were built beside it."""
        mine = f"build {self.image}"
        own = tuple(step for step in self.steps if f"{step.name} > ".startswith(f"{mine} > "))
        return own or self.steps


class State(StrEnum):
    """The result of one preflight check."""

    OK = "ok"
    NOTE = "note"
    STOPS = "stops a build"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One preflight check: what was checked, what was found, what to do."""

    name: str
    state: State
    found: str
    hint: str = ""
    exit_code: int = 0


class NightlyStatus(StrEnum):
    """The result of a nightly run, overall or in one region."""

    UNCHANGED = "unchanged"
    """The current image has the same inputs: nothing was built."""
    PROMOTED = "promoted"
    HELD = "held"
    """Verified, but too different from the current image: a person decides."""
    INCONCLUSIVE = "inconclusive"
    """The host was too busy to verify the image: the next run verifies it again."""
    FAILED = "failed"
    PARTLY = "partly"
    """Current in some regions; failed or on hold in others."""
    UNSHARED = "unshared"
    """The current image has the same inputs, but sharing it failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionResult:
    """The result of a nightly run in one region."""

    place: str
    """`this host` or the region; `this machine` in records of older versions."""
    id: str
    """The image's digest or AMI id there; empty if it did not get there."""
    ending: NightlyStatus
    text: str
    """What happened, or why nothing did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NightlyRun:
    """One nightly run of one image on one target."""

    id: str
    image: str
    target: TargetKind
    channel: str
    started: datetime
    ended: datetime | None
    """None while it runs, or if it was killed."""
    ending: NightlyStatus
    digest: str
    """Of all inputs; empty if they could not be resolved."""
    before: str
    """The id of the image that was current; empty if none was."""
    location: str
    """The new image: a path or an AMI id; empty if there is none."""
    base: str = ""
    """Name and id of the base AMI; empty for a disk, and in older records."""
    places: tuple[RegionResult, ...] = ()
    drifts: tuple[str, ...] = ()
    """Why the promotion is on hold, one line each."""
    moved: tuple[str, ...] = ()
    """The packages whose versions changed, one line each."""
    not_compared: tuple[str, ...] = ()
    """What could not be compared, one line each."""
    retired: tuple[str, ...] = ()
    """What was deprecated or deleted, one line each."""
    error: str = ""
    exit_code: int = 0
    steps: tuple[StepRecord, ...] = ()
