"""mount-spill outside a VM: real wipefs and mke2fs on plain files, a folder for sysfs, and a fake mount."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fake_programs import calls, fake

SCRIPT = Path(__file__).parents[2] / "packer/guest/usr/local/sbin/mount-spill"
MIB = 1 << 20
INSTANCE_STORE, EBS = "Amazon EC2 NVMe Instance Storage        ", "Amazon Elastic Block Store              "
SHELLS = {name: found for name in ("dash", "busybox") if (found := shutil.which(name))}
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
DISK = "/var/lib/dask/spill"
# The top folder of a new file system is its owner's alone.
MOUNT = 'for folder; do :; done; chmod 755 "$folder"'

pytestmark = pytest.mark.needs("wipefs", "mke2fs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What one run of mount-spill did."""

    status: int
    output: str
    mounted: list[str]
    """The device of each mount."""
    notices: str


class Machine:
    """A folder that mount-spill takes for /."""

    def __init__(self, root: Path) -> None:
        self.root, self.programs = root, root / "programs"
        for folder in ("dev", "proc/self", "run", "sys/module/md_mod/parameters", "sys/block"):
            (root / folder).mkdir(parents=True)
        (root / "sys/module/md_mod/parameters/new_array").touch()
        self.write("proc/self/mountinfo", "22 1 259:1 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p1 rw\n")
        self.write("proc/swaps", "Filename Type Size Used Priority\n")
        fake(self.programs, "mount", MOUNT)
        fake(self.programs, "modprobe", "")

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def disk(
        self, number: int, *, model: str = INSTANCE_STORE, size: int = 64 * MIB, read_only: int = 0
    ) -> Path:
        """Add an empty disk, and return its file."""
        name = f"nvme{number}n1"
        for attribute, value in {
            "device/model": model,
            "dev": f"259:{number * 10}",
            "ro": str(read_only),
            "size": str(size // 512),
        }.items():
            self.write(f"sys/block/{name}/{attribute}", f"{value}\n")
        (self.root / f"sys/block/{name}/holders").mkdir()
        file = self.root / "dev" / name
        file.touch()
        os.truncate(file, size)
        return file

    def array(self, *numbers: int, size: int = 64 * MIB) -> Path:
        """Prepare what the kernel makes when disks are joined, and return the file of the joined disk."""
        for number in numbers:
            (self.root / f"sys/block/md_spill/md/dev-nvme{number}n1").mkdir(parents=True)
        file = self.root / "dev/md_spill"
        file.touch()
        os.truncate(file, size)
        return file

    def md(self, name: str) -> str:
        return (self.root / "sys/block/md_spill/md" / name).read_text().strip()

    def run(self, shell: str = "dash") -> Done:
        argv = [SHELLS[shell], *(["sh"] if shell == "busybox" else []), str(SCRIPT)]
        before = len(calls(self.programs, "mount"))
        done = subprocess.run(
            argv,
            env={"PATH": f"{self.programs}:{PATH}", "MOUNT_SPILL_ROOT": str(self.root)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        notices = self.root / "run/dask/spill-notices"
        return Done(
            status=done.returncode,
            output=done.stdout + done.stderr,
            mounted=[
                Path(call.split()[-2]).name
                for call in calls(self.programs, "mount")[before:]
                if call.endswith(DISK)
            ],
            notices=notices.read_text() if notices.exists() else "",
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "root")


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def signature(file: Path) -> str:
    argv = ["wipefs", "--noheadings", "--output", "TYPE,LABEL", str(file)]
    text = subprocess.run(argv, env={"PATH": PATH}, capture_output=True, text=True, check=True).stdout
    return " ".join(text.split())


def made(file: Path, *command: str) -> None:
    subprocess.run([*command, str(file)], env={"PATH": PATH}, check=True, capture_output=True, input=b"yes\n")


@pytest.mark.parametrize("shell", SHELLS)
def test_one_empty_disk_gets_a_file_system(machine: Machine, shell: str) -> None:
    disk = machine.disk(1)
    done = machine.run(shell)
    assert (done.status, done.mounted, done.notices) == (0, ["nvme1n1"], "")
    assert signature(disk) == "ext4 dask-spill"
    assert (
        "has_journal"
        not in subprocess.run(
            ["dumpe2fs", "-h", disk], env={"PATH": PATH}, capture_output=True, text=True, check=True
        ).stdout
    )
    options = calls(machine.programs, "mount")[0].split()
    assert options[options.index("-o") + 1].split(",")[:3] == ["nodev", "nosuid", "noatime"]
    assert (machine.root / "var/lib/dask/spill").stat().st_mode & 0o7777 == 0o1777


def test_after_a_reboot_our_file_system_is_made_again(machine: Machine) -> None:
    """What is on it has no use, and after a crash it can't be trusted."""
    disk = machine.disk(1)
    machine.run()
    first = digest(disk)
    done = machine.run()
    assert done.mounted == ["nvme1n1"]
    assert digest(disk) != first  # it has another UUID
    assert signature(disk) == "ext4 dask-spill"


@pytest.mark.parametrize("shell", SHELLS)
def test_several_disks_are_joined_in_equal_parts_inside_a_margin(machine: Machine, shell: str) -> None:
    machine.disk(1)
    machine.disk(2, size=96 * MIB)
    joined = machine.array(1, 2)
    done = machine.run(shell)
    assert (done.status, done.mounted, done.notices) == (0, ["md_spill"], "")
    assert signature(joined) == "ext4 dask-spill"
    assert [machine.md(name) for name in ("level", "raid_disks", "array_state")] == ["raid0", "2", "active"]
    assert [machine.md(f"dev-nvme{n}n1/slot") for n in (1, 2)] == ["0", "1"]
    assert {machine.md(f"dev-nvme{n}n1/offset") for n in (1, 2)} == {str(MIB // 512)}
    assert {machine.md(f"dev-nvme{n}n1/size") for n in (1, 2)} == {str((64 - 2) * MIB // 1024)}


def test_a_disk_of_ours_that_is_joined_later_loses_its_signature(machine: Machine) -> None:
    """Else it would look like ours after the next reboot, with somebody's data behind."""
    disk = machine.disk(1)
    machine.run()
    machine.disk(2)
    machine.array(1, 2)
    assert machine.run().mounted == ["md_spill"]
    assert signature(disk) == ""


def test_disks_that_the_kernel_does_not_join_are_used_as_one(machine: Machine) -> None:
    machine.disk(1)
    machine.disk(2)  # without an array, sysfs has nothing to write to
    done = machine.run()
    assert (done.status, done.mounted) == (0, ["nvme1n1"])
    assert "can't be joined" in done.notices


def test_without_an_instance_store_nothing_happens(machine: Machine) -> None:
    root = machine.disk(0, model=EBS)
    before = digest(root)
    done = machine.run()
    assert (done.status, done.mounted, done.notices, digest(root)) == (0, [], "", before)
    assert calls(machine.programs, "modprobe") == []


def test_a_second_start_in_the_same_boot_changes_nothing(machine: Machine) -> None:
    disk = machine.disk(1)
    machine.run()
    before = digest(disk)
    machine.write("proc/self/mountinfo", f"30 22 259:10 / {DISK} rw - ext4 /dev/nvme1n1 rw\n")
    done = machine.run()
    assert (done.status, done.mounted, digest(disk)) == (0, [], before)


def partitioned(machine: Machine, disk: Path) -> None:
    machine.write(f"sys/block/{disk.name}/{disk.name}p1/partition", "1\n")


def partition_table(machine: Machine, disk: Path) -> None:
    """Without a partition, so only the table tells."""
    del machine
    subprocess.run(["sfdisk", "-q", disk], env={"PATH": PATH}, input=b"label: gpt\n", check=True)


def file_system(machine: Machine, disk: Path) -> None:
    del machine
    made(disk, "mke2fs", "-q", "-t", "ext4", "-L", "data")


def file_system_without_label(machine: Machine, disk: Path) -> None:
    del machine
    made(disk, "mke2fs", "-q", "-t", "ext4")


def label_like_ours(machine: Machine, disk: Path) -> None:
    del machine
    made(disk, "mke2fs", "-q", "-t", "ext4", "-L", "dask-spill x")


def other_type_with_our_label(machine: Machine, disk: Path) -> None:
    del machine
    made(disk, "mke2fs", "-q", "-t", "ext2", "-L", "dask-spill")


def swap_space(machine: Machine, disk: Path) -> None:
    del machine
    made(disk, "mkswap")


def swap_in_use(machine: Machine, disk: Path) -> None:
    machine.write("proc/swaps", f"Filename Type Size Used Priority\n/dev/{disk.name} partition 1 0 -2\n")


def lvm_member(machine: Machine, disk: Path) -> None:
    """The label of a physical volume, as libblkid looks for it: LABELONE in sector 1, with its CRC."""
    del machine
    sector = bytearray(512)
    sector[:8] = b"LABELONE"
    sector[8:16] = (1).to_bytes(8, "little")
    sector[20:24] = (32).to_bytes(4, "little")
    sector[24:32] = b"LVM2 001"
    sector[32:64] = b"0123456789abcdef0123456789abcdef"
    sector[16:20] = lvm_crc(bytes(sector[20:])).to_bytes(4, "little")
    with disk.open("r+b") as file:
        file.seek(512)
        file.write(sector)


def lvm_crc(data: bytes) -> int:
    crc = 0xF597A6CF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0xEDB88320 if crc & 1 else 0)
    return crc


def raid_member(machine: Machine, disk: Path) -> None:
    """The superblock of somebody's md array, format 1.2."""
    del machine
    superblock = bytearray(256)
    superblock[0:4] = (0xA92B4EFC).to_bytes(4, "little")
    superblock[4:8] = (1).to_bytes(4, "little")
    superblock[16:32] = b"0123456789abcdef"
    superblock[32:64] = b"any:dask-spill".ljust(32, b"\0")
    superblock[128:136] = (8).to_bytes(8, "little")  # data offset, not read
    superblock[144:152] = (8).to_bytes(8, "little")  # where it lies, in sectors
    total = sum(int.from_bytes(superblock[at : at + 4], "little") for at in range(0, 256, 4))
    superblock[216:220] = ((total & 0xFFFFFFFF) + (total >> 32) & 0xFFFFFFFF).to_bytes(4, "little")
    with disk.open("r+b") as file:
        file.seek(4096)
        file.write(superblock)


def held(machine: Machine, disk: Path) -> None:
    """By device mapper or md, without a signature."""
    machine.write(f"sys/block/{disk.name}/holders/dm-0/x", "")


def mounted(machine: Machine, disk: Path) -> None:
    """Even if it is ours: then a person has mounted it there."""
    made(disk, "mke2fs", "-q", "-t", "ext4", "-L", "dask-spill")
    machine.write("proc/self/mountinfo", "31 22 259:10 / /data rw - ext4 /dev/nvme1n1 rw\n")


def unreadable(machine: Machine, disk: Path) -> None:
    """wipefs fails, as on a disk that does not answer."""
    fake(machine.programs, "wipefs", "echo 'wipefs: error: Input/output error' >&2; exit 1")


def no_wipefs(machine: Machine, disk: Path) -> None:
    fake(machine.programs, "wipefs", "exit 127")


def no_mounts(machine: Machine, disk: Path) -> None:
    (machine.root / "proc/self/mountinfo").unlink()


def read_only(machine: Machine, disk: Path) -> None:
    machine.write(f"sys/block/{disk.name}/ro", "1\n")


def undescribed(machine: Machine, disk: Path) -> None:
    (machine.root / f"sys/block/{disk.name}/ro").unlink()


def ebs(machine: Machine, disk: Path) -> None:
    machine.write(f"sys/block/{disk.name}/device/model", EBS + "\n")


def other_model(machine: Machine, disk: Path) -> None:
    machine.write(f"sys/block/{disk.name}/device/model", "QEMU NVMe Ctrl\n")


def longer_model(machine: Machine, disk: Path) -> None:
    machine.write(f"sys/block/{disk.name}/device/model", "Amazon EC2 NVMe Instance Storage 2\n")


def no_model(machine: Machine, disk: Path) -> None:
    machine.write(f"sys/block/{disk.name}/device/model", "")


def root_disk(machine: Machine, disk: Path) -> None:
    """A root file system on the whole disk."""
    machine.write("proc/self/mountinfo", "22 1 259:10 / / rw - ext4 /dev/root rw\n")


LEFT = (
    partitioned, partition_table, file_system, file_system_without_label, label_like_ours,
    other_type_with_our_label, swap_space, swap_in_use, lvm_member, raid_member, held, mounted, unreadable,
    no_wipefs, no_mounts, read_only, undescribed, ebs, other_model, longer_model, no_model, root_disk,
)  # fmt: skip
QUIETLY = {ebs, other_model, longer_model, no_model}


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another"])
@pytest.mark.parametrize("what", LEFT, ids=lambda what: what.__name__)
def test_a_disk_is_left_as_it_is(machine: Machine, what: object, beside: bool) -> None:
    assert callable(what)
    disk = machine.disk(1)
    what(machine, disk)
    before = digest(disk)
    if beside:
        machine.disk(2)
        machine.array(1, 2)
    done = machine.run()
    assert digest(disk) == before
    assert "nvme1n1" not in done.mounted
    usable = beside and what not in (unreadable, no_wipefs, no_mounts)
    assert done.mounted == (["nvme2n1"] if usable else [])
    assert (f"{disk.name} is left as it is: " in done.output) == (what not in QUIETLY)
    assert not (machine.root / "sys/block/md_spill/md/raid_disks").exists()


def test_the_second_name_of_a_multipath_disk_is_no_disk(machine: Machine) -> None:
    machine.write("sys/block/nvme1c1n1/device/model", INSTANCE_STORE + "\n")
    assert machine.run().output.count("nvme1c1n1") == 0


@pytest.mark.parametrize("broken", ["mke2fs", "mount"])
def test_an_error_is_reported_and_leaves_the_root_disk_for_spilling(machine: Machine, broken: str) -> None:
    machine.disk(1)
    fake(machine.programs, broken, "exit 1")
    done = machine.run()
    assert done.status == 1
    assert "data is spilled to the root file system" in done.notices
    assert (machine.root / "var/lib/dask/spill").is_dir()


def test_a_problem_of_an_earlier_start_is_forgotten(machine: Machine) -> None:
    machine.disk(1)
    fake(machine.programs, "mount", "exit 1")
    machine.run()
    fake(machine.programs, "mount", MOUNT)
    assert machine.run().notices == ""
