"""What QEMU gets from Packer for the VM that an image is baked on, for each architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from ami_builder.build.base_image import BaseDisk
from ami_builder.build.inputs import Inputs
from ami_builder.core.options import Arch
from ami_builder.qemu import bake, hardware
from ami_builder.qemu.hardware import HARDWARE, Accelerator
from ami_builder.state.workspace import Workspace
from tests.sample_image import image as guest_image

pytestmark = pytest.mark.needs("ssh-keygen", "xorriso")


def variables(arch: Arch, folder: Path, *, own: bool = True) -> tuple[dict[str, object], str]:
    """Return Packer's variables, and QEMU's arguments in one line."""
    image = replace(guest_image(), arch=arch)
    inputs = Inputs(image=image, guest={}, base_digest="", container_digest="", digest="0" * 64)
    kernel = folder / "vmlinuz" if own else None
    base = BaseDisk(disk=folder / "disk", kernel=kernel, initrd=folder / "initrd.img" if own else None)
    workspace = Workspace.open({"AMI_BUILDER_HOME": str(folder)})
    with workspace.run("build", image.name) as run:
        found = bake.bake_variables(
            inputs,
            base=base,
            archive=None,
            accelerator=Accelerator.TCG,
            run=run,
            output=folder / "output",
            console_log=folder / "console.log",
        )
    arguments = cast(Sequence[Sequence[str]], found["qemu_args"])
    return dict(found), " ".join(word for pair in arguments for word in pair)


def firmware(monkeypatch: pytest.MonkeyPatch, arch: Arch, file: Path, kind: str) -> None:
    file.touch()
    table = {**HARDWARE, arch: replace(HARDWARE[arch], firmware=((str(file), kind),))}
    monkeypatch.setattr(hardware, "HARDWARE", table)


def test_a_kernel_for_amd64_is_booted_without_firmware(tmp_path: Path) -> None:
    found, text = variables(Arch.AMD64, tmp_path)
    assert (found["qemu_binary"], found["machine_type"]) == ("qemu-system-x86_64", "pc")
    assert "console=ttyS0" in text
    assert "-bios" not in text
    assert "-drive" not in text


def test_a_kernel_for_arm64_needs_firmware_for_its_smbios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    firmware(monkeypatch, Arch.ARM64, tmp_path / "efi.fd", "bios")
    found, text = variables(Arch.ARM64, tmp_path)
    assert found["qemu_binary"] == "qemu-system-aarch64"
    assert str(found["machine_type"]).startswith("virt")
    assert "console=ttyAMA0" in text
    assert f"-bios {tmp_path}/efi.fd" in text
    assert "-drive" not in text


@pytest.mark.parametrize("arch", list(Arch))
def test_a_firmware_on_a_drive_leaves_packers_disk(
    arch: Arch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packer drops its own -drive for any that it is given."""
    firmware(monkeypatch, arch, tmp_path / "code.fd", "pflash")
    _, text = variables(arch, tmp_path, own=False)
    assert f"-drive if=pflash,unit=0,format=raw,readonly=on,file={tmp_path}/code.fd" in text
    assert f"-drive file={tmp_path}/output/image.qcow2,if=virtio," in text
