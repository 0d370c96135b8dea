"""One run of the experiment: boot a VM, give Dask the work, and collect the results."""

from __future__ import annotations

import shutil
import statistics
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ami_builder.core.errors import AmiBuilderError, BuildFailed, TimedOut
from ami_builder.core.oom import kills
from ami_builder.core.options import Datasource, Network
from ami_builder.core.units import MIB
from ami_builder.qemu.hardware import HOST_ADDRESS, Accelerator
from ami_builder.qemu.machine import VirtualMachine, boot_again
from ami_builder.qemu.target import QemuMachine
from ami_builder.system import host_load, processes, ssh
from tests.experiment import results, tasks
from tests.experiment.cases import METHOD, Case, expected_limit, work_seconds
from tests.experiment.driver import Driver, driving
from tests.experiment.layers import IMAGE
from tests.experiment.results import LoginTry, Result, Trace
from tests.experiment.saved import SavedMachine, as_script
from tests.experiment.user_data import FOLDER, LAYERS_UNIT, user_data

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ami_builder.config.schema import Image
    from ami_builder.console import Step
    from ami_builder.state.workspace import Run

_LOGIN_SECONDS = 15.0
_LOGIN_EVERY = 2.0
_BACK_SECONDS = 60.0
_LOGINS_AT_REST = 3
_DISK_TIMES = 5
"""The disk, in times the memory: W1 spills half of that, and no worker may fill the disk."""

