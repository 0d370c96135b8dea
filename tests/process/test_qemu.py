"""Disk images by the real qemu-img; machines by a fake QEMU that fails in each way that a real one does."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ami_builder.core.errors import BuildFailed, MissingTool, TimedOut, UsageError
from ami_builder.core.options import Arch, Network
from ami_builder.qemu import accelerator, hardware, machine
from ami_builder.qemu.accelerator import choose_accelerator, known_accelerator
from ami_builder.qemu.disks import create_overlay, image_info
from ami_builder.qemu.extra_disks import ExtraDisk
from ami_builder.qemu.hardware import HARDWARE, Accelerator, Tap
from ami_builder.qemu.machine import GuestStuck, MachineDied, VirtualMachine
from ami_builder.system import processes
from tests.saved_vm import SavedVm

pytestmark = pytest.mark.needs("qemu-img", "qemu-io")

MIB = 1 << 20

# Speaks the monitor's protocol on the descriptor that it is given, forwards the ports that it is asked for.
FAKE = r"""
import json, os, re, socket, sys, time
here = {here!r}
argv = sys.argv[1:]
if argv == ["--version"]:
    print("QEMU emulator version 9.9"); sys.exit()
with open(here + "/argv.json", "w") as file:
    json.dump(argv, file)
with open(here + "/pids", "a") as file:
    file.write(str(os.getpid()) + chr(10))
text = " ".join(argv)
{first}
with open(re.search(r"path=(.*?) -serial", text)[1].replace(",,", ","), "ab") as console:
    console.write({console!r})
usernet = ""
for here_, there in re.findall(r"hostfwd=tcp:127.0.0.1:(\d+)-:(\d+)", text):
    port = int(here_) or 40000 + int(there)
    usernet += f"  TCP[HOST_FORWARD]  12       127.0.0.1 {{port}}       10.0.2.15 {{there}}     0     0\r\n"
monitor = socket.socket(fileno=int(re.search(r"socket,id=monitor,fd=(\d+)", text)[1]))
def say(it):
    monitor.sendall(json.dumps(it).encode() + b"\n")
def asks():
    # The client ends its messages with nothing.
    unread = ""
    while data := monitor.recv(65536):
        unread += data.decode()
        while unread.strip():
            try:
                asked, end = json.JSONDecoder().raw_decode(unread)
            except ValueError:
                break
            unread = unread[end:].lstrip()
            yield asked
version = {{"qemu": {{"micro": 0, "minor": 0, "major": 9}}, "package": ""}}
say({{"QMP": {{"version": version, "capabilities": ["oob"]}}}})
for asked in asks():
    command = asked["execute"]
    {each}
    answer = {{}}
    if command == "query-status":
        answer = {{"status": {state!r}, "running": True, "singlestep": False}}
    if command == "human-monitor-command":
        answer = usernet
    say({{"return": answer, "id": asked.get("id")}})
    if command == "quit":
        sys.exit()
time.sleep(60)
"""

Fake = Callable[..., Path]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Put a fake QEMU first on PATH; returns the folder with its argv.json and pids."""
    folder = tmp_path / "fake"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(machine, "_QUIT_SECONDS", 60)
    monkeypatch.setattr("ami_builder.qemu.monitor._ANSWER_SECONDS", 60)

    def make(
        *,
        first: str = "",
        each: str = "",
        console: bytes = b"",
        state: str = "running",
        name: str = "qemu-system-x86_64",
    ) -> Path:
        program = folder / name
        script = FAKE.format(here=str(folder), first=first, each=each, console=console, state=state)
        program.write_text(f"#!{sys.executable}\n{script}")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        return folder

    return make


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return qcow2(tmp_path / "disk.qcow2")


@pytest.fixture
def build(tmp_path: Path, disk: Path) -> Callable[..., VirtualMachine]:
    return lambda **changes: VirtualMachine(**(settings(disk, tmp_path) | changes))


def settings(disk: Path, folder: Path) -> dict[str, Any]:
    return {
        "disk": disk,
        "directory": folder / "vm",
        "memory": 512 * MIB,
        "cpus": 2,
        "accelerator": Accelerator.TCG,
        "user": "admin",
    }


def qcow2(path: Path, size: int = 16 * MIB) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(size)], check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q 0 1M", path], check=True)
    return path


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def pids(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "pids").read_text().split()]


# Images


def test_info_of_qcow2(disk: Path) -> None:
    info = image_info(disk)
    assert (info.format, info.virtual_size) == ("qcow2", 16 * MIB)


