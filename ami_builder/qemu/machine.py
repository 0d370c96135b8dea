"""A machine that boots an image the way EC2 would, on a throw-away overlay."""

from __future__ import annotations

import re
import shlex
import signal
import socket
import time
import uuid
from contextlib import ExitStack, suppress
from enum import StrEnum
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import TYPE_CHECKING, TypeVar

from ami_builder.core.errors import BuildFailed, MissingTool
from ami_builder.core.options import Network
from ami_builder.core.records import Endpoint
from ami_builder.qemu.disks import create_overlay
from ami_builder.qemu.monitor import FAILURES, Monitor
from ami_builder.system import processes
from ami_builder.verify.machine import Unresponsive

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

T = TypeVar("T")

QEMU = "qemu-system-x86_64"
DEFAULT_INSTANCE = "i-0123456789abcdef0"
DEFAULT_MAC = "02:00:00:00:00:01"

# Multi-threaded TCG makes a guest's kernel panic now and then, or hang before it.
_BOOTS = 3
_QUIT_SECONDS = 5.0
_CONSOLE_LINES = 15
# A gigabyte or two; on a busy disk that takes its time.
_SAVE_SECONDS = 300.0

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

THIS_MACHINE = "169.254.169.2"
"""What a guest whose network looks like EC2's calls the machine that it runs on."""
# 169.254.169.254 has to lie in the guest's own network for QEMU to forward it.
_EC2_NETWORK = f"net=169.254.169.0/24,host={THIS_MACHINE},dns=169.254.169.3,dhcpstart=169.254.169.20"

# Features of a processor that cost more than they give where they are emulated.
_SLOW_FLAGS = ("la57", "smap", "smep", "umip", "pku", "erms", "fsrm", "svm")
# QEMU 7.2 translates a program again for each address that it is loaded to; 10.0 doesn't. systemd 252 and
# later apply this early in the boot (credential sysctl.extra), older ones ignore it. It is not in the image.
_SAME_ADDRESSES = "io.systemd.credential:sysctl.extra=kernel.randomize_va_space=0"
_PANIC = re.compile(rb"Kernel panic - not syncing[^\r\n]*")
# What a kernel says when the image is at fault; other panics under TCG are now and then the emulator's.
_IMAGE_AT_FAULT = re.compile(rb"Unable to mount root|No working init|No init found|Requested init")
_RESTARTING = b"reboot: Restarting system"
_KERNEL = re.compile(rb"Linux version|\[ *\d+\.\d+\] |systemd\[1\]|Welcome to (?!GRUB)|\blogin: ")
# Far longer than a boot takes; with "quiet" a kernel says nothing either.
_FIRMWARE_SECONDS = 300.0
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])|[^\x20-\x7e\n]")
_FORWARD = re.compile(r"TCP\[HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)\s+\S+\s+(\d+)")


class Accelerator(StrEnum):
    """What runs the guest's instructions."""

    KVM = "kvm"
    TCG = "tcg"

    @property
    def cpu(self) -> str:
        """QEMU's processor model: all that the accelerator can give.

        Emulated, every miss of the TLB walks the page tables in software: a fifth level costs a quarter. The
        guards of user memory (SMAP and its like) end a block of translated code at each copy between kernel
        and user: starting a process takes twice as long with them. Fast strings (ERMS, FSRM) go byte by byte,
        half as fast as a loop. SVM makes the guest load KVM. None of it changes what is measured.
        """
        return "host" if self is Accelerator.KVM else f"max,{','.join(f'{flag}=off' for flag in _SLOW_FLAGS)}"


class Bus(StrEnum):
    """How the guest reaches its root disk."""

    NVME = "nvme"
    """As on EC2."""
    VIRTIO = "virtio-blk-pci"
    """For a machine that is to be saved."""


