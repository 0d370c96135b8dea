"""Is the verdict the same on a slow host? `python -m tests.benchmarks slow-host`

Verifies one finished image again and again while the host is slowed down in four ways, and a copy of it
without the memory limit as well. The good image should pass every time, and the other one fail every time:
then the exit status is 0, else 1. Needs root.

Prints Markdown on stdout: the host, a table of the four ways, and a table of all runs. The raw figures are
appended to a file, one JSON object a line, as soon as a run has ended. Runs in that file are not repeated, so
an interrupted measurement continues where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from ami_builder.config import loading
from ami_builder.core.errors import AmiBuilderError
from ami_builder.core.records import PRESSURE, TargetKind
from ami_builder.qemu.accelerator import choose_accelerator
from ami_builder.state.workspace import Workspace
from ami_builder.system.resources import checks_dir
from ami_builder.verify import runner
from tests.benchmarks import host, records, slowdown, without_limit
from tests.benchmarks.slowdown import Slowdown
from tests.vm.conftest import HOME, ROOT, environment

FOLDER = ROOT / ".cache" / "benchmarks" / "slow-host"
"""A workspace for each way, with its records and evidence, beside the image without the limit."""

_ACCELERATOR = "AMI_BUILDER_ACCELERATOR"
_NUMBER = r"(\d+(?:\.\d+)?)"
_LONGEST = tuple(
    re.compile(pattern)
    for pattern in (
        rf"longest wait for a login {_NUMBER} s",
        rf"no login for {_NUMBER} s",
        rf"{_NUMBER} s between two",
    )
)
_AT_REST = tuple(
    re.compile(pattern) for pattern in (rf"{_NUMBER} s at rest", rf"at rest (?:takes )?{_NUMBER} s")
)


class Subject(StrEnum):
    """Which image is verified."""

    GOOD = "good image"
    UNLIMITED = "image without the limit"


class Outcome(StrEnum):
    """How a verification ended."""

    PASSED = "passed"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"
    BROKEN = "broken off"
    """Neither: the VM did not come up, something took too long, or a tool failed."""


_BY_STATUS = {0: Outcome.PASSED, 5: Outcome.FAILED, 10: Outcome.INCONCLUSIVE}
_WANTED = {Subject.GOOD: Outcome.PASSED, Subject.UNLIMITED: Outcome.FAILED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One verification to be done."""

    slowdown: str
    subject: Subject
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One verification that was done; times are seconds."""

    slowdown: str
    title: str
    subject: Subject
    number: int
    outcome: Outcome
    status: int
    error: str
    """What ended a verification that was broken off."""
    not_passed: tuple[str, ...]
    """The checks that failed or are inconclusive, with phase and message."""
    wall: float
    longest: float | None
    """The longest wait for a login under memory pressure, as the check says."""
    at_rest: float | None
    """A login's time before the pressure, as the check says."""
    second_try: bool
    """Whether the steps of memory pressure were done twice."""
    wait_share: float
    """Of the time in which the emulator's threads could have run, the part in which they waited for a CPU."""
    emulator_seconds: float
    """CPU seconds of all emulators."""
    emulators: int
    load: float
    """The host's load average before the run."""
    started: str
    run_id: str
    image: str
    """sha256 of the good image."""
    checks: str
    """sha256 of the checks."""
    commit: str

    @property
    def as_it_should(self) -> bool:
        """Whether the verdict is the right one."""
        return self.outcome is _WANTED[self.subject]