_LOOK = """
sed -n 's/^MemTotal: *\\([0-9]*\\) kB/total \\1/p' /proc/meminfo
sed -n 's/^AVAILABLE_MEMORY_FOR_DASK=/measured /p' /run/dask/memory.env
journalctl -u dask -b -o cat --no-pager | sed -n 's/.*; reserve \\([0-9]*\\)).*/reserve \\1/p' | tail -1
sed 's/^/protected /' /sys/fs/cgroup/system.slice/memory.min
[ ! -e /run/ami-builder-layers ] || echo layers 1
cat /sys/fs/cgroup/system.slice/docker-*.scope/memory.max | sed 's/max/0/; s/^/container /' | sort | tail -1
"""
_KERNEL = "journalctl -k -b -o short-monotonic --no-pager"
_NANNY = "cat /var/lib/docker/containers/*/*-json.log | grep -c 'memory budget. Restarting' || true"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What all runs have in common."""

    image: Image
    disk: Path
    accelerator: Accelerator
    saved: Path | None = None
    """Where VMs are saved once they have booted, for all runs to go on from; None: each run boots."""
    timeout: float | None
    """For the work of one run, in seconds. None: what the work and the memory need."""


def make(case: Case, setup: Setup, run: Run, step: Step) -> tuple[Result, Trace]:
    """Boot a VM for the case, give Dask the work, and return the results.

    The logs of a failed run are kept. Raises BuildFailed or TimedOut when the VM does not boot, or when Dask
    does not have the limit of the policy.
    """
    made: list[_OneRun] = []

    def boot(attempt: int) -> tuple[Result, Trace]:
        folder = run.work / f"{case.name}-{attempt}"
        folder.mkdir(parents=True)
        made.append(_OneRun(case, setup, folder, step))
        return made[-1].go()

    def again() -> bool:
        # A VM that gets stuck during the work is a result, not a fault of the emulator.
        if made[-1].working:
            return False
        step.update("the emulated VM got stuck: booting again")
        return True

    try:
        return boot_again(boot, again)
    except AmiBuilderError as failed:
        _keep_logs(made[-1].directory, run.directory / "machines" / case.name, failed)
        raise


def _keep_logs(folder: Path, to: Path, failed: AmiBuilderError) -> None:
    """Copy the logs out of the folder that is deleted after the run."""
    to.mkdir(parents=True, exist_ok=True)
    for log in folder.glob("*.log"):
        shutil.copy(log, to)
        if failed.log == log:
            failed.log = to / log.name


class _OneRun:
    def __init__(self, case: Case, setup: Setup, directory: Path, step: Step) -> None:
        self.case, self.setup, self.directory, self.step = case, setup, directory, step
        self.working = False
        self.timeout = setup.timeout or work_seconds(case)
        verify = replace(
            setup.image.verify,
            network=Network.NAT,
            datasource=Datasource.EC2,
            cpus=case.cpus,
            disk_size=max(setup.image.verify.disk_size, _DISK_TIMES * case.memory),
        )
        self.image = replace(setup.image, verify=verify)
        self.vm: VirtualMachine | None = None

    def go(self) -> tuple[Result, Trace]:
        when = datetime.now(UTC).isoformat(timespec="seconds")
        with ExitStack() as stack:
            driver = stack.enter_context(driving(self.directory / "scheduler.log"))
            session = self._boot(stack, driver)
            self.step.update("waiting for Dask")
            worker = driver.expect("limit", timeout=self.image.verify.timeout, alive=self._check_alive)
            values = self._memory(session)
            self._check_layers(session, values)
            memory = tasks.Memory(
                total=values["total"] * 1024, available=values["measured"] + values["reserve"]
            )
            limit = int(worker["limit"])
            expected = expected_limit(self.case.policy, total=memory.total, measured=values["measured"])
            if expected is not None and limit != expected:
                raise BuildFailed(
                    f"Dask's limit under policy {self.case.policy} is {limit}, expected {expected}",
                    hint="check that the container of the image has no limit of its own",
                )
            assert self.vm is not None
            at_rest = [_log_in(session, 0.0, self.vm.pid) for _ in range(_LOGINS_AT_REST)]
            own_rest = statistics.median(login.own for login in at_rest)
            self._start_agent(session, memory)
            with _logins(session, self.vm.pid) as seen:
                # After the login: its time is not part of the work.
                began = self._uptime(session)
                waited, used = host_load.cpu_waits(self.vm.pid), host_load.cpu_seconds(self.vm.pid)
                ended = self._work(driver, memory)
                cpu_steal = host_load.longest_wait(waited, host_load.cpu_waits(self.vm.pid))
                used_then = host_load.cpu_seconds(self.vm.pid)
            result, trace = self._collect(session, when, memory, limit, began, ended, seen, cpu_steal)
            result = replace(
                result,
                saved=self.setup.saved is not None,
                ssh_rest=round(statistics.median(login.ended - login.began for login in at_rest), 2),
                ssh_above_rest=round(results.longest_own_wait(seen) - own_rest, 2),
                container=values["container"],
                protected=values["protected"],
                cpu_seconds=None if used is None or used_then is None else round(used_then - used, 1),
            )
            return result, trace

    def _boot(self, stack: ExitStack, driver: Driver) -> ssh.Session:
        self.step.update("waiting for ssh")
        scheduler = f"tcp://{HOST_ADDRESS}:{driver.port}"
        data = user_data(self.image, self.case.policy, scheduler, self.case.layers)
        if self.setup.saved is not None:
            saved = SavedMachine(
                image=self.image,
                source=self.setup.disk,
                folder=self.setup.saved / f"{self.case.memory // MIB}MiB-{self.case.cpus}cpu",
                memory=self.case.memory,
                cpus=self.case.cpus,
                accelerator=self.setup.accelerator,
            )
            saved.ensure()
            self.vm, session = saved.go_on(stack, self.directory)
            session.run("sh -s", sudo=True, stdin=as_script(data))
            return session
        key = ssh.generate_key(self.directory)
        public_key = key.with_suffix(".pub").read_text().strip()
        machine = QemuMachine(
            image=self.image,
            disk=self.setup.disk,
            accelerator=self.setup.accelerator,
            memory=self.case.memory,
        )
        endpoint = machine.boot(stack, self.directory, data, public_key)
        self.vm = machine.vm
        session = stack.enter_context(ssh.Session(endpoint, key=key, directory=self.directory / "ssh"))
        session.wait(self.image.verify.timeout, self._check_alive)
        return session

    def _check_alive(self) -> None:
        assert self.vm is not None
        self.vm.check_alive()

    def _memory(self, session: ssh.Session) -> Mapping[str, int]:
        words = session.run(_LOOK, sudo=True).stdout.split()
        found = {name: int(value) for name, value in zip(words[::2], words[1::2], strict=True)}
        if missing := {"total", "measured", "reserve", "protected", "container"} - found.keys():
            raise BuildFailed(f"the VM reports no {', '.join(sorted(missing))}")
        return found

    def _check_layers(self, session: ssh.Session, values: Mapping[str, int]) -> None:
        wanted = self.case.layers
        if "layers" not in values:
            log = session.run(f"journalctl -u {LAYERS_UNIT} -b -o cat --no-pager", sudo=True).stdout
            raise BuildFailed(f"the layers {wanted!r} were not set", tail=tuple(log.splitlines()[-10:]))
        if wanted != IMAGE and "protect" not in wanted and values["protected"]:
            raise BuildFailed(f"{values['protected']} bytes are protected in spite of the layers {wanted!r}")

    def _uptime(self, session: ssh.Session) -> float:
        return float(session.run("cat /proc/uptime").stdout.split()[0])

    def _start_agent(self, session: ssh.Session, memory: tasks.Memory) -> None:
        if agent := tasks.agent(self.case.work, memory):
            program = f"python3 {FOLDER}/{tasks.MODULE}.py {' '.join(map(str, agent))}"
            session.run(f"systemd-run --quiet --unit=ami-builder-agent {program}", sudo=True)

    def _work(self, driver: Driver, memory: tasks.Memory) -> Mapping[str, Any]:
        self.working = True
        work = Path(tasks.__file__).with_name("work.py")
        driver.send(
            {
                "module": tasks.MODULE,
                "path": str(work),
                "tasks": [asdict(task) for task in tasks.tasks(self.case, memory)],
                "timeout": self.timeout,
            }
        )
        self.step.update("working")
        ended = driver.expect(
            "ended",
            timeout=self.timeout + 120,
            alive=self._check_alive,
            on_other=lambda message: self.step.update(
                f"{message['done']} of {message['of']} tasks done, {message['failed']} failed"
            ),
        )
        found: Mapping[str, Any] = ended["ended"]
        return found

    def _collect(
        self, session: ssh.Session, when: str, memory: tasks.Memory, limit: int, began: float,
        ended: Mapping[str, Any], seen: list[LoginTry], cpu_steal: float,
    ) -> tuple[Result, Trace]:  # fmt: skip
        self.step.update("reading the logs of the VM")
        counts = self._counts(session)
        console = (self.directory / "console.log").read_text(errors="replace")
        inside = results.watched(results.ticks(console), began, ended["seconds"])
        came_back = counts is not None
        if counts is None:
            system, by_cgroup = results.console_kills(console)
            counts = (0, system + by_cgroup, system, by_cgroup, ())
        by_nanny, by_kernel, system, by_cgroup, killed_outside = counts
        longest_stall, stalled = results.stalls(inside, began, ended["seconds"])
        ssh_longest, ssh_late = results.waits(seen)
        result = Result(
            method=METHOD,
            case=self.case,
            when=when,
            accelerator=self.setup.accelerator,
            total=memory.total,
            available=memory.available,
            limit=limit,
            done=ended["done"],
            failed=ended["failed"],
            unfinished=ended["unfinished"],
            came_back=came_back,
            seconds=ended["seconds"],
            by_nanny=by_nanny,
            by_kernel=by_kernel,
            system_oom_kills=system,
            cgroup_oom_kills=by_cgroup,
            killed_outside=killed_outside,
            longest_stall=round(longest_stall, 2),
            stalled=round(stalled, 2),
            ssh_tries=len(seen),
            ssh_failed=sum(not login.answered for login in seen),
            ssh_longest=round(ssh_longest, 2),
            ssh_late=round(ssh_late, 2),
            psi_some=round(inside[-1].some - inside[0].some, 2),
            psi_full=round(inside[-1].full - inside[0].full, 2),
            spilled=ended["spilled"],
            peak=max(tick.held for tick in inside),
            held_before_stall=results.held_before_stall(inside),
            held_before_long_stall=results.held_before_long_stall(inside, console),
            cpu_steal=round(cpu_steal, 2),
        )
        return result, results.trace(inside, began, ended["marks"])

    def _counts(self, session: ssh.Session) -> tuple[int, int, int, int, tuple[str, ...]] | None:
        """Return the restarts by the nanny and the kills by the kernel; None if the VM stays unresponsive."""

        def read() -> tuple[str, str] | None:
            self._check_alive()
            try:
                session.wait(_BACK_SECONDS, self._check_alive)
                kernel = session.run(_KERNEL, sudo=True, timeout=_BACK_SECONDS).stdout
                return kernel, session.run(_NANNY, sudo=True, timeout=_BACK_SECONDS).stdout
            except (ssh.Unreachable, TimedOut):
                return None

        try:
            kernel, nanny = processes.wait_until(read, what="reading the logs", timeout=_BACK_SECONDS)
        except TimedOut:
            return None
        return (int(nanny), *results.counted(kills(kernel)))


def _log_in(session: ssh.Session, start: float, emulator: int) -> LoginTry:
    """Log in over a new connection. Times are relative to `start`."""
    argv: list[str | Path] = [
        "ssh", "-F", session.config, "-o", "ControlPath=none",
        "-o", f"ConnectTimeout={_LOGIN_SECONDS:.0f}", ssh.HOST, "--", "true",
    ]  # fmt: skip
    began, waited = time.monotonic(), host_load.cpu_waits(emulator)
    try:
        answered = processes.capture(argv, what="a login", timeout=_LOGIN_SECONDS).status == 0
    except AmiBuilderError:
        answered = False
    ended = time.monotonic()
    denied = min(ended - began, host_load.longest_wait(waited, host_load.cpu_waits(emulator)))
    return LoginTry(began=began - start, ended=ended - start, answered=answered, denied=denied)


@contextmanager
def _logins(session: ssh.Session, emulator: int) -> Iterator[list[LoginTry]]:
    """Log in again and again over new connections until the block ends."""
    seen: list[LoginTry] = []
    over = threading.Event()
    start = time.monotonic()

    def watch() -> None:
        while not over.is_set():
            login = _log_in(session, start, emulator)
            if not over.is_set() or login.answered:
                seen.append(login)
            over.wait(_LOGIN_EVERY)

    watcher = threading.Thread(target=watch, name="logins", daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join(_LOGIN_SECONDS + processes.STOP_SECONDS)
