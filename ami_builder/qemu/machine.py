"""A VM that boots an image the way EC2 would, on a throw-away overlay."""

import re
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from types import TracebackType
from typing import TypeVar

from ami_builder.core.errors import BuildFailed
from ami_builder.core.options import Arch, Network
from ami_builder.core.records import Endpoint
from ami_builder.qemu import extra_disks
from ami_builder.qemu.disks import create_overlay
from ami_builder.qemu.extra_disks import ExtraDisk
from ami_builder.qemu.hardware import (
    DEFAULT_INSTANCE,
    EC2_NETWORK,
    HARDWARE,
    MAC,
    SAME_ADDRESSES,
    Accelerator,
    Tap,
    firmware,
    smbios,
)
from ami_builder.qemu.monitor import FAILURES, Monitor
from ami_builder.system import processes
from ami_builder.verify.machine import Unresponsive

T = TypeVar("T")


# Multi-threaded TCG makes a guest's kernel panic now and then, or hang before it.
_BOOTS = 3
_QUIT_SECONDS = 5.0
_CONSOLE_LINES = 15

_PANIC = re.compile(rb"Kernel panic - not syncing[^\r\n]*")
# A kernel's message when the image is at fault; other panics under TCG may be caused by the emulator.
_IMAGE_AT_FAULT = re.compile(rb"Unable to mount root|No working init|No init found|Requested init")
_RESTARTING = b"reboot: Restarting system"
_KERNEL = re.compile(rb"Linux version|\[ *\d+\.\d+\] |systemd\[1\]|Welcome to (?!GRUB)|\blogin: ")
# Far longer than a boot takes: with "quiet" a kernel prints nothing either.
_FIRMWARE_SECONDS = 300.0
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])|[^\x20-\x7e\n]")
_FORWARD = re.compile(r"TCP\[HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)\s+\S+\s+22\s")


class MachineDied(BuildFailed):
    """QEMU ended or could not continue, for another reason than disk space."""


class GuestStuck(MachineDied, Unresponsive):
    """The guest's kernel panicked, or its firmware hangs; `boot_again` if the emulator may have caused it."""

    boot_again = False


def boot_again(boot: Callable[[int], T], again: Callable[[], bool]) -> T:
    """Call `boot` with 1, and with 2 and 3 if the guest got stuck in a way that emulation causes.

    `again` is called before each repetition. When it returns False, or after the third attempt, the error is
    raised.
    """
    for attempt in range(1, _BOOTS):
        try:
            return boot(attempt)
        except GuestStuck as stuck:
            if not (stuck.boot_again and again()):
                raise
    return boot(_BOOTS)