def test_info_of_raw(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(b"\0" * 510 + b"\x55\xaa" + b"\0" * MIB)
    assert image_info(raw).format == "raw"


@pytest.mark.parametrize("content", [b"", b"short", b"<html>404</html>" * 100, b"\0" * MIB])
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "page.qcow2"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"page\.qcow2 is not a disk image"):
        image_info(path)


@pytest.mark.parametrize("name", ["missing.qcow2", "."])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is not a file"):
        image_info(tmp_path / name)


def test_a_damaged_header_is_refused(disk: Path) -> None:
    with disk.open("r+b") as file:
        file.seek(4)
        file.write(b"\xff" * 60)
    with pytest.raises(UsageError, match=r"reading .*disk\.qcow2 failed") as caught:
        image_info(disk)
    assert any("qcow2" in line for line in caught.value.tail)


def test_other_formats_are_named(tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    subprocess.run(["qemu-img", "create", "-q", "-f", "vmdk", path, "1M"], check=True)
    with pytest.raises(UsageError, match="is a vmdk image") as caught:
        image_info(path)
    assert "qemu-img convert -O qcow2" in str(caught.value.hint)


def test_an_image_that_refers_to_another_file_is_refused(tmp_path: Path, disk: Path) -> None:
    """An image from elsewhere could show the guest any file of this machine."""
    overlay, split = tmp_path / "overlay.qcow2", tmp_path / "split.qcow2"
    create_overlay(disk, overlay)
    options = f"data_file={tmp_path / 'data'},data_file_raw=on"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, split, "1M"], check=True)
    for path in (overlay, split):
        with pytest.raises(UsageError, match="not a complete image"):
            image_info(path)


def test_overlay_grows_and_leaves_the_image_alone(tmp_path: Path, disk: Path) -> None:
    before = disk.read_bytes()
    overlay = tmp_path / "overlay.qcow2"
    create_overlay(disk, overlay, 64 * MIB)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q 0 1M", overlay], check=True)
    told = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", overlay]))
    assert (told["virtual-size"], told["backing-filename-format"]) == (64 * MIB, "qcow2")
    assert disk.read_bytes() == before


def test_overlay_does_not_shrink(tmp_path: Path, disk: Path) -> None:
    with pytest.raises(UsageError, match="smaller than the image"):
        create_overlay(disk, tmp_path / "overlay.qcow2", 15 * MIB)


# Machines


def test_machine_yields_its_endpoint_and_leaves_only_logs(
    fake: Fake, build: Callable[..., VirtualMachine], tmp_path: Path
) -> None:
    folder = fake(console=b"hello\r\n")
    with build() as endpoint:
        assert (endpoint.address, endpoint.port, endpoint.user) == ("127.0.0.1", 40022, "admin")
        assert (tmp_path / "vm/overlay.qcow2").exists()
        [pid] = pids(folder)
        assert not gone(pid)
    assert gone(pid)
    assert sorted(p.name for p in (tmp_path / "vm").iterdir()) == ["console.log", "qemu.log"]
    assert endpoint.console_log.read_bytes() == b"hello\r\n"


def arguments(folder: Path) -> str:
    return " ".join(json.loads((folder / "argv.json").read_text()))


def test_an_instance_of_ec2(fake: Fake, build: Callable[..., VirtualMachine]) -> None:
    folder = fake()
    with build(imds_port=1234, disk_size=32 * MIB, memory=1000 * MIB, cpus=3):
        text = arguments(folder)
    assert "-smp 3 -m 1048576000B" in text
    assert "-accel tcg,thread=multi -cpu max" in text
    assert "guestfwd=tcp:169.254.169.254:80-cmd:" in text
    assert "STDIO TCP4:127.0.0.1:1234," in text
    assert "nvme,drive=root,serial=vol0123456789abcdef0," in text
    assert "mac=02:00:00:00:00:01" in text
    system = re.search(r"manufacturer=Amazon EC2,product=m6i.large,uuid=(\S+),serial=(\S+)", text)
    assert system is not None
    assert system[1] == system[2]
    assert re.fullmatch(r"ec2[0-9a-f]{5}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", system[1])
    assert "if=none,id=seed" not in text
    forwards = re.findall(r"hostfwd=tcp:127.0.0.1:(\d+)-:(\d+)", text)
    assert forwards == [("0", "22")], "QEMU chooses free ports itself"


