"""Whether VMs run under KVM on this host, found out by running one."""

import json
import os
import platform
import re
from contextlib import suppress
from pathlib import Path

from ami_builder.core.errors import TimedOut, UsageError
from ami_builder.core.options import Arch
from ami_builder.qemu.hardware import HARDWARE, Accelerator
from ami_builder.qemu.machine import GuestStuck, MachineDied, VirtualMachine
from ami_builder.state.workspace import write_atomically
from ami_builder.system import processes

KVM_SECONDS = 60.0
"""How long a guest may take under KVM until its userspace runs; it usually takes about ten seconds."""

_DEVICE = Path("/dev/kvm")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_USERSPACE = re.compile(rb"systemd\[1\]|Welcome to (?!GRUB)|Freeing unused kernel|Run /\S*init|\blogin: ")


def choose_accelerator(
    disk: Path, *, cache: Path, directory: Path, arch: Arch = Arch.AMD64
) -> tuple[Accelerator, str]:
    """Return how to run VMs of an architecture on this host, and the reason in one line.

    /dev/kvm may open and still not run an ordinary kernel (nested in some clouds), so this boots `disk` under
    KVM, once for each boot of this host: `cache` is a file that keeps the answer.
    AMI_BUILDER_ACCELERATOR=kvm|tcg decides without a try.
    """
    decided = known_accelerator(cache, arch)
    if decided is not None:
        return decided
    accelerator, reason, certain = _try_kvm(disk, directory, arch)
    if certain:
        record = {"host": _host(arch), "accelerator": accelerator, "reason": reason}
        write_atomically(cache, json.dumps(record))
    return accelerator, reason


def known_accelerator(cache: Path, arch: Arch = Arch.AMD64) -> tuple[Accelerator, str] | None:
    """Return what is known without booting anything; None if only a try can decide."""
    if not arch.is_native:
        return Accelerator.TCG, f"TCG (slow): KVM can't run {arch} on {platform.machine()}"
    if wanted := os.environ.get("AMI_BUILDER_ACCELERATOR"):
        if wanted not in tuple(Accelerator):
            raise UsageError(
                f"AMI_BUILDER_ACCELERATOR is {wanted!r}, expected kvm or tcg",
                hint="unset it to let a try decide",
            )
        return Accelerator(wanted), f"{wanted.upper()}, set by AMI_BUILDER_ACCELERATOR"
    try:
        os.close(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return Accelerator.TCG, f"TCG (slow): {_DEVICE}: {error.strerror}"
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(cache.read_text())
        if known["host"] == _host(arch):
            return Accelerator(known["accelerator"]), str(known["reason"])
    return None


def _host(arch: Arch) -> dict[str, str]:
    """Return what the answer is valid for: this boot of the host, an architecture, and this QEMU."""
    return {
        "boot": _BOOT_ID.read_text().strip(),
        "arch": arch,
        "qemu": processes.output([HARDWARE[arch].qemu, "--version"]).splitlines()[0],
    }


def _try_kvm(disk: Path, directory: Path, arch: Arch) -> tuple[Accelerator, str, bool]:
    machine = VirtualMachine(
        disk=disk,
        directory=directory,
        memory=1 << 30,
        cpus=2,
        accelerator=Accelerator.KVM,
        user="",
        arch=arch,
    )

    def up() -> bool:
        machine.check_alive()
        return machine.console_shows(_USERSPACE)

    try:
        with machine:
            processes.wait_until(up, what="a guest under KVM", timeout=KVM_SECONDS, interval=0.1)
    except GuestStuck as panic:
        return Accelerator.TCG, f"TCG (slow): under KVM, {panic.message}", False
    except MachineDied as error:
        return Accelerator.TCG, f"TCG (slow): /dev/kvm opens, but {error.message}", True
    except TimedOut:
        reason = f"TCG (slow): a guest under KVM printed nothing to its console for {KVM_SECONDS:.0f} s"
        return Accelerator.TCG, reason, False
    return Accelerator.KVM, "KVM: a guest has run on it", True
