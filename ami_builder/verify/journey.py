"""Takes one machine through the phases: first boot, service restart, reboot, memory pressure."""

import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from ami_builder.config.schema import Image
from ami_builder.console import Step
from ami_builder.core.errors import AmiBuilderError
from ami_builder.core.options import Role
from ami_builder.core.records import (
    FIRST_BOOT,
    PRESSURE,
    CheckResult,
    Measurement,
    Outcome,
    RunStatus,
    outcome_of,
)
from ami_builder.system import processes, ssh, templates
from ami_builder.system.certificates import Authority, Certificate
from ami_builder.system.resources import checks_dir
from ami_builder.verify import runner
from ami_builder.verify.boot_progress import SHUTTING_DOWN, WAITING, reporting
from ami_builder.verify.machine import Machine, MachineResult, Unresponsive

_SHORT_SECONDS = 60.0
_PROMPT_BOOT_SECONDS = 60.0
"""From the start to a login by ssh, on EC2 and on a fast host without KVM."""
_MOST_PATIENCE = 8.0
# A fixed piece of work that the CPU time of a boot is compared with: a shell, and processes that it starts.
# If it changes, older records can't be compared any more.
_IDLE = "sleep 3"
_CONTROL = """
i=0; while [ "$i" -lt 40000 ]; do i=$((i + 1)); done
i=0; while [ "$i" -lt 40 ]; do /bin/true; i=$((i + 1)); done
"""
# There is no scheduler for a worker here, so the image's own Compose file is verified in role local: here
# with TLS, and without after the reboot.
_OWN_COMPOSE_FILE = """
cp /var/lib/ami-builder/compose.image.yaml /etc/dask/compose.yaml
cp -r /var/lib/ami-builder/tls /etc/dask
sed -i s/^DASK_ROLE=.*/DASK_ROLE=local/ /etc/dask/dask.env
systemctl restart dask.service
"""
_NO_TLS = "rm -r /etc/dask/tls"
_READ_MEASURED = "sed -n s/^AVAILABLE_MEMORY_FOR_DASK=//p /run/dask/memory.env"

_USER_DATA = "user-data.yaml.j2"

_EVIDENCE = {
    "journal.txt": "journalctl --no-pager --boot",
    "dask-service.txt": "systemctl status --no-pager --full dask.service; cat /run/dask/*",
    "docker-inspect.json": "docker ps -aq | xargs -r docker inspect",
    "docker-logs.txt": "docker ps -aq | xargs -r -n 1 docker logs --tail 200 2>&1",
    "cloud-init.txt": "cat /run/cloud-init/status.json /var/log/cloud-init*.log",
}


def verify_machine(
    image: Image, machine: Machine, *, work: Path, evidence: Path, step: Step, attempt: int = 1
) -> MachineResult:
    """Take a machine through all phases, or until a check failed.

    Its files go to a folder in `work`. A folder in `evidence` gets the console, the checks' output and, if a
    check did not pass, logs of the machine. From the second `attempt` on both have its number in their names.
    Raises BuildFailed, CloudFailed or TimedOut when the machine doesn't come up.
    """
    name = machine.name.replace(" ", "") + (f"-{attempt}" if attempt > 1 else "")
    return _Journey(image, machine, work / name, evidence / name).go(step)


def user_data(image: Image, *, nonce: str, certificate: Certificate | None = None) -> str:
    """Return a cloud-config with its own Compose file, as a control plane sends it.

    The checks read `nonce` on the machine, to know that it is the right one. `certificate` is put aside for
    the phase with TLS. Raises UsageError with the template's name and line.
    """
    environment = templates.environment(checks_dir())
    return templates.render(environment, _USER_DATA, image=image, nonce=nonce, certificate=certificate)