class MachineDied(BuildFailed):
    """QEMU ended or could not go on, through no fault of this machine's disk space."""


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
    """One booted VM on a throw-away overlay; the context yields its Endpoint, and leaves console.log.

    With `writable` there is no overlay: the disk itself, a qcow2 file, takes all writes and stays.

    With `imds_port` it looks like an EC2 instance: SMBIOS as Amazon's, metadata at 169.254.169.254, a root on
    NVMe. `memory` and `disk_size` are bytes. Entering raises MissingTool, UsageError or BuildFailed; it
    returns once QEMU runs, long before the guest is up.

    With `saved`, a file that `save` has written, the guest does not boot: it goes on where it was saved, and
    its clock does too. The disk has to be a copy of what it was then, and all settings but ports the same.
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
        ports: Sequence[int] = (),
        instance_id: str = DEFAULT_INSTANCE,
        mac: str = DEFAULT_MAC,
        writable: bool = False,
        bus: Bus = Bus.NVME,
        saved: Path | None = None,
    ) -> None:
        self._disk, self._disk_size, self._seed = disk, disk_size, seed
        self._writable, self._bus, self._saved = writable, bus, saved
        self._memory, self._cpus, self._accelerator = memory, cpus, accelerator
        self._imds_port, self._network, self._ports = imds_port, network, (22, *ports)
        self._user, self._instance_id, self._mac = user, instance_id, mac
        self._directory = directory
        self._root = disk if writable else directory / "overlay.qcow2"
        self._log = directory / "qemu.log"
        self.console_log = directory / "console.log"
        self._console_start = 0
        self._owned = ExitStack()
        self._running = ExitStack()
        self._process: Popen[str] | None = None
        self._monitor: Monitor | None = None
        self._forwards: Mapping[int, int] = dict.fromkeys(self._ports, 0)

    def __enter__(self) -> Endpoint:
        with ExitStack() as owned:
            self._directory.mkdir(parents=True, exist_ok=True)
            if not self._writable:
                owned.callback(self._root.unlink, missing_ok=True)
                create_overlay(self._disk, self._root, self._disk_size)
            self.console_log.touch()
            self._console_start = self.console_log.stat().st_size
            self._start()
            owned.callback(lambda: self._running.close())
            if self._saved is not None:
                self._go_on()
            self._owned = owned.pop_all()
        return Endpoint(
            address="127.0.0.1",
            port=self._forwards[22],
            user=self._user,
            console_log=self.console_log,
            ports=self._forwards,
        )

    def _start(self) -> None:
        """Start QEMU's process; `_running` ends it."""
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
                self._forwards = self._forwarded()
            except FAILURES as error:
                raise self._ended() from error
            running.callback(self._quit)
            self._running = running.pop_all()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.power_off()

    def power_off(self) -> None:
        """Cut the machine's power and remove its overlay; calling it again does nothing."""
        self._owned.close()

    @property
    def pid(self) -> int:
        """QEMU's process."""
        assert self._process is not None, "the machine runs only inside its context"
        return self._process.pid

    def expect_reboot(self) -> None:
        """Prepare for a reboot that the guest is about to be asked for; `start_again` follows it.

        Under emulation a QEMU that starts its guest again needs ten times as long for firmware and boot
        loader: both write over memory that the old system's translated code came from, and QEMU looks at
        each such write. A new process has no such code, so QEMU ends at the reboot instead.
        """
        if self._accelerator is Accelerator.TCG:
            self._tell("set-action", {"reboot": "shutdown"})

    def start_again(self, timeout: float) -> None:
        """Start QEMU again, on the same disk and ports, once the guest has gone down to reboot.

        Does nothing under KVM, whose guest starts again in the same process. Raises BuildFailed when QEMU
        can't start or fails, or the guest can't go on, and TimedOut when it has not gone down after `timeout`
        seconds.
        """
        if self._accelerator is not Accelerator.TCG:
            return
        process = self._process
        assert process is not None, "the machine runs only inside its context"

        def down() -> bool:
            try:
                self.check_alive()
            except MachineDied:
                # QEMU that has ended is what is waited for.
                if process.poll() is None:
                    raise
            return process.poll() is not None

        processes.wait_until(down, what="the guest to go down", timeout=timeout, log=self.console_log)
        if process.returncode != 0:
            raise self._ended()
        self._running.close()
        self._saved = None  # it boots now
        self._start()

    def press_power_button(self) -> None:
        """Ask the guest to shut down, as ACPI does; when it has, QEMU ends, and `check_alive` raises."""
        self._tell("system_powerdown")

    def reset(self) -> None:
        """Start the guest anew at once, as a reset button does."""
        self._tell("system_reset")

    def _tell(self, command: str, arguments: Mapping[str, object] | None = None) -> None:
        assert self._monitor is not None, "the machine runs only inside its context"
        try:
            self._monitor.execute(command, arguments)
        except FAILURES as error:
            raise self._ended() from error

    def save(self, path: Path) -> None:
        """Stop the guest for good, and write its memory and its devices to a file for `saved`.

        The file belongs to the disk as it is then. Raises BuildFailed; QEMU can't save a machine with an NVMe
        disk.
        """
        assert self._monitor is not None, "the machine runs only inside its context"
        path.unlink(missing_ok=True)
        try:
            self._monitor.execute("stop")
            # QEMU's own bound is meant for a network.
            self._monitor.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40})
            self._monitor.execute("migrate", {"uri": f"exec:cat >{shlex.quote(str(path))}"})
            processes.wait_until(self._written, what=f"saving {path}", timeout=_SAVE_SECONDS, interval=0.1)
        except FAILURES as error:
            raise BuildFailed(f"the machine can't be saved: {error}", log=self._log) from error

    def _written(self) -> bool:
        assert self._monitor is not None
        told = self._monitor.execute("query-migrate")
        assert isinstance(told, dict)
        if told["status"] == "failed":
            raise BuildFailed(f"the machine can't be saved: {told.get('error-desc')}", log=self._log)
        return bool(told["status"] == "completed")

    def _go_on(self) -> None:
        """Wait until all that was saved is there, and let the guest go on."""
        processes.wait_until(
            lambda: self._state() != "inmigrate",
            what="reading a saved machine",
            timeout=_SAVE_SECONDS,
            interval=0.1,
            log=self._log,
        )
        self._tell("cont")

    def check_alive(self) -> None:
        """Raise BuildFailed, with the end of the console, when the machine can't come up any more."""
        assert self._process is not None, "the machine runs only inside its context"
        if self._process.poll() is not None:
            raise self._ended()
        if panic := _PANIC.search(self._console()):
            raise self._panicked(panic[0])
        if self._hangs():
            raise self._stuck(f"its console has said nothing for {_FIRMWARE_SECONDS:.0f} s")
        state = self._state()
        if state == "internal-error":
            raise MachineDied(
                f"the guest could not go on under {self._accelerator.upper()}",
                hint="AMI_BUILDER_ACCELERATOR=tcg runs it without KVM, more slowly",
                log=self.console_log,
                tail=self._tail(),
            )
        if state == "io-error":
            raise BuildFailed(
                "the machine stopped because its disk could not be written",
                hint=f"free some space in {self._directory}",
                log=self.console_log,
                tail=self._tail(),
            )

    def _hangs(self) -> bool:
        """Tell whether an emulated machine has stopped before its kernel says anything.

        Emulated processors now and then wait for each other there for ever, after a reboot most of all.
        """
        if self._accelerator is not Accelerator.TCG or self._saved is not None:
            return False
        silent = time.time() - self.console_log.stat().st_mtime
        return silent > _FIRMWARE_SECONDS and not _KERNEL.search(self._console().rpartition(_RESTARTING)[2])

    def console_shows(self, pattern: re.Pattern[bytes]) -> bool:
        """Tell whether the guest has written `pattern` to its serial console since it was started."""
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
            # The monitor is gone because QEMU is going.
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

    def _forwarded(self) -> Mapping[int, int]:
        """Ask QEMU which free ports it took: choosing them beforehand would race with other programs."""
        assert self._monitor is not None
        told = self._monitor.execute("human-monitor-command", {"command-line": "info usernet"})
        ports = {int(inside): int(outside) for outside, inside in _FORWARD.findall(str(told))}
        if missing := set(self._ports) - ports.keys():
            raise BuildFailed(
                f"QEMU forwards no port for {sorted(missing)}", tail=tuple(str(told).splitlines())
            )
        return ports

    def _ended(self) -> MachineDied:
        assert self._process is not None
        with suppress(TimeoutExpired):
            self._process.wait(_QUIT_SECONDS)
        status = self._process.poll()
        if status == 0:
            return MachineDied("the machine switched itself off", log=self.console_log, tail=self._tail())
        said = self._log.read_text(errors="replace").strip().splitlines()[-processes.TAIL_LINES :]
        how = "does not answer" if status is None else _how(status)
        return MachineDied(f"QEMU {how}", log=self._log, tail=tuple(said) or self._tail())

    def _panicked(self, line: bytes) -> GuestStuck:
        text = _printable(line)[0]
        if self._accelerator is Accelerator.TCG and not _IMAGE_AT_FAULT.search(line):
            return self._stuck(f"its kernel panicked: {text}")
        return GuestStuck(f"the guest's kernel panicked: {text}", log=self.console_log, tail=self._tail())

    def _stuck(self, why: str) -> GuestStuck:
        stuck = GuestStuck(
            f"the emulated machine got stuck: {why}",
            hint="multi-threaded emulation does this now and then: boot it again",
            log=self.console_log,
            tail=self._tail(),
        )
        stuck.boot_again = True
        return stuck

    def _tail(self) -> tuple[str, ...]:
        return _printable(self._console())[-_CONSOLE_LINES:]

    def _arguments(self, *, monitor: int) -> list[str]:
        kvm = self._accelerator is Accelerator.KVM
        argv = [QEMU, "-nodefaults", "-no-user-config", "-display", "none"]
        argv += ["-machine", "q35", "-accel", "kvm" if kvm else "tcg,thread=multi"]
        argv += ["-cpu", self._accelerator.cpu, "-smp", str(self._cpus), "-m", f"{self._memory}B"]
        if not kvm:
            argv += ["-smbios", f"type=11,value={_SAME_ADDRESSES}"]
        argv += firmware()
        argv += ["-chardev", f"socket,id=monitor,fd={monitor}", "-mon", "chardev=monitor,mode=control"]
        argv += ["-chardev", f"file,id=console,append=on,path={_escaped(self.console_log)}"]
        argv += ["-serial", "chardev:console", "-device", "virtio-rng-pci"]
        # No disk here has to survive a crash of the host, so the host's disk may take its time (unsafe).
        root = f"if=none,id=root,format=qcow2,cache=unsafe,discard=unmap,file={_escaped(self._root)}"
        if self._writable:
            # A bake overwrites its free space: zeros take none in the file.
            root = f"detect-zeroes=unmap,{root}"
        volume = f"vol{self._instance_id.removeprefix('i-')}"[:20]
        argv += ["-drive", root, "-device", f"{self._bus},drive=root,serial={volume},bootindex=0"]
        if self._saved is not None:
            argv += ["-incoming", f"exec:cat {shlex.quote(str(self._saved))}"]
        if self._seed is not None:
            seed = f"if=none,id=seed,format=raw,readonly=on,file={_escaped(self._seed)}"
            argv += ["-drive", seed, "-device", "virtio-blk-pci,drive=seed"]
        user = ["user", "id=net", "ipv6=off"]
        if self._imds_port is not None:
            argv += _smbios(self._instance_id)
            forwarder = f"{processes.find('socat')} STDIO TCP4:127.0.0.1:{self._imds_port}"
            user += [_EC2_NETWORK, f"guestfwd=tcp:169.254.169.254:80-cmd:{forwarder}"]
        if self._network is Network.ISOLATED:
            user.append("restrict=on")
        # QEMU chooses free ports when it starts first, and takes them again after a reboot.
        user += [f"hostfwd=tcp:127.0.0.1:{here}-:{port}" for port, here in self._forwards.items()]
        argv += ["-netdev", ",".join(user)]
        return [*argv, "-device", f"virtio-net-pci,netdev=net,mac={self._mac},romfile="]


