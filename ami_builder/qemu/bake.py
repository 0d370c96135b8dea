"""Bakes a disk from inputs: base and container in parallel, then Packer, then a search of the raw disk."""

import base64
from collections.abc import Callable, Mapping
from pathlib import Path

from ami_builder.build import container, packer, plugins
from ami_builder.build.base_image import BaseDisk, base_disk
from ami_builder.build.inputs import Inputs
from ami_builder.console import Step, size
from ami_builder.core.options import ContainerSource
from ami_builder.core.units import MIB
from ami_builder.qemu.accelerator import choose_accelerator
from ami_builder.qemu.disks import image_info, nocloud_iso
from ami_builder.qemu.hardware import HARDWARE, Accelerator, firmware
from ami_builder.qemu.traces import IDENTITY_FILE, require_clean
from ami_builder.state.workspace import Run, Workspace
from ami_builder.system import ssh
from ami_builder.verify.executor import side_by_side

DISK_NAME = "image.qcow2"
"""Of the baked disk, as packer/qemu.pkr.hcl has it."""

SOURCE = packer.Source(
    type="qemu", template="qemu.pkr.hcl", plugin=plugins.Plugin(name="qemu", oldest=(1, 1, 0))
)

# The archive's disk as the baking machine sees it; 20-container.sh loads it from there.
_ARCHIVE_DEVICE = "/dev/disk/by-id/virtio-container"
# A VM that only bakes needs no cloud-init. panic=5: a kernel that panics under emulation boots again.
# The VM starts what Packer needs to log in, and containerd; Docker waits for the guest's own settings.
# norandmaps: an emulator translates a program only once if it is always at the same addresses.
_WANTED = ("ssh", "systemd-networkd", "systemd-user-sessions", "containerd")
_KERNEL_COMMAND_LINE = " ".join(
    (
        "root=LABEL=root ro cloud-init=disabled panic=5 norandmaps",
        "systemd.unit=basic.target",
        *(f"systemd.wants={unit}.service" for unit in _WANTED),
        *(f"systemd.mask={unit}.service" for unit in ("apparmor", "systemd-timesyncd")),
    )
)


def bake(
    inputs: Inputs,
    workspace: Workspace,
    run: Run,
    step: Step,
    *,
    on_boot: Callable[[float], None] = lambda _: None,
) -> Path:
    """Make or find base and container, then bake on the accelerator that a guest has really run on.

    Returns the disk. `on_boot` gets the seconds until ssh answered on an emulated VM.
    """
    plugins.require(SOURCE.plugin, run.work, run.log("packer"))
    base, prepared = _ingredients(inputs, workspace, run, step)
    # An archive is attached as a disk, a recipe is uploaded.
    attached = inputs.image.container.source is ContainerSource.ARCHIVE
    image_info(base.disk)
    with step.step("choose the accelerator") as child:
        accelerator, reason = choose_accelerator(
            base.disk,
            cache=workspace.accelerator,
            directory=run.work,
            arch=inputs.image.arch,
        )
        child.done(reason)
    with step.step("bake with Packer", detail="boot") as child:
        output = run.work / "output"
        console_log = run.log("bake-console")
        variables = bake_variables(
            inputs,
            base=base,
            archive=prepared if attached else None,
            accelerator=accelerator,
            run=run,
            output=output,
            console_log=console_log,
        )

        def moved(text: str) -> None:
            child.update(text)
            if text == packer.CONNECTED and accelerator is Accelerator.TCG:
                on_boot(child.seconds)

        stage = run.directory / "packer"
        uploads = [] if attached or prepared is None else [prepared]
        packer.stage(stage, SOURCE, inputs.guest, variables, uploads=uploads)
        packer.validate(stage, run.log("packer"))
        packer.build(
            stage,
            log=run.log("packer"),
            console_log=console_log,
            timeout=inputs.image.bake.timeout,
            on_progress=moved,
        )
        disk = output / DISK_NAME
        child.done(size(disk.stat().st_size))
    with step.step("search the disk for keys") as child:
        identity = (run.directory / IDENTITY_FILE).read_text()
        # Packer's key must not be left either, wherever the base's sshd reads such keys.
        public_key = Path(str(variables["ssh_private_key_file"])).with_suffix(".pub").read_text()
        contents = require_clean(disk, f"{identity}\n{public_key}", run.work)
        child.done(f"none of {contents}")
    return disk


