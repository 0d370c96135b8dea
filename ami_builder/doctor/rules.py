"""Whether the memory limits of a running cluster's workers are right: pure; sizes are bytes.

What is available to Dask is bounded by nested *domains*: every cgroup above a worker that has a limit, and
the machine. A domain has a capacity, and all workers in it have to get along with it together:

- a cgroup: its limit, for that is what the kernel enforces, whatever Dask believes;
- a machine: MemAvailable now, and what the workers and their nannies hold now (anonymous and shared pages,
  for what their files map is in MemAvailable already); of a cgroup with a limit, all that it holds, for its
  limit is for a scheduler beside the worker as well. That is what would be available if they were gone: the
  same number that an image of ours measures just before Dask starts.

A worker's *share* of a domain is its part of the capacity by threads, as Dask itself divides memory. Then
its limit is

- missing where Dask has none: nothing is spilled, paused or restarted;
- too high where the limits in a domain add up to more than the capacity, and this one to more than its
  share: the kernel would act before Dask. A machine's memory is never whole Dask's, so limits that add up
  to it are too high however large it is;
- needlessly low where every domain has room left, and this one's part of it is more than a tenth of its
  share and 128 MiB. Less than that is a reserve that somebody may have meant: for agents that grow, or for
  the nanny;
- right otherwise.

Whoever follows all the advice ends with limits that no domain is too small for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from ami_builder.core.units import MIB

NOISE = 100
"""A machine's reading may be off by a hundredth: a fifth of the 5 % in which the nanny acts."""
RUNTIME = 32 * MIB
"""Or by so much: what comes up outside a container with it. Docker's shim and Compose took 26 MB."""
LEAST_RAISE = 128 * MIB
IN_MEMORY = frozenset({"tmpfs", "ramfs"})


class Health(StrEnum):
    """What is said of a worker's limit."""

    RIGHT = "right"
    MISSING = "missing"
    TOO_HIGH = "too high"
    TOO_LOW = "needlessly low"
    UNKNOWN = "unknown"
    SILENT = "no answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A cgroup with a limit that a worker is in."""

    id: str
    """One on its machine."""
    path: str
    limit: int
    swap: int | None = None
    """How much swap it may use; None: as much as there is."""
    held: int = 0
    """What it holds that the kernel can't drop, of all that are in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one worker told."""

    boot: str
    """The machine's boot id: workers with the same one share a kernel."""
    limit: int | None
    nthreads: int
    total: int
    available: int
    swap: int = 0
    page: int = 4096
    levels: tuple[Level, ...] = ()
    """From its own cgroup up."""
    processes: Mapping[str, int] = field(default_factory=dict)
    """Name of a process on the machine -> what it holds: the worker, and its nanny."""
    nanny: bool = True
    nanny_process: str | None = None
    rss: int = 0
    target: float | None = None
    spill: float | None = None
    pause: float | None = None
    terminate: float | None = None
    directory: str = ""
    spill_system: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One worker that the scheduler knows, and its reading, or why there is none."""

    address: str
    name: str = ""
    host: str = ""
    reading: Reading | None = None
    problem: str = ""
    silent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What is said of one worker."""

    worker: Worker
    health: Health
    reason: str
    advised: int | None = None
    """The limit to set, in whole pages; None where nothing is to be changed, or can be said."""
    excess: int | None = None
    """How much the limit is above (below: negative) the one advised."""
    warnings: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class _Domain:
    """What several workers have to get along with."""

    name: str
    capacity: int
    total: int | None
    """MemTotal, of a machine."""
    held: int = 0
    """What a cgroup holds now."""
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
        """Add up the limits; who has none is to get its share, so counts with that."""
        readings = self.members.values()
        self.threads = sum(max(1, r.nthreads) for r in readings)
        self.taken = sum(r.limit or int(self.share(r)) for r in readings)
        self.wanted = sum(max(0.0, self.share(r) - r.limit) for r in readings if r.limit)
        # Dask rounds down to a byte what it divides, and so may miss the whole machine by a byte a worker.
        self.whole = self.total is not None and self.taken >= self.total - len(self.members)
        self.full = self.whole or self.taken > self.capacity + sum(self.slack(r) for r in readings)

    def slack(self, reading: Reading) -> float:
        """Return how much more than its share is no fault: a reading's noise, or what a page rounds off."""
        return self.page if self.total is None else max(self.capacity / NOISE, RUNTIME) * self.part(reading)

    def exceeded_by(self, reading: Reading) -> bool:
        over = (reading.limit or 0) - self.share(reading)
        return self.full and over > (0 if self.whole else self.slack(reading))

    def room(self, reading: Reading) -> float:
        """Return how much more this worker may have when all that have less than their share get more."""
        lacks = max(0.0, self.share(reading) - (reading.limit or 0))
        spare = max(0, self.capacity - self.taken)
        return lacks * min(1.0, spare / self.wanted) if self.wanted else 0.0


