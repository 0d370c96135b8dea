"""One run of the experiment: a machine of its own, the work, and what everybody saw of it."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ami_builder import qemu
from ami_builder.config.schema import Image
from ami_builder.console import Step
from ami_builder.core.errors import AmiBuilderError, BuildFailed, TimedOut
from ami_builder.core.oom import kills
from ami_builder.core.options import Datasource, Network
from ami_builder.qemu.target import LocalMachine
from ami_builder.state.workspace import Run
from ami_builder.system import host, processes, ssh
from tests.experiment import results, tasks
from tests.experiment.cases import METHOD, Case, expected_limit
from tests.experiment.driver import Driver, driving
from tests.experiment.results import Login, Result, Trace
from tests.experiment.user_data import FOLDER, user_data

_LOGIN_SECONDS = 15.0
_LOGIN_EVERY = 2.0
_BACK_SECONDS = 60.0

_LOOK = """
sed -n 's/^MemTotal: *\\([0-9]*\\) kB/total \\1/p' /proc/meminfo
sed -n 's/^AVAILABLE_MEMORY_FOR_DASK=/measured /p' /run/dask/memory.env
journalctl -u dask -b -o cat --no-pager | sed -n 's/.*; reserve \\([0-9]*\\)).*/reserve \\1/p' | tail -1
"""
_KERNEL = "journalctl -k -b -o short-unix --no-pager"
_NANNY = "journalctl -u dask.service -b -o cat --no-pager | grep -c 'memory budget. Restarting' || true"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where runs are made."""

    image: Image
    disk: Path
    accelerator: qemu.Accelerator
    timeout: float
    """For the work of one run, in seconds."""


def make(case: Case, place: Place, run: Run, step: Step) -> tuple[Result, Trace]:
    """Boot a machine for the case, give Dask the work, and return what was seen.

    The logs of a machine that shows nothing are kept with the run. Raises BuildFailed or TimedOut when it
    does not come up, or the policy did not arrive.
    """
    made: list[_Run] = []

    def boot(attempt: int) -> tuple[Result, Trace]:
        folder = run.work / f"{case.name}-{attempt}"
        folder.mkdir(parents=True)
        made.append(_Run(case, place, folder, step))
        return made[-1].go()

    def again() -> bool:
        # One that gets stuck while it works is not put down to the emulator, and not run until it fits.
        if made[-1].working:
            return False
        step.update("the emulated machine got stuck: booting again")
        return True

    try:
        return qemu.boot_again(boot, again)
    except AmiBuilderError as failed:
        _keep_logs(made[-1].directory, run.directory / "machines" / case.name, failed)
        raise


def _keep_logs(folder: Path, to: Path, failed: AmiBuilderError) -> None:
    """Take what a person needs out of the folder that goes with the run."""
    to.mkdir(parents=True, exist_ok=True)
    for log in folder.glob("*.log"):
        shutil.copy(log, to)
        if failed.log == log:
            failed.log = to / log.name


