"""The sections of a page from one record: chain of numbers, checks, steps, trends, files."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ami_builder.checks.machine_state import Incomplete, MachineState, SchedulerAnswer
from ami_builder.console import duration
from ami_builder.core import oom
from ami_builder.core.diff import Quantity, multiple
from ami_builder.core.options import Role
from ami_builder.core.records import (
    FIRST_BOOT,
    PRESSURE,
    Measurement,
    Outcome,
    RunStatus,
    StepRecord,
    Verdict,
)
from ami_builder.core.units import MIB
from ami_builder.report.page import ChainNumber, Start, Trend

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from datetime import datetime
    from pathlib import Path

    from ami_builder.state.runs import RecordedRun

_CHAIN = ("memory limit chain: ", "chain: ")  # the second: recorded by older versions
_INSIDE = " > "
_EVIDENCE = {".log", ".txt", ".json", ".jsonl", ".xml", ".md"}
_MOST_POINTS = 30


def columns(verdict: Verdict) -> tuple[tuple[str, str], ...]:
    """Return each start as machine and phase, grouped by machine."""
    machines = dict.fromkeys(result.machine for result in verdict.results)
    phases = dict.fromkeys(result.phase for result in verdict.results)
    there = {(result.machine, result.phase) for result in verdict.results}
    return tuple((m, p) for m in machines for p in phases if (m, p) in there)


def checks(verdict: Verdict) -> Mapping[str, tuple[Outcome | None, ...]]:
    """Return every check with its outcome at each start in `columns`."""
    found = {(r.name, r.machine, r.phase): r.outcome for r in verdict.results}
    return {r.name: tuple(found.get((r.name, *start)) for start in columns(verdict)) for r in verdict.results}


def failures(verdict: Verdict) -> Mapping[tuple[Outcome, str, str], Sequence[tuple[str, str]]]:
    """Return the failed checks, then the inconclusive ones, each in the order in which they ran.

    Starts at which a check has the same message are together.
    """
    found: dict[tuple[Outcome, str, str], list[tuple[str, str]]] = {}
    for outcome in (Outcome.FAILED, Outcome.INCONCLUSIVE):
        for result in verdict.results:
            if result.outcome is outcome:
                key = (outcome, result.name, result.message)
                found.setdefault(key, []).append((result.machine, result.phase))
    return found


def starts(verdict: Verdict, evidence: Path) -> tuple[Start, ...]:
    """Return the chain of numbers at each start, from the evidence that was collected then."""
    measured = {(one.machine, one.phase): one for one in verdict.measured}
    found = []
    for machine, phase in columns(verdict):
        if phase == PRESSURE:  # Dask does not start in this phase
            continue
        one = measured.get((machine, phase))
        outcomes = {
            r.outcome
            for r in verdict.results
            if (r.machine, r.phase) == (machine, phase) and r.name.startswith(_CHAIN)
        } - {Outcome.SKIPPED}
        variable = one.available if one else None
        found.append(
            Start(
                machine=machine,
                phase=phase,
                total=one.total if one else None,
                available=variable,
                times=_times(one) if one else (),
                growth=_growth(_folder(evidence, machine), phase),
                further=_further(_folder(evidence, machine), phase, variable),
                holds=_holds(outcomes),
            )
        )
    return tuple(found)


def _holds(outcomes: Collection[Outcome]) -> bool | None:
    if Outcome.FAILED in outcomes:
        return False
    return None if Outcome.INCONCLUSIVE in outcomes or not outcomes else True


def _times(one: Measurement) -> tuple[str, ...]:
    times = []
    if one.ssh_seconds is not None:
        times.append(f"ssh after {duration(one.ssh_seconds)}")
    if one.dask_seconds is not None:
        times.append(f"Dask after {duration(one.dask_seconds)}")
    if one.cpu_seconds is not None:
        ratio = f" ({multiple(one.boot_ratio)})" if one.boot_ratio is not None else ""
        times.append(f"{duration(one.cpu_seconds)} of CPU time{ratio}")
    return tuple(times)


def _growth(folder: Path, phase: str) -> str:
    """Return how much more the system used at the end than when Dask started, and what has grown."""
    try:
        found = json.loads(_json(folder / f"machine-{phase}.json")["growth"])
        growth, excess = int(found["growth"]), int(found["excess"])
        by = ", ".join(f"{one['cgroup']} +{int(one['bytes']) / MIB:.0f} MiB" for one in found["grown"])
    except (ValueError, KeyError, TypeError):  # older images compare nothing
        return ""
    beyond = f", {excess / MIB:.0f} MiB more than its reserve" if excess > 0 else ""
    moved = "shrunk" if growth < 0 else "grown"
    return f"the system has {moved} by {abs(growth) / MIB:.0f} MiB{beyond}{f' ({by})' if by else ''}"


def _folder(evidence: Path, machine: str) -> Path:
    """Return the evidence of a machine's last boot. A VM that panicked is booted again in another folder."""
    name, _, region = machine.partition(" in ")
    first = evidence / region / name.replace(" ", "")
    return max(first.parent.glob(f"{first.name}-[0-9]"), default=first)


