"""Whether the memory limits of a cluster's workers are right. Pure; sizes are bytes.

The memory for Dask is bounded by *domains*: every cgroup with a limit that a worker is in, and the machine.
All workers in a domain share its capacity:

- of a cgroup: its limit, which the kernel enforces whatever limit Dask has;
- of a machine: MemAvailable now, plus what the workers and their nannies hold now (anonymous and shared
  pages; pages of files are in MemAvailable already). For a cgroup with a limit, all that it holds counts,
  because its limit may include a scheduler. The sum is what would be available without Dask: the number that
  an image of ami-builder measures just before Dask starts.

A worker's *share* of a domain is its part of the capacity by threads, as Dask itself divides memory. A
limit is

- missing if Dask has none: it does not spill, pause or restart;
- too high if the limits in a domain exceed its capacity and this one exceeds its share: the kernel acts
  before Dask does. The system needs part of every machine, so limits that add up to all of its memory are too
  high;
- needlessly low if all domains have room for more than a tenth of its share and 128 MiB. Less than that may
  be a deliberate reserve, for agents that grow or for the nanny;
- right otherwise.

If all workers follow the advice, no domain is too small for its limits.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from ami_builder.core.units import MIB

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

NOISE = 100
"""A reading of a machine may be off by 1/100 of it, a fifth of the 5 % in which the nanny acts."""
RUNTIME = 32 * MIB
"""Or by this: processes that start with a container, outside of it. Docker's shim and Compose took 26 MB."""
LEAST_RAISE = 128 * MIB
IN_MEMORY = frozenset({"tmpfs", "ramfs"})


