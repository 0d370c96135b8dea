"""Runs the checks against a booted machine: pytest in a process of its own, with guards around it."""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from pathlib import Path
from subprocess import Popen
from threading import Event

from ami_builder.checks.context import ENVIRONMENT, HOST, Context
from ami_builder.core.errors import UsageError
from ami_builder.core.records import CheckResult, Outcome
from ami_builder.system import processes
from ami_builder.system.resources import checks_dir

__all__ = ["Context", "digest", "run", "shipped"]

_PLUGIN = "ami_builder.checks.plugin"
_COMPUTED_IN = ("core/oom.py", "core/units.py", "system/host_load.py")
"""Where checks get bounds and measured values from."""
_ALIVE_SECONDS = 2.0
_FAILED = 1
_STATUS = {
    2: "it was interrupted, or a file could not be read",
    3: "an error inside pytest",
    4: "it was called wrongly",
}


def shipped(folder: Path) -> tuple[Path, ...]:
    """Return the check files in a folder, in the order in which they run."""
    return tuple(sorted(folder.glob("test_*.py")))


def digest(files: Sequence[Path]) -> str:
    """Return the sha256 of what a verdict depends on: these files, the conftest.py beside each, our other
    checks, and the modules in which theirs are computed.

    Raises UsageError when a file can't be read.
    """
    folder = checks_dir()
    beside = {path for path in folder.iterdir() if path.suffix in {".py", ".sh", ".j2"}}
    beside |= {folder.parent / name for name in _COMPUTED_IN}
    own = {file.resolve() for file in files}
    own |= {path for file in own if (path := file.with_name("conftest.py")).exists()}
    total = hashlib.sha256()
    for path in sorted(beside | own):
        try:
            content = path.read_bytes()
        except OSError as wrong:
            raise UsageError(f"the checks in {path} can't be read: {wrong.strerror}") from wrong
        total.update(path.name.encode() + b"\0" + hashlib.sha256(content).digest())
    return total.hexdigest()


