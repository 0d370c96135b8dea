"""From inputs to a baked disk: base and container side by side, then Packer, then a look at the raw disk."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ami_builder import qemu
from ami_builder.build import base_image, packer, recipe
from ami_builder.build.inputs import Inputs
from ami_builder.console import Step, size
from ami_builder.qemu import seed
from ami_builder.qemu.traces import IDENTITY_FILE, require_clean
from ami_builder.state.workspace import Run, Workspace
from ami_builder.system import ssh
from ami_builder.verify.concurrency import side_by_side

MIB = 1 << 20

# The archive's disk as the baking machine sees it; 20-container.sh loads it from there.
_ARCHIVE_DEVICE = "/dev/disk/by-id/virtio-container"
# Cloud-init has nothing to tell a machine that only bakes, and a kernel that panics under emulation boots
# again by itself. It starts what Packer needs to log in, and containerd beside that: Docker waits for the
# guest's own settings. An emulator translates programs once when they are always at the same addresses.
_WANTED = ("ssh", "systemd-networkd", "systemd-user-sessions", "containerd")
_KERNEL_COMMAND_LINE = " ".join(
    (
        "root=LABEL=root ro console=ttyS0 cloud-init=disabled panic=5 norandmaps",
        "systemd.unit=basic.target",
        *(f"systemd.wants={unit}.service" for unit in _WANTED),
        *(f"systemd.mask={unit}.service" for unit in ("apparmor", "systemd-timesyncd")),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseDisk:
    """The disk that baking starts from; a kernel of ours is booted directly, without firmware."""

    disk: Path
    kernel: Path | None = None
    initrd: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Baked:
    """What Packer made, still in the run's work folder."""

    disk: Path
    packages: Path


def bake(
    inputs: Inputs,
    workspace: Workspace,
    run: Run,
    step: Step,
    *,
    on_boot: Callable[[float], None] = lambda _: None,
) -> Baked:
    """Make or find base and container, then bake on the accelerator that a guest has really run on.

    `on_boot` gets the seconds that an emulated VM took until ssh answered.
    """
    base, archive = _ingredients(inputs, workspace, run, step)
    qemu.image_info(base.disk)
    with step.step("choose the accelerator") as child:
        accelerator, reason = qemu.choose_accelerator(
            base.disk, cache=workspace.cache / "accelerator.json", directory=run.work
        )
        child.done(reason)
    with step.step("bake with Packer", detail="boot") as child:
        output = run.work / "output"
        console_log = run.log("bake-console")
        variables = bake_variables(
            inputs,
            base=base,
            archive=archive,
            accelerator=accelerator,
            run=run,
            output=output,
            console_log=console_log,
        )

        def moved(text: str) -> None:
            child.update(text)
            if text == packer.CONNECTED and accelerator is qemu.Accelerator.TCG:
                on_boot(child.seconds)

        stage = run.directory / "packer"
        packer.stage(stage, inputs.guest, variables)
        packer.validate(stage, run.log("packer"))
        packer.build(
            stage,
            only="qemu.image",
            log=run.log("packer"),
            console_log=console_log,
            timeout=inputs.image.bake.timeout,
            on_progress=moved,
        )
        disk = output / "image.qcow2"
        child.done(size(disk.stat().st_size))
    with step.step("search the disk for keys") as child:
        identity = (run.directory / IDENTITY_FILE).read_text()
        # Packer's key is known here too, wherever the base's sshd reads such keys.
        public_key = Path(str(variables["ssh_private_key_file"])).with_suffix(".pub").read_text()
        contents = require_clean(disk, f"{identity}\n{public_key}", run.work)
        child.done(f"none of {contents}")
    return Baked(disk=disk, packages=run.directory / "packages.txt")


