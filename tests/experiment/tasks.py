"""The tasks of each work, with what they are given: how large they are follows from the machine."""

from __future__ import annotations

from dataclasses import dataclass

from ami_builder.core.units import MIB
from tests.experiment.cases import Case, Work, generator

MODULE = "ami_builder_work"
"""What work.py is called inside the container, where nothing else of ours is."""

SPIKES, TASKS = 10, 200
ARRAY_TIMES = 2.5
AGENT_PERCENT = 4
_MATRIX = 4
_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A call of a function of work.py."""

    key: str
    function: str
    arguments: tuple[int | float | str, ...] = ()
    after: tuple[str, ...] = ()
    """Tasks whose results are further arguments, before the others."""
    kept: bool = True
    """Whether the client wants its result: only such tasks are counted."""
    taken: bool = False
    """Whether the client takes the result once it is there, instead of leaving it in memory or spilled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a machine has for Dask, in bytes."""

    total: int
    """MemTotal."""
    available: int
    """MemAvailable just before Dask started, to a page."""


def agent(work: Work, machine: Machine) -> tuple[int, int, float] | None:
    """Return how large a process beside Dask grows, in which steps, with which pauses; None without one."""
    if work is not Work.AGENT:
        return None
    return machine.total * AGENT_PERCENT // 100, MIB, 0.25


def tasks(case: Case, machine: Machine) -> tuple[Task, ...]:
    """Return the work of a run; what a task needs stands before it."""
    block = max(4 * MIB, min(128 * MIB, machine.total // 64 // MIB * MIB))
    match case.work:
        case Work.ARRAY:
            return _array(machine, block)
        case Work.LEAK_SLOW:
            return (_leak(machine, block // 2, 0.25),)
        case Work.LEAK_FAST:
            return (_leak(machine, block * 2, 0.02),)
        case Work.SPIKES | Work.AGENT | Work.RESTARTS:
            return _spikes(case, machine, block)
        case Work.MATRIX:
            return _matrix(machine)


def _array(machine: Machine, block: int) -> tuple[Task, ...]:
    count = round(ARRAY_TIMES * machine.total / block)
    blocks = [Task(key=f"block-{n}", function="block", arguments=(block,)) for n in range(count)]
    digests = [Task(key=f"digest-{n}", function="digest", after=(f"block-{n}",)) for n in range(count)]
    whole = Task(key="whole", function="combine", after=tuple(each.key for each in digests))
    return (*blocks, *digests, whole)


def _leak(machine: Machine, step: int, pause: float) -> Task:
    start = machine.available * 85 // 100
    return Task(key="leak", function="leak", arguments=(start, machine.total, step, pause), taken=True)


def _spikes(case: Case, machine: Machine, block: int) -> tuple[Task, ...]:
    draw = generator(case)
    spiking = set(draw.sample(range(TASKS), SPIKES))
    low = machine.available * 95 // 100
    found = []
    for n in range(TASKS):
        name, function = f"task-{n}", "ordinary"
        first: tuple[int | str, ...] = ()
        if n in spiking:
            target = draw.randint(low, machine.total)
            if case.work is not Work.RESTARTS:
                name, function = f"spike-{n}", "spike"
                first = (name, target, block * 2)
            elif target > machine.available:
                name, function = f"end-{n}", "end"
                first = (name,)
        found.append(Task(key=name, function=function, arguments=(*first, block, _SECONDS), taken=True))
    return tuple(found)


def _matrix(machine: Machine) -> tuple[Task, ...]:
    """Return the sums of products of two matrices of blocks: each takes 80 % of the memory."""
    size = machine.total * 80 // 100 // _MATRIX**2 // MIB * MIB
    span = range(_MATRIX)
    found = [
        Task(key=f"{name}-{i}-{j}", function="block", arguments=(size,), kept=False)
        for name in ("left", "right")
        for i in span
        for j in span
    ]
    for i in span:
        for j in span:
            parts = []
            for k in span:
                part, needs = f"part-{i}-{j}-{k}", (f"left-{i}-{k}", f"right-{k}-{j}")
                found.append(Task(key=part, function="multiply", after=needs, kept=False))
                parts.append(part)
            while len(parts) > 2:
                total = f"sum-{i}-{j}-{len(parts)}"
                found.append(Task(key=total, function="multiply", after=(parts[0], parts[1]), kept=False))
                parts = [total, *parts[2:]]
            found.append(Task(key=f"product-{i}-{j}", function="multiply", after=(parts[0], parts[1])))
    return tuple(found)
