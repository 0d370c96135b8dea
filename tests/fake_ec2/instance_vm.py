"""One instance's machine and the thread that owns it: processes end with the thread that started them."""

from __future__ import annotations

import queue
import threading
import time
import traceback
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ami_builder.core.errors import AmiBuilderError
from ami_builder.core.options import Arch, Network
from ami_builder.qemu import imds
from ami_builder.qemu.extra_disks import ExtraDisk
from ami_builder.qemu.hardware import Accelerator, Tap
from ami_builder.qemu.machine import GuestStuck, VirtualMachine
from ami_builder.system import processes

if TYPE_CHECKING:
    from collections.abc import Callable

    from ami_builder.core.records import Endpoint

SHUTDOWN_SECONDS = 90.0
"""How long a guest may take to shut down, before its power is cut."""

_LOOK_SECONDS = 0.25
_BY_GUEST = "Client.InstanceInitiatedShutdown: Instance initiated shutdown"
_BY_USER = "Client.UserInitiatedShutdown: User initiated shutdown"
_BROKEN = "Server.InternalError: Internal error on launch"


class Owner(Protocol):
    """What a machine reports to."""

    def running(self) -> None:
        """The guest boots."""

    def off(self, reason: str) -> bool:
        """The guest is off; returns whether the instance is to go with it."""

    def ended(self) -> None:
        """Record that the instance has ended."""

    def admits(self, port: int) -> bool:
        """Tell whether the port is open to this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmLaunch:
    """What an instance is launched as; `memory` in bytes."""

    instance_id: str
    address: str
    port: int
    memory: int
    cpus: int
    accelerator: Accelerator
    network: Network
    tap: Tap | None
    """Its place in a network of instances; with None, `port` is forwarded to it while a group says so."""
    directory: Path
    arch: Arch
    disks: tuple[ExtraDisk, ...]
    """Beside the root disk, which is the volume."""


class InstanceVm(threading.Thread):
    """An instance from its launch to its end: `ask` returns at once, things are done in order."""

    def __init__(
        self, launch: VmLaunch, *, metadata: imds.MetadataServer, volume: Path, owner: Owner
    ) -> None:
        super().__init__(name=launch.instance_id, daemon=True)
        self.launch, self.metadata, self.volume = launch, metadata, volume
        self._owner = owner
        self._asked: queue.SimpleQueue[tuple[str, Callable[[], None]]] = queue.SimpleQueue()
        self._machine: VirtualMachine | None = None
        self._endpoint: Endpoint | None = None
        self._power = ExitStack()
        self._relay = ExitStack()
        self._open = False

    def ask(self, what: str, then: Callable[[], None] = lambda: None) -> None:
        """Ask for `stop`, `start`, `reset`, `capture` (with what captures) or `terminate`."""
        self._asked.put((what, then))

    def run(self) -> None:
        """Own the machine until the instance is terminated."""
        try:
            with self.metadata as metadata, self._power:
                self._boot(metadata.port)
                while True:
                    try:
                        what, then = self._asked.get(timeout=_LOOK_SECONDS)
                    except queue.Empty:
                        what, then = "look", lambda: None
                    if what == "terminate" or self._do(what, then, metadata.port):
                        return
        except Exception:
            # An internal error, or QEMU can't start: the launch fails, and the traceback shows why.
            traceback.print_exc()
            self._owner.off(_BROKEN)
        finally:
            self._cut()
            self._owner.ended()

    def _do(self, what: str, then: Callable[[], None], imds_port: int) -> bool:
        """Do one thing; returns whether the instance is to go."""
        match what:
            case "start":
                self._boot(imds_port)
            case "stop":
                self._shut_down()
                return self._owner.off(_BY_USER)
            case "capture":
                was_on = self._machine is not None
                self._shut_down()
                then()
                if was_on:
                    self._boot(imds_port)
            case "reset" if self._machine is not None:
                self._machine.execute("system_reset")
        return self._look(imds_port)

    def _look(self, imds_port: int) -> bool:
        if self._machine is None:
            return False
        try:
            self._machine.check_alive()
        except GuestStuck as panic:
            if not panic.boot_again:
                return False
            # Emulation's fault: an instance would have come up.
            self._cut()
            self._boot(imds_port)
        except AmiBuilderError:
            self._cut()
            return self._owner.off(_BY_GUEST)
        self._sync_relay()
        return False

    def _boot(self, imds_port: int) -> None:
        launch = self.launch
        machine = VirtualMachine(
            disk=self.volume,
            writable=True,
            directory=launch.directory,
            memory=launch.memory,
            cpus=launch.cpus,
            accelerator=launch.accelerator,
            user="",
            imds_port=imds_port,
            network=launch.network,
            tap=launch.tap,
            instance_id=launch.instance_id,
            arch=launch.arch,
            disks=launch.disks,
        )
        self._endpoint = self._power.enter_context(machine)
        self._machine = machine
        self._sync_relay()
        self._owner.running()

    def _shut_down(self) -> None:
        """Press the power button, and cut the power of a guest that doesn't listen."""
        if self._machine is None:
            return
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        try:
            self._machine.execute("system_powerdown")
            while time.monotonic() < deadline:
                self._machine.check_alive()
                time.sleep(_LOOK_SECONDS)
        except AmiBuilderError:
            pass
        self._cut()

    def _cut(self) -> None:
        self._relay.close()
        self._open = False
        self._power.close()
        self._machine = self._endpoint = None

    def _sync_relay(self) -> None:
        """Make the port reachable exactly while a security group says so."""
        if self.launch.tap is not None:
            return
        admitted = self._owner.admits(self.launch.port)
        if admitted == self._open:
            return
        self._relay.close()
        self._open = admitted
        if admitted:
            assert self._endpoint is not None
            listen = f"TCP4-LISTEN:{self.launch.port},bind={self.launch.address},fork,reuseaddr"
            to = f"TCP4:127.0.0.1:{self._endpoint.port}"
            self._relay.enter_context(processes.running(["socat", listen, to]))