class _Journey:
    def __init__(self, image: Image, machine: Machine, work: Path, evidence: Path) -> None:
        self.image, self.machine = image, machine
        self.work, self.evidence = work, evidence
        for folder in (self.work, self.evidence):
            folder.mkdir(parents=True)
        self.key = ssh.generate_key(self.work)
        self.public_key = self.key.with_suffix(".pub").read_text().strip()
        self.nonce = secrets.token_hex(16)
        self.results: list[CheckResult] = []
        self.measured: list[Measurement] = []
        self.patience = 1.0
        """How many times longer than on a fast host everything may take before it times out."""

    @property
    def timeout(self) -> float:
        """How long a step may take, in seconds."""
        return self.image.verify.timeout * self.patience

    def go(self, step: Step) -> MachineResult:
        with ExitStack() as stack:
            stack.callback(self._keep_console)
            certificate = Authority.create(days=2).issue("verification", days=2, serves=True)
            text = user_data(self.image, nonce=self.nonce, certificate=certificate)
            with step.step("start"):
                endpoint = self.machine.start(stack, self.work, text, self.public_key)
            # After the start: how long EC2 takes to launch an instance says nothing about the image.
            began = time.monotonic()
            session = stack.enter_context(ssh.Session(endpoint, key=self.key, directory=self.work / "ssh"))
            try:
                with step.step("first boot", detail=WAITING) as child:
                    alive = reporting(self.machine.check_alive, child, endpoint.console_log)
                    session.wait(self.timeout, alive)
                    seconds = time.monotonic() - began
                    # The boot is the control: if it took three times as long, so may everything else.
                    self.patience = min(_MOST_PATIENCE, max(1.0, seconds / _PROMPT_BOOT_SECONDS))
                    self._check(session, FIRST_BOOT, child, began, ssh_seconds=seconds)
                with step.step("service restart, with the image's own Compose file and TLS") as child:
                    began = time.monotonic()
                    session.run(_OWN_COMPOSE_FILE, sudo=True, check=False, timeout=self.timeout)
                    self._check(session, "restart", child, began, tls=True)
                # After a failure, skip the longest steps. A machine without the right limit may stall
                # for good under memory pressure, and then its evidence can't be fetched.
                if not self._failed():
                    with step.step("reboot", detail=SHUTTING_DOWN) as child:
                        session.run(_NO_TLS, sudo=True, check=False, timeout=self.timeout)
                        began = time.monotonic()
                        alive = reporting(self.machine.check_alive, child, endpoint.console_log, reboot=True)
                        self.machine.reboot(session, self.timeout, alive)
                        self._check(session, "reboot", child, began, ssh_seconds=time.monotonic() - began)
                if self.image.verify.pressure and not self._failed():
                    with step.step("memory pressure") as child:
                        self._judge(session, PRESSURE, child)
            except AmiBuilderError as failed:
                self.machine.save_console()
                if failed.log == endpoint.console_log:
                    failed.tail = processes.last_lines(endpoint.console_log)
                if not isinstance(failed, Unresponsive):
                    self._keep_evidence(session, step)
                raise
            if self._failed() or self._ended(Outcome.INCONCLUSIVE):
                self.machine.save_console()
                self._keep_evidence(session, step)
        step.done("", RunStatus(outcome_of(self.results)))
        return MachineResult(results=tuple(self.results), measured=tuple(self.measured))

    def _check(
        self,
        session: ssh.Session,
        phase: str,
        step: Step,
        began: float,
        *,
        ssh_seconds: float | None = None,
        tls: bool = False,
    ) -> None:
        dask_seconds: float | None = None
        cpu_seconds: float | None = None

        def ready() -> None:
            nonlocal dask_seconds, cpu_seconds
            dask_seconds = time.monotonic() - began
            if ssh_seconds is not None:
                cpu_seconds = self.machine.cpu_seconds(session)

        step.update("waiting for Dask")
        self._judge(session, phase, step, ready, tls=tls)
        short = _SHORT_SECONDS * self.patience
        measured = session.run(_READ_MEASURED, sudo=True, check=False, timeout=short).stdout.strip()
        if measured.isdigit():
            self.measured.append(
                Measurement(
                    machine=self.machine.name,
                    phase=phase,
                    total=self.machine.memory,
                    available=int(measured),
                    ssh_seconds=ssh_seconds,
                    dask_seconds=dask_seconds,
                    cpu_seconds=cpu_seconds,
                    control_seconds=self._control(session) if phase == FIRST_BOOT else None,
                )
            )

    def _control(self, session: ssh.Session) -> float | None:
        """Return the CPU seconds that the machine takes for a fixed piece of work, at rest; None if unknown.

        What an idle machine uses in the same time is subtracted: on a slow host the work takes long, and Dask
        runs beside it.
        """
        (idle, idle_seconds), (work, work_seconds) = (
            self._used(session, script) for script in (_IDLE, _CONTROL)
        )
        if idle is None or work is None:
            return None
        alone = work - idle * work_seconds / idle_seconds
        return alone if alone > 0 else None

    def _used(self, session: ssh.Session, script: str) -> tuple[float | None, float]:
        """Run a script, and return the CPU seconds that the machine used, and the seconds that it took."""
        began, before = time.monotonic(), self.machine.cpu_seconds(session)
        session.run(script, timeout=self.timeout)
        after = self.machine.cpu_seconds(session)
        used = None if before is None or after is None else after - before
        return used, time.monotonic() - began

    def _judge(
        self,
        session: ssh.Session,
        phase: str,
        step: Step,
        on_ready: Callable[[], None] = lambda: None,
        *,
        tls: bool = False,
    ) -> None:
        """Run the checks of a phase, and report their results on the step."""
        settings = self.image.verify
        results = runner.run(
            files=[*runner.shipped(checks_dir()), *settings.checks],
            ssh_config=session.config,
            host=ssh.HOST,
            phase=phase,
            context=runner.Context(
                nonce=self.nonce,
                machine=self.machine.name,
                machine_memory=self.machine.memory,
                disk=settings.disk_size,
                reserve=self.image.memory.reserve,
                headroom=self.image.memory.nanny_headroom,
                datasource=settings.datasource,
                role=Role.LOCAL,
                workers=self.image.dask.workers,
                user=self.image.base.ssh_user,
                public_key=self.public_key,
                timeout=self.timeout,
                emulator=self.machine.emulator,
                tls=tls,
            ),
            directory=self.evidence,
            timeout=self.timeout,
            alive=self.machine.check_alive,
            on_result=lambda result: step.update(result.name),
            on_ready=on_ready,
            on_progress=step.update,
        )
        self.results += results
        step.done(summary(results), RunStatus(outcome_of(results)))

    def _failed(self) -> bool:
        return self._ended(Outcome.FAILED)

    def _ended(self, outcome: Outcome) -> bool:
        """Return whether any check so far had this outcome."""
        return any(result.outcome is outcome for result in self.results)

    def _keep_evidence(self, session: ssh.Session, step: Step) -> None:
        """Fetch the logs of the machine. A failure to do so must not hide the first error."""
        for name, command in _EVIDENCE.items():
            step.update(f"fetching {name}")
            try:
                # `true`, so that a missing file does not keep the rest from being fetched.
                short = _SHORT_SECONDS * self.patience
                session.fetch(f"{command}\ntrue", self.evidence / name, sudo=True, timeout=short)
            except AmiBuilderError as failed:
                (self.evidence / name).write_text(f"not available: {failed}\n")
                if isinstance(failed, ssh.Unreachable):
                    return

    def _keep_console(self) -> None:
        log: Path = self.work / "console.log"
        if log.exists():
            shutil.copy(log, self.evidence)


def summary(results: Sequence[CheckResult]) -> str:
    """Return the results of a phase in one line; only the failed checks if there are any."""
    for outcome in (Outcome.FAILED, Outcome.INCONCLUSIVE):
        if count := sum(result.outcome is outcome for result in results):
            return f"{count} of {len(results)} checks {outcome}"
    notes = [result.message for result in results if result.outcome is Outcome.PASSED and result.message]
    return "; ".join([f"{len(results)} checks passed", *notes])