class Health(StrEnum):
    """The verdict on a worker's limit."""

    RIGHT = "right"
    MISSING = "missing"
    TOO_HIGH = "too high"
    TOO_LOW = "needlessly low"
    UNKNOWN = "unknown"
    NO_ANSWER = "no answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupLimit:
    """A cgroup with a limit that a worker is in."""

    id: str
    """Unique on its machine."""
    path: str
    limit: int
    swap: int | None = None
    """The limit of swap; None: no limit."""
    held: int = 0
    """Memory of all its processes that the kernel can't reclaim."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """How much more a machine's system uses than when Dask started, as the machine itself says."""

    reserve: int
    """What was left to the system then."""
    growth: int
    excess: int
    """By how much Dask's limit is more than the machine can give now; negative if it is less."""
    by: Mapping[str, int]
    """The cgroups that have grown most."""

    def is_news(self, total: int) -> bool:
        """Return whether a machine with so much memory should warn, as its compare-memory decides."""
        return self.excess > max(RUNTIME, total // NOISE)

    def __str__(self) -> str:
        """Return it as a part of a sentence."""
        by = ", ".join(f"{name} +{_mib(size)}" for name, size in self.by.items())
        return f"the system has grown by {_mib(self.growth)} since Dask started{f' ({by})' if by else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The memory of one worker and its machine, as the worker read it."""

    boot: str
    """The machine's boot id, which is equal for all workers on the same machine."""
    limit: int | None
    nthreads: int
    total: int
    available: int
    host: str = ""
    """The name of the machine, or of the container."""
    instance: str = ""
    """The id of the EC2 instance; empty elsewhere."""
    swap: int = 0
    page: int = 4096
    levels: tuple[CgroupLimit, ...] = ()
    """From its own cgroup up."""
    processes: Mapping[str, int] = field(default_factory=dict)
    """Process -> memory that it holds. These are the worker and its nanny."""
    nanny: bool = True
    nanny_process: str | None = None
    rss: int = 0
    target: float | None = None
    spill: float | None = None
    pause: float | None = None
    terminate: float | None = None
    directory: str = ""
    spill_system: str = ""
    spill_size: int | None = None
    """Of the file system that it spills to."""
    spill_free: int | None = None
    max_spill: int | None = None
    """What Dask spills at most (distributed.worker.memory.max-spill); None: no bound."""
    versions: Mapping[str, str] = field(default_factory=dict)
    growth: Growth | None = None
    """Of its machine; None if that says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A worker that the scheduler knows, with its reading or the reason why there is none."""

    address: str
    name: str = ""
    host: str = ""
    reading: Reading | None = None
    problem: str = ""
    silent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduler:
    """The scheduler's machine and versions, as far as it answered."""

    address: str
    host: str = ""
    instance: str = ""
    boot: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The answers of a cluster's machines."""

    workers: tuple[Worker, ...]
    scheduler: Scheduler
    here: Mapping[str, str]
    """The versions on this host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The verdict on one worker."""

    worker: Worker
    health: Health
    reason: str
    advised: int | None = None
    """The limit to set, in whole pages; None if the limit is right or unknown."""
    excess: int | None = None
    """The limit minus the advised one."""
    warnings: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class _Domain:
    """Memory that several workers share."""

    name: str
    capacity: int
    total: int | None
    """MemTotal of a machine; None for a cgroup."""
    held: int = 0
    """Memory that a cgroup holds now."""
    page: int
    members: dict[str, Reading]
    threads: int = 1
    taken: int = 0
    wanted: float = 0.0
    whole: bool = False
    full: bool = False

    def share(self, reading: Reading) -> float:
        return self.capacity * self.part(reading)

    def part(self, reading: Reading) -> float:
        return max(1, reading.nthreads) / self.threads

    def weigh(self) -> None:
        """Add up the limits. A worker without one counts with its share, which it will be advised."""
        readings = self.members.values()
        self.threads = sum(max(1, r.nthreads) for r in readings)
        self.taken = sum(r.limit or int(self.share(r)) for r in readings)
        self.wanted = sum(max(0.0, self.share(r) - r.limit) for r in readings if r.limit)
        # Dask rounds each worker's part of the machine down, so the sum may be a byte less per worker.
        self.whole = self.total is not None and self.taken >= self.total - len(self.members)
        self.full = self.whole or self.taken > self.capacity + sum(self.slack(r) for r in readings)

    def slack(self, reading: Reading) -> float:
        """Return how far a limit may exceed its share: the noise of a reading, or a page."""
        return self.page if self.total is None else max(self.capacity / NOISE, RUNTIME) * self.part(reading)

    def exceeded_by(self, reading: Reading) -> bool:
        over = (reading.limit or 0) - self.share(reading)
        return self.full and over > (0 if self.whole else self.slack(reading))

    def room(self, reading: Reading) -> float:
        """Return how much more this worker may have if all that have less than their share get more."""
        lacks = max(0.0, self.share(reading) - (reading.limit or 0))
        spare = max(0, self.capacity - self.taken)
        return lacks * min(1.0, spare / self.wanted) if self.wanted else 0.0


def diagnose(workers: Sequence[Worker]) -> tuple[Diagnosis, ...]:
    """Return the verdict on every worker's limit, in the order of the workers."""
    read = {w.address: w.reading for w in workers if w.reading is not None}
    domains = _domains(read)
    return tuple(
        _unread(worker) if worker.reading is None else _judge(worker, worker.reading, domains[worker.address])
        for worker in workers
    )


def summary(diagnoses: Sequence[Diagnosis]) -> str:
    """Return one line with the number of right limits, and of the other verdicts."""
    if not diagnoses:
        return "the scheduler has no workers"
    counts = Counter(diagnosis.health for diagnosis in diagnoses)
    right, total = counts[Health.RIGHT], len(diagnoses)
    others = ", ".join(f"{counts[h]} {h}" for h in Health if counts[h] and h is not Health.RIGHT)
    verb = "has" if 1 in (right, total) else "have"
    first = f"{right} of {total} worker{'s' if total > 1 else ''} {verb} a right limit"
    return f"{first}: {others}" if others else first


def _domains(read: Mapping[str, Reading]) -> Mapping[str, Sequence[_Domain]]:
    """Return every worker's domains: its cgroups from its own up, then its machine."""
    machines: dict[str, dict[str, Reading]] = defaultdict(dict)
    for address, reading in read.items():
        machines[reading.boot][address] = reading
    found: dict[str, list[_Domain]] = {address: [] for address in read}
    for members in machines.values():
        groups: dict[tuple[str, int], _Domain] = {}
        for address, reading in members.items():
            for level in reading.levels:
                group = groups.setdefault(
                    (level.id, level.limit),
                    _Domain(
                        name=f"the cgroup {level.path}",
                        capacity=level.limit,
                        total=None,
                        held=level.held,
                        page=reading.page,
                        members={},
                    ),
                )
                group.members[address] = reading
                found[address].append(group)
        machine = _machine(members)
        for address in members:
            found[address].append(machine)
        for domain in (*groups.values(), machine):
            domain.weigh()
    return found


def _machine(members: dict[str, Reading]) -> _Domain:
    # Count the outermost of these cgroups only: it includes the others.
    own = {reading.levels[0].id for reading in members.values() if reading.levels}
    held: dict[str, int] = {}
    for reading in members.values():
        counted = [level for level in reading.levels if level.id in own]
        if counted and counted[-1].held >= sum(reading.processes.values()):
            held[counted[-1].id] = counted[-1].held
        else:
            held.update(reading.processes)
    total = min(reading.total for reading in members.values())
    available = min(reading.available for reading in members.values())
    page = max(reading.page for reading in members.values())
    return _Domain(
        name="the machine",
        capacity=min(total, available + sum(held.values())),
        total=total,
        page=page,
        members=members,
    )


def _unread(worker: Worker) -> Diagnosis:
    return Diagnosis(
        worker=worker, health=Health.NO_ANSWER if worker.silent else Health.UNKNOWN, reason=worker.problem
    )


def _judge(worker: Worker, reading: Reading, domains: Sequence[_Domain]) -> Diagnosis:
    health, reason, advised = _health(reading, domains)
    return Diagnosis(
        worker=worker,
        health=health,
        reason=reason,
        advised=advised,
        excess=reading.limit - advised if reading.limit and advised is not None else None,
        warnings=tuple(_warnings(reading, domains)),
    )


def _health(reading: Reading, domains: Sequence[_Domain]) -> tuple[Health, str, int | None]:
    """Return the verdict on a limit, with the reason and the limit to set."""
    tightest = min(domains, key=lambda domain: domain.share(reading))
    share = _pages(tightest.share(reading), reading.page)
    if not reading.limit:
        return Health.MISSING, f"Dask has no limit; set its share of {tightest.name}", share
    if exceeded := [domain for domain in domains if domain.exceeded_by(reading)]:
        return Health.TOO_HIGH, _excess(exceeded[0]), share
    binding = min(domains, key=lambda domain: domain.room(reading))
    advised = _pages(reading.limit + binding.room(reading), reading.page)
    if advised - reading.limit > max(LEAST_RAISE, tightest.share(reading) / 10):
        return Health.TOO_LOW, f"{binding.name} has room for more", advised
    return Health.RIGHT, f"fits {tightest.name}", None


def _excess(domain: _Domain) -> str:
    count = len(domain.members)
    limits = "the limit is" if count == 1 else f"the limits of {count} workers add up to"
    if domain.whole:
        return f"{limits} all memory of the machine, but the system needs some"
    if domain.total is None:
        return f"{limits} more than the limit of {domain.name}"
    return f"{limits} more than the machine has available"


def _pages(size: float, page: int) -> int:
    # At least one page: 0 would mean no limit.
    return max(1, int(size) // page) * page


def _mib(size: float) -> str:
    return f"{size / MIB:.0f} MiB"


def _warnings(reading: Reading, domains: Sequence[_Domain]) -> Iterable[str]:
    yield from _outgrown(reading, domains[-1])
    if reading.spill_system in IN_MEMORY:
        yield f"spills to {reading.spill_system} ({reading.directory}), which is memory; use a disk"
    if reading.levels and reading.swap and not any(level.swap == 0 for level in reading.levels):
        yield "its cgroup may use swap, which Dask doesn't count: it slows down instead of spilling"
    if not reading.nanny:
        yield "has no nanny, which would restart it when it reaches its limit"
    elif reading.limit and not reading.terminate:
        yield "terminate is off, so its nanny doesn't restart it when it reaches its limit"
    elif reading.limit:
        yield from _late_nanny(reading, domains)
    if reading.limit:
        for key in ("target", "spill", "pause"):
            if not getattr(reading, key):
                yield f"{key} is off (distributed.worker.memory.{key})"


def _outgrown(reading: Reading, machine: _Domain) -> Iterable[str]:
    """Warn if the machine can't give what the limit promises: by its own comparison, or by this reading."""
    growth, short = reading.growth, machine.taken - machine.capacity
    if not reading.limit:
        return
    if growth is not None and growth.is_news(reading.total):
        yield f"its machine can give {_mib(growth.excess)} less than the limit promises: {growth}"
    elif machine.exceeded_by(reading) and short > 0:
        yield (
            f"its machine can give {_mib(short)} less than the limits promise: they are too high, or what"
            " runs beside Dask has grown since they were set"
        )


def _late_nanny(reading: Reading, domains: Sequence[_Domain]) -> Iterable[str]:
    """Warn if a cgroup has no room left for the nannies, and what else runs in it, when they have to act."""
    for domain in domains[:-1]:
        members = domain.members.values()
        nannies = {r.nanny_process: r.processes.get(r.nanny_process, 0) for r in members if r.nanny_process}
        workers: dict[str, int] = {}
        for member in members:
            workers.update({n: size for n, size in member.processes.items() if n != member.nanny_process})
        room = domain.capacity - max(sum(nannies.values()), domain.held - sum(workers.values()))
        terminate = reading.terminate or 1.0
        if nannies and not domain.full and domain.taken * terminate > room > 0:
            share = room / terminate * max(1, reading.nthreads) / domain.threads
            yield (
                f"the kernel kills it before its nanny does: at {terminate:.0%} of the limit, "
                f"{domain.name} has no room for the nanny and what else runs there; "
                f"a limit of {_pages(share, reading.page)} leaves room"
            )
            return
