"""What a build costs here and in another commit: `python -m tests.benchmarks against`

Clones this checkout's HEAD and the other commit into fresh folders and runs `scripts/ami-builder build` in
both, in turns (old, new, new, old), so that neither has the better host. A cold build has an empty HOME,
empty caches and no virtual environment; system packages stay installed. With --cached a `build --force`
follows in the same clones: it bakes and verifies again, with base and container cached.

Prints a Markdown table on stdout; the raw figures are kept as JSON. CPU time is that of every process of the
build. As root it is counted by a cgroup, phase by phase; otherwise it is that of all processes that were
waited for, as a whole.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

from ami_builder.core.errors import AmiBuilderError
from ami_builder.state.workspace import write_atomically
from ami_builder.system import processes
from tests.benchmarks import cgroups, host, records
from tests.vm.conftest import ROOT

FOLDER = ROOT / ".cache" / "benchmarks"
OLD_COMMIT = "4bf1c7a"
SAMPLE_SECONDS = 0.25
SET_UP = "set-up"
PRESSURE = "memory pressure"

_CACHED = "cached"
_LEAST_SECONDS = 1.0
"""A phase that is shorter on both sides is no line of the table."""
_UNSEEN = 0.02
"""The difference between both ways to count CPU time that is worth a remark."""
_OVERLAP = 0.05
"""Seconds by which steps that follow each other may seem to overlap."""
_ACCELERATOR = "AMI_BUILDER_ACCELERATOR"
_MISSING_PACKAGES = """
. scripts/lib/setup.sh
look_for_programs run
printf '%s\\n' ${packages[@]+"${packages[@]}"}
"""


class Side(StrEnum):
    """Whose build."""

    OLD = "old"
    NEW = "new"


class Kind(StrEnum):
    """What was there before a build."""

    COLD = "cold"
    CACHED = "base and container cached"


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of a build; times are seconds since 1970."""

    name: str
    began: float
    ended: float
    cpu: float | None = None

    @property
    def wall(self) -> float:
        """Seconds."""
        return self.ended - self.began


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """One build that was measured; times are seconds."""

    side: Side
    kind: Kind
    turn: int
    commit: str
    status: int
    wall: float
    cpu: float
    cpu_waited: float
    """CPU time of all processes that were waited for: `cpu` as another method counts it."""
    load: float
    """The host's load average before."""
    phases: tuple[Phase, ...]
    steps: tuple[Mapping[str, Any], ...]
    """As in the run's record."""
    second_try: bool
    """Whether the steps of memory pressure were done twice."""
    wrong: tuple[str, ...]
    """The checks that failed or are inconclusive, with their messages, or else the error."""

    @property
    def complete(self) -> bool:
        """Whether it did all of its work, whatever the checks said of it."""
        return self.status == 0 or any(
            step["status"] == "passed" and _leaf(step["name"]) == PRESSURE for step in self.steps
        )


def turns(count: int) -> list[tuple[int, Side]]:
    """Return who builds when, in so many pairs: the one that was second in a pair is first in the next."""
    pairs = [(Side.OLD, Side.NEW), (Side.NEW, Side.OLD)]
    return [(turn + 1, side) for turn in range(count) for side in pairs[turn % 2]]


def used(samples: Sequence[tuple[float, float]], began: float, ended: float) -> float:
    """Return the CPU seconds between two times; `samples` are times and CPU seconds so far, both rising."""
    return _at(samples, ended) - _at(samples, began)


def _at(samples: Sequence[tuple[float, float]], when: float) -> float:
    if when <= samples[0][0]:
        return samples[0][1]
    for (before, low), (after, high) in pairwise(samples):
        if before <= when <= after:
            part = (when - before) / (after - before) if after > before else 1.0
            return low + part * (high - low)
    return samples[-1][1]


