"""The cases: a policy and a work on a VM. Also: their order, and the limit that each policy sets."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from typing import TYPE_CHECKING

from ami_builder.core.units import GIB, MIB
from tests.experiment.layers import OFF

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

METHOD = 1
"""Increase it with every change of the work or the measurements: results of other methods are ignored."""
PAGE = 4096

Kind = tuple[int, int]
"""A VM's memory in bytes, and its number of CPUs."""


class LimitPolicy(StrEnum):
    """How Dask's memory limit is chosen."""

    NONE = "none"
    """No limit: Dask uses the memory of the whole VM."""
    AVAILABLE = "available"
    """AVAILABLE_MEMORY_FOR_DASK with a `memory.reserve` of 0."""
    HEADROOM_1 = "headroom-1"
    """The same, less 1 %."""
    HEADROOM_2 = "headroom-2"
    """The same, less 2 %."""
    NANNY = "nanny"
    """As `HEADROOM_2`, and Dask's own limit is 64 MiB below that of its cgroup."""
    HEADROOM = "headroom"
    """As `AVAILABLE`, less 5 %."""
    FRACTION = "fraction"
    """95 % of MemTotal."""
    GKE = "gke"
    """What GKE's formula leaves of MemTotal."""
    DASK_ONLY = "dask-only"
    """Dask's own limit is that of `AVAILABLE`, and no cgroup has a limit."""
    MEASURED = "measured"
    """As `AVAILABLE`, less the files that the services which must respond have mapped."""
    NANNY_8 = "nanny-8"
    """As `AVAILABLE`, and Dask's own limit is 8 MiB below that of its cgroup."""
    NANNY_16 = "nanny-16"
    NANNY_32 = "nanny-32"
    NANNY_64 = "nanny-64"
    PROGRAMS = "programs"
    """As `AVAILABLE`, less what the image reserves for the programs of the system."""
    PROGRAMS_1 = "programs-1"
    """The same, less 1 %."""
    DEFAULT = "default"
    """The image's own settings and its own Compose file."""
    DEFAULT_2 = "default-2"
    """The same with a reserve of 2 %, the default until November 2026."""
    FOLLOW = "follow"
    """The same with `memory.follow` and a reserve of 0, whatever the image has."""
    FOLLOW_1 = "follow-1"
    """The same with a reserve of 1 %."""

    @property
    def text(self) -> str:
        """A description."""
        return _POLICIES[self]


class Work(StrEnum):
    """What the Dask worker computes."""

    ARRAY = "array"
    """Blocks of random bytes, 2.5 times as large as the memory, kept and then reduced."""
    LEAK_SLOW = "leak-slow"
    """One task that grows from below the available memory to the memory of the whole VM."""
    LEAK_FAST = "leak-fast"
    """The same, as fast as possible."""
    SPIKES = "spikes"
    """200 tasks. At the first attempt, 5 % of them use between 95 % of the available memory and MemTotal."""
    MATRIX = "matrix"
    """A product of matrices whose blocks don't fit into memory together."""
    AGENT = "agent"
    """The spikes, beside an agent that grows by 4 % of the VM after memory was measured."""
    RESTARTS = "restarts"
    """The control for the spikes: tasks that would use too much kill their worker instead, and use none."""

    @property
    def text(self) -> str:
        """A description."""
        return _WORK[self]