def run(
    *,
    files: Sequence[Path],
    ssh_config: Path,
    host: str,
    phase: str,
    context: Context,
    directory: Path,
    timeout: float,
    alive: Callable[[], None] = lambda: None,
    on_result: Callable[[CheckResult], None] = lambda _: None,
    on_ready: Callable[[], None] = lambda: None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> tuple[CheckResult, ...]:
    """Run check files against the machine `host` of `ssh_config` and return a result for every check.

    If the results can't be trusted (no checks, all skipped, another machine, pytest broken or stopped), there
    is a failed result whose name begins with `guard:`; an inconclusive one if this host can't run the checks.
    A check that the host was too busy for is inconclusive, and the others continue.

    `directory` gets pytest's log, JUnit XML and the machine's answers, each with the phase in its name.
    `timeout` is in seconds, for the checks themselves: Dask has `context.timeout` to start, and its client
    the same again. `on_ready` is called when Dask on the right machine has answered, before the first check.
    `on_progress` gets what a long check is doing. `alive` is called repeatedly; its errors end the checks.

    Raises UsageError when a file is missing, and what `alive` raises.
    """
    for path in files:
        if not path.exists():
            raise UsageError(f"there are no checks at {path}", hint="see verify.checks in ami-builder.toml")
    directory.mkdir(parents=True, exist_ok=True)
    clean = directory.resolve() / f"checks-{phase}"
    clean.mkdir(exist_ok=True)
    # Our own, so that no pytest.ini or pyproject.toml beside the files has any effect.
    (clean / "pytest.ini").write_text("[pytest]\n")
    replace(context, phase=phase).write(clean / "context.json")
    tally = _Tally(
        phase=phase,
        machine=context.machine,
        on_result=on_result,
        on_ready=on_ready,
        on_progress=on_progress,
    )
    log = directory / f"checks-{phase}.log"
    receiver, sender = os.pipe()
    with (
        os.fdopen(receiver, encoding="utf-8", errors="replace") as events,
        os.fdopen(sender, "w") as writer,
        log.open("wb") as out,
    ):
        argv: list[str | Path] = [
            *(sys.executable, "-m", "pytest", "-v", "--color=no", "--tb=short", "--strict-markers"),
            *("-p", _PLUGIN, "-p", "no:cacheprovider", "-c", clean / "pytest.ini"),
            # So that the name of every check contains its file, and every file gets its conftest.py.
            *("--rootdir=/", "--confcutdir=/"),
            *("--import-mode=importlib", f"--junitxml={directory.resolve() / f'junit-{phase}.xml'}"),
            f"--hosts={host if '://' in host else f'ssh://{host}'}",
            f"--ssh-config={ssh_config}",
            f"--events={sender}",
            f"--record={directory.resolve()}",
            *(path.resolve() for path in files),
        ]
        with processes.running(
            argv, env=_environment(clean), cwd=clean, stdout=out.fileno(), pass_fds=[sender]
        ) as process:
            writer.close()  # so that the events end when pytest ends
            bound = 2 * context.timeout + timeout
            with _watched(process, bound, alive) as late:
                for line in events:
                    if line.endswith("\n"):  # or pytest was killed while it wrote
                        tally.add(line)
                status = process.wait()
    if status == -signal.SIGKILL and not late.is_set():
        tally.killed()
    tally.close(f"stopped after {bound:.0f} s" if late.is_set() else _reason(status), log)
    return tuple(tally.results)


@dataclass(slots=True, kw_only=True)
class _Tally:
    """The results that pytest has reported so far, and whether they can be trusted in the end."""

    phase: str
    machine: str
    on_result: Callable[[CheckResult], None]
    on_ready: Callable[[], None]
    on_progress: Callable[[str], None]
    results: list[CheckResult] = field(default_factory=list)
    expected: int = 0
    checks: int = 0
    finished: bool = False

    def add(self, line: str) -> None:
        event = json.loads(line)
        match event["event"]:
            case "collected":
                self.expected = event["count"]
            case "ready":
                self.on_ready()
            case "progress":
                self.on_progress(event["text"])
            case "result":
                self.checks += 1
                self._result(event["name"], Outcome(event["outcome"]), event["message"], event["seconds"])
            case "guard":
                self._result(event["name"], Outcome(event["outcome"]), event["message"])
            case "finished":
                self.finished = True
            case other:
                raise ValueError(f"unknown event {other!r}")

    def close(self, reason: str, log: Path) -> None:
        """Add a failed guard if the results can't be trusted; `reason` is why pytest ended badly."""
        failed = any(result.outcome is Outcome.FAILED for result in self.results)
        last = next((line for line in reversed(processes.last_lines(log)) if line.strip()), "no output")
        if any(result.name.startswith("guard:") for result in self.results):
            return
        if self.finished and not self.checks and not self.expected:
            self._guard("checks were found", f"pytest ran nothing ({last.strip(' =')})")
        elif self.checks < self.expected or not self.finished or (reason and not failed):
            why = f"{self.checks} of {self.expected} checks were run: {reason or 'pytest ended early'}"
            self._guard("the checks ran to the end", f"{why} ({last.strip(' =')})")
        elif all(result.outcome is Outcome.SKIPPED for result in self.results):
            self._guard("not all checks were skipped", f"all {self.checks} were")

    def killed(self) -> None:
        """Add that somebody else killed pytest: a host without memory does that."""
        message = f"pytest was killed (SIGKILL) after {self.checks} of {self.expected} checks"
        self._result(HOST, Outcome.INCONCLUSIVE, message)

    def _guard(self, name: str, message: str) -> None:
        self._result(f"guard: {name}", Outcome.FAILED, message)

    def _result(self, name: str, outcome: Outcome, message: str, seconds: float = 0.0) -> None:
        result = CheckResult(
            name=name,
            phase=self.phase,
            machine=self.machine,
            outcome=outcome,
            seconds=seconds,
            message=message,
        )
        self.results.append(result)
        self.on_result(result)


def _reason(status: int) -> str:
    """Return the meaning of an exit status of pytest; empty for 0."""
    if status == 0:
        return ""
    if status == _FAILED:
        return "it failed, though no check did"
    return _STATUS.get(status, f"exit status {status}")


@contextmanager
def _watched(process: Popen[str], seconds: float, alive: Callable[[], None]) -> Iterator[Event]:
    """Stop `process` after `seconds` and set the event, or when `alive` raises, and raise that error."""
    late, over, errors = Event(), Event(), list[Exception]()

    def watch() -> None:
        end = time.monotonic() + seconds
        while not over.wait(min(_ALIVE_SECONDS, max(0.0, end - time.monotonic()))):
            if time.monotonic() >= end:
                late.set()
                break
            try:
                alive()
            except Exception as wrong:  # raised below: here it would only end the thread
                errors.append(wrong)
                break
        else:
            return
        processes.stop(process)

    watcher = threading.Thread(target=copy_context().run, args=(watch,), daemon=True)
    watcher.start()
    try:
        yield late
    finally:
        over.set()
        watcher.join()
    if errors:
        raise errors[0]


def _environment(clean: Path) -> dict[str, str]:
    # So that the plugin is found in a source checkout that is not installed.
    package = checks_dir().parents[1]
    own = {
        ENVIRONMENT: str(clean / "context.json"),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": str(package),
    }
    return processes.environment(own)