class VirtualMachine:
    """One booted VM on a throw-away overlay. The context yields its Endpoint, and leaves console.log.

    With `writable` there is no overlay: the disk itself, a qcow2 file, takes all writes and is kept.

    With `imds_port` it looks like an EC2 instance: SMBIOS as Amazon's, metadata at 169.254.169.254, a root on
    NVMe. With `tap` it does too, and has that network in place of `imds_port` and `network`. `disks` are
    further NVMe disks. `memory` and `disk_size` are bytes. Entering raises MissingTool, UsageError or
    BuildFailed; it returns once QEMU runs, long before the guest is up.
    """

    def __init__(
        self,
        *,
        disk: Path,
        directory: Path,
        memory: int,
        cpus: int,
        accelerator: Accelerator,
        user: str,
        disk_size: int | None = None,
        imds_port: int | None = None,
        seed: Path | None = None,
        network: Network = Network.ISOLATED,
        tap: Tap | None = None,
        instance_id: str = DEFAULT_INSTANCE,
        writable: bool = False,
        arch: Arch = Arch.AMD64,
        disks: Sequence[ExtraDisk] = (),
    ) -> None:
        self._hardware = HARDWARE[arch]
        self._disk, self._disk_size, self._seed = disk, disk_size, seed
        self._writable = writable
        self._memory, self._cpus, self._accelerator = memory, cpus, accelerator
        self._imds_port, self._network, self._tap = imds_port, network, tap
        self._user, self._instance_id = user, instance_id
        self._directory = directory
        self._root = disk if writable else directory / "overlay.qcow2"
        self._disks = [
            (one, one.path or directory / f"disk-{number}.raw") for number, one in enumerate(disks, start=1)
        ]
        self._log = directory / "qemu.log"
        self.console_log = directory / "console.log"
        self._console_start = 0
        self._owned = ExitStack()
        self._running = ExitStack()
        self._process: Popen[str] | None = None
        self._monitor: Monitor | None = None
        self._ssh_port = 0

    def __enter__(self) -> Endpoint:
        with ExitStack() as owned:
            self._directory.mkdir(parents=True, exist_ok=True)
            if not self._writable:
                owned.callback(self._root.unlink, missing_ok=True)
                create_overlay(self._disk, self._root, self._disk_size)
            for one, path in self._disks:
                if one.path is None:
                    owned.callback(path.unlink, missing_ok=True)
                extra_disks.create(path, one.size)
            self.console_log.touch()
            self._console_start = self.console_log.stat().st_size
            self._start()
            owned.callback(lambda: self._running.close())
            self._owned = owned.pop_all()
        address, port = (self._tap.address, 22) if self._tap is not None else ("127.0.0.1", self._ssh_port)
        return Endpoint(address=address, port=port, user=self._user, console_log=self.console_log)

    def _start(self) -> None:
        """Start QEMU; `_running` ends it."""
        with ExitStack() as running:
            ours, theirs = socket.socketpair()
            running.callback(ours.close)
            with theirs, self._log.open("a") as log:
                argv = self._arguments(monitor=theirs.fileno())
                self._process = running.enter_context(
                    processes.running(argv, stdout=log.fileno(), pass_fds=[theirs.fileno()])
                )
            try:
                self._monitor = running.enter_context(Monitor(ours))
                if self._tap is None:
                    self._ssh_port = self._forwarded()
            except FAILURES as error:
                raise self._ended() from error
            running.callback(self._quit)
            self._running = running.pop_all()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._owned.close()

    @property
    def pid(self) -> int:
        """QEMU's process."""
        assert self._process is not None, "the VM runs only inside its context"
        return self._process.pid

    def expect_reboot(self) -> None:
        """Prepare for a reboot of the guest, before it is requested; call `start_again` after it.

        An emulated guest that reboots in the same QEMU process needs ten times as long for firmware and boot
        loader: they overwrite memory that the old system's translated code came from, and QEMU checks each
        such write. So QEMU ends at the reboot, and a new process without such code starts.
        """
        if self._accelerator is Accelerator.TCG:
            self.execute("set-action", {"reboot": "shutdown"})

    def start_again(self, timeout: float) -> None:
        """Start QEMU again, with the same disk and ssh port, once the guest has shut down to reboot.

        Does nothing under KVM, whose guest reboots in the same process. Raises BuildFailed when QEMU fails or
        the guest can't continue, and TimedOut when it has not shut down after `timeout` seconds.
        """
        if self._accelerator is not Accelerator.TCG:
            return
        process = self._process
        assert process is not None, "the VM runs only inside its context"

        def down() -> bool:
            try:
                self.check_alive()
            except MachineDied:
                # Not if QEMU has ended, which is what this waits for.
                if process.poll() is None:
                    raise
            return process.poll() is not None

        processes.wait_until(down, what="the shutdown of the guest", timeout=timeout, log=self.console_log)
        if process.returncode != 0:
            raise self._ended()
        self._running.close()
        self._start()

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Run a command of QEMU's monitor and return its result. Raises BuildFailed."""
        assert self._monitor is not None, "the VM runs only inside its context"
        try:
            return self._monitor.execute(command, arguments)
        except FAILURES as error:
            raise self._ended() from error

    def check_alive(self) -> None:
        """Raise BuildFailed, with the end of the console, if the VM can't come up any more."""
        assert self._process is not None, "the VM runs only inside its context"
        if self._process.poll() is not None:
            raise self._ended()
        if panic := _PANIC.search(self._console()):
            raise self._panicked(panic[0])
        if self._hangs():
            raise self._stuck(f"its console was empty for {_FIRMWARE_SECONDS:.0f} s")
        state = self._state()
        if state == "internal-error":
            raise MachineDied(
                f"the guest could not continue under {self._accelerator.upper()}",
                hint="AMI_BUILDER_ACCELERATOR=tcg runs it without KVM, more slowly",
                log=self.console_log,
                tail=self._tail(),
            )
        if state == "io-error":
            raise BuildFailed(
                "the VM stopped because its disk could not be written",
                hint=f"free some space in {self._directory}",
                log=self.console_log,
                tail=self._tail(),
            )

    def _hangs(self) -> bool:
        """Return whether an emulated VM hangs before its kernel prints anything.

        Emulated processors sometimes wait for each other there forever, mostly after a reboot.
        """
        if self._accelerator is not Accelerator.TCG:
            return False
        seconds = time.time() - self.console_log.stat().st_mtime
        return seconds > _FIRMWARE_SECONDS and not _KERNEL.search(self._console().rpartition(_RESTARTING)[2])

    def console_shows(self, pattern: re.Pattern[bytes]) -> bool:
        """Return whether the guest has written `pattern` to its serial console since the start."""
        return pattern.search(self._console()) is not None

    def _console(self) -> bytes:
        with self.console_log.open("rb") as file:
            file.seek(self._console_start)
            return file.read()

    def _state(self) -> str:
        assert self._monitor is not None
        assert self._process is not None
        try:
            status = self._monitor.execute("query-status")
        except TimeoutError:
            return "busy"
        except FAILURES:
            # The monitor closed because QEMU is ending.
            with suppress(TimeoutExpired):
                self._process.wait(_QUIT_SECONDS)
            raise self._ended() from None
        assert isinstance(status, dict)
        return str(status["status"])

    def _quit(self) -> None:
        assert self._monitor is not None
        assert self._process is not None
        with suppress(*FAILURES):
            self._monitor.execute("quit", seconds=_QUIT_SECONDS)
        with suppress(TimeoutExpired):
            self._process.wait(_QUIT_SECONDS)

    def _forwarded(self) -> int:
        """Return the free port that QEMU took for ssh; one chosen in advance might be taken by then."""
        assert self._monitor is not None
        usernet = self._monitor.execute("human-monitor-command", {"command-line": "info usernet"})
        if (found := _FORWARD.search(str(usernet))) is None:
            raise BuildFailed("QEMU forwards no port for ssh", tail=tuple(str(usernet).splitlines()))
        return int(found[1])

    def _ended(self) -> MachineDied:
        assert self._process is not None
        with suppress(TimeoutExpired):
            self._process.wait(_QUIT_SECONDS)
        status = self._process.poll()
        if status == 0:
            return MachineDied("the VM switched itself off", log=self.console_log, tail=self._tail())
        tail = self._log.read_text(errors="replace").strip().splitlines()[-processes.TAIL_LINES :]
        how = "does not answer" if status is None else _how(status)
        return MachineDied(f"QEMU {how}", log=self._log, tail=tuple(tail) or self._tail())

    def _panicked(self, line: bytes) -> GuestStuck:
        text = _printable(line)[0]
        if self._accelerator is Accelerator.TCG and not _IMAGE_AT_FAULT.search(line):
            return self._stuck(f"its kernel panicked: {text}")
        return GuestStuck(f"the guest's kernel panicked: {text}", log=self.console_log, tail=self._tail())

    def _stuck(self, why: str) -> GuestStuck:
        stuck = GuestStuck(
            f"the emulated VM got stuck: {why}",
            hint="multi-threaded emulation causes this sometimes: boot it again",
            log=self.console_log,
            tail=self._tail(),
        )
        stuck.boot_again = True
        return stuck

    def _tail(self) -> tuple[str, ...]:
        return _printable(self._console())[-_CONSOLE_LINES:]

    def _arguments(self, *, monitor: int) -> list[str]:
        kvm = self._accelerator is Accelerator.KVM
        hardware = self._hardware
        argv = [hardware.qemu, "-nodefaults", "-no-user-config", "-display", "none"]
        argv += ["-machine", hardware.machine, "-accel", "kvm" if kvm else "tcg,thread=multi"]
        argv += ["-cpu", hardware.cpu(self._accelerator), "-smp", str(self._cpus), "-m", f"{self._memory}B"]
        if not kvm:
            argv += ["-smbios", f"type=11,value={SAME_ADDRESSES}"]
        argv += firmware(hardware.arch)
        argv += ["-chardev", f"socket,id=monitor,fd={monitor}", "-mon", "chardev=monitor,mode=control"]
        argv += ["-chardev", f"file,id=console,append=on,path={_escaped(self.console_log)}"]
        argv += ["-serial", "chardev:console", "-device", "virtio-rng-pci"]
        # unsafe: no disk here has to survive a crash of the host, so nothing waits for the host's disk.
        root = f"if=none,id=root,format=qcow2,cache=unsafe,discard=unmap,file={_escaped(self._root)}"
        if self._writable:
            # A bake overwrites free space with zeros, which then take no space in the file.
            root = f"detect-zeroes=unmap,{root}"
        volume = f"vol{self._instance_id.removeprefix('i-')}"[:20]
        argv += ["-drive", root, "-device", f"nvme,drive=root,serial={volume},bootindex=0"]
        argv += extra_disks.arguments(
            [one for one, _ in self._disks], [_escaped(path) for _, path in self._disks]
        )
        if self._seed is not None:
            seed = f"if=none,id=seed,format=raw,readonly=on,file={_escaped(self._seed)}"
            argv += ["-drive", seed, "-device", "virtio-blk-pci,drive=seed"]
        if self._imds_port is not None or self._tap is not None:
            argv += smbios(self._instance_id, hardware.arch)
        if self._tap is not None:
            argv += ["-netdev", f"tap,id=net,ifname={self._tap.name},script=no,downscript=no"]
        else:
            argv += ["-netdev", self._user_network()]
        mac = self._tap.mac if self._tap is not None else MAC
        return [*argv, "-device", f"virtio-net-pci,netdev=net,mac={mac},romfile="]

    def _user_network(self) -> str:
        user = ["user", "id=net", "ipv6=off"]
        if self._imds_port is not None:
            forwarder = f"{processes.find('socat')} STDIO TCP4:127.0.0.1:{self._imds_port}"
            user += [EC2_NETWORK, f"guestfwd=tcp:169.254.169.254:80-cmd:{forwarder}"]
        if self._network is Network.ISOLATED:
            user.append("restrict=on")
        # QEMU chooses a free port when it starts first, and takes it again after a reboot.
        user.append(f"hostfwd=tcp:127.0.0.1:{self._ssh_port}-:22")
        return ",".join(user)


def _escaped(path: Path) -> str:
    return str(path.resolve()).replace(",", ",,")


def _how(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed (exit status {status})"


def _printable(raw: bytes) -> tuple[str, ...]:
    text = _ESCAPES.sub("", raw.decode(errors="replace").replace("\r", "\n"))
    return tuple(line.rstrip() for line in text.splitlines() if line.strip())