def test_an_instance_on_a_network_of_the_hosts(fake: Fake, build: Callable[..., VirtualMachine]) -> None:
    folder = fake()
    tap = Tap(name="tap7", mac="02:00:ac:1f:00:05", address="172.31.0.5")
    with build(tap=tap) as endpoint:
        text = arguments(folder)
    assert (endpoint.address, endpoint.port) == ("172.31.0.5", 22)
    assert "-netdev tap,id=net,ifname=tap7,script=no,downscript=no" in text
    assert "virtio-net-pci,netdev=net,mac=02:00:ac:1f:00:05," in text
    assert "manufacturer=Amazon EC2" in text
    assert "user,id=net" not in text
    assert "hostfwd" not in text


def test_a_machine_with_a_seed_is_no_instance(
    fake: Fake, build: Callable[..., VirtualMachine], tmp_path: Path
) -> None:
    folder = fake()
    with build(seed=tmp_path / "seed.iso"):
        text = arguments(folder)
    assert f"id=seed,format=raw,readonly=on,file={tmp_path}/seed.iso" in text
    assert "Amazon" not in text
    assert "169.254" not in text


@pytest.mark.parametrize(("network", "restricted"), [(Network.ISOLATED, True), (Network.NAT, False)])
def test_network(
    fake: Fake, build: Callable[..., VirtualMachine], network: Network, restricted: bool
) -> None:
    folder = fake()
    with build(network=network):
        assert ("restrict=on" in arguments(folder)) == restricted


def test_kvm_uses_the_hosts_processor(fake: Fake, build: Callable[..., VirtualMachine]) -> None:
    folder = fake()
    with build(accelerator=Accelerator.KVM):
        text = arguments(folder)
    assert "-accel kvm -cpu host" in text
    assert "type=11" not in text, "a machine that is not emulated is not changed"


def test_an_emulated_machine_puts_programs_where_they_were(
    fake: Fake, build: Callable[..., VirtualMachine]
) -> None:
    folder = fake()
    with build():
        text = arguments(folder)
    assert "type=11,value=io.systemd.credential:sysctl.extra=kernel.randomize_va_space=0" in text


def test_further_disks(fake: Fake, build: Callable[..., VirtualMachine], tmp_path: Path) -> None:
    """Empty ones go with the VM; a file that is given stays. The guest sees the models of EC2's disks."""
    folder, kept = fake(), tmp_path / "a,kept.raw"
    kept.write_bytes(b"mine")
    disks = [
        ExtraDisk(size=MIB),
        ExtraDisk(path=kept),
        ExtraDisk(size=MIB, instance_store=False, serial="vol1"),
    ]
    with build(disks=disks):
        text = arguments(folder)
        assert (tmp_path / "vm/disk-1.raw").stat().st_size == MIB
    assert f"id=disk2,format=raw,cache=unsafe,discard=unmap,file={tmp_path}/a,,kept.raw" in text
    serials = re.findall(r"nvme,drive=disk\d,id=nvme\d,serial=(\S+)", text)
    assert [(serial[:3], len(serial) <= 20) for serial in serials] == [("AWS", True)] * 2 + [("vol", True)]
    assert serials[0] != serials[1]
    (encoded,) = re.findall(r"credential\.binary:systemd\.unit-dropin\.mount-spill\.service=(\S+)", text)
    assert "Amazon EC2 NVMe Instance Storage" in base64.b64decode(encoded).decode()
    assert [path.name for path in (tmp_path / "vm").glob("disk-*")] == []
    assert kept.read_bytes() == b"mine"
    with build():
        assert "mount-spill" not in arguments(folder)


def test_a_folder_with_a_comma(fake: Fake, build: Callable[..., VirtualMachine], tmp_path: Path) -> None:
    folder = fake(console=b"there")
    with build(directory=tmp_path / "a,b") as endpoint:
        assert f"file={tmp_path}/a,,b/overlay.qcow2" in arguments(folder)
    assert endpoint.console_log.read_bytes() == b"there"