def phases_of(record: Mapping[str, Any], started: float) -> list[Phase]:
    """Return the innermost steps of a run's record, by when they began, and the set-up before the first.

    `started` is when the command was started. Steps that ran side by side are one phase, because their CPU
    time can't be divided; what came out of the cache is none.
    """
    steps: Sequence[Mapping[str, Any]] = record.get("steps") or ()
    first = next((step for step in steps if step["name"].startswith("build ")), None)
    if first is None:
        return []
    # The record begins when that step does, and steps count from the first of all.
    zero = datetime.fromisoformat(record["started"]).timestamp() - first["began"]
    leaves = [
        Phase(
            name=_leaf(step["name"]),
            began=zero + step["began"],
            ended=zero + step["began"] + step["seconds"],
        )
        for step in steps
        if step.get("detail") != _CACHED
        and not any(other["name"].startswith(f"{step['name']} > ") for other in steps)
    ]
    found: list[Phase] = [Phase(name=SET_UP, began=started, ended=zero)]
    for phase in sorted(leaves, key=lambda each: each.began):
        last = found[-1]
        if phase.began < last.ended - _OVERLAP:
            names = sorted({*last.name.split(" and "), phase.name})
            found[-1] = Phase(name=" and ".join(names), began=last.began, ended=max(last.ended, phase.ended))
        else:
            found.append(phase)
    return found


def _leaf(path: str) -> str:
    """Return a step's own name, without what says more about it."""
    return path.rpartition(" > ")[2].partition(", ")[0]


def table(builds: Sequence[Build]) -> Iterator[str]:
    """Yield the lines of the Markdown table: cold, cached, memory pressure, then each phase; medians."""
    yield "| | wall, old | wall, new | ratio | CPU, old | CPU, new | ratio |"
    yield "|---|---|---|---|---|---|---|"
    counted = [build for build in builds if build.complete]
    for kind in Kind:
        some = [build for build in counted if build.kind is kind]
        if some:
            walls = {side: [build.wall for build in some if build.side is side] for side in Side}
            cpus = {side: [build.cpu for build in some if build.side is side] for side in Side}
            yield _row(f"**{kind}**", walls, cpus)
    names = list(dict.fromkeys(phase.name for build in counted for phase in build.phases))
    for name in sorted(names, key=lambda each: each != PRESSURE):
        # The set-up of a cached build is the start of the program.
        some = [build for build in counted if name != SET_UP or build.kind is Kind.COLD]
        walls = {side: list(_sums(some, side, name, cpu=False)) for side in Side}
        cpus = {side: list(_sums(some, side, name, cpu=True)) for side in Side}
        if any(times and statistics.median(times) >= _LEAST_SECONDS for times in walls.values()):
            yield _row(f"**{name}**" if name == PRESSURE else name, walls, cpus)


def _sums(builds: Iterable[Build], side: Side, name: str, *, cpu: bool) -> Iterator[float]:
    """Yield for each build that has a phase what it took; a VM that got stuck goes through one twice."""
    for build in builds:
        found = [phase for phase in build.phases if build.side is side and phase.name == name]
        times = [phase.cpu if cpu else phase.wall for phase in found]
        known = [time for time in times if time is not None]
        if known:
            yield sum(known)


def _row(name: str, walls: Mapping[Side, Sequence[float]], cpus: Mapping[Side, Sequence[float]]) -> str:
    return f"| {' | '.join([name, *_cells(walls), *_cells(cpus)])} |"


def _cells(times: Mapping[Side, Sequence[float]]) -> list[str]:
    medians = {side: statistics.median(found) for side, found in times.items() if found}
    cells = [host.minutes(medians[side]) if side in medians else "–" for side in Side]
    both = len(medians) == len(Side) and medians[Side.OLD] > 0
    return [*cells, f"{medians[Side.NEW] / medians[Side.OLD]:.0%}" if both else "–"]


