"""The pytest plugin of the checks, ours and the user's: guards, fixtures, order of checks, live results.

To run checks by hand, set PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 and AMI_BUILDER_CHECKS_CONTEXT=FILE (the JSON of a
`Context`), and run `pytest -p ami_builder.checks.plugin --hosts=ssh://NAME --ssh-config=FILE`. The plugin
replaces testinfra's: `host` is never the machine that pytest runs on, and is identified before any check.
"""

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import NoReturn, TypeVar

import pytest
import testinfra  # type: ignore[import-untyped]
import testinfra.host  # type: ignore[import-untyped]

from ami_builder.checks.check_names import NOTE, message_of, name_of
from ami_builder.checks.context import ENVIRONMENT, HOST, Context
from ami_builder.checks.login_times import ANSWER, NEW_CONNECTION, LoginMonitor
from ami_builder.checks.machine_state import (
    ANSWERS,
    ContainerState,
    Incomplete,
    MachineState,
    SchedulerAnswer,
    Sections,
    WorkersAnswer,
    sections,
)
from ami_builder.checks.pressure_result import PressureResult
from ami_builder.core.options import Role
from ami_builder.core.records import FIRST_BOOT, PRESSURE, Outcome
from ami_builder.system import processes

BLOCKED = "blocked: "
"""A skipped check whose reason begins with this has no result because another check failed."""

INCONCLUSIVE = "inconclusive: "
"""A skipped check whose reason begins with this is inconclusive: the host was too busy to judge."""

GUARD_STATUS = 64
"""pytest's exit status when a guard refuses."""

_HERE = Path(__file__).resolve().parent
# Importing distributed takes ten seconds on an emulated VM, so the client gets at least a minute.
_LEAST_CLIENT_SECONDS = 60.0
# How much the workers store under memory pressure, in multiples of their limit.
_WORK = 1.3
# Runs a script that outlives the login that started it.
_DETACHED = f'umask 022; exec setsid -f /bin/sh -c "$@" </dev/null >{ANSWER} 2>{ANSWER}.err'

Answer = TypeVar("Answer")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ami-builder checks")
    group.addoption("--hosts", help="the booted machine, as ssh://NAME")
    group.addoption("--ssh-config", help="ssh_config file that says how to reach it")
    group.addoption("--events", type=int, help="file descriptor that gets each result as a line of JSON")
    group.addoption("--record", type=Path, help="folder that gets what the machine answered")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "first_boot: run in the phase `boot` only")
    config.addinivalue_line("markers", "tls: run where the machine has certificates only")
    config.addinivalue_line("markers", "pressure: run in the phase `pressure` only, alone there")
    config.pluginmanager.register(_CheckSession(config), "ami-builder-run")