_POLICIES = {
    LimitPolicy.NONE: "no limit",
    LimitPolicy.AVAILABLE: "all that is available",
    LimitPolicy.HEADROOM_1: "available less 1 %",
    LimitPolicy.HEADROOM_2: "available less 2 %",
    LimitPolicy.NANNY: "available less 2 %; Dask's own limit 64 MiB lower",
    LimitPolicy.HEADROOM: "available less 5 %",
    LimitPolicy.FRACTION: "95 % of MemTotal",
    LimitPolicy.GKE: "GKE's formula",
    LimitPolicy.DASK_ONLY: "all that is available, as Dask's own limit only",
    LimitPolicy.MEASURED: "available less what the system has mapped of files",
    LimitPolicy.NANNY_8: "all that is available; Dask's own limit 8 MiB lower",
    LimitPolicy.NANNY_16: "all that is available; Dask's own limit 16 MiB lower",
    LimitPolicy.NANNY_32: "all that is available; Dask's own limit 32 MiB lower",
    LimitPolicy.NANNY_64: "all that is available; Dask's own limit 64 MiB lower",
    LimitPolicy.PROGRAMS: "available less what the image reserves for the system's programs",
    LimitPolicy.PROGRAMS_1: "the same less 1 %",
    LimitPolicy.DEFAULT: "the image's own settings",
    LimitPolicy.DEFAULT_2: "the image's own settings, but a reserve of 2 %",
    LimitPolicy.FOLLOW: "the image's own settings, but a reserve of 0 and memory.follow",
    LimitPolicy.FOLLOW_1: "the image's own settings, but a reserve of 1 % and memory.follow",
}
HEADROOM = {
    LimitPolicy.NANNY: 64 * MIB,
    LimitPolicy.NANNY_8: 8 * MIB,
    LimitPolicy.NANNY_16: 16 * MIB,
    LimitPolicy.NANNY_32: 32 * MIB,
    LimitPolicy.NANNY_64: 64 * MIB,
}
"""`memory.nanny_headroom` under these policies."""
RESERVE_PERCENT = {
    LimitPolicy.AVAILABLE: 0,
    LimitPolicy.HEADROOM_1: 1,
    LimitPolicy.HEADROOM_2: 2,
    LimitPolicy.NANNY: 2,
    LimitPolicy.HEADROOM: 5,
    LimitPolicy.DASK_ONLY: 0,
    LimitPolicy.NANNY_8: 0,
    LimitPolicy.NANNY_16: 0,
    LimitPolicy.NANNY_32: 0,
    LimitPolicy.NANNY_64: 0,
    LimitPolicy.PROGRAMS: 0,
    LimitPolicy.PROGRAMS_1: 1,
    LimitPolicy.DEFAULT_2: 2,
    LimitPolicy.FOLLOW: 0,
    LimitPolicy.FOLLOW_1: 1,
}
"""`memory.reserve` under these policies, in percent. It replaces the image's own."""
TWO_PERCENT = LimitPolicy.HEADROOM_2
"""The policy with the reserve that was the default in 2026."""
_WORK = {
    Work.ARRAY: "W1: random blocks of 2.5 × memory, kept and reduced",
    Work.LEAK_SLOW: "W2: a leak up to the whole VM, slow",
    Work.LEAK_FAST: "W2: a leak up to the whole VM, fast",
    Work.SPIKES: "W3: 200 tasks, of which 5 % spike at first",
    Work.MATRIX: "W4: a product of matrices that spills",
    Work.AGENT: "W5: the same as W3, beside an agent that grows",
    Work.RESTARTS: "W3's control: workers are killed, but use no memory",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run of a policy and a work on a VM."""

    memory: int
    cpus: int
    policy: LimitPolicy
    work: Work
    repeat: int
    """1 for the first run of this kind."""
    seed: int
    """Of the whole experiment. The order of the runs and the random parts of the work depend on it."""
    layers: str = OFF
    """The layers of defence that are on; see layers.py. Images of 2026 had none."""

    @property
    def name(self) -> str:
        """A short unique name, usable as a file name."""
        layers = "" if self.layers == OFF else f"-{self.layers}"
        return (
            f"{self.memory // MIB}MiB-{self.cpus}cpu-{self.policy}{layers}-{self.work}"
            f"-seed{self.seed}-{self.repeat}"
        )

    @property
    def kind(self) -> Kind:
        """The kind of VM. Only runs on the same kind are compared."""
        return self.memory, self.cpus

    @property
    def draw(self) -> int:
        """The seed of the work: the same under each policy and with all layers, different for each repeat."""
        return _number(self.seed, self.memory, self.cpus, self.work, self.repeat)


def plan(
    *,
    memory: Sequence[int],
    cpus: int,
    policies: Sequence[LimitPolicy],
    work: Sequence[Work],
    layers: Sequence[str] = (OFF,),
    repeat: int,
    seed: int,
) -> tuple[Case, ...]:
    """Return all cases in an order that depends on the seed.

    All first runs come before all second runs, so that an experiment that is cut short has every kind.
    """
    wanted: list[Case] = []
    for number in range(1, repeat + 1):
        cases = [
            Case(memory=m, cpus=cpus, policy=p, work=w, layers=each, repeat=number, seed=seed)
            for m, p, w in product(dict.fromkeys(memory), dict.fromkeys(policies), dict.fromkeys(work))
            for each in dict.fromkeys(layers)
        ]
        # Sorted by a hash of the name: adding cases doesn't change the order of the others.
        wanted += sorted(cases, key=lambda case: _number(case.seed, case.name))
    return tuple(wanted)


def left(cases: Sequence[Case], made: Iterable[Case]) -> tuple[Case, ...]:
    """Return the cases that have not been run, in their order."""
    known = set(made)
    return tuple(case for case in cases if case not in known)


def generator(case: Case) -> random.Random:
    """Return the random generator for the work."""
    return random.Random(case.draw)


def fraction_limit(total: int) -> int:
    """Return 95 % of MemTotal, in whole pages."""
    return total * 95 // 100 // PAGE * PAGE


def gke_limit(total: int) -> int:
    """Return what GKE's formula leaves of MemTotal, in whole pages.

    cloud.google.com/kubernetes-engine/docs/concepts/plan-node-sizes: 255 MiB below 1 GiB, else 25 % of the
    first 4 GiB, 20 % of the next 4, 10 % of the next 8, 6 % of the next 112, 2 % above; and 100 MiB more
    for eviction.
    """
    if total < GIB:
        reserved = 255 * MIB
    else:
        reserved, rest = 0, total
        for width, percent in ((4 * GIB, 25), (4 * GIB, 20), (8 * GIB, 10), (112 * GIB, 6), (rest, 2)):
            reserved += min(rest, width) * percent // 100
            rest -= min(rest, width)
    return max(PAGE, (total - reserved - 100 * MIB) // PAGE * PAGE)


def work_seconds(case: Case) -> float:
    """Return how long the work of a run may take: about twice what it takes with the limit."""
    gib = case.memory / GIB
    match case.work:
        case Work.ARRAY:
            return 60 + 60 * gib
        case Work.MATRIX:
            return 120 + 330 * gib
        case Work.LEAK_SLOW | Work.LEAK_FAST:
            return 120 + 15 * gib
        case Work.SPIKES | Work.AGENT | Work.RESTARTS:
            return 180 + 30 * gib


def expected_limit(policy: LimitPolicy, *, total: int, measured: int) -> int | None:
    """Return the limit that Dask must have; None if the image decides.

    `measured` is AVAILABLE_MEMORY_FOR_DASK on the VM.
    """
    match policy:
        case LimitPolicy.NONE:
            return total
        case LimitPolicy.FRACTION:
            return fraction_limit(total)
        case LimitPolicy.GKE:
            return gke_limit(total)
        case LimitPolicy.DEFAULT | LimitPolicy.DEFAULT_2 | LimitPolicy.FOLLOW | LimitPolicy.FOLLOW_1:
            return None
        case _:
            return measured - HEADROOM.get(policy, 0)


def _number(*parts: object) -> int:
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big")
