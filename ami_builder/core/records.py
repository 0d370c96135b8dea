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


class NightlyStatus(StrEnum):
    """How a night ended, in all or in one place."""

    UNCHANGED = "unchanged"
    """What stands in the channel was made of the same inputs: nothing was built."""
    PROMOTED = "promoted"
    HELD = "held"
    """Verified, but it drifted from the image in the channel: a person decides."""
    INCONCLUSIVE = "inconclusive"
    """The host was too busy to judge the image: the channel stays, and the next run verifies it again."""
    FAILED = "failed"
    PARTLY = "partly"
    """Promoted in some places, failed in others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionResult:
    """What became of the image in one place."""

    place: str
    """`this machine`, or the region."""
    id: str
    """The image's id there: a digest, or an AMI's id; empty when it never got there."""
    ending: NightlyStatus
    text: str
    """What happened, or why not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NightlyRun:
    """One night of one image on one target."""

    id: str
    image: str
    target: TargetKind
    channel: str
    started: datetime
    ended: datetime | None
    """None while it is going, or when it was killed."""
    ending: NightlyStatus
    digest: str
    """Of everything that went in; empty when the inputs could not be resolved."""
    before: str
    """The id of what stood in the channel; empty when nothing did."""
    location: str
    """The new image: a path, or an AMI's id; empty when there is none."""
    places: tuple[RegionResult, ...] = ()
    drifts: tuple[str, ...] = ()
    """What held the promotion, one line each."""
    moved: tuple[str, ...] = ()
    """The packages whose versions changed, one line each."""
    not_compared: tuple[str, ...] = ()
    """What the gate could not look at, one line each."""
    retired: tuple[str, ...] = ()
    """What was deprecated or deleted, one line each."""
    error: str = ""
    exit_code: int = 0
    steps: tuple[StepRecord, ...] = ()
