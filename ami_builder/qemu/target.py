"""The qemu target: disk images that are baked and booted on this host, without any account."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from ami_builder.build import base_image
from ami_builder.build.inputs import Inputs, gather
from ami_builder.build.target import Shared
from ami_builder.config.schema import Image
from ami_builder.console import Progress, Step, size
from ami_builder.core.cleanup import Decision
from ami_builder.core.errors import AmiBuilderError, UsageError
from ami_builder.core.options import Arch, Datasource, Network
from ami_builder.core.records import Artifact, Endpoint, TargetKind, Verdict
from ami_builder.qemu import cleanup, imds
from ami_builder.qemu.accelerator import choose_accelerator, known_accelerator
from ami_builder.qemu.bake import bake
from ami_builder.qemu.channels import ChannelFile
from ami_builder.qemu.disks import image_info, nocloud_iso
from ami_builder.qemu.extra_disks import ExtraDisk
from ami_builder.qemu.hardware import HARDWARE, Accelerator
from ami_builder.qemu.machine import VirtualMachine, boot_again
from ami_builder.state.workspace import Run, StoredImage, Workspace
from ami_builder.system import host_load, ssh
from ami_builder.verify.boot_progress import WAITING, reporting
from ami_builder.verify.executor import side_by_side
from ami_builder.verify.journey import verify_machine
from ami_builder.verify.machine import MachineResult

_LOOK_SECONDS = 2.0
_SCHEDULER, _DASHBOARD = 8786, 8787


@dataclass(slots=True, kw_only=True)
class QemuMachine:
    """A VM that boots a disk the way EC2 would, on a throw-away overlay."""

    image: Image
    disk: Path
    accelerator: Accelerator
    memory: int
    disks: tuple[ExtraDisk, ...] = ()
    _vm: VirtualMachine | None = field(default=None, init=False)
    _used_before: float = field(default=0.0, init=False)
    """CPU seconds of the boots before, if QEMU's process is the same."""

    @property
    def name(self) -> str:
        """Its memory."""
        return size(self.memory)

    @property
    def vm(self) -> VirtualMachine:
        """The VM, once it was started."""
        assert self._vm is not None, "it was not started"
        return self._vm

    def start(self, stack: ExitStack, directory: Path, user_data: str, public_key: str) -> Endpoint:
        """Boot the disk with EC2's metadata service, or with a NoCloud seed."""
        return self.boot(stack, directory, user_data.encode(), public_key)

    def boot(self, stack: ExitStack, directory: Path, user_data: bytes | None, public_key: str) -> Endpoint:
        """Boot the disk with any user data, or with none."""
        settings = self.image.verify
        instance_id = imds.new_instance_id()
        metadata: imds.MetadataServer | None = None
        iso: Path | None = None
        if settings.datasource is Datasource.EC2:
            served = imds.InstanceMetadata(
                instance_id=instance_id,
                user_data=user_data,
                public_key=public_key,
                instance_type=HARDWARE[self.image.arch].instance_type,
                arch=self.image.arch,
            )
            metadata = stack.enter_context(imds.MetadataServer(served))
        else:
            iso = directory / "seed.iso"
            nocloud_iso(iso, user_data=user_data or b"", public_key=public_key, instance_id=instance_id)
        self._vm = VirtualMachine(
            disk=self.disk,
            directory=directory,
            memory=self.memory,
            cpus=settings.cpus,
            disk_size=settings.disk_size,
            accelerator=self.accelerator,
            user=self.image.base.ssh_user,
            arch=self.image.arch,
            imds_port=metadata.port if metadata is not None else None,
            seed=iso,
            network=settings.network,
            instance_id=instance_id,
            disks=self.disks,
        )
        return stack.enter_context(self._vm)

    def check_alive(self) -> None:
        """Raise BuildFailed when the VM can't come up any more."""
        self.vm.check_alive()

    def reboot(self, session: ssh.Session, timeout: float, alive: Callable[[], None]) -> None:
        """Reboot the VM from inside, and wait for a login."""
        vm, before = self.vm, self.emulator

        def start_again(timeout: float) -> None:
            # Read before the reboot, whose own CPU seconds are what is measured.
            used = host_load.cpu_seconds(before) or 0.0
            vm.start_again(timeout)
            self._used_before = used if vm.pid == before else 0.0

        vm.expect_reboot()
        session.reboot(timeout, alive, start_again)

    def cpu_seconds(self, session: ssh.Session) -> float | None:
        """Return the CPU seconds that QEMU has used since the start or the last reboot."""
        del session
        used = host_load.cpu_seconds(self.emulator)
        return None if used is None else used - self._used_before

    @property
    def emulator(self) -> int:
        """QEMU's process."""
        return self.vm.pid

    def save_console(self) -> None:
        """Do nothing: QEMU writes the log all the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuTarget:
    """This host."""

    workspace: Workspace
    arch: Arch = Arch.AMD64
    """The architecture of the image that it was opened for; `emulated` depends on it."""
    kind: TargetKind = field(default=TargetKind.QEMU, init=False)
    name: str = field(default="this host", init=False)
    region: str = field(default="", init=False)
    builds_side_by_side: bool = field(default=False, init=False)

    @property
    def emulated(self) -> bool | None:
        """Whether VMs are emulated here; None if only a try can tell."""
        try:
            known = known_accelerator(self.workspace.accelerator, self.arch)
        except AmiBuilderError:
            # The step that needs the accelerator raises the same error.
            return None
        return None if known is None else known[0] is Accelerator.TCG

    def gather(self, image: Image, *, refresh: bool) -> Inputs:
        """Resolve base disk and container to what they would be now."""
        base = partial(base_image.digest, image, self.workspace, refresh=refresh)
        return gather(image, self.workspace, base, refresh=refresh)

    def find(self, image: Image, digest: str) -> StoredImage | None:
        """Return the finished image with exactly this digest."""
        return self.workspace.image(image.name, digest)

    def bake(
        self, inputs: Inputs, run: Run, step: Step, *, again: bool, on_boot: Callable[[float], None]
    ) -> StoredImage:
        """Bake a disk and put it among the finished images. A killed run never leaves a finished one."""
        del again
        disk = bake(inputs, self.workspace, run, step, on_boot=on_boot)
        artifact = Artifact(
            image=inputs.image.name,
            target=self.kind,
            location=str(disk),
            digest=inputs.digest,
            created=datetime.now(UTC),
            run_id=run.record.run_id,
            arch=inputs.image.arch,
            size=disk.stat().st_size,
        )
        return self.workspace.store(artifact, disk, run.directory / "packages.txt")

    def verify(
        self, image: Image, stored: StoredImage, run: Run, step: Step, evidence: Path
    ) -> Sequence[MachineResult]:
        """Verify a disk on a VM of each configured memory size; the first error ends the other VMs."""
        image_info(stored.path)
        with step.step("choose the accelerator") as child:
            accelerator, reason = choose_accelerator(
                stored.path, cache=self.workspace.accelerator, directory=run.work, arch=image.arch
            )
            child.done(reason)
        machines = [
            QemuMachine(image=image, disk=stored.path, accelerator=accelerator, memory=memory)
            for memory in image.verify.memory
        ]
        # More VMs than processors would only make each other late.
        at_once = max(1, (os.cpu_count() or 1) // image.verify.cpus)
        calls = [partial(verify_vm, image, one, run.work, evidence, step) for one in machines]
        return side_by_side(calls, workers=at_once)

    def keep_verdict(self, stored: StoredImage, verdict: Verdict) -> StoredImage:
        """Put the verdict beside an image of ours."""
        return self.workspace.store_verdict(stored, verdict)

    def copies(self, image: Image) -> Sequence[QemuTarget]:
        """Return nothing: an image of this host is not copied."""
        del image
        return ()

    def elsewhere(self, regions: Sequence[str]) -> Sequence[QemuTarget]:
        """Return this target. Raises UsageError for any region."""
        if regions:
            raise UsageError(f"--region {regions[0]}: a local image has no region", hint="add --target aws")
        return (self,)

    def unconfigured(self, image: Image) -> Sequence[QemuTarget]:
        """Return none."""
        del image
        return ()

    def find_copy(self, image: Image, stored: StoredImage) -> StoredImage | None:
        """Return the image itself."""
        del image
        return stored

    def receive(self, image: Image, stored: StoredImage, step: Step) -> StoredImage:
        """Return the image itself."""
        del image, step
        return stored

    def share(self, image: Image, stored: StoredImage, step: Step) -> Shared:
        """Do nothing: everyone who can read the disk can boot it."""
        del image, stored, step
        return Shared()

    def channels(self, image: Image) -> ChannelFile:
        """Return the file beside the images."""
        return ChannelFile(workspace=self.workspace, image=image.name)

    def exclusive(self, images: Mapping[str, Image]) -> AbstractContextManager[object]:
        """Lock the builds and channels of all images, and remove what killed builds left among the images."""
        return cleanup.exclusive(self.workspace, images)

    def plan_cleanup(self, images: Mapping[str, Image], step: Step) -> tuple[Decision, ...]:
        """Decide about every finished image, cache and record on this host."""
        del step
        return cleanup.plan_cleanup(self.workspace, images, datetime.now(UTC))

    def clean_up(self, decisions: Sequence[Decision], progress: Progress) -> Iterator[Decision]:
        """Delete what the plan says."""
        with progress.step("delete") as step:
            step.done(f"{cleanup.delete(decisions)} deleted")
        yield from decisions

    def remove_orphans(self, images: Mapping[str, Image], progress: Progress) -> None:
        """Do nothing: a killed run leaves nothing outside its folder, which the next build removes."""


def verify_vm(image: Image, machine: QemuMachine, work: Path, evidence: Path, step: Step) -> MachineResult:
    """Verify an image on a VM. Boot it again if it got stuck in a way that emulation causes."""
    with step.step(f"machine of {machine.name}") as child:

        def boot(attempt: int) -> MachineResult:
            return verify_machine(image, machine, work=work, evidence=evidence, step=child, attempt=attempt)

        def again() -> bool:
            child.update("the emulated VM got stuck: booting again")
            return True

        return boot_again(boot, again)


def foreign(disk: Path, image: Image) -> StoredImage:
    """Return a disk that was not built here as if it were stored, with the digest of its content."""
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
        arch=image.arch,
        size=info.st_size,
    )
    return StoredImage(artifact=artifact, verdict=None, directory=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """How a person reaches a VM."""

    ssh: str
    tunnel: str
    """Forwards the dashboard and the scheduler to the same ports here: Dask listens in the VM only."""
    console_log: Path


def launch(
    image: Image,
    disk: Path,
    *,
    memory: int,
    user_data: Path | None,
    disks: Sequence[ExtraDisk] = (),
    workspace: Workspace,
    progress: Progress,
    on_ready: Callable[[Launched], None],
) -> None:
    """Boot an image as EC2 would, call `on_ready` when ssh answers, and wait until the VM is stopped.

    Raises Interrupted on Ctrl-C, which is the normal end, and BuildFailed when the VM dies.
    """
    image_info(disk)
    # A person needs the network, and user data the way that EC2 hands it over.
    verify = replace(image.verify, network=Network.NAT, datasource=Datasource.EC2)
    settings = replace(image, verify=verify)
    with workspace.run("run", image.name) as run, ExitStack() as stack:
        with progress.step("choose the accelerator") as step:
            accelerator, reason = choose_accelerator(
                disk, cache=workspace.accelerator, directory=run.work, arch=image.arch
            )
            step.done(reason)
        with progress.step("boot", detail=WAITING) as step:
            key = ssh.generate_key(run.work)
            machine = QemuMachine(
                image=settings, disk=disk, accelerator=accelerator, memory=memory, disks=tuple(disks)
            )
            content = user_data.read_bytes() if user_data is not None else None
            endpoint = machine.boot(stack, run.work, content, key.with_suffix(".pub").read_text().strip())
            session = stack.enter_context(ssh.Session(endpoint, key=key, directory=run.work / "ssh"))
            alive = reporting(machine.check_alive, step, endpoint.console_log)
            session.wait(image.verify.timeout, alive)
            step.done("ssh answers")
        login = f"ssh -F {session.config}"
        forward = " ".join(f"-L {port}:127.0.0.1:{port}" for port in (_DASHBOARD, _SCHEDULER))
        on_ready(
            Launched(
                ssh=f"{login} {ssh.HOST}",
                tunnel=f"{login} -N {forward} {ssh.HOST}",
                console_log=endpoint.console_log,
            )
        )
        while not threading.Event().wait(_LOOK_SECONDS):
            machine.check_alive()