def notes(builds: Sequence[Build]) -> Iterator[str]:
    """Yield what has to be known beside the table, a line each."""
    for build in builds:
        name = f"{build.side}, {build.kind}, turn {build.turn}"
        if build.second_try:
            yield f"{name}: memory pressure needed a second try"
        starts = sum(_leaf(step["name"]) == "first boot" for step in build.steps)
        if starts > 1:
            yield f"{name}: the VM was booted {starts} times, because the emulated one got stuck"
        if abs(build.cpu - build.cpu_waited) > _UNSEEN * build.cpu:
            yield (
                f"{name}: {build.cpu:.0f} s of CPU time by the cgroup, {build.cpu_waited:.0f} s by the"
                " processes that were waited for"
            )
        if build.status:
            counts = "all phases ran, so it counts" if build.complete else "it does not count"
            yield f"{name}: exit status {build.status}, {counts}: {'; '.join(build.wrong) or 'no record'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Clone:
    """A commit in a folder of its own, with an empty HOME beside it."""

    side: Side
    commit: str
    folder: Path

    @property
    def checkout(self) -> Path:
        """The files of the commit."""
        return self.folder / "ami-builder"

    @property
    def home(self) -> Path:
        """HOME of its builds."""
        return self.folder / "home"

    def environment(self) -> dict[str, str]:
        """Return the environment of a user who has never used ami-builder."""
        left_out = ("AMI_BUILDER_", "XDG_", "PYTHON", "VIRTUAL_ENV", "PIP_CACHE_DIR")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
        chosen = {name: os.environ[name] for name in (_ACCELERATOR, "PYTHON") if name in os.environ}
        return {**kept, **chosen, "HOME": str(self.home)}

    @property
    def runs(self) -> Path:
        """The records of its builds."""
        return self.home / ".local/state/ami-builder/runs"


def clone(checkout: Path, side: Side, commit: str, folder: Path) -> Clone:
    """Clone a checkout and check a commit out."""
    made = Clone(side=side, commit=commit, folder=folder)
    made.home.mkdir(parents=True)
    _git("clone", "--quiet", "--no-checkout", str(checkout), str(made.checkout))
    _git("-C", str(made.checkout), "checkout", "--quiet", "--detach", commit)
    return made


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"git {' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout.strip()


def measure(made: Clone, kind: Kind, turn: int, options: Sequence[str] = ()) -> Build:
    """Run `scripts/ami-builder build` to its end and return what it cost."""
    argv: list[str | Path] = [made.checkout / "scripts" / "ami-builder", "build", *options]
    log = made.folder / f"{kind.name.lower()}.log"
    load, waited = host.load(), _waited()
    before = records.known(made.runs)
    samples: list[tuple[float, float]] = []
    with ExitStack() as stack:
        out = stack.enter_context(log.open("w"))
        group: cgroups.Group | None = None
        with suppress(cgroups.NoGroup):
            group = stack.enter_context(cgroups.group("cpuacct"))

        def sample() -> None:
            if group is not None:
                samples.append((time.time(), group.cpu_seconds()))

        sample()
        started, began = time.time(), time.monotonic()
        process = stack.enter_context(
            processes.running(
                argv if group is None else group.command(argv),
                env=made.environment(),
                cwd=made.checkout,
                stdout=out.fileno(),
            )
        )

        def ended() -> bool:
            sample()
            return process.poll() is not None

        processes.wait_until(ended, what="the build's end", timeout=float("inf"), interval=SAMPLE_SECONDS)
        wall = time.monotonic() - began
        sample()
    waited = _waited() - waited
    record = records.newest(made.runs, before)
    phases = [
        Phase(
            name=phase.name,
            began=phase.began,
            ended=phase.ended,
            cpu=round(used(samples, phase.began, phase.ended), 2) if samples else None,
        )
        for phase in phases_of(record, started)
    ]
    return Build(
        side=made.side,
        kind=kind,
        turn=turn,
        commit=made.commit,
        status=process.returncode,
        wall=round(wall, 2),
        cpu=round(samples[-1][1] - samples[0][1] if samples else waited, 2),
        cpu_waited=round(waited, 2),
        load=load,
        phases=tuple(phases),
        steps=tuple(record.get("steps", ())),
        second_try=records.second_try(record),
        wrong=_wrong(record, process.returncode, log),
    )


def _waited() -> float:
    """Return the CPU seconds of all processes below this one that have ended and were waited for."""
    times = resource.getrusage(resource.RUSAGE_CHILDREN)
    return times.ru_utime + times.ru_stime


def _wrong(record: Mapping[str, Any], status: int, log: Path) -> tuple[str, ...]:
    if status == 0:
        return ()
    error = record.get("error") or " / ".join(processes.last_lines(log, 5))
    return records.not_passed(record) or (str(error),)


