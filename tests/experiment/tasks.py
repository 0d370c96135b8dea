"""The tasks of each work. Their sizes depend on the memory of the VM."""

from __future__ import annotations

from dataclasses import dataclass

from ami_builder.core.units import MIB
from tests.experiment.cases import Case, Work, generator

MODULE = "ami_builder_work"
"""The module name of work.py inside the container."""

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
    """Whether the client keeps its future. Only such tasks are counted."""
    taken: bool = False
    """Whether the client releases the future as soon as it has finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The memory of a VM, in bytes."""

    total: int
    """MemTotal."""
    available: int
    """MemAvailable just before Dask started, in whole pages."""


def agent(work: Work, memory: Memory) -> tuple[int, int, float] | None:
    """Return the final size, the step and the pause of the process that grows beside Dask, or None."""
    if work is not Work.AGENT:
        return None
    return memory.total * AGENT_PERCENT // 100, MIB, 0.25


def tasks(case: Case, memory: Memory) -> tuple[Task, ...]:
    """Return the tasks of a run. Each task comes after the tasks that it depends on."""
    block = max(4 * MIB, min(128 * MIB, memory.total // 64 // MIB * MIB))
    match case.work:
        case Work.ARRAY:
            return _array(memory, block)
        case Work.LEAK_SLOW:
            return (_leak(memory, block // 2, 0.25),)
        case Work.LEAK_FAST:
            return (_leak(memory, block * 2, 0.02),)
        case Work.SPIKES | Work.AGENT | Work.RESTARTS:
            return _spikes(case, memory, block)
        case Work.MATRIX:
            return _matrix(memory)


def _array(memory: Memory, block: int) -> tuple[Task, ...]:
    count = round(ARRAY_TIMES * memory.total / block)
    blocks = [Task(key=f"block-{n}", function="block", arguments=(block,)) for n in range(count)]
    digests = [Task(key=f"digest-{n}", function="digest", after=(f"block-{n}",)) for n in range(count)]
    whole = Task(key="whole", function="combine", after=tuple(each.key for each in digests))
    return (*blocks, *digests, whole)


def _leak(memory: Memory, step: int, pause: float) -> Task:
    start = memory.available * 85 // 100
    return Task(key="leak", function="leak", arguments=(start, memory.total, step, pause), taken=True)


def _spikes(case: Case, memory: Memory, block: int) -> tuple[Task, ...]:
    draw = generator(case)
    spiking = set(draw.sample(range(TASKS), SPIKES))
    low = memory.available * 95 // 100
    found = []
    for n in range(TASKS):
        name, function = f"task-{n}", "ordinary"
        first: tuple[int | str, ...] = ()
        if n in spiking:
            target = draw.randint(low, memory.total)
            if case.work is not Work.RESTARTS:
                name, function = f"spike-{n}", "spike"
                first = (name, target, block * 2)
            elif target > memory.available:
                name, function = f"end-{n}", "end"
                first = (name,)
        found.append(Task(key=name, function=function, arguments=(*first, block, _SECONDS), taken=True))
    return tuple(found)


def _matrix(memory: Memory) -> tuple[Task, ...]:
    """Return the product of two matrices of blocks. Each matrix takes 80 % of the memory."""
    size = memory.total * 80 // 100 // _MATRIX**2 // MIB * MIB
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
