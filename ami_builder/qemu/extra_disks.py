"""Further NVMe disks of a VM, which its guest takes for EC2's: EBS volumes and instance stores."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# QEMU's NVMe disks have one fixed model, so the guest's own system puts EC2's over it, by the disk's serial
# number, before the unit that looks at it. systemd 256 and later take this drop-in from SMBIOS; with an older
# one the guest sees QEMU's model, and uses none of these disks.
_EC2_MODELS = r"""[Service]
ExecStartPre=+/bin/sh -c 'for disk in /sys/block/nvme*/device; do \
    read -r serial <$$disk/serial; \
    case $$serial in \
        vol*) model="Amazon Elastic Block Store" ;; \
        AWS*) model="Amazon EC2 NVMe Instance Storage" ;; \
        *) continue ;; \
    esac; \
    printf "%%-40s\n" "$$model" >/run/model-$$serial; mount --bind /run/model-$$serial $$disk/model; \
done'
"""
_CREDENTIAL = "io.systemd.credential.binary:systemd.unit-dropin.mount-spill.service"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtraDisk:
    """A disk beside the root disk, in a raw file."""

    size: int = 0
    """Bytes. A file that is shorter grows to it; 0 leaves it as it is."""
    path: Path | None = None
    """A file that is kept; None: an empty disk that is removed with the VM."""
    instance_store: bool = True
    """Whether the guest sees an instance store, or an EBS volume."""
    serial: str = ""
    """Its serial number, which begins with `AWS` or, of an EBS volume, `vol`. Empty: one by its number."""

    def serial_number(self, number: int) -> str:
        """Return the serial number of the VM's disk of this number."""
        return self.serial or f"{'AWS' if self.instance_store else 'vol'}{number:017d}"


def create(path: Path, size: int) -> None:
    """Make the file of a disk, or let it grow; it takes no space for what was never written."""
    with path.open("ab") as file:
        if file.seek(0, 2) < size:
            file.truncate(size)


def arguments(disks: Sequence[ExtraDisk], files: Sequence[str]) -> list[str]:
    """Return QEMU's arguments for disks, whose files' names are escaped for it."""
    if not disks:
        return []
    models = base64.b64encode(_EC2_MODELS.encode()).decode()
    argv = ["-smbios", f"type=11,value={_CREDENTIAL}={models}"]
    for number, (disk, file) in enumerate(zip(disks, files, strict=True), start=1):
        drive = f"if=none,id=disk{number},format=raw,cache=unsafe,discard=unmap,file={file}"
        device = f"nvme,drive=disk{number},id=nvme{number},serial={disk.serial_number(number)}"
        argv += ["-drive", drive, "-device", device]
    return argv