def _require_packages(made: Clone) -> None:
    """End the program when system packages are missing: their installation would be measured."""
    argv = ["bash", "-c", _MISSING_PACKAGES]
    done = subprocess.run(
        argv, cwd=made.checkout, env=made.environment(), capture_output=True, text=True, check=False
    )
    if missing := done.stdout.split():
        sys.exit(f"system packages are missing; install them first: apt-get install {' '.join(missing)}")


def main(arguments: Sequence[str]) -> None:
    """Measure as the command line asks for, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks against",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--commit", default=OLD_COMMIT, help=f"what HEAD is compared with ({OLD_COMMIT})")
    parser.add_argument("--turns", type=int, default=2, help="builds of each side (2)")
    parser.add_argument(
        "--cached", action="store_true", help="then measure builds with base and container cached"
    )
    parser.add_argument("--busy", action="store_true", help="measure though something else runs on this host")
    parser.add_argument("--output", type=Path, help=f"where the raw figures go (a new file in {FOLDER})")
    given = parser.parse_args(arguments)
    if not given.busy:
        host.refuse_when_busy()
    commits = {
        side: _git("-C", str(ROOT), "rev-parse", "--verify", f"{name}^{{commit}}")
        for side, name in ((Side.OLD, given.commit), (Side.NEW, "HEAD"))
    }
    if _git("-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"):
        _say("there are changes that are not committed: they are not measured")
    output = given.output or FOLDER / f"against-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    about = host.describe()
    builds: list[Build] = []
    try:
        for build in measured(ROOT, commits, given.turns, cached=given.cached):
            builds.append(build)
            _keep(output, about, builds)
            wall, cpu = host.minutes(build.wall), host.minutes(build.cpu)
            _say(f"exit status {build.status} after {wall}, CPU time {cpu}")
    except AmiBuilderError as failed:
        sys.exit("\n".join([failed.message, *failed.tail]))
    finally:
        if builds:
            print("\n".join(report(about, commits, builds)), flush=True)
            _say(f"raw figures: {output}")
    if not all(build.complete for build in builds):
        sys.exit(1)


def report(about: host.Host, commits: Mapping[Side, str], builds: Sequence[Build]) -> Iterator[str]:
    """Yield the whole Markdown: the host, what was compared, the table and the notes."""
    old, new = (commits[side][:10] for side in Side)
    order = ", ".join(build.side for build in builds if build.kind is Kind.COLD)
    yield f"{about}."
    yield ""
    yield f"Old is commit {old}, new {new}; medians; cold builds in this order: {order}."
    yield ""
    yield from table(builds)
    remarks = list(notes(builds))
    if remarks:
        yield ""
        yield from (f"- {remark}" for remark in remarks)


def measured(checkout: Path, commits: Mapping[Side, str], count: int, *, cached: bool) -> Iterator[Build]:
    """Build both commits of a checkout in turns, and yield what each build cost as soon as it has ended."""
    parent = Path(os.environ.get("TMPDIR", "/var/tmp"))
    order = turns(count)
    with tempfile.TemporaryDirectory(dir=parent, prefix="ami-builder-against-") as folder:
        last: dict[Side, Clone] = {}
        for side in Side:
            probe = clone(checkout, side, commits[side], Path(folder) / f"{side}-probe")
            _require_packages(probe)
            shutil.rmtree(probe.folder)
        for turn, side in order:
            if side in last:
                shutil.rmtree(last.pop(side).folder)
            last[side] = clone(checkout, side, commits[side], Path(folder) / f"{side}-{turn}")
            _say(f"turn {turn} of {count}: {side} ({commits[side][:10]}), {Kind.COLD}")
            yield measure(last[side], Kind.COLD, turn)
        for turn, side in order if cached else ():
            _say(f"turn {turn} of {count}: {side} ({commits[side][:10]}), {Kind.CACHED}")
            yield measure(last[side], Kind.CACHED, turn, ["--force"])


def _keep(output: Path, about: host.Host, builds: Sequence[Build]) -> None:
    figures = {"host": asdict(about), "builds": [asdict(build) for build in builds]}
    write_atomically(output, json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


def _say(text: str) -> None:
    print(f"{datetime.now().astimezone():%H:%M:%S} against: {text}", file=sys.stderr, flush=True)
