"""What a machine is doing until ssh answers, according to its console."""

import re
from collections.abc import Callable
from pathlib import Path

from ami_builder.console import Step

WAITING = "waiting for ssh"
SHUTTING_DOWN = "shutting down"

# In reverse order: the first one found on the console is the stage that the machine has reached.
_STAGES = (
    ("login prompt", re.compile(rb"\blogin: ")),
    ("system services", re.compile(rb"systemd\[1\]|cloud-init\[\d+\]|Welcome to (?!GRUB)")),
    ("kernel", re.compile(rb"Linux version|Booting `|\[ *\d+\.\d{6}\] ")),
    ("boot loader", re.compile(rb"GRUB")),
    ("firmware", re.compile(rb"BdsDxe|reboot: Restarting system")),
)
_RESTART = re.compile(rb"reboot: Restarting system|BdsDxe: loading")


def doing(console: bytes, *, reboot: bool) -> str:
    """Return what a machine is doing, from its console since the start or the call to reboot."""
    if reboot:
        restarts = list(_RESTART.finditer(console))
        if not restarts:
            return SHUTTING_DOWN
        console = console[restarts[-1].start() :]
    stage = next((name for name, pattern in _STAGES if pattern.search(console)), "")
    return f"{WAITING} (console: {stage})" if stage else WAITING


def reporting(
    check: Callable[[], None], step: Step, console: Path, *, reboot: bool = False
) -> Callable[[], None]:
    """Return a function that calls `check`, then reports on `step` what the machine is doing.

    `console` is read from its current end on. If it is empty at a reboot, it is not written while the machine
    runs: the console of an instance is fetched on demand.
    """
    start = console.stat().st_size if console.exists() else 0
    known = reboot and start > 0

    def checked() -> None:
        check()
        text = b""
        if console.exists():
            with console.open("rb") as file:
                file.seek(start)
                text = file.read()
        step.update(doing(text, reboot=known))

    return checked