def test_firmware_is_found_or_named(
    fake: Fake, build: Callable[..., VirtualMachine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fake()
    code = tmp_path / "code.fd"
    amd64 = replace(HARDWARE[Arch.AMD64], firmware=((str(code), "pflash"),))
    monkeypatch.setattr(hardware, "HARDWARE", {Arch.AMD64: amd64})
    with pytest.raises(MissingTool) as caught, build():
        pass
    assert "apt-get install ovmf" in str(caught.value.hint)
    code.touch()
    with build():
        assert f"if=pflash,unit=0,format=raw,readonly=on,file={code}" in arguments(folder)


def test_an_arm64_machine_looks_like_graviton(
    fake: Fake, build: Callable[..., VirtualMachine], disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fake(name="qemu-system-aarch64")
    graviton = replace(HARDWARE[Arch.ARM64], firmware=((str(disk), "bios"),))
    monkeypatch.setattr(hardware, "HARDWARE", {Arch.ARM64: graviton})
    monkeypatch.setattr(machine, "HARDWARE", {Arch.ARM64: graviton})
    with build(arch=Arch.ARM64, imds_port=1):
        text = arguments(folder)
    assert "-machine virt,gic-version=max -accel tcg" in text
    assert "-cpu max,pauth=off,sve=off," in text
    assert "product=m7g.large" in text
    assert "nvme,drive=root" in text


def test_an_architecture_that_this_host_lacks_is_emulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMI_BUILDER_ACCELERATOR", "kvm")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    found = known_accelerator(tmp_path / "cache.json", Arch.ARM64)
    assert found == (Accelerator.TCG, "TCG (slow): KVM can't run arm64 on x86_64")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert known_accelerator(tmp_path / "cache.json", Arch.ARM64) is not None
    assert known_accelerator(tmp_path / "cache.json", Arch.ARM64)[0] is Accelerator.KVM  # type: ignore[index]


def test_qemu_is_missing(
    build: Callable[..., VirtualMachine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bin"
    path.mkdir()
    (path / "qemu-img").symlink_to(processes.find("qemu-img"))
    monkeypatch.setattr(processes, "find", lambda name: refuse(name) if "system" in name else path / name)
    with pytest.raises(MissingTool, match="qemu-system-x86_64"), build():
        pass
    assert not (tmp_path / "vm/overlay.qcow2").exists()


def refuse(name: str) -> Path:
    raise MissingTool(f"{name} is not installed")


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ("print('no such device', file=sys.stderr); sys.exit(1)", "QEMU failed .exit status 1."),
        ("print('no such device', flush=True); os.abort()", "QEMU was ended by SIGABRT"),
        ("print('no such device', flush=True); sys.exit(0)", "the VM switched itself off"),
    ],
)
def test_qemu_dies_at_once(
    fake: Fake, build: Callable[..., VirtualMachine], tmp_path: Path, first: str, message: str
) -> None:
    fake(first=first)
    with pytest.raises(MachineDied, match=message) as caught, build():
        pass
    if "itself" not in message:
        assert caught.value.tail == ("no such device",)
        assert caught.value.log == tmp_path / "vm/qemu.log"
    assert not (tmp_path / "vm/overlay.qcow2").exists()


def test_qemu_does_not_answer(
    fake: Fake, build: Callable[..., VirtualMachine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ami_builder.qemu.monitor._ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(machine, "_QUIT_SECONDS", 0.5)
    folder = fake(first="time.sleep(60)")
    with pytest.raises(MachineDied, match="QEMU does not answer"), build():
        pass
    assert all(gone(pid) for pid in pids(folder))


def test_qemu_dies_later(fake: Fake, build: Callable[..., VirtualMachine]) -> None:
    fake(each="if command == 'query-status': sys.exit(3)", console=b"\x1b[2Jlast \x1b[0;1mwords\r\n\r\n")
    it = build()
    with it, pytest.raises(MachineDied, match="exit status 3") as caught:
        it.check_alive()
    assert caught.value.tail == ("last words",)


def test_a_healthy_machine_is_alive(fake: Fake, build: Callable[..., VirtualMachine]) -> None:
    fake(console=b"Kernel panic is not what this line is about\r\n")
    it = build()
    with it:
        it.check_alive()
        it.check_alive()


def test_internal_error(fake: Fake, build: Callable[..., VirtualMachine]) -> None:
    fake(state="internal-error")
    it = build(accelerator=Accelerator.KVM)
    with it, pytest.raises(MachineDied, match="could not continue under KVM") as caught:
        it.check_alive()
    assert "AMI_BUILDER_ACCELERATOR=tcg" in str(caught.value.hint)


def test_the_hosts_disk_is_full(fake: Fake, build: Callable[..., VirtualMachine]) -> None:
    fake(state="io-error")
    it = build()
    with it, pytest.raises(BuildFailed, match="could not be written") as caught:
        it.check_alive()
    assert not isinstance(caught.value, MachineDied)


@pytest.mark.parametrize(
    ("accelerated", "line", "again"),
    [
        (Accelerator.TCG, b"Kernel panic - not syncing: Fatal exception in interrupt", True),
        (
            Accelerator.TCG,
            b"Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block",
            False,
        ),
        (Accelerator.TCG, b"Kernel panic - not syncing: No working init found.", False),
        (Accelerator.KVM, b"Kernel panic - not syncing: Fatal exception in interrupt", False),
    ],
)
def test_guest_panic(
    fake: Fake, build: Callable[..., VirtualMachine], accelerated: Accelerator, line: bytes, again: bool
) -> None:
    fake(console=b"[    1.2] Oops\r\n[    1.3] " + line + b"\r\n[    1.4] Rebooting\r\n")
    it = build(accelerator=accelerated)
    with it, pytest.raises(GuestStuck, match=re.escape(line.decode())) as caught:
        it.check_alive()
    assert caught.value.boot_again is again
    assert caught.value.tail[-1] == "[    1.4] Rebooting"


@pytest.mark.parametrize(
    ("accelerated", "console", "silent", "stuck"),
    [
        (Accelerator.TCG, b"[    9.9] reboot: Restarting system\r\nUEFI\r\n", 400, True),
        (Accelerator.TCG, b"UEFI\r\n", 400, True),
        (Accelerator.TCG, b"UEFI\r\n", 200, False),
        (Accelerator.TCG, b"UEFI\r\n[    0.000000] Linux version 6\r\n", 400, False),
        (Accelerator.TCG, b"reboot: Restarting system\r\nWelcome to Debian\r\n", 400, False),
        (Accelerator.KVM, b"UEFI\r\n", 400, False),
    ],
)
def test_firmware_that_hangs_under_emulation_is_told_from_a_quiet_system(
    fake: Fake,
    build: Callable[..., VirtualMachine],
    accelerated: Accelerator,
    console: bytes,
    silent: float,
    stuck: bool,
) -> None:
    fake(console=console)
    it = build(accelerator=accelerated)
    with it:
        then = time.time() - silent
        os.utime(it.console_log, (then, then))
        with pytest.raises(GuestStuck, match="console") if stuck else nullcontext() as caught:
            it.check_alive()
    assert caught is None or caught.value.boot_again


def test_the_console_of_an_earlier_machine_does_not_count(
    fake: Fake, build: Callable[..., VirtualMachine], tmp_path: Path
) -> None:
    fake(console=b"Kernel panic - not syncing: once\r\n")
    with build():
        pass
    fake(console=b"fine\r\n")
    it = build()
    with it:
        it.check_alive()
    assert (tmp_path / "vm/console.log").read_bytes() == b"Kernel panic - not syncing: once\r\nfine\r\n"


def test_a_stubborn_qemu_is_killed(
    fake: Fake, build: Callable[..., VirtualMachine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "STOP_SECONDS", 0.5)
    monkeypatch.setattr(machine, "_QUIT_SECONDS", 0.5)
    folder = fake(
        first="import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        each="if command == 'quit': continue",
    )
    with build():
        pass
    assert all(gone(pid) for pid in pids(folder))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_when_entering_fails(
    fake: Fake,
    build: Callable[..., VirtualMachine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    folder = fake()

    def fail(self: VirtualMachine) -> None:
        raise error

    monkeypatch.setattr(VirtualMachine, "_forwarded", fail)
    with pytest.raises(error), build():
        pass
    assert all(gone(pid) for pid in pids(folder))
    assert not (tmp_path / "vm/overlay.qcow2").exists()


def test_nothing_outlives_a_killed_builder(fake: Fake, disk: Path, tmp_path: Path) -> None:
    folder = fake()
    script = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from ami_builder.qemu.hardware import HARDWARE, Accelerator
        from ami_builder.qemu.machine import VirtualMachine
        with VirtualMachine(disk=Path({str(disk)!r}), directory=Path({str(tmp_path / "vm")!r}),
                            memory=1 << 28, cpus=1, accelerator=Accelerator.TCG, user="admin"):
            print("up", flush=True)
            time.sleep(60)
    """)
    builder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert builder.stdout is not None
    with builder.stdout:
        assert builder.stdout.readline() == "up\n"
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    [pid] = pids(folder)
    processes.wait_until(lambda: gone(pid), what="the end of QEMU", timeout=120, interval=0.05)


# A machine that is saved, and goes on


@pytest.fixture
def savable(tmp_path: Path, disk: Path) -> Callable[..., SavedVm]:
    return lambda **changes: SavedVm(**settings(disk, tmp_path), **changes)


def asked(folder: Path) -> list[dict[str, Any]]:
    """Return the commands that the monitor was given, apart from questions."""
    told = [json.loads(line) for line in (folder / "asked").read_text().splitlines()]
    return [each for each in told if not each["execute"].startswith(("q", "human"))]


def monitored(answers: str = "") -> str:
    """Let the fake QEMU write down what it is asked, and answer as `answers` maps a command."""
    return (
        "open(here + '/asked', 'a').write(json.dumps(asked) + chr(10)); "
        f"told = {{{answers}}}.get(command); "
        "told and say({**told, 'id': asked.get('id')})\n    if told: continue"
    )


def test_a_machine_is_saved_as_it_was_stopped(
    fake: Fake, savable: Callable[..., SavedVm], tmp_path: Path
) -> None:
    folder = fake(each=monitored("'query-migrate': {'return': {'status': 'completed'}}"))
    it = savable()
    with it:
        it.save(tmp_path / "a memory")
        assert "virtio-blk-pci,drive=root,serial=vol0123456789abcdef0," in arguments(folder)
        stop, bound, save = asked(folder)
    assert (stop["execute"], bound["execute"]) == ("stop", "migrate-set-parameters")
    assert save["arguments"] == {"uri": f"exec:cat >'{tmp_path}/a memory'"}


@pytest.mark.parametrize(
    "answers",
    [
        "'migrate': {'error': {'class': 'GenericError', 'desc': 'blocked by nvme'}}",
        "'query-migrate': {'return': {'status': 'failed', 'error-desc': 'blocked by nvme'}}",
    ],
)
def test_why_a_machine_can_not_be_saved(
    fake: Fake, savable: Callable[..., SavedVm], tmp_path: Path, answers: str
) -> None:
    fake(each=monitored(answers))
    it = savable()
    with it, pytest.raises(BuildFailed, match="can't be saved: blocked by nvme"):
        it.save(tmp_path / "memory")


def test_a_saved_machine_goes_on_once_all_is_read(
    fake: Fake, savable: Callable[..., SavedVm], tmp_path: Path
) -> None:
    reading = "'query-status': not os.path.exists(here + '/read') and {'return': {'status': 'inmigrate'}}"
    folder = fake(each=monitored(reading), state="paused")
    threading.Timer(0.5, (folder / "read").touch).start()
    it = savable(saved=tmp_path / "a memory")
    with it:
        assert (folder / "read").exists()
        assert [each["execute"] for each in asked(folder)][-1] == "cont"
        assert f"-incoming exec:cat '{tmp_path}/a memory'" in arguments(folder)
        # It does not come from its firmware, so there is nothing to be heard of its kernel.
        then = time.time() - 400
        os.utime(it.console_log, (then, then))
        it.check_alive()


def test_a_file_that_holds_no_machine(fake: Fake, savable: Callable[..., SavedVm], tmp_path: Path) -> None:
    fake(each="if command == 'query-status': print('bad magic', flush=True); sys.exit(1)")
    with pytest.raises(MachineDied, match="exit status 1") as caught, savable(saved=tmp_path / "memory"):
        pass
    assert caught.value.tail == ("bad magic",)
    assert not (tmp_path / "vm/overlay.qcow2").exists()


# The accelerator


@pytest.fixture
def choose(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], tuple[Accelerator, str]]:
    monkeypatch.delenv("AMI_BUILDER_ACCELERATOR", raising=False)
    device = tmp_path / "kvm"
    device.touch()
    monkeypatch.setattr(accelerator, "_DEVICE", device)
    monkeypatch.setattr(accelerator, "KVM_SECONDS", 0.5)
    boot = tmp_path / "boot_id"
    boot.write_text("one\n")
    monkeypatch.setattr(accelerator, "_BOOT_ID", boot)
    return lambda: choose_accelerator(disk, cache=tmp_path / "cache.json", directory=tmp_path / "try")


Choose = Callable[[], tuple[Accelerator, str]]


def test_a_guest_that_comes_up_proves_kvm_once_a_boot(fake: Fake, choose: Choose, tmp_path: Path) -> None:
    folder = fake(console=b"\r\nWelcome to Debian GNU/Linux 13 (trixie)!\r\n")
    first = choose()
    assert first == (Accelerator.KVM, "KVM: a guest has run on it")
    assert "-accel kvm" in arguments(folder)
    assert "restrict=on" in arguments(folder)
    assert choose() == first
    assert len(pids(folder)) == 1
    (tmp_path / "boot_id").write_text("two\n")
    choose()
    assert len(pids(folder)) == 2


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"host": 1}'])
def test_a_damaged_cache_is_made_anew(fake: Fake, choose: Choose, tmp_path: Path, damage: str) -> None:
    fake(console=b"localhost login: ")
    (tmp_path / "cache.json").write_text(damage)
    assert choose()[0] is Accelerator.KVM
    assert json.loads((tmp_path / "cache.json").read_text())["accelerator"] == "kvm"


@pytest.mark.parametrize(
    ("settings", "reason", "cached"),
    [
        ({"first": "os.abort()"}, "opens, but QEMU was ended by SIGABRT", True),
        ({"state": "internal-error"}, "opens, but the guest could not continue under KVM", True),
        ({"console": b"UEFI only"}, "printed nothing", False),
        ({"console": b"\x1b[47mWelcome to GRUB!\r\n"}, "printed nothing", False),
        (
            {"console": b"Kernel panic - not syncing: what"},
            "kernel panicked: Kernel panic - not syncing: what",
            False,
        ),
    ],
)
def test_kvm_that_runs_no_guest_is_not_used(
    fake: Fake, choose: Choose, tmp_path: Path, settings: dict[str, Any], reason: str, cached: bool
) -> None:
    fake(**settings)
    chosen, why = choose()
    assert chosen is Accelerator.TCG
    assert reason in why
    assert "\n" not in why
    assert (tmp_path / "cache.json").exists() == cached


def test_kvm_that_does_not_open_costs_nothing(
    choose: Choose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "_DEVICE", tmp_path / "absent")
    chosen, why = choose()
    assert chosen is Accelerator.TCG
    assert "No such file or directory" in why


def test_a_full_disk_does_not_decide(
    fake: Fake, choose: Choose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(state="io-error")
    with pytest.raises(BuildFailed, match="could not be written"):
        choose()
    assert not (tmp_path / "cache.json").exists()


@pytest.mark.parametrize("wanted", list(Accelerator))
def test_the_environment_decides(
    choose: Choose, monkeypatch: pytest.MonkeyPatch, wanted: Accelerator
) -> None:
    monkeypatch.setenv("AMI_BUILDER_ACCELERATOR", wanted)
    assert choose()[0] is wanted


def test_the_environment_is_wrong(choose: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMI_BUILDER_ACCELERATOR", "hvf")
    with pytest.raises(UsageError, match="hvf"):
        choose()


def test_a_writable_disk_stays(
    fake: Fake, build: Callable[..., VirtualMachine], tmp_path: Path, disk: Path
) -> None:
    folder = fake()
    with build(writable=True):
        assert "detect-zeroes=unmap,if=none,id=root" in arguments(folder)
        assert f"file={disk}" in arguments(folder)
    assert disk.exists()
    assert sorted(p.name for p in (tmp_path / "vm").iterdir()) == ["console.log", "qemu.log"]


# Reboots

# The guest goes down at the first look at it once the file is there, and QEMU ends with the status in it.
GOES_DOWN = (
    "down = here + '/down';"
    " went = command == 'query-status' and os.path.exists(down) and int(open(down).read());"
    " went is False or os.remove(down) or (os.abort() if went < 0 else sys.exit(went))"
)
TOLD = (
    "command in ('set-action', 'system_reset') and print(json.dumps(asked), file=open(here + '/told', 'a'));"
)


def goes_down(folder: Path, status: int = 0) -> None:
    (folder / "down").write_text(str(status))


def test_a_reboot_under_emulation_is_a_new_qemu_on_the_same_disk_and_ports(
    fake: Fake, build: Callable[..., VirtualMachine], tmp_path: Path
) -> None:
    folder = fake(each=f"{TOLD} {GOES_DOWN}", console=b"booted\r\n")
    it = build()
    with it as endpoint:
        first = arguments(folder)
        it.expect_reboot()
        it.check_alive()
        assert len(pids(folder)) == 1, "it goes on until the guest has gone down"
        goes_down(folder)
        it.start_again(30)
        old, new = pids(folder)
        assert gone(old)
        assert not gone(new)
        assert it.pid == new
        again = arguments(folder)
        assert "hostfwd=tcp:127.0.0.1:0-:22" in first
        assert f"hostfwd=tcp:127.0.0.1:{endpoint.port}-:22" in again
        again = again.replace(f"127.0.0.1:{endpoint.port}-", "127.0.0.1:0-")
        monitor = re.compile(r"id=monitor,fd=\d+")
        assert monitor.sub("", again) == monitor.sub("", first), "nothing else is different"
        assert (tmp_path / "vm/overlay.qcow2").exists()
        it.check_alive()
    assert all(gone(pid) for pid in pids(folder))
    assert sorted(p.name for p in (tmp_path / "vm").iterdir()) == ["console.log", "qemu.log"]
    assert endpoint.console_log.read_bytes() == b"booted\r\n" * 2
    (told,) = [json.loads(line) for line in (folder / "told").read_text().splitlines()]
    assert (told["execute"], told["arguments"]) == ("set-action", {"reboot": "shutdown"})


def test_a_second_reboot_is_as_the_first(fake: Fake, build: Callable[..., VirtualMachine]) -> None:
    folder = fake(each=f"{TOLD} {GOES_DOWN}")
    it = build()
    with it:
        for _ in range(2):
            it.expect_reboot()
            goes_down(folder)
            it.start_again(30)
        assert [gone(pid) for pid in pids(folder)] == [True, True, False]
    assert len((folder / "told").read_text().splitlines()) == 2, "a new QEMU has to be told again"


def test_under_kvm_the_same_qemu_goes_on(fake: Fake, build: Callable[..., VirtualMachine]) -> None:
    folder = fake(each=f"{TOLD} {GOES_DOWN}")
    it = build(accelerator=Accelerator.KVM)
    with it:
        it.expect_reboot()
        it.start_again(0.1)
        it.check_alive()
        [pid] = pids(folder)
        assert it.pid == pid
        assert not gone(pid)
    assert not (folder / "told").exists()


def test_a_guest_that_does_not_go_down_in_time(
    fake: Fake, build: Callable[..., VirtualMachine], tmp_path: Path
) -> None:
    folder = fake(each=GOES_DOWN)
    it = build()
    with it:
        it.expect_reboot()
        with pytest.raises(TimedOut, match="the shutdown of the guest") as caught:
            it.start_again(0.5)
        assert caught.value.log == tmp_path / "vm/console.log"
        [pid] = pids(folder)
        assert not gone(pid)
    assert gone(pid)


@pytest.mark.parametrize(("status", "message"), [(3, "exit status 3"), (-6, "was ended by SIGABRT")])
def test_qemu_that_crashes_while_the_guest_goes_down_is_not_started_again(
    fake: Fake, build: Callable[..., VirtualMachine], tmp_path: Path, status: int, message: str
) -> None:
    folder = fake(each=GOES_DOWN)
    it = build()
    with it:
        it.expect_reboot()
        goes_down(folder, status)
        with pytest.raises(MachineDied, match=message):
            it.start_again(30)
    assert len(pids(folder)) == 1
    assert not (tmp_path / "vm/overlay.qcow2").exists()


def test_a_guest_that_panics_on_its_way_down_is_not_waited_for(
    fake: Fake, build: Callable[..., VirtualMachine]
) -> None:
    fake(each=GOES_DOWN)
    it = build()
    with it as endpoint:
        it.expect_reboot()
        with endpoint.console_log.open("ab") as console:
            console.write(b"Kernel panic - not syncing: Fatal exception in interrupt\r\n")
        with pytest.raises(GuestStuck, match="Fatal exception") as caught:
            it.start_again(30)
        assert caught.value.boot_again


def test_qemu_that_cannot_start_again_is_told(
    fake: Fake, build: Callable[..., VirtualMachine], tmp_path: Path
) -> None:
    """Another program may have taken one of the ports meanwhile."""
    second = "if len(open(here + '/pids').read().split()) > 1: sys.exit('Could not set up host forwarding')"
    folder = fake(first=second, each=GOES_DOWN)
    it = build()
    with it:
        it.expect_reboot()
        goes_down(folder)
        with pytest.raises(MachineDied, match="exit status 1") as caught:
            it.start_again(30)
        assert caught.value.tail[-1] == "Could not set up host forwarding"
    assert all(gone(pid) for pid in pids(folder))
    assert not (tmp_path / "vm/overlay.qcow2").exists()
