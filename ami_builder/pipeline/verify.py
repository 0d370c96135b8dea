"""Prove an image: boot it untouched as a cloud would, then check, restart, check, reboot, check."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from ami_builder.adapters import checks, imds, qemu, seed, ssh
from ami_builder.console import Step
from ami_builder.errors import AmiBuilderError, BuildFailed, ChecksFailed
from ami_builder.model import CheckResult, Datasource, Image, Outcome, Role, Verdict, Verify
from ami_builder.pipeline.concurrent import side_by_side
from ami_builder.render import user_data
from ami_builder.resources import checks_dir
from ami_builder.workspace import Run, Workspace

GIB = 1 << 30

# A multi-threaded TCG boot now and then panics in the guest's kernel: that says nothing about the image.
_BOOTS = 2
_SHORT_SECONDS = 60.0
# A worker's image has no scheduler here, so its own Compose file is proved in the role that needs none.
_OWN_COMPOSE_FILE = """
cp /var/lib/ami-builder/compose.image.yaml /etc/dask/compose.yaml
sed -i s/^DASK_ROLE=.*/DASK_ROLE=local/ /etc/dask/dask.env
systemctl restart dask.service
"""
_READ_MEASURED = "sed -n s/^AVAILABLE_MEMORY_FOR_DASK=//p /run/dask/memory.env"

_EVIDENCE = {
    "journal.txt": "journalctl --no-pager --boot",
    "dask-service.txt": "systemctl status --no-pager --full dask.service; cat /run/dask/*",
    "docker-inspect.json": "docker ps -aq | xargs -r docker inspect",
    "docker-logs.txt": "docker ps -aq | xargs -r -n 1 docker logs --tail 200 2>&1",
    "cloud-init.txt": "cat /run/cloud-init/status.json /var/log/cloud-init*.log",
}


def checks_digest(image: Image) -> str:
    """Return what the verdict is bound to besides the image: the checks and the machines they ran on."""
    settings = TypeAdapter(Verify).dump_json(image.verify, exclude={"checks", "timeout"})
    files = checks.digest([*checks.shipped(checks_dir()), *image.verify.checks])
    return hashlib.sha256(files.encode() + settings).hexdigest()


def verify(image: Image, disk: Path, digest: str, workspace: Workspace, run: Run, step: Step) -> Verdict:
    """Prove a disk image on a machine of each configured size; the disk is never written.

    Raises BuildFailed when a machine doesn't come up; failed checks are in the verdict.
    """
    qemu.image_info(disk)
    accelerator, reason = qemu.choose_accelerator(
        disk, cache=workspace.cache / "accelerator.json", directory=run.work
    )
    step.update(reason)
    # More machines than processors would only make each other late.
    at_once = max(1, (os.cpu_count() or 1) // image.verify.cpus)
    calls = [_machine_proof(image, disk, accelerator, memory, run, step) for memory in image.verify.memory]
    proofs = side_by_side(calls, workers=at_once)
    verdict = Verdict(
        digest=digest,
        checks_digest=checks_digest(image),
        results=tuple(result for proof in proofs for result in proof.results),
        measured={key: value for proof in proofs for key, value in proof.measured.items()},
    )
    run.update(verdict=verdict)
    return verdict


def require_passed(verdict: Verdict, evidence: Path) -> None:
    """Raise ChecksFailed that names every check that failed."""
    failed = [r for r in verdict.results if r.outcome is Outcome.FAILED]
    if verdict.passed:
        return
    raise ChecksFailed(
        f"{len(failed)} of {len(verdict.results)} checks failed: this image does not keep its promise",
        tail=tuple(f"{r.name} ({r.phase}, {r.memory / GIB:g} GiB): {r.message}" for r in failed),
        log=evidence,
        hint="the console, the journal and docker inspect of the machine are in that folder",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Proof:
    results: tuple[CheckResult, ...]
    measured: dict[str, int]


def _machine_proof(
    image: Image, disk: Path, accelerator: qemu.Accelerator, memory: int, run: Run, step: Step
) -> Callable[[], _Proof]:
    def prove() -> _Proof:
        with step.step(f"machine of {memory / GIB:g} GiB") as child:
            for attempt in range(1, _BOOTS + 1):
                machine = _Machine(image, disk, accelerator, memory, run, attempt)
                try:
                    return machine.prove(child)
                except qemu.GuestPanic as panic:
                    if attempt == _BOOTS or not panic.boot_again:
                        raise
                    child.update("the guest's kernel panicked under emulation: booting again")
            raise AssertionError("unreachable")

    return prove


class _Machine:
    """One machine's way through the phases."""

    def __init__(
        self,
        image: Image,
        disk: Path,
        accelerator: qemu.Accelerator,
        memory: int,
        run: Run,
        attempt: int,
    ) -> None:
        name = f"{memory >> 20}MiB" + (f"-{attempt}" if attempt > 1 else "")
        self.image = image
        self.disk = disk
        self.accelerator = accelerator
        self.memory = memory
        self.work = run.work / name
        self.evidence = run.directory / "machines" / name
        for folder in (self.work, self.evidence):
            folder.mkdir(parents=True)
        self.key = ssh.generate_key(self.work)
        self.public_key = self.key.with_suffix(".pub").read_text().strip()
        self.nonce = secrets.token_hex(16)
        self.instance_id = imds.new_instance_id()
        self.results: list[CheckResult] = []
        self.measured: dict[str, int] = {}

    def prove(self, step: Step) -> _Proof:
        """Go through all phases; evidence is kept when a check failed or the machine did not come up."""
        timeout = self.image.verify.timeout
        with ExitStack() as stack:
            machine, session = self._boot(stack)
            try:
                with step.step("first boot", detail="waiting for ssh") as child:
                    session.wait(timeout, machine.check_alive)
                    self._check(session, "boot", child)
                with step.step("service restart, with the image's own Compose file") as child:
                    session.run(
                        _OWN_COMPOSE_FILE,
                        sudo=True,
                        check=False,
                        timeout=timeout,
                    )
                    self._check(session, "restart", child)
                with step.step("reboot", detail="waiting for ssh") as child:
                    session.reboot(timeout, machine.check_alive)
                    self._check(session, "reboot", child)
            except AmiBuilderError:
                self._keep_evidence(session)
                raise
            if any(r.outcome is Outcome.FAILED for r in self.results):
                self._keep_evidence(session)
        return _Proof(results=tuple(self.results), measured=self.measured)

    def _boot(self, stack: ExitStack) -> tuple[qemu.Machine, ssh.Session]:
        text = user_data(self.image, nonce=self.nonce)
        settings = self.image.verify
        metadata: imds.MetadataServer | None = None
        iso: Path | None = None
        if settings.datasource is Datasource.EC2:
            metadata = stack.enter_context(
                imds.MetadataServer(
                    imds.InstanceMetadata(
                        instance_id=self.instance_id, user_data=text.encode(), public_key=self.public_key
                    )
                )
            )
        else:
            iso = self.work / "seed.iso"
            seed.nocloud_iso(iso, user_data=text, public_key=self.public_key, instance_id=self.instance_id)
        machine = qemu.Machine(
            disk=self.disk,
            directory=self.work,
            memory=self.memory,
            cpus=settings.cpus,
            disk_size=settings.disk_size,
            accelerator=self.accelerator,
            user=self.image.base.ssh_user,
            imds_port=metadata.port if metadata is not None else None,
            seed=iso,
            network=settings.network,
            instance_id=self.instance_id,
        )
        stack.callback(_keep, machine.console_log, self.evidence)
        endpoint = stack.enter_context(machine)
        session = stack.enter_context(ssh.Session(endpoint, key=self.key, directory=self.work / "ssh"))
        return machine, session

    def _check(self, session: ssh.Session, phase: str, step: Step) -> None:
        step.update("waiting for Dask")
        settings = self.image.verify
        results = checks.run(
            files=[*checks.shipped(checks_dir()), *settings.checks],
            ssh_config=session.config,
            host=ssh.HOST,
            phase=phase,
            context=checks.Context(
                nonce=self.nonce,
                machine_memory=self.memory,
                disk=settings.disk_size,
                reserve=self.image.reserve,
                datasource=settings.datasource,
                role=Role.LOCAL,
                workers=self.image.dask.workers,
                user=self.image.base.ssh_user,
                public_key=self.public_key,
                timeout=settings.timeout,
            ),
            directory=self.evidence,
            timeout=settings.timeout,
            on_result=lambda result: step.update(result.name),
        )
        self.results += results
        measured = session.run(_READ_MEASURED, sudo=True, check=False, timeout=_SHORT_SECONDS).stdout.strip()
        if measured.isdigit():
            self.measured[f"{phase}@{self.memory}"] = int(measured)
        failed = sum(r.outcome is Outcome.FAILED for r in results)
        step.done(f"{failed} of {len(results)} checks failed" if failed else f"{len(results)} checks passed")

    def _keep_evidence(self, session: ssh.Session) -> None:
        """Fetch what tells why; a machine that doesn't answer any more must not hide the first error."""
        for name, command in _EVIDENCE.items():
            try:
                session.fetch(command, self.evidence / name, sudo=True, timeout=_SHORT_SECONDS)
            except AmiBuilderError as gone:
                (self.evidence / name).write_text(f"not available: {gone}\n")
                if isinstance(gone, BuildFailed):
                    return


def _keep(log: Path, folder: Path) -> None:
    if log.exists():
        shutil.copy(log, folder)
