"""How long a build or a verification takes on this host: from earlier runs, or from the bake's boot."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from ami_builder.config.schema import Image
from ami_builder.console import size
from ami_builder.core.records import RunRecord, RunStatus, StepRecord, TargetKind

LAST = 3
"""How many of the last runs count: the host and the images change over time."""

CACHED = "cached"
"""The detail of a step that had nothing to do. Its duration is ignored."""

BASE, CONTAINER = "base disk", "container"
"""Steps that run in parallel."""

# What the parts of a build take under emulation, in units of the seconds from the start of the bake until ssh
# answered. Measured on 2026-11-28 with QEMU 7.2 and 2 processors, otherwise idle: 20 s, then 28 s for the
# rest of the bake, 107 s for the phases, 45 s for memory pressure. To measure them again, see the steps in
# record.json, and "Connected to SSH!" in packer.log.
_REST_OF_BAKE = 1.4
_PHASES = 5.3
"""First boot, service restart and reboot, with their checks."""
_PRESSURE = 2.3
"""Memory pressure on a VM of 2 GiB; the work grows with the memory."""
_PRESSURE_BYTES = 2 << 30

_BAKE = "bake with Packer"
_VERIFY = "verify"
_MACHINE = "machine of "
_MEMORY_PRESSURE = "memory pressure"
_ACCELERATOR = "choose the accelerator"
_EMULATED = "TCG"

_MINUTE = 60
_ROUND = 10
"""Seconds that an estimate of less than two minutes is rounded to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """How long a build or a verification will take, and the source of that."""

    seconds: float
    runs: int = 0
    """How many earlier runs it is based on; 0 if it is based on the boot of the bake."""
    emulated: bool = False

    def __str__(self) -> str:
        amount, unit = _rounded(self.seconds)
        if self.runs:
            some = "1 earlier run" if self.runs == 1 else f"{self.runs} earlier runs"
            text = f"about {amount} {unit} on this host, judging by {some}"
        else:
            text = f"about {amount} more {'minutes' if unit == 'min' else 'seconds'}"
        return f"{text}: without KVM the VM is emulated, which is slow" if self.emulated else text


def of_build(
    known: Sequence[RunRecord],
    image: Image,
    target: TargetKind,
    *,
    ready: Collection[str],
    baked: bool,
    verify: bool,
    emulated: bool | None,
) -> Estimate | None:
    """Return how long a build with resolved inputs takes; None if that is unknown for a part of it.

    `known` are the records of earlier runs, the last one last. `ready` are steps that have nothing to do. An
    image that is `baked` is only verified. `emulated` is None if unknown, or if it does not apply.
    """
    fitting = _fitting(known, image, target, emulated)
    parts: dict[str, _Time | None] = {}
    if not baked:
        last = next((record for record in reversed(fitting) if _part(record, _BAKE) is not None), None)
        if last is None:
            return None
        for name in _parts(last):
            if name != _VERIFY and name not in ready:
                parts[name] = _median(fitting, lambda record, name=name: _part(record, name))  # type: ignore[misc]
    if verify:
        parts[_VERIFY] = _median(fitting, lambda record: _verification(record, image))
    times = [time for time in parts.values() if time is not None]
    if not times or len(times) < len(parts):
        return None
    together = [time.seconds for name, time in parts.items() if time and name in (BASE, CONTAINER)]
    alone = [time.seconds for name, time in parts.items() if time and name not in (BASE, CONTAINER)]
    return Estimate(
        seconds=max(together, default=0.0) + sum(alone),
        runs=len(frozenset[str]().union(*(time.runs for time in times))),
        emulated=bool(emulated),
    )


def of_verification(
    known: Sequence[RunRecord], image: Image, target: TargetKind, *, emulated: bool | None
) -> Estimate | None:
    """Return how long a verification takes; None without an earlier one on the same machines."""
    fitting = _fitting(known, image, target, emulated)
    time = _median(fitting, lambda record: _verification(record, image))
    if time is None:
        return None
    return Estimate(seconds=time.seconds, runs=len(time.runs), emulated=bool(emulated))