def firmware() -> tuple[str, str]:
    """Return the QEMU flag and value that boot by UEFI; raises MissingTool where no firmware is installed."""
    for name, kind in _FIRMWARE:
        if Path(name).is_file():
            if kind == "bios":
                return "-bios", name
            return "-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={name}"
    raise MissingTool("the UEFI firmware for QEMU (OVMF) is not installed", hint="apt-get install ovmf")


def _smbios(instance_id: str) -> list[str]:
    # cloud-init takes a machine for an instance when both begin with ec2 and are the same.
    serial = f"ec2{str(uuid.uuid5(uuid.NAMESPACE_URL, instance_id))[3:]}"
    system = f"type=1,manufacturer=Amazon EC2,product=m6i.large,uuid={serial},serial={serial}"
    return [
        "-smbios", "type=0,vendor=Amazon EC2,version=1.0",
        "-smbios", system,
        "-smbios", f"type=2,manufacturer=Amazon EC2,asset={instance_id}",
        "-smbios", "type=3,manufacturer=Amazon EC2",
    ]  # fmt: skip


def _escaped(path: Path) -> str:
    return str(path.resolve()).replace(",", ",,")


def _how(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed (exit status {status})"


def _printable(raw: bytes) -> tuple[str, ...]:
    text = _ESCAPES.sub("", raw.decode(errors="replace").replace("\r", "\n"))
    return tuple(line.rstrip() for line in text.splitlines() if line.strip())
