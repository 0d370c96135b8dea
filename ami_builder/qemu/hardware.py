"""The hardware that a VM has: processor, firmware, root disk, and the looks of an EC2 instance."""

import uuid
from enum import StrEnum
from pathlib import Path

from ami_builder.core.errors import MissingTool

QEMU = "qemu-system-x86_64"
DEFAULT_INSTANCE = "i-0123456789abcdef0"
MAC = "02:00:00:00:00:01"

# A whole firmware for -bios, or code alone for a flash drive; variables that a guest sets live in its memory.
_FIRMWARE = (
    ("/usr/share/ovmf/OVMF.fd", "bios"),
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "pflash"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "pflash"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "pflash"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "pflash"),
    ("/usr/share/qemu/edk2-x86_64-code.fd", "pflash"),
    ("/usr/share/qemu/ovmf-x86_64-code.bin", "pflash"),
    ("/opt/homebrew/share/qemu/edk2-x86_64-code.fd", "pflash"),
)

HOST_ADDRESS = "169.254.169.2"
"""The address of this host in a guest's network that looks like EC2's."""
# 169.254.169.254 has to lie in the guest's own network for QEMU to forward it.
EC2_NETWORK = f"net=169.254.169.0/24,host={HOST_ADDRESS},dns=169.254.169.3,dhcpstart=169.254.169.20"

# Features of a processor that cost more than they give when emulated.
_SLOW_FLAGS = ("la57", "smap", "smep", "umip", "pku", "erms", "fsrm", "svm")
# QEMU 7.2 translates a program again for each address that it is loaded to; 10.0 doesn't. systemd 252 and
# later apply this early in the boot (credential sysctl.extra), older ones ignore it. It is not in the image.
SAME_ADDRESSES = "io.systemd.credential:sysctl.extra=kernel.randomize_va_space=0"


class Accelerator(StrEnum):
    """What runs the guest's instructions."""

    KVM = "kvm"
    TCG = "tcg"

    @property
    def cpu(self) -> str:
        """QEMU's processor model with all that the accelerator offers, except what is slow when emulated.

        Under emulation every TLB miss walks the page tables in software, so a fifth level costs 25 %. The
        guards of user memory (SMAP and the like) end a block of translated code at each copy between kernel
        and user, so starting a process takes twice as long. Fast strings (ERMS, FSRM) copy byte by byte, half
        as fast as a loop. SVM makes the guest load KVM. The checks measure none of these.
        """
        return "host" if self is Accelerator.KVM else f"max,{','.join(f'{flag}=off' for flag in _SLOW_FLAGS)}"


def firmware() -> tuple[str, str]:
    """Return the QEMU flag and value that boot by UEFI. Raises MissingTool if no firmware is installed."""
    for name, kind in _FIRMWARE:
        if Path(name).is_file():
            if kind == "bios":
                return "-bios", name
            return "-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={name}"
    raise MissingTool("the UEFI firmware for QEMU (OVMF) is not installed", hint="apt-get install ovmf")


def smbios(instance_id: str) -> list[str]:
    """Return the QEMU arguments that make a VM look like an EC2 instance."""
    # cloud-init detects an instance by uuid and serial: both begin with ec2, and are the same.
    serial = f"ec2{str(uuid.uuid5(uuid.NAMESPACE_URL, instance_id))[3:]}"
    system = f"type=1,manufacturer=Amazon EC2,product=m6i.large,uuid={serial},serial={serial}"
    return [
        "-smbios", "type=0,vendor=Amazon EC2,version=1.0",
        "-smbios", system,
        "-smbios", f"type=2,manufacturer=Amazon EC2,asset={instance_id}",
        "-smbios", "type=3,manufacturer=Amazon EC2",
    ]  # fmt: skip