def from_boot(image: Image, seconds: float, *, verify: bool, processors: int) -> Estimate | None:
    """Return how long the rest of a build takes, if ssh answered on its emulated VM after `seconds`.

    None for a cloud image, whose boot was never compared with the rest.
    """
    if image.base.source is not None:
        return None
    units = _REST_OF_BAKE
    if verify:
        settings = image.verify
        pressure = _PRESSURE / _PRESSURE_BYTES if settings.pressure else 0.0
        at_once = max(1, processors // settings.cpus)
        machines = sorted((_PHASES + pressure * memory for memory in settings.memory), reverse=True)
        units += sum(machines[::at_once])
    return Estimate(seconds=units * seconds, emulated=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Time:
    """How long a part took, and in which runs."""

    seconds: float
    runs: frozenset[str]


def _median(known: Sequence[RunRecord], of: Callable[[RunRecord], float | None]) -> _Time | None:
    found = [(record.run_id, time) for record in reversed(known) if (time := of(record)) is not None][:LAST]
    if not found:
        return None
    return _Time(seconds=median(time for _, time in found), runs=frozenset(run_id for run_id, _ in found))


def _fitting(
    known: Sequence[RunRecord], image: Image, target: TargetKind, emulated: bool | None
) -> list[RunRecord]:
    """Return the successful runs of the same image and target, on the same kind of VM if that is known."""
    return [
        record
        for record in known
        if record.status is RunStatus.PASSED
        and record.image == image.name
        and record.artifact is not None
        and record.artifact.target is target
        and record.artifact.arch is image.arch
        and (emulated is None or _was_emulated(record) is emulated)
    ]


def _was_emulated(record: RunRecord) -> bool | None:
    chosen = [step.detail for step in record.own_steps if _last(step) == _ACCELERATOR]
    return chosen[-1].startswith(_EMULATED) if chosen else None


def _parts(record: RunRecord) -> list[str]:
    """Return the names of a build's parts, in order."""
    return list(dict.fromkeys(name for name, _ in _second(record)))


def _part(record: RunRecord, name: str) -> float | None:
    """Return how long a part of a build took; None if it had nothing to do, or does not exist."""
    done = [step.seconds for found, step in _second(record) if found == name and step.detail != CACHED]
    return sum(done) if done else None


def _second(record: RunRecord) -> Iterator[tuple[str, StepRecord]]:
    for step in record.own_steps:
        top, _, name = step.name.partition(" > ")
        if top == f"build {record.image}" and name and " > " not in name and step.status is RunStatus.PASSED:
            yield name, step


def _verification(record: RunRecord, image: Image) -> float | None:
    """Return how long the verification in a run took; None without one on the same machines."""
    names = [_last(step) for step in record.own_steps]
    machines = {name.removeprefix(_MACHINE) for name in names if name.startswith(_MACHINE)}
    settings = image.verify
    if machines not in ({size(memory) for memory in settings.memory}, set(settings.instance_types)):
        return None
    if (_MEMORY_PRESSURE in names) is not settings.pressure:
        return None
    if (inside := _part(record, _VERIFY)) is not None:
        return inside
    alone = [s.seconds for s in record.own_steps if s.name.startswith(f"{_VERIFY} ") and " > " not in s.name]
    return alone[-1] if alone else None


def _last(step: StepRecord) -> str:
    return step.name.rpartition(" > ")[2]


def _rounded(seconds: float) -> tuple[int, str]:
    tens = max(_ROUND, _ROUND * math.floor(seconds / _ROUND + 0.5))
    if tens < 2 * _MINUTE:
        return tens, "s"
    return math.floor(seconds / _MINUTE + 0.5), "min"