def _further(folder: Path, phase: str, variable: int | None) -> tuple[ChainNumber, ...]:
    evidence = _json(folder / f"machine-{phase}.json")
    docker = kernel = limits = None
    dask = SchedulerAnswer(workers=(), error="")
    try:
        machine = MachineState.parse(evidence)
        docker = machine.container.memory if machine.container else None
        maximum = machine.levels[0].get("max") if machine.levels else ""
        kernel = int(maximum) if maximum.isdecimal() else 0 if maximum == "max" else None
        dask = machine.dask
    except Incomplete:
        pass
    workers = len(dask.workers)
    context = _json(folder / f"checks-{phase}" / "context.json")
    headroom = oom.nanny_headroom(
        context.get("headroom"), limit=variable or 0, role=Role(context.get("role") or Role.NONE)
    )
    if workers:
        limits = sum(worker.memory_limit for worker in dask.workers) + headroom
    name = f"memory_limit of {workers} workers" if workers > 1 else "memory_limit"
    if headroom:
        name += " + nanny_headroom"
    # Dask rounds each worker's share down.
    equal = limits is not None and variable is not None and variable - workers < limits <= variable
    return (
        ChainNumber(name="HostConfig.Memory", value=docker, equal=docker == variable),
        ChainNumber(name="memory.max", value=kernel, equal=kernel == variable),
        ChainNumber(name=name, value=limits, equal=equal),
    )


def _json(path: Path) -> Mapping[str, Any]:
    """Return the evidence in a file; empty if it is missing or truncated."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def took(run: RecordedRun) -> float | None:
    """Return how long a run took, in seconds; None if it has no steps."""
    return max((step.began + step.seconds for _, step in bars(run.record.own_steps)), default=None)


def bars(steps: Sequence[StepRecord]) -> tuple[tuple[int, StepRecord], ...]:
    """Return the steps as a tree, each with its depth and its start relative to the first step."""
    first = min((step.began for step in steps), default=0.0)
    inside: dict[str, list[StepRecord]] = {}
    known = {step.name for step in steps}
    for step in steps:
        parent = step.name.rpartition(_INSIDE)[0]
        inside.setdefault(parent if parent in known else "", []).append(step)

    def walk(parent: str, depth: int) -> Iterator[tuple[int, StepRecord]]:
        for step in inside.pop(parent, ()):
            name = step.name.removeprefix(f"{parent}{_INSIDE}") if parent else step.name
            yield depth, replace(step, name=name, began=step.began - first)
            yield from walk(step.name, depth + 1)

    return tuple(walk("", 0))


def trends(builds: Sequence[RecordedRun]) -> tuple[Trend, ...]:
    """Return size, memory for Dask, boot time and build time over the builds of an image."""
    size = [(run.when, float(run.baked.artifact.size)) for run in builds if run.baked]
    time = [
        (run.when, seconds)
        for run in builds
        if run.record.status is RunStatus.PASSED and (seconds := took(run)) is not None
    ]
    memory: dict[str, list[tuple[datetime, float]]] = {}
    boots: dict[str, list[tuple[datetime, float]]] = {}
    for run in builds:
        for one in run.record.verdict.measured if run.record.verdict else ():
            if one.phase != FIRST_BOOT:
                continue
            memory.setdefault(one.machine, []).append((run.when, one.available))
            if (ratio := one.boot_ratio) is not None:
                boots.setdefault(one.machine, []).append((run.when, ratio))
    named = [(f"Memory for Dask on {machine}", Quantity.AVAILABLE, memory[machine]) for machine in memory]
    named += [(f"CPU time to boot on {machine}", Quantity.BOOT, boots[machine]) for machine in boots]
    named += [("Size of the image", Quantity.SIZE, size), ("Time to build and verify", Quantity.TIME, time)]
    return tuple(
        Trend(title=title, quantity=quantity, points=tuple(points[-_MOST_POINTS:]))
        for title, quantity, points in named
        if len(points) > 1
    )


def links(directories: Sequence[Path], page: Path) -> Mapping[str, Mapping[str, str]]:
    """Return the logs and the evidence in these folders, with links relative to the page."""
    found: dict[str, Mapping[str, str]] = {}
    for directory in directories:
        machines = [*directory.glob("machines/*/"), *directory.glob("machines/*/*/")]
        # What pytest was given is no evidence.
        machines = sorted(path for path in machines if not path.name.startswith("checks-"))
        folders = [directory, directory / "logs", *machines]
        for folder in folders:
            files = sorted(file for file in folder.glob("*") if file.suffix in _EVIDENCE and file.is_file())
            if files:
                name = f"{directory.name}/{folder.relative_to(directory)}".removesuffix("/.")
                addresses = [quote(os.fsencode(os.path.relpath(file, page.parent))) for file in files]
                found[name] = {file.name: address for file, address in zip(files, addresses, strict=True)}
    return found
