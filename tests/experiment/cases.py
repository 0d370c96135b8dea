"""What is compared: policies, work, machines; and which runs of them are still to be made."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import product

from ami_builder.core.units import GIB, MIB

METHOD = 1
"""Goes up with every change of the work or of what is measured: results of another method don't compare."""
PAGE = 4096
NANNY_HEADROOM = 64 * MIB
"""What `memory.nanny_headroom` is under the policy `NANNY`."""

Kind = tuple[int, int]
"""A machine's memory in bytes, and its CPUs."""


class Policy(StrEnum):
    """What becomes Dask's memory limit."""

    NONE = "none"
    """Nothing: Dask finds the whole machine."""
    AVAILABLE = "available"
    """AVAILABLE_MEMORY_FOR_DASK, as the image measures it, with a `memory.reserve` of 0."""
    HEADROOM_2 = "headroom-2"
    """The same, less 2 %."""
    NANNY = "nanny"
    """As before, and Dask is told `NANNY_HEADROOM` less than its cgroup has."""
    HEADROOM = "headroom"
    """As `AVAILABLE`, less 5 %."""
    FRACTION = "fraction"
    """95 % of MemTotal."""
    GKE = "gke"
    """What GKE's formula leaves of MemTotal."""
    DASK_ONLY = "dask-only"
    """The same as `AVAILABLE` is told to Dask, and no cgroup has a limit."""

    @property
    def text(self) -> str:
        """What it is, for a person."""
        return _POLICIES[self]


class Work(StrEnum):
    """What Dask is given to do."""

    ARRAY = "array"
    """2.5 times the memory in blocks of random bytes, all kept and then reduced."""
    LEAK_SLOW = "leak-slow"
    """One task that takes more and more memory, from below what is available to the whole machine."""
    LEAK_FAST = "leak-fast"
    """The same, as fast as memory can be filled."""
    SPIKES = "spikes"
    """200 tasks; 5 % of them reach into that zone at their first attempt, and all others are ordinary."""
    MATRIX = "matrix"
    """A product of matrices of blocks, of which more are needed than memory holds."""
    AGENT = "agent"
    """The spikes, beside a logging agent that grows by 4 % of the machine after memory was measured."""
    RESTARTS = "restarts"
    """The control for the spikes: those that would take more than there is end their worker and take none."""

    @property
    def text(self) -> str:
        """What it is, for a person."""
        return _WORK[self]


_POLICIES = {
    Policy.NONE: "no limit",
    Policy.AVAILABLE: "all that is available",
    Policy.HEADROOM_2: "available less 2 %",
    Policy.NANNY: f"available less 2 %; Dask told {NANNY_HEADROOM // MIB} MiB less",
    Policy.HEADROOM: "available less 5 %",
    Policy.FRACTION: "95 % of MemTotal",
    Policy.GKE: "GKE's formula",
    Policy.DASK_ONLY: "all that is available, told to Dask alone",
}
RESERVE_PERCENT = {
    Policy.AVAILABLE: 0,
    Policy.HEADROOM_2: 2,
    Policy.NANNY: 2,
    Policy.HEADROOM: 5,
    Policy.DASK_ONLY: 0,
}
"""What `memory.reserve` is under these policies, whatever the image's own is."""
DEFAULT = Policy.HEADROOM_2
"""The policy with the default of `memory.reserve`."""
_WORK = {
    Work.ARRAY: "W1: random blocks of 2.5 × memory, kept and reduced",
    Work.LEAK_SLOW: "W2: a leak up to the whole machine, slow",
    Work.LEAK_FAST: "W2: a leak up to the whole machine, fast",
    Work.SPIKES: "W3: 200 tasks, of which 5 % spike at first",
    Work.MATRIX: "W4: a product of matrices that spills",
    Work.AGENT: "W5: the same as W3, beside an agent that grows",
    Work.RESTARTS: "W3's control: workers end, and no memory is taken",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run: a policy and a work on a machine, once."""

    memory: int
    cpus: int
    policy: Policy
    work: Work
    repeat: int
    """1 for the first run of this kind."""
    seed: int
    """Of the whole experiment; decides the order, and through `draw` what is random in the work."""

    @property
    def name(self) -> str:
        """Short, unique, and fit for a file's name."""
        return (
            f"{self.memory // MIB}MiB-{self.cpus}cpu-{self.policy}-{self.work}-seed{self.seed}-{self.repeat}"
        )

    @property
    def kind(self) -> Kind:
        """The machine: what is compared runs on the same."""
        return self.memory, self.cpus

    @property
    def draw(self) -> int:
        """What seeds the work: the same under each policy, and another for each repeat."""
        return _number(self.seed, self.memory, self.cpus, self.work, self.repeat)


def plan(
    *,
    memory: Sequence[int],
    cpus: int,
    policies: Sequence[Policy],
    work: Sequence[Work],
    repeat: int,
    seed: int,
) -> tuple[Case, ...]:
    """Return all runs, in the order that the seed shuffles them into.

    Every first run comes before every second one, so that an experiment that is cut short has something of
    all.
    """
    wanted: list[Case] = []
    for number in range(1, repeat + 1):
        cases = [
            Case(memory=m, cpus=cpus, policy=p, work=w, repeat=number, seed=seed)
            for m, p, w in product(dict.fromkeys(memory), dict.fromkeys(policies), dict.fromkeys(work))
        ]
        # By each case's own number: what else is asked for doesn't move it against the others.
        wanted += sorted(cases, key=lambda case: _number(case.seed, case.name))
    return tuple(wanted)


def left(cases: Sequence[Case], made: Iterable[Case]) -> tuple[Case, ...]:
    """Return the runs that are still to be made, in their order."""
    known = set(made)
    return tuple(case for case in cases if case not in known)


def generator(case: Case) -> random.Random:
    """Return what the work draws from."""
    return random.Random(case.draw)


def fraction_limit(total: int) -> int:
    """Return 95 % of MemTotal, to a page."""
    return total * 95 // 100 // PAGE * PAGE


def gke_limit(total: int) -> int:
    """Return what GKE's formula leaves of MemTotal, to a page.

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


def expected_limit(policy: Policy, *, total: int, measured: int) -> int:
    """Return the limit that Dask has to have; `measured` is AVAILABLE_MEMORY_FOR_DASK on that machine."""
    match policy:
        case Policy.NONE:
            return total
        case Policy.AVAILABLE | Policy.HEADROOM_2 | Policy.HEADROOM | Policy.DASK_ONLY:
            return measured
        case Policy.NANNY:
            return measured - NANNY_HEADROOM
        case Policy.FRACTION:
            return fraction_limit(total)
        case Policy.GKE:
            return gke_limit(total)


def _number(*parts: object) -> int:
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big")
