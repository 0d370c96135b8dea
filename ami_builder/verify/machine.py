"""What a machine must be able to do so that an image can be verified on it, and what it shows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ami_builder.core.errors import BuildFailed
from ami_builder.core.records import CheckResult, Endpoint, Measurement

if TYPE_CHECKING:  # `list` needs no ssh
    from ami_builder.system.ssh import Session


class Machine(Protocol):
    """A machine that boots an image: a VM of this host, or an EC2 instance."""

    @property
    def name(self) -> str:
        """Its memory, or its instance type."""

    @property
    def memory(self) -> int:
        """In bytes; 0 before the start."""

    def start(self, stack: ExitStack, directory: Path, user_data: str, public_key: str) -> Endpoint:
        """Boot the image, which is never written. Closing `stack` ends the machine.

        `directory` gets the machine's files, such as console.log.
        """

    def check_alive(self) -> None:
        """Raise BuildFailed, with the end of the console, if the machine can't come up any more."""

    def reboot(self, session: Session, timeout: float, alive: Callable[[], None]) -> None:
        """Reboot the machine from inside and wait for a login; call `alive` in between."""

    def cpu_seconds(self, session: Session) -> float | None:
        """Return the CPU seconds used since the start or the last reboot; None if unknown."""

    @property
    def emulator(self) -> int:
        """The process id of the VM on this host; 0 if there is none."""

    def save_console(self) -> None:
        """Bring console.log up to date."""


class Unresponsive(BuildFailed):
    """The machine hangs: nothing can be fetched from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineResult:
    """What the checks found on one machine, and what was measured there."""

    results: tuple[CheckResult, ...]
    measured: tuple[Measurement, ...]