def plan(slowdowns: Sequence[str], runs: int, bad: int = 1) -> list[Job]:
    """Return `runs` verifications of the good image spread over all ways, and `bad` of the other in each.

    The first round has every way and both images in it.
    """
    good = [runs // len(slowdowns) + (place < runs % len(slowdowns)) for place in range(len(slowdowns))]
    return [
        Job(slowdown=name, subject=subject, number=number + 1)
        for number in range(max(*good, bad))
        for name, count in zip(slowdowns, good, strict=True)
        for subject, wanted in ((Subject.GOOD, count), (Subject.UNLIMITED, bad))
        if number < wanted
    ]


def waits(messages: Iterable[str]) -> tuple[float | None, float | None]:
    """Return the longest wait for a login and that at rest, from whichever message tells them."""
    longest: float | None = None
    at_rest: float | None = None
    for message in messages:
        longest = longest if longest is not None else _first(_LONGEST, message)
        at_rest = at_rest if at_rest is not None else _first(_AT_REST, message)
    return longest, at_rest


def _first(patterns: Sequence[re.Pattern[str]], text: str) -> float | None:
    return next((float(found[1]) for pattern in patterns if (found := pattern.search(text))), None)


def read_runs(path: Path) -> list[Run]:
    """Return the runs in a file of raw figures; none when there is no file.

    A last line that was not written to its end is left out.
    """
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [_run(json.loads(line)) for line in lines[:-1] if line.strip()]


def _run(fields: Mapping[str, Any]) -> Run:
    own = {
        "subject": Subject(fields["subject"]),
        "outcome": Outcome(fields["outcome"]),
        "not_passed": tuple(fields["not_passed"]),
    }
    return Run(**{**fields, **own})


def append(path: Path, run: Run) -> None:
    """Add a run to the file of raw figures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        # What a killed program wrote of its last line goes.
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(json.dumps(asdict(run), ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def table(runs: Sequence[Run]) -> Iterator[str]:
    """Yield the Markdown: a line for each way to slow the host down, then one for each run."""
    yield (
        "| host | good image green | image without the limit red | wall, good | wall, without the limit"
        " | longest wait for a login | at rest | waiting for a CPU |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for name in dict.fromkeys(run.slowdown for run in runs):
        some = [run for run in runs if run.slowdown == name]
        good = [run for run in some if run.subject is Subject.GOOD]
        bad = [run for run in some if run.subject is Subject.UNLIMITED]
        yield _row(
            some[0].title,
            _count(good),
            _count(bad),
            _range([run.wall for run in good], host.minutes),
            _range([run.wall for run in bad], host.minutes),
            _range([run.longest for run in good], _seconds),
            _range([run.at_rest for run in good], _seconds),
            _range([run.wait_share for run in some], _percent),
        )
    good, bad = ([run for run in runs if run.subject is subject] for subject in Subject)
    yield f"| all | {_count(good)} | {_count(bad)} | | | | | |"
    yield ""
    yield (
        "| host | image | run | outcome | wall | longest wait for a login | at rest | emulator's CPU time"
        " | waiting for a CPU | what did not pass |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for run in runs:
        yield _row(
            run.title,
            run.subject,
            str(run.number),
            run.outcome if run.as_it_should else f"**{run.outcome}**",
            host.minutes(run.wall),
            _seconds(run.longest),
            _seconds(run.at_rest),
            host.minutes(run.emulator_seconds),
            _percent(run.wait_share),
            _why(run),
        )


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _count(runs: Sequence[Run]) -> str:
    if not runs:
        return "–"
    right = sum(run.as_it_should for run in runs)
    others = [run.outcome for run in runs if not run.as_it_should]
    more = ", ".join(f"{others.count(outcome)} {outcome}" for outcome in dict.fromkeys(others))
    return f"{right} of {len(runs)}" + (f" ({more})" if more else "")


def _range(values: Sequence[float | None], formatted: Callable[[float], str]) -> str:
    """Return the median, and the least and most where there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    middle = formatted(statistics.median(known))
    return middle if len(known) == 1 else f"{middle} ({formatted(min(known))} to {formatted(max(known))})"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} s"


def _percent(share: float) -> str:
    return f"{share:.0%}"