class _CheckSession:
    """One phase on one machine: the guards, and the answers of the machine that the fixtures return."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.pool = ThreadPoolExecutor(max_workers=2)
        self.machine: Future[MachineState] | None = None
        self.client: Future[WorkersAnswer] | None = None
        self.pressure: Future[PressureResult] | None = None
        self.failed = 0
        self.inconclusive = 0
        self.blocked = ""
        self.unreadable = False
        self.sending = Lock()
        events = config.getoption("events")
        self.events = None if events is None else os.fdopen(events, "w", encoding="utf-8")

    def refuse(self, name: str, message: str, outcome: Outcome = Outcome.FAILED) -> NoReturn:
        """End the session, because its results could not be trusted."""
        self.guard(name, message, outcome)
        pytest.exit(f"{name}: {message}", returncode=GUARD_STATUS)

    def guard(self, name: str, message: str, outcome: Outcome = Outcome.FAILED) -> None:
        """Send the result of a guard."""
        self.send(event="guard", name=name, outcome=outcome, message=message)

    def send(self, **event: object) -> None:
        if self.events is not None:
            with self.sending:  # threads that ask the machine send progress
                self.events.write(json.dumps(event) + "\n")
                self.events.flush()

    def read_context(self) -> Context:
        path = os.environ.get(ENVIRONMENT, "")
        if not path:
            self.refuse("guard: context", f"{ENVIRONMENT} does not name the file that describes the machine")
        try:
            return Context.read(Path(path))
        except (OSError, ValueError, KeyError, TypeError) as wrong:
            self.refuse("guard: context", f"{path} is not a context of the checks: {wrong}")

    def connect(self) -> testinfra.host.Host:
        spec, ssh_config = self.config.getoption("hosts"), self.config.getoption("ssh_config")
        name = "guard: checks run on the booted machine"
        if not spec or not ssh_config:
            self.refuse(name, "--hosts=ssh://NAME and --ssh-config=FILE are needed")
        if not spec.startswith("ssh://"):
            self.refuse(name, f"--hosts={spec} is not ssh://NAME: the checks would run on another machine")
        # The caller owns the shared connection: testinfra must not keep one of its own open.
        host = testinfra.get_host(spec, ssh_config=ssh_config, controlpersist=0)
        # If this host can't start ssh for a moment, that says nothing about the machine.
        run_local = host.backend.run_local
        host.backend.run_local = lambda *command: processes.start(partial(run_local, *command))
        return host

    def ask(self, script: str, *arguments: str) -> tuple[str, str, int]:
        """Run one of the scripts as root and return stdout, stderr and status."""
        return self.run(_text(script), *arguments)

    def run(self, script: str, *arguments: str) -> tuple[str, str, int]:
        """Run the text of a script as root and return stdout, stderr and status."""
        command = "sudo -n /bin/sh -c %s sh" + " %s" * len(arguments)
        done = self.host.run(command, script, *arguments)
        # Not .stdout: that asks the machine for its encoding first.
        return (
            done.stdout_bytes.decode("utf-8", "replace"),
            done.stderr_bytes.decode("utf-8", "replace"),
            done.rc,
        )

    def identify(self) -> None:
        """Identify the machine, wait for its Dask, and start to read its state."""
        self.context = self.read_context()
        self.host = self.connect()
        name = "guard: the machine is the one that was booted"
        try:
            waited, stderr, status = self.ask("wait_for_dask.sh", *self._wait_arguments())
        except RuntimeError as unreachable:
            self.refuse(name, f"ssh failed: {unreachable.args[0].stderr.strip()}")
        except OSError as wrong:
            self.refuse(HOST, str(wrong), Outcome.INCONCLUSIVE)
        found = sections(waited)
        if "nonce" not in found:
            last = (stderr.strip().splitlines() or ["no output"])[-1]
            self.refuse(name, f"the first script failed on the machine (status {status}): {last}")
        if not self.context.nonce or found["nonce"].strip() != self.context.nonce:
            answer = found["nonce"].strip() or "nothing: no user data was applied"
            self.refuse(name, f"its nonce should be {self.context.nonce or 'something'}, but is {answer}")
        if found.get("settled", "").strip() == ANSWERS:
            self.send(event="ready")
        name, pid = _container(found)
        if self.context.phase == PRESSURE:
            self.pressure = self.pool.submit(self._run_pressure, name, pid)
            return
        self.machine = self.pool.submit(self._read_state, waited, pid)
        if self.context.phase == FIRST_BOOT:
            self.client = self.pool.submit(self._ask_workers, pid)

    def _wait_arguments(self) -> tuple[str, str, str]:
        least = 0 if self.context.role is Role.SCHEDULER else max(1, self.context.workers)
        return self.context.nonce, f"{self.context.timeout:.0f}", str(least)

    def _read_state(self, waited: str, pid: str) -> MachineState:
        gathered, stderr, status = self.ask("machine_state.sh", self.context.user, self.context.phase, pid)
        text = {**sections(waited), **sections(gathered)}
        self.record("machine", {**text, "stderr": stderr})
        try:
            return MachineState.parse(text)
        except Incomplete as wrong:
            raise Incomplete(f"{wrong} (status {status}; {stderr.strip()[-200:]})") from wrong

    def _ask_workers(self, pid: str) -> WorkersAnswer:
        if not pid:
            return WorkersAnswer(workers=(), error="no Dask container is running")
        seconds = max(self.context.timeout, _LEAST_CLIENT_SECONDS)
        program = _text("ask_workers.py")
        arguments = (self.context.role.value, str(self.context.workers), f"{seconds:.0f}")
        stdout, stderr, status = self.ask("in_container.sh", pid, f"{2 * seconds:.0f}", program, *arguments)
        self.record("client", {"stdout": stdout, "stderr": stderr, "status": status})
        return WorkersAnswer.parse(stdout, stderr, status)

    def _run_pressure(self, container: str, pid: str) -> PressureResult:
        pressure = self._run_pressure_once("pressed", container, pid)
        why = pressure.double_kill()
        if not why:
            return pressure
        # Only once: if it happens again, the image has failed.
        waited = sections(self.ask("wait_for_dask.sh", *self._wait_arguments())[0])
        return replace(self._run_pressure_once("pressed-again", *_container(waited)), first_attempt=why)

    def _run_pressure_once(self, record: str, container: str, pid: str) -> PressureResult:
        if not pid:
            raise Incomplete("no Dask container is running")
        seconds = max(self.context.timeout, _LEAST_CLIENT_SECONDS)
        texts = (_text("in_container.sh"), _text("memory_pressure.py"))
        numbers = (f"{seconds:.0f}", str(self.context.workers), str(_WORK))
        arguments = (container, pid, *numbers, *texts)
        host, ssh_config = self.config.getoption("hosts"), self.config.getoption("ssh_config")
        ssh = ["ssh", *NEW_CONNECTION, "-F", ssh_config, host.removeprefix("ssh://"), "--"]
        watch = LoginMonitor(ssh, self.context.emulator, lambda text: self.send(event="progress", text=text))
        self.send(event="progress", text="logins at rest")
        watch.at_rest()
        self.run(_DETACHED, _text("memory_pressure.sh"), "sh", *arguments)
        watch.until_end(1.5 * seconds)
        watched = watch.watched
        answer, errors, _ = self.run(f"cat {ANSWER}; cat {ANSWER}.err >&2")
        text = sections(answer)
        self.record(record, {**text, "stderr": errors, "watched": asdict(watched)})
        return PressureResult.parse(text, watched)

    def record(self, name: str, answer: Mapping[str, object]) -> None:
        folder = self.config.getoption("record")
        if folder is not None:
            path = Path(folder) / f"{name}-{self.context.phase}.json"
            path.write_text(json.dumps(answer, indent=1), encoding="utf-8")

    def answer_of(self, future: Future[Answer] | None) -> Answer:
        """Return an answer of the machine; end the session as failed when the answer cannot be read."""
        if future is None:
            pytest.fail(f"in the phase {self.context.phase} this is not read from the machine")
        try:
            return future.result()
        except OSError as wrong:
            self.refuse(HOST, str(wrong), Outcome.INCONCLUSIVE)
        except (Incomplete, RuntimeError) as wrong:
            self.refuse("guard: the machine answers", str(wrong))

    # pytest's hooks, in the order of their calls.

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Refuse files without checks, leave out checks of other phases, and run those of the client last."""
        wanted = {Path(argument.split("::")[0]).resolve() for argument in config.args}
        empty = [path for path in sorted(wanted) if not any(item.path.is_relative_to(path) for item in items)]
        if empty and not config.option.collectonly and not self.unreadable:
            self.refuse("guard: every file has checks", f"none in {', '.join(str(path) for path in empty)}")
        context = self.read_context()
        others = [item for item in items if not _applies(item, context)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
        items.sort(key=lambda item: "client" in getattr(item, "fixturenames", ()))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        if not session.config.option.collectonly and not session.testsfailed:
            self.send(event="collected", count=len(session.items))
            self.identify()

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or (report.when == "setup" and not report.passed):
            outcome = "failed" if report.failed else "skipped" if report.skipped else "passed"
        elif report.failed:
            outcome = "failed"  # a teardown: one more result, under the same name
        else:
            return
        if hasattr(report, "wasxfail"):
            # A check that is expected to fail shows nothing, whether or not it fails.
            outcome = "failed"
        message = message_of(report)
        if outcome == "skipped" and message.startswith(INCONCLUSIVE):
            outcome, message = "inconclusive", message.removeprefix(INCONCLUSIVE)
        self.failed += outcome == "failed"
        self.inconclusive += outcome == "inconclusive"
        if outcome == "skipped" and message.startswith(BLOCKED):
            self.blocked = self.blocked or f"{name_of(report)}: {message}"
        self.send(
            event="result",
            name=name_of(report),
            outcome=outcome,
            seconds=round(report.duration, 3),
            message=message,
        )

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.unreadable = True
            self.guard("guard: the files can be read", message_of(report))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        # An inconclusive check may block others; no verdict passes with one.
        if self.blocked and not self.failed and not self.inconclusive:
            self.guard("guard: nothing is blocked without a failure", self.blocked)
            session.exitstatus = GUARD_STATUS
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.send(event="finished")


def _container(waited: Sections) -> tuple[str, str]:
    """Return id and main pid of the Dask container; empty without one."""
    name, pid, *_ = [*waited.get("container", "").split("\n"), "", ""]
    return name, pid


def _applies(item: pytest.Item, context: Context) -> bool:
    """Return whether a check is one of this phase, and of this machine."""
    if item.get_closest_marker("pressure"):
        return context.phase == PRESSURE
    if context.phase == PRESSURE or (item.get_closest_marker("tls") and not context.tls):
        return False
    return context.phase == FIRST_BOOT or not item.get_closest_marker("first_boot")


def _text(script: str) -> str:
    return (_HERE / script).read_text(encoding="utf-8")


def _run(config: pytest.Config) -> _CheckSession:
    run = config.pluginmanager.get_plugin("ami-builder-run")
    assert isinstance(run, _CheckSession)
    return run


@pytest.fixture(scope="session")
def host(request: pytest.FixtureRequest) -> testinfra.host.Host:
    """The booted machine, as testinfra shows it; use `with host.sudo():` for what only root may see."""
    return _run(request.config).host


@pytest.fixture(scope="session")
def context(request: pytest.FixtureRequest) -> Context:
    """What the machine was booted with."""
    return _run(request.config).context


@pytest.fixture(scope="session")
def machine(request: pytest.FixtureRequest) -> MachineState:
    """The state of the machine after this start."""
    run = _run(request.config)
    return run.answer_of(run.machine)


@pytest.fixture(scope="session")
def pressure(request: pytest.FixtureRequest) -> PressureResult:
    """What happened under memory pressure; in the phase `pressure` only."""
    run = _run(request.config)
    return run.answer_of(run.pressure)


@pytest.fixture
def note(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """A function that adds a text to a check that passed."""
    return partial(record_property, NOTE)


@pytest.fixture(scope="session")
def container(machine: MachineState) -> ContainerState:
    """The running Dask container; without one, the check is blocked."""
    if machine.container is None:
        pytest.skip(f"{BLOCKED}no Dask container is running")
    return machine.container


@pytest.fixture(scope="session")
def variable(machine: MachineState) -> int:
    """AVAILABLE_MEMORY_FOR_DASK as measured, in bytes; without it, the check is blocked."""
    if machine.variable is None:
        pytest.skip(f"{BLOCKED}AVAILABLE_MEMORY_FOR_DASK was not measured")
    return machine.variable


@pytest.fixture(scope="session")
def client(request: pytest.FixtureRequest) -> WorkersAnswer:
    """The workers' answer to Dask's own client, or why there is none; on the first boot only."""
    run = _run(request.config)
    return run.answer_of(run.client)


@pytest.fixture(scope="session")
def dask(machine: MachineState) -> SchedulerAnswer:
    """The workers as the scheduler's HTTP server lists them; without its answer, the check is blocked."""
    if machine.dask.error:
        pytest.skip(f"{BLOCKED}Dask's scheduler gave no answer")
    return machine.dask


@pytest.fixture(scope="session")
def workers(client: WorkersAnswer) -> WorkersAnswer:
    """The answer of `client`; without one, the check is blocked."""
    if client.error:
        pytest.skip(f"{BLOCKED}Dask's client got no answer")
    return client