def diagnose(workers: Sequence[Worker]) -> tuple[Diagnosis, ...]:
    """Judge every worker's limit beside those of its neighbours, in the order given."""
    read = {w.address: w.reading for w in workers if w.reading is not None}
    domains = _domains(read)
    return tuple(
        _unread(worker) if worker.reading is None else _judge(worker, worker.reading, domains[worker.address])
        for worker in workers
    )


def effective(reading: Reading) -> int | None:
    """Return the least limit of the cgroups that a worker is in."""
    return min((level.limit for level in reading.levels), default=None)


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
    # A cgroup in another one that counts is in there already.
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
        worker=worker, health=Health.SILENT if worker.silent else Health.UNKNOWN, reason=worker.problem
    )


def _judge(worker: Worker, reading: Reading, domains: Sequence[_Domain]) -> Diagnosis:
    tightest = min(domains, key=lambda domain: domain.share(reading))
    share = _pages(tightest.share(reading), reading.page)
    warnings = tuple(_warnings(reading, domains))
    if not reading.limit:
        reason = f"Dask manages no memory here; this is its share of {tightest.name}"
        return Diagnosis(
            worker=worker, health=Health.MISSING, reason=reason, advised=share, warnings=warnings
        )
    exceeded = [domain for domain in domains if domain.exceeded_by(reading)]
    if exceeded:
        return Diagnosis(
            worker=worker,
            health=Health.TOO_HIGH,
            reason=_excess(exceeded[0]),
            advised=share,
            excess=reading.limit - share,
            warnings=warnings,
        )
    binding = min(domains, key=lambda domain: domain.room(reading))
    advised = _pages(reading.limit + binding.room(reading), reading.page)
    if advised - reading.limit > max(LEAST_RAISE, tightest.share(reading) / 10):
        return Diagnosis(
            worker=worker,
            health=Health.TOO_LOW,
            reason=f"{binding.name} has that much more for it",
            advised=advised,
            excess=reading.limit - advised,
            warnings=warnings,
        )
    return Diagnosis(worker=worker, health=Health.RIGHT, reason=f"fits {tightest.name}", warnings=warnings)


def _excess(domain: _Domain) -> str:
    count = len(domain.members)
    limits = "it is" if count == 1 else f"the limits of its {count} workers are together"
    if domain.whole:
        return f"{limits} the machine's whole memory, which the system needs a part of"
    if domain.total is None:
        return f"{limits} more than {domain.name} is allowed"
    return f"{limits} more than the machine has available"


def _pages(size: float, page: int) -> int:
    # Not 0, which is no limit to Dask.
    return max(1, int(size) // page) * page


def _warnings(reading: Reading, domains: Sequence[_Domain]) -> Iterable[str]:
    if reading.spill_system in IN_MEMORY:
        yield f"spills to {reading.spill_system} ({reading.directory}), which is memory: use a disk"
    if reading.levels and reading.swap and not any(level.swap == 0 for level in reading.levels):
        yield "its cgroup may use swap: Dask doesn't count it, and slows down instead of spilling"
    if not reading.nanny:
        yield "has no nanny: nobody restarts it when it reaches its limit"
    elif reading.limit and not reading.terminate:
        yield "terminate is off: its nanny doesn't restart it when it reaches its limit"
    elif reading.limit:
        yield from _late_nanny(reading, domains)
    if reading.limit:
        for key in ("target", "spill", "pause"):
            if not getattr(reading, key):
                yield f"{key} is off (distributed.worker.memory.{key})"


def _late_nanny(reading: Reading, domains: Sequence[_Domain]) -> Iterable[str]:
    """Say where the nannies, and what else is there, don't fit into what a cgroup has left when they act."""
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
                f"the kernel kills it before its nanny does: at {terminate:.0%} of the limit the nanny and "
                f"what else runs there don't fit into {domain.name}; "
                f"a limit of {_pages(share, reading.page)} leaves room"
            )
            return