class _Run:
    def __init__(self, case: Case, place: Place, directory: Path, step: Step) -> None:
        self.case, self.place, self.directory, self.step = case, place, directory, step
        self.working = False
        verify = replace(place.image.verify, network=Network.NAT, datasource=Datasource.EC2, cpus=case.cpus)
        self.image = replace(place.image, verify=verify)
        self.machine = LocalMachine(
            image=self.image, disk=place.disk, accelerator=place.accelerator, memory=case.memory
        )

    def go(self) -> tuple[Result, Trace]:
        when = datetime.now(UTC).isoformat(timespec="seconds")
        with ExitStack() as stack:
            driver = stack.enter_context(driving(self.directory / "scheduler.log"))
            session = self._boot(stack, driver)
            self.step.update("waiting for Dask")
            worker = driver.expect("limit", timeout=self.image.verify.timeout, alive=self.machine.check_alive)
            told = self._look(session)
            machine = tasks.Machine(total=told["total"] * 1024, available=told["measured"] + told["reserve"])
            limit = int(worker["limit"])
            expected = expected_limit(self.case.policy, total=machine.total, measured=told["measured"])
            if limit != expected:
                raise BuildFailed(
                    f"the policy {self.case.policy} did not arrive: Dask's limit is {limit}, not {expected}",
                    hint="does the image have a container without a limit of its own?",
                )
            self._start_agent(session, machine)
            with _logins(session) as seen:
                # What the login for it took is not part of the work.
                began = self._uptime(session)
                waited = self.machine.waited()
                ended = self._work(driver, machine)
                starved = host.starved(waited, self.machine.waited())
            return self._told(session, when, machine, limit, began, ended, seen, starved)

    def _boot(self, stack: ExitStack, driver: Driver) -> ssh.Session:
        self.step.update("waiting for ssh")
        key = ssh.generate_key(self.directory)
        told = user_data(self.image, self.case.policy, f"tcp://{qemu.THIS_MACHINE}:{driver.port}")
        public_key = key.with_suffix(".pub").read_text().strip()
        endpoint = self.machine.boot(stack, self.directory, told, public_key)
        session = stack.enter_context(ssh.Session(endpoint, key=key, directory=self.directory / "ssh"))
        session.wait(self.image.verify.timeout, self.machine.check_alive)
        return session

    def _look(self, session: ssh.Session) -> Mapping[str, int]:
        words = session.run(_LOOK, sudo=True).stdout.split()
        found = {name: int(value) for name, value in zip(words[::2], words[1::2], strict=True)}
        if missing := {"total", "measured", "reserve"} - found.keys():
            raise BuildFailed(f"the machine does not tell {', '.join(sorted(missing))}")
        return found

    def _uptime(self, session: ssh.Session) -> float:
        return float(session.run("cat /proc/uptime").stdout.split()[0])

    def _start_agent(self, session: ssh.Session, machine: tasks.Machine) -> None:
        if agent := tasks.agent(self.case.work, machine):
            program = f"python3 {FOLDER}/{tasks.MODULE}.py {' '.join(map(str, agent))}"
            session.run(f"systemd-run --quiet --unit=ami-builder-agent {program}", sudo=True)

    def _work(self, driver: Driver, machine: tasks.Machine) -> Mapping[str, Any]:
        self.working = True
        work = Path(tasks.__file__).with_name("work.py")
        driver.tell(
            {
                "module": tasks.MODULE,
                "path": str(work),
                "tasks": [asdict(task) for task in tasks.tasks(self.case, machine)],
                "timeout": self.place.timeout,
            }
        )
        self.step.update("working")
        ended = driver.expect(
            "ended",
            timeout=self.place.timeout + 120,
            alive=self.machine.check_alive,
            on_other=lambda said: self.step.update(
                f"{said['done']} of {said['of']} tasks done, {said['failed']} failed"
            ),
        )
        found: Mapping[str, Any] = ended["ended"]
        return found

    def _told(
        self, session: ssh.Session, when: str, machine: tasks.Machine, limit: int, began: float,
        ended: Mapping[str, Any], seen: list[Login], starved: float,
    ) -> tuple[Result, Trace]:  # fmt: skip
        self.step.update("reading what the machine has seen")
        counts = self._counts(session)
        console = (self.directory / "console.log").read_text(errors="replace")
        inside = results.watched(results.ticks(console), began, ended["seconds"])
        came_back = counts is not None
        if counts is None:
            everywhere, in_containers = results.console_kills(console)
            counts = (0, everywhere + in_containers, everywhere, in_containers, ())
        by_nanny, by_kernel, everywhere, in_containers, harmed = counts
        frozen_longest, frozen = results.stood_still(inside, began, ended["seconds"])
        ssh_longest, ssh_frozen = results.waits(seen)
        result = Result(
            method=METHOD,
            case=self.case,
            when=when,
            accelerator=self.place.accelerator,
            total=machine.total,
            available=machine.available,
            limit=limit,
            done=ended["done"],
            failed=ended["failed"],
            unfinished=ended["unfinished"],
            came_back=came_back,
            seconds=ended["seconds"],
            by_nanny=by_nanny,
            by_kernel=by_kernel,
            global_kills=everywhere,
            container_kills=in_containers,
            harmed=harmed,
            frozen_longest=round(frozen_longest, 2),
            frozen=round(frozen, 2),
            ssh_tries=len(seen),
            ssh_failed=sum(not login.answered for login in seen),
            ssh_longest=round(ssh_longest, 2),
            ssh_frozen=round(ssh_frozen, 2),
            stalled_some=round(inside[-1].some - inside[0].some, 2),
            stalled_full=round(inside[-1].full - inside[0].full, 2),
            spilled=ended["spilled"],
            peak=max(tick.held for tick in inside),
            unharmed=results.unharmed(inside),
            starved=round(starved, 2),
        )
        return result, results.trace(inside, began, ended["marks"])

    def _counts(self, session: ssh.Session) -> tuple[int, int, int, int, tuple[str, ...]] | None:
        """Return restarts by the nanny and whom the kernel killed; None when the machine never comes back."""

        def read() -> tuple[str, str] | None:
            self.machine.check_alive()
            try:
                session.wait(_BACK_SECONDS, self.machine.check_alive)
                kernel = session.run(_KERNEL, sudo=True, timeout=_BACK_SECONDS).stdout
                return kernel, session.run(_NANNY, sudo=True, timeout=_BACK_SECONDS).stdout
            except (ssh.Unreachable, TimedOut):
                return None

        try:
            kernel, nanny = processes.wait_until(read, what="reading the logs", timeout=_BACK_SECONDS)
        except TimedOut:
            return None
        return (int(nanny), *results.counted(kills(kernel)))


@contextmanager
def _logins(session: ssh.Session) -> Iterator[list[Login]]:
    """Log in anew again and again, as a person would, until the block ends."""
    seen: list[Login] = []
    over = threading.Event()
    argv: list[str | Path] = [
        "ssh", "-F", session.config, "-o", "ControlPath=none",
        "-o", f"ConnectTimeout={_LOGIN_SECONDS:.0f}", ssh.HOST, "--", "true",
    ]  # fmt: skip
    start = time.monotonic()

    def log_in() -> None:
        began = time.monotonic()
        try:
            answered = processes.capture(argv, what="a login", timeout=_LOGIN_SECONDS).status == 0
        except AmiBuilderError:
            answered = False
        if not over.is_set() or answered:
            seen.append(Login(began=began - start, ended=time.monotonic() - start, answered=answered))

    def watch() -> None:
        while not over.is_set():
            log_in()
            over.wait(_LOGIN_EVERY)

    watcher = threading.Thread(target=watch, name="logins", daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join(_LOGIN_SECONDS + processes.STOP_SECONDS)