def _why(run: Run) -> str:
    """Return what did not pass, for a cell of a table; all of it only where it should have passed."""
    names = list(run.not_passed)
    if run.as_it_should and len(names) > 1:
        names = [names[0], f"{len(names) - 1} more"]
    notes = [run.error] if run.error else []
    if run.second_try:
        notes.append("memory pressure needed a second try")
    return "; ".join([*names, *notes]).replace("|", "\\|").replace("\n", " ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verifier:
    """Verifies images on a slowed host, with a workspace of its own."""

    home: Path
    image: str
    checks: str
    commit: str
    slowdowns: Mapping[str, Slowdown]
    command: Sequence[str | Path] = (sys.executable, "-m", "ami_builder", "verify")
    emulator: str = slowdown.EMULATOR

    def verify(self, job: Job, image: Path) -> Run:
        """Do one verification; raises NoGroup when the host can't be slowed down."""
        way = self.slowdowns[job.slowdown]
        # Of this way alone: two may be measured at the same time, and the newest record has to be ours.
        home = self.home / job.slowdown
        runs = Workspace.open({"AMI_BUILDER_HOME": str(home)}).runs_dir
        before = records.known(runs)
        log = home / "logs" / f"{job.slowdown}-{job.subject.name.lower()}-{job.number}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        load = host.load()
        kept = {name: os.environ[name] for name in (_ACCELERATOR,) if name in os.environ}
        with slowdown.slowed(way) as group:
            started, began = datetime.now(UTC), time.monotonic()
            status, usage = slowdown.run(
                [*self.command, image, "--json"],
                way,
                group,
                env=environment(AMI_BUILDER_HOME=str(home), **kept),
                cwd=ROOT,
                log=log,
                emulator=self.emulator,
            )
            wall = time.monotonic() - began
        record = records.newest(runs, before)
        outcome, error = _BY_STATUS.get(status, Outcome.BROKEN), ""
        if outcome is Outcome.BROKEN:
            error = f"exit status {status}: {record.get('error') or _last_line(log)}"
        elif not usage.pids:
            outcome, error = Outcome.BROKEN, "no process of the emulator was seen, so nothing slowed it down"
        longest, at_rest = waits(
            result["message"] for result in records.results(record) if result["phase"] == PRESSURE
        )
        return Run(
            slowdown=job.slowdown,
            title=str(way),
            subject=job.subject,
            number=job.number,
            outcome=outcome,
            status=status,
            error=error,
            not_passed=records.not_passed(record),
            wall=round(wall, 1),
            longest=longest,
            at_rest=at_rest,
            second_try=records.second_try(record),
            wait_share=round(usage.wait_share, 3),
            emulator_seconds=round(usage.ran, 1),
            emulators=len(usage.pids),
            load=load,
            started=started.isoformat(timespec="seconds"),
            run_id=record.get("run_id", ""),
            image=self.image,
            checks=self.checks,
            commit=self.commit,
        )


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"


def newest_image() -> Path:
    """Return the newest finished image of the default configuration; ends the program when there is none."""
    name = loading.load(ROOT / "ami-builder.toml", environ={}, overrides={}).select().name
    found = [
        stored.path
        for stored in Workspace.open({"AMI_BUILDER_HOME": str(HOME)}).images()
        if stored.artifact.image == name and stored.artifact.target is TargetKind.QEMU
    ]
    if not found:
        sys.exit(
            f"there is no finished image {name!r} in {HOME}: make one with"
            f" `AMI_BUILDER_HOME={HOME} scripts/ami-builder build`, or name one with --image"
        )
    return found[-1]


def commit() -> str:
    """Return the checked-out commit, with a note when files have been changed since."""
    argv = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main(arguments: Sequence[str]) -> None:
    """Verify as the command line asks for, and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks slow-host",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    settings = loading.load(ROOT / "ami-builder.toml", environ={}, overrides={}).select().verify
    ways = {way.name: way for way in slowdown.slowdowns(slowdown.usable_cpus(), settings.cpus)}
    parser.add_argument(
        "--runs", type=int, default=10, help="verifications of the good image, spread over all ways (10)"
    )
    parser.add_argument(
        "--bad-runs", type=int, default=1, help="verifications of the image without the limit in each way (1)"
    )
    parser.add_argument("--image", type=Path, help="a finished image (the newest of the default one)")
    parser.add_argument(
        "--output", type=Path, help=f"the file of raw figures (one for each image in {FOLDER})"
    )
    parser.add_argument(
        "--only",
        choices=ways,
        action="append",
        help=f"one way to slow the host down, instead of all; repeatable: {', '.join(ways)}",
    )
    parser.add_argument("--busy", action="store_true", help="measure though something else runs on this host")
    given = parser.parse_args(arguments)
    if os.geteuid() != 0:
        sys.exit("slow-host needs root: it puts the emulator into a cgroup with a CPU quota")
    image = (given.image or newest_image()).absolute()
    if not image.is_file():
        sys.exit(f"--image {image}: there is no such file")
    if not given.busy:
        host.refuse_when_busy()
    try:
        _measure(image, given.output, plan(given.only or list(ways), given.runs, given.bad_runs), ways)
    except AmiBuilderError as failed:
        sys.exit("\n".join([failed.message, *failed.tail]))


def _measure(image: Path, output: Path | None, jobs: Sequence[Job], ways: Mapping[str, Slowdown]) -> None:
    with image.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    judged_by = runner.digest(runner.shipped(checks_dir()))
    path = output or FOLDER / f"{digest[:12]}-{judged_by[:12]}.jsonl"
    done = read_runs(path)
    if any((run.image, run.checks) != (digest, judged_by) for run in done):
        sys.exit(f"{path} is about another image or other checks: name another file with --output")
    finished = {(run.slowdown, run.subject, run.number) for run in done}
    left = [job for job in jobs if (job.slowdown, job.subject, job.number) not in finished]
    unlimited = FOLDER / f"without-limit-{digest[:12]}.qcow2"
    if not unlimited.exists() and any(job.subject is Subject.UNLIMITED for job in left):
        _say("making a copy of the image without the limit")
        without_limit.make(image, unlimited)
    verifier = Verifier(home=FOLDER, image=digest, checks=judged_by, commit=commit(), slowdowns=ways)
    subjects = {Subject.GOOD: image, Subject.UNLIMITED: unlimited}
    _say(f"{len(left)} of {len(jobs)} verifications to do; raw figures in {path}")
    # Before the host is slowed down, and once for all runs: no workspace has to try KVM by itself.
    accelerator = FOLDER / "cache" / "accelerator.json"
    with tempfile.TemporaryDirectory() as folder:
        chosen, _ = choose_accelerator(image, cache=accelerator, directory=Path(folder))
    os.environ[_ACCELERATOR] = str(chosen)
    about = host.describe(accelerator)
    try:
        for number, job in enumerate(left, 1):
            _say(f"{number} of {len(left)}: {job.subject}, {ways[job.slowdown]}")
            run = verifier.verify(job, subjects[job.subject])
            append(path, run)
            after = f"{run.outcome} after {host.minutes(run.wall)}"
            _say(f"{number} of {len(left)}: {': '.join(filter(None, [after, _why(run)]))}")
    finally:
        done = read_runs(path)
        if done:
            print("\n".join([f"{about}; commit {commit()}.", "", *table(done)]), flush=True)
    if not all(run.as_it_should for run in done):
        sys.exit(1)


def _say(text: str) -> None:
    print(f"{datetime.now().astimezone():%H:%M:%S} slow-host: {text}", file=sys.stderr, flush=True)