def _ingredients(inputs: Inputs, workspace: Workspace, run: Run, step: Step) -> tuple[BaseDisk, Path | None]:
    """Make the base disk and the container's archive side by side, or find them in the cache."""
    found: dict[str, BaseDisk | Path | None] = {}

    def base() -> None:
        with step.step("base disk") as child:
            found["base"] = _base(inputs, workspace, run, child)

    def container() -> None:
        with step.step("container") as child:
            found["container"] = container_archive(inputs, workspace, run, child)

    side_by_side([base, container])
    made, archive = found["base"], found["container"]
    assert isinstance(made, BaseDisk)
    assert not isinstance(archive, BaseDisk)
    return made, archive


def _base(inputs: Inputs, workspace: Workspace, run: Run, step: Step) -> BaseDisk:
    image = inputs.image
    if (workspace.cache / "base" / inputs.base_digest).is_dir():
        step.done("cached")
    if image.base.source is not None:
        return BaseDisk(disk=base_image.fetch(image.base, workspace, step.update))
    folder = recipe.base_recipe(image).make(workspace, inputs.base_digest, "", run.log("base"), step.update)
    return BaseDisk(disk=folder / "disk.qcow2", kernel=folder / "vmlinuz", initrd=folder / "initrd.img")


def container_archive(inputs: Inputs, workspace: Workspace, run: Run, step: Step) -> Path | None:
    """Return the container's archive from the cache, made when it isn't there; None when it is pulled."""
    image = inputs.image
    if image.container.requirements is None:
        step.done(f"{image.container.reference}, pulled while baking")
        return None
    if (workspace.cache / "container" / inputs.container_digest).is_dir():
        step.done("cached")
    made = recipe.container_recipe(image)
    folder = made.make(workspace, inputs.container_digest, "container.tar", run.log("container"), step.update)
    return folder / "container.tar"


def bake_variables(
    inputs: Inputs,
    *,
    base: BaseDisk,
    archive: Path | None,
    accelerator: qemu.Accelerator,
    run: Run,
    output: Path,
    console_log: Path,
) -> Mapping[str, packer.Variable]:
    """Return the values of Packer's variables, of which the most are how QEMU boots the base."""
    image = inputs.image
    key = ssh.generate_key(run.work)
    public_key = key.with_suffix(".pub").read_text().strip()
    arguments = [
        ["-serial", f"file:{console_log}"],
        ["-cpu", accelerator.cpu],
        # Packer's own -device is replaced as soon as there is one here, so it is named again.
        ["-device", "virtio-net,netdev=user.0"],
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
            ["-append", _KERNEL_COMMAND_LINE],
            ["-smbios", f"type=11,value=io.systemd.credential.binary:ssh.authorized_keys.root={encoded}"],
        ]
    else:
        user = image.base.ssh_user
        arguments.append(list(qemu.firmware()))
        # Not as Packer's CD: cloud kernels have no driver for its drive.
        iso = run.work / "seed.iso"
        seed.nocloud_iso(
            iso,
            user_data=b"#cloud-config\n",
            public_key=public_key,
            instance_id=f"bake-{run.record.run_id}",
        )
        arguments += _read_only("seed", iso)
    return {
        "image_name": image.name,
        "image_digest": inputs.digest,
        "run_id": run.record.run_id,
        "container_reference": image.container.reference,
        "container_archive": _ARCHIVE_DEVICE if archive is not None else "",
        "insecure_registry": image.container.insecure_registry or "",
        "packages": list(image.base.packages),
        "records_directory": str(run.directory),
        "manifest_file": str(run.directory / "manifest.json"),
        "ssh_username": user,
        "ssh_private_key_file": str(key),
        "base_disk": str(base.disk),
        "disk_size": f"{-(-image.base.disk_size // MIB)}M",
        "output_directory": str(output),
        "accelerator": str(accelerator),
        "memory_mib": image.bake.memory // MIB,
        "cpus": image.bake.cpus,
        "qemu_args": arguments,
    }


def _read_only(name: str, file: Path) -> list[list[str]]:
    """Return the arguments that show a file to the machine as a disk of that serial number."""
    return [
        ["-blockdev", f"driver=file,filename={file},node-name={name},read-only=on"],
        ["-device", f"virtio-blk-pci,drive={name},serial={name}"],
    ]
