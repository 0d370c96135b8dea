"""What a machine is doing until ssh answers, by a console that QEMU wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from ami_builder.console import Mode, open_progress
from ami_builder.core.errors import BuildFailed
from ami_builder.verify.boot_progress import doing, reporting

FIRMWARE = b'\x1b[2J\x1b[01;01H\x1b[=3hBdsDxe: loading Boot0001 "UEFI QEMU NVMe Ctrl" from PciRoot(0x0)\r\n'
GRUB = b"\x1b[0m\x1b[30m\x1b[47mWelcome to GRUB!\r\n"
KERNEL = b"\x1b[37m\x1b[40m  Booting `Debian'\r\n\r\nerror: no suitable video mode found.\r\n"
SERVICES = b"\x1b[?7h[   16.615262] cloud-init[496]: Cloud-init v. 25.1.4 running 'init-local'\r\n"
LOGIN = b"\r\nip-169-254-169-20 login: "
RESTART = b"\x1b[?7h\x1b[6n[   75.428277] reboot: Restarting system\r\n"
BOOT = [FIRMWARE, GRUB, KERNEL, SERVICES, LOGIN]


@pytest.mark.parametrize(
    ("lines", "stage"),
    [
        (BOOT[:1], "firmware"),
        (BOOT[:2], "boot loader"),
        (BOOT[:3], "kernel"),
        ([b"[    0.000000] Linux version 6.12"], "kernel"),
        ([b"[    1.234567] pci 0000:00"], "kernel"),
        (BOOT[:4], "system services"),
        ([*BOOT[:3], b"Welcome to Ubuntu 24.04"], "system services"),
        (BOOT, "login prompt"),
    ],
)
def test_how_far_a_boot_has_come(lines: list[bytes], stage: str) -> None:
    assert doing(b"".join(lines), reboot=False) == f"waiting for ssh (console: {stage})"
    again = b"".join([b"[   40.000000] sh[817]: the last words", RESTART, *lines])
    assert doing(again, reboot=True) == f"waiting for ssh (console: {stage})"


def test_a_reboot_begins_with_shutting_down() -> None:
    assert doing(b"", reboot=True) == "shutting down"
    assert doing(b"[   70.000000] systemd[1]: Stopping", reboot=True) == "shutting down"
    assert doing(RESTART, reboot=True) == "waiting for ssh (console: firmware)"


def test_a_system_that_writes_nothing_has_restarted_once_its_firmware_writes() -> None:
    assert doing(FIRMWARE, reboot=True) == "waiting for ssh (console: firmware)"
    assert doing(b"", reboot=False) == "waiting for ssh"


def test_it_is_reported_while_somebody_waits(tmp_path: Path) -> None:
    console = tmp_path / "console.log"
    with open_progress(Mode.QUIET) as progress, progress.step("first boot") as step:
        check = reporting(lambda: None, step, console)
        check()
        assert step.detail == "waiting for ssh"
        console.write_bytes(FIRMWARE + GRUB)
        check()
        assert step.detail == "waiting for ssh (console: boot loader)"
        console.write_bytes(b"".join(BOOT))
        check = reporting(lambda: None, step, console, reboot=True)
        check()
        assert step.detail == "shutting down"
        console.write_bytes(b"".join([*BOOT, RESTART, *BOOT[:3]]))
        check()
        assert step.detail == "waiting for ssh (console: kernel)"


def test_an_empty_console_says_nothing(tmp_path: Path) -> None:
    """An instance's console comes when it is asked for."""
    console = tmp_path / "console.log"
    console.touch()
    with open_progress(Mode.QUIET) as progress, progress.step("reboot") as step:
        reporting(lambda: None, step, console, reboot=True)()
        assert step.detail == "waiting for ssh"


def test_what_is_wrong_with_the_machine_is_raised(tmp_path: Path) -> None:
    def dead() -> None:
        raise BuildFailed("QEMU was ended by SIGKILL")

    with open_progress(Mode.QUIET) as progress, progress.step("first boot") as step:
        check = reporting(dead, step, tmp_path / "console.log")
        with pytest.raises(BuildFailed):
            check()