def _ingredients(inputs: Inputs, workspace: Workspace, run: Run, step: Step) -> tuple[BaseDisk, Path | None]:
    """Return the base disk and what the container is made from, made in parallel or found in the cache."""

    def base() -> BaseDisk | Path | None:
        with step.step("base disk") as child:
            return base_disk(inputs.image, inputs.base_digest, workspace, run, child)

    def prepared() -> BaseDisk | Path | None:
        with step.step("container") as child:
            return container.prepare(inputs.image, inputs.container_digest, workspace, run, child)

    made, upload = side_by_side([base, prepared])
    assert isinstance(made, BaseDisk)
    assert not isinstance(upload, BaseDisk)
    return made, upload


def bake_variables(
    inputs: Inputs,
    *,
    base: BaseDisk,
    archive: Path | None,
    accelerator: Accelerator,
    run: Run,
    output: Path,
    console_log: Path,
) -> Mapping[str, packer.Variable]:
    """Return the values of Packer's variables; most of them are how QEMU boots the base."""
    image = inputs.image
    hardware = HARDWARE[image.arch]
    key = ssh.generate_key(run.work)
    public_key = key.with_suffix(".pub").read_text().strip()
    arguments = [
        ["-serial", f"file:{console_log}"],
        ["-cpu", hardware.cpu(accelerator)],
        # Any -device here replaces Packer's own, so it is repeated.
        ["-device", "virtio-net,netdev=user.0,romfile="],
        ["-device", "virtio-rng-pci"],
    ]
    if archive is not None:
        arguments += _read_only("container", archive)
    if base.kernel is not None and base.initrd is not None:
        user = "root"
        encoded = base64.b64encode(public_key.encode()).decode()
        arguments += [
            ["-kernel", str(base.kernel)],
            ["-initrd", str(base.initrd)],
            ["-append", f"{_KERNEL_COMMAND_LINE} console={hardware.console}"],
            ["-smbios", f"type=11,value=io.systemd.credential.binary:ssh.authorized_keys.root={encoded}"],
        ]
    else:
        user = image.base.ssh_user
        # Not as Packer's CD: cloud kernels have no driver for that drive.
        iso = run.work / "seed.iso"
        nocloud_iso(
            iso,
            user_data=b"#cloud-config\n",
            public_key=public_key,
            instance_id=f"bake-{run.record.run_id}",
        )
        arguments += _read_only("seed", iso)
    if base.kernel is None or hardware.direct_boot_firmware:
        flag, value = firmware(image.arch)
        arguments.append([flag, value])
        if flag == "-drive":
            # Any -drive here replaces Packer's own, which is its disk.
            disk = f"file={output / DISK_NAME},if=virtio,cache=unsafe,discard=unmap,detect-zeroes=unmap"
            arguments.append(["-drive", f"{disk},format=qcow2"])
    return {
        "image_name": image.name,
        "image_digest": inputs.digest,
        "run_id": run.record.run_id,
        **container.variables(image, _ARCHIVE_DEVICE if archive is not None else container.UPLOADED),
        "packages": list(image.base.packages),
        "records_directory": str(run.directory),
        "manifest_file": str(run.directory / "manifest.json"),
        "ssh_username": user,
        "ssh_private_key_file": str(key),
        "base_disk": str(base.disk),
        "disk_size": f"{-(-image.base.disk_size // MIB)}M",
        "output_directory": str(output),
        "qemu_binary": hardware.qemu,
        "machine_type": hardware.bake_machine,
        "accelerator": str(accelerator),
        "memory_mib": image.bake.memory // MIB,
        "cpus": image.bake.cpus,
        "qemu_args": arguments,
    }


def _read_only(name: str, file: Path) -> list[list[str]]:
    """Return QEMU's arguments for a file as a read-only disk with `name` as its serial number."""
    return [
        ["-blockdev", f"driver=file,filename={file},node-name={name},read-only=on"],
        ["-device", f"virtio-blk-pci,drive={name},serial={name}"],
    ]
