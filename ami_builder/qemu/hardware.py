"""The hardware that a VM has: processor, firmware, root disk, and the looks of an EC2 instance.

All that differs between architectures is in one table, `HARDWARE`.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType

from ami_builder.core.errors import MissingTool
from ami_builder.core.options import Arch
from ami_builder.system import processes

DEFAULT_INSTANCE = "i-0123456789abcdef0"
MAC = "02:00:00:00:00:01"

HOST_ADDRESS = "169.254.169.2"
"""The address of this host in a guest's network that looks like EC2's."""
# 169.254.169.254 has to lie in the guest's own network for QEMU to forward it.
EC2_NETWORK = f"net=169.254.169.0/24,host={HOST_ADDRESS},dns=169.254.169.3,dhcpstart=169.254.169.20"

# QEMU 7.2 translates a program again for each address that it is loaded to; 10.0 doesn't. systemd 252 and
# later apply this early in the boot (credential sysctl.extra), older ones ignore it. It is not in the image.
SAME_ADDRESSES = "io.systemd.credential:sysctl.extra=kernel.randomize_va_space=0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tap:
    """A network device of this host that a VM's one is connected to, in place of QEMU's user network.

    What is behind it, the caller decides: DHCP, metadata at 169.254.169.254, and how far packets get.
    """

    name: str
    mac: str
    """The guest's own hardware address."""
    address: str
    """The address that the guest will have, where ssh reaches it."""


class Accelerator(StrEnum):
    """What runs the guest's instructions."""

    KVM = "kvm"
    TCG = "tcg"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What QEMU needs for VMs of one architecture, and what their guests see."""

    arch: Arch
    qemu: str
    """QEMU's program."""
    machine: str
    """QEMU's -machine where an image boots."""
    bake_machine: str
    """QEMU's -machine where an image is baked."""
    slow_flags: tuple[str, ...]
    """Properties of the processor model `max` that cost more than they give when emulated."""
    console: str
    """The kernel's name of the first serial port."""
    direct_boot_firmware: bool
    """Whether a kernel that QEMU loads itself needs firmware too: the guest has no SMBIOS without it."""
    firmware: tuple[tuple[str, str], ...]
    """Where UEFI firmware may be: `bios` for -bios, or `pflash` for a flash drive with its code alone.
    Variables that a guest sets live in its memory."""
    firmware_package: str
    """The Debian package of the first of them."""
    instance_type: str
    """The type of EC2 instance that SMBIOS and metadata show."""

    def cpu(self, accelerator: Accelerator) -> str:
        """Return QEMU's processor model with all that the accelerator offers, except what is slow emulated.

        The checks measure none of these.
        """
        if accelerator is Accelerator.KVM:
            return "host"
        return ",".join(("max", *(f"{flag}=off" for flag in self.slow_flags)))


HARDWARE: Mapping[Arch, Hardware] = MappingProxyType(
    {
        Arch.AMD64: Hardware(
            arch=Arch.AMD64,
            qemu="qemu-system-x86_64",
            machine="q35",
            bake_machine="pc",
            # Under emulation every TLB miss walks the page tables in software, so a fifth level costs 25 %.
            # The guards of user memory (SMAP and the like) end a block of translated code at each copy
            # between kernel and user, so starting a process takes twice as long. Fast strings (ERMS, FSRM)
            # copy byte by byte, half as fast as a loop. SVM makes the guest load KVM.
            slow_flags=("la57", "smap", "smep", "umip", "pku", "erms", "fsrm", "svm"),
            console="ttyS0",
            direct_boot_firmware=False,
            firmware=(
                ("/usr/share/ovmf/OVMF.fd", "bios"),
                ("/usr/share/OVMF/OVMF_CODE_4M.fd", "pflash"),
                ("/usr/share/OVMF/OVMF_CODE.fd", "pflash"),
                ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "pflash"),
                ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "pflash"),
                ("/usr/share/qemu/edk2-x86_64-code.fd", "pflash"),
                ("/usr/share/qemu/ovmf-x86_64-code.bin", "pflash"),
                ("/opt/homebrew/share/qemu/edk2-x86_64-code.fd", "pflash"),
            ),
            firmware_package="ovmf",
            instance_type="m6i.large",
        ),
        Arch.ARM64: Hardware(
            arch=Arch.ARM64,
            qemu="qemu-system-aarch64",
            machine="virt,gic-version=max",
            bake_machine="virt,gic-version=max",
            # Signing each return address with QEMU's own cipher takes longer than the calls themselves.
            slow_flags=("pauth", "sve", "sme", "lpa2"),
            console="ttyAMA0",
            direct_boot_firmware=True,
            firmware=(
                ("/usr/share/qemu-efi-aarch64/QEMU_EFI.fd", "bios"),
                ("/usr/share/AAVMF/AAVMF_CODE.no-secboot.fd", "pflash"),
                ("/usr/share/AAVMF/AAVMF_CODE.fd", "pflash"),
                ("/usr/share/edk2/aarch64/QEMU_EFI.fd", "bios"),
                ("/usr/share/edk2/aarch64/QEMU_EFI-pflash.raw", "pflash"),
                ("/usr/share/qemu/edk2-aarch64-code.fd", "pflash"),
                ("/usr/share/qemu/aavmf-aarch64-code.bin", "pflash"),
                ("/opt/homebrew/share/qemu/edk2-aarch64-code.fd", "pflash"),
            ),
            firmware_package="qemu-efi-aarch64",
            instance_type="m7g.large",
        ),
    }
)


def firmware(arch: Arch) -> tuple[str, str]:
    """Return the QEMU flag and value that boot by UEFI. Raises MissingTool if no firmware is installed."""
    for name, kind in HARDWARE[arch].firmware:
        if Path(name).is_file():
            if kind == "bios":
                return "-bios", name
            return "-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={name}"
    package = HARDWARE[arch].firmware_package
    raise MissingTool(
        f"the UEFI firmware for QEMU's {arch} machines is not installed",
        hint=processes.how_to_install(package),
    )


def smbios(instance_id: str, arch: Arch) -> list[str]:
    """Return the QEMU arguments that make a VM look like an EC2 instance."""
    # cloud-init detects an instance by uuid and serial: both begin with ec2, and are the same.
    serial = f"ec2{str(uuid.uuid5(uuid.NAMESPACE_URL, instance_id))[3:]}"
    product = HARDWARE[arch].instance_type
    system = f"type=1,manufacturer=Amazon EC2,product={product},uuid={serial},serial={serial}"
    return [
        "-smbios", "type=0,vendor=Amazon EC2,version=1.0",
        "-smbios", system,
        "-smbios", f"type=2,manufacturer=Amazon EC2,asset={instance_id}",
        "-smbios", "type=3,manufacturer=Amazon EC2",
    ]  # fmt: skip
