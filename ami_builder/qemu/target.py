"""The local target: a disk image baked and booted by QEMU, with no account at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from ami_builder import qemu
from ami_builder.build.inputs import Inputs, gather
from ami_builder.config.schema import Image
from ami_builder.console import Step, size
from ami_builder.core.errors import AmiBuilderError
from ami_builder.core.options import Datasource
from ami_builder.core.records import Artifact, Endpoint, TargetKind, Verdict
from ami_builder.qemu import imds, seed
from ami_builder.qemu.bake import bake
from ami_builder.state.workspace import Run, StoredImage, Workspace
from ami_builder.system import host_load, ssh
from ami_builder.verify.concurrency import side_by_side
from ami_builder.verify.journey import Proof, prove


@dataclass(slots=True, kw_only=True)
class LocalMachine:
    """A QEMU machine that boots a disk the way EC2 would, on a throw-away overlay."""

    image: Image
    disk: Path
    accelerator: qemu.Accelerator
    memory: int
    _machine: qemu.Machine | None = field(default=None, init=False)
    _used_before: float = field(default=0.0, init=False)
    """CPU seconds of the boots before, where QEMU's process is the same."""

    @property
    def name(self) -> str:
        """Its memory."""
        return size(self.memory)

    def start(self, stack: ExitStack, directory: Path, user_data: str, public_key: str) -> Endpoint:
        """Boot the disk with EC2's metadata service, or with a NoCloud seed."""
        return self.boot(stack, directory, user_data.encode(), public_key)

    def boot(self, stack: ExitStack, directory: Path, user_data: bytes | None, public_key: str) -> Endpoint:
        """Boot the disk with user data of any kind, or with none at all."""
        settings = self.image.verify
        instance_id = imds.new_instance_id()
        metadata: imds.MetadataServer | None = None
        iso: Path | None = None
        if settings.datasource is Datasource.EC2:
            told = imds.InstanceMetadata(instance_id=instance_id, user_data=user_data, public_key=public_key)
            metadata = stack.enter_context(imds.MetadataServer(told))
        else:
            iso = directory / "seed.iso"
            seed.nocloud_iso(iso, user_data=user_data or b"", public_key=public_key, instance_id=instance_id)
        self._machine = qemu.Machine(
            disk=self.disk,
            directory=directory,
            memory=self.memory,
            cpus=settings.cpus,
            disk_size=settings.disk_size,
            accelerator=self.accelerator,
            user=self.image.base.ssh_user,
            imds_port=metadata.port if metadata is not None else None,
            seed=iso,
            network=settings.network,
            instance_id=instance_id,
        )
        return stack.enter_context(self._machine)

    def waited(self) -> dict[int, float]:
        """Return for how many seconds each of its threads has waited for a processor of ours."""
        assert self._machine is not None, "it was not started"
        return host_load.cpu_waits(self._machine.pid)

    def check_alive(self) -> None:
        """Raise BuildFailed when the machine can't come up any more."""
        assert self._machine is not None, "it was not started"
        self._machine.check_alive()

    def reboot(self, session: ssh.Session, timeout: float, alive: Callable[[], None]) -> None:
        """Reboot the VM from inside, and wait for a login."""
        assert self._machine is not None, "it was not started"
        machine, before = self._machine, self.emulator

        def start_again(timeout: float) -> None:
            # Not after the reboot: what that takes is what is asked for.
            used = host_load.cpu_seconds(before) or 0.0
            machine.start_again(timeout)
            self._used_before = used if machine.pid == before else 0.0

        machine.expect_reboot()
        session.reboot(timeout, alive, start_again)

    def cpu_seconds(self, session: ssh.Session) -> float | None:
        """Return the CPU seconds that QEMU has used since it was started, or since the reboot."""
        used = host_load.cpu_seconds(self.emulator)
        return None if used is None else used - self._used_before

    @property
    def emulator(self) -> int:
        """The process that runs the VM on this host."""
        assert self._machine is not None, "it was not started"
        return self._machine.pid

    def save_console(self) -> None:
        """QEMU writes the log all the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSite:
    """This machine."""

    workspace: Workspace
    target: TargetKind = field(default=TargetKind.QEMU, init=False)

    @property
    def emulated(self) -> bool | None:
        """Whether machines are emulated here; None when only a try can tell."""
        try:
            known = qemu.known_accelerator(self._accelerators)
        except AmiBuilderError:
            # The step that needs the accelerator raises the same error.
            return None
        return None if known is None else known[0] is qemu.Accelerator.TCG

    @property
    def _accelerators(self) -> Path:
        return self.workspace.cache / "accelerator.json"

    def gather(self, image: Image, *, refresh: bool) -> Inputs:
        """Resolve base and container to what they would be now."""
        return gather(image, self.workspace, refresh=refresh)

    def find(self, inputs: Inputs) -> StoredImage | None:
        """Return the finished image of exactly these inputs."""
        return self.workspace.image(inputs.image.name, inputs.digest)

    def bake(
        self, inputs: Inputs, run: Run, step: Step, *, again: bool, on_boot: Callable[[float], None]
    ) -> StoredImage:
        """Bake a disk and put it among the finished images; what a killed run left is never whole."""
        baked = bake(inputs, self.workspace, run, step, on_boot=on_boot)
        artifact = Artifact(
            image=inputs.image.name,
            target=self.target,
            location=str(baked.disk),
            digest=inputs.digest,
            created=datetime.now(UTC),
            run_id=run.record.run_id,
            size=baked.disk.stat().st_size,
        )
        return self.workspace.store(artifact, baked.disk, baked.packages)

    def prove(self, image: Image, stored: StoredImage, run: Run, step: Step) -> Sequence[Proof]:
        """Prove a disk on a machine of each configured size; the first that fails ends the others."""
        qemu.image_info(stored.path)
        with step.step("choose the accelerator") as child:
            accelerator, reason = qemu.choose_accelerator(
                stored.path, cache=self._accelerators, directory=run.work
            )
            child.done(reason)
        machines = [
            LocalMachine(image=image, disk=stored.path, accelerator=accelerator, memory=memory)
            for memory in image.verify.memory
        ]
        # More machines than processors would only make each other late.
        at_once = max(1, (os.cpu_count() or 1) // image.verify.cpus)
        return side_by_side([partial(prove, image, one, run, step) for one in machines], workers=at_once)

    def judge(self, stored: StoredImage, verdict: Verdict) -> StoredImage:
        """Put the verdict beside an image of ours."""
        return self.workspace.store_verdict(stored, verdict)


def foreign(disk: Path, image: Image) -> StoredImage:
    """Return a disk that was not built here as if it were stored; its digest is that of its content."""
    with disk.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    info = disk.stat()
    artifact = Artifact(
        image=image.name,
        target=TargetKind.QEMU,
        location=str(disk),
        digest=digest,
        created=datetime.fromtimestamp(info.st_mtime, UTC),
        run_id="",
        size=info.st_size,
    )
    return StoredImage(artifact=artifact, verdict=None, directory=None)
