"""How fast Dask spills, by where it spills to: `python -m tests.benchmarks spill`

One VM with bounded disks: the root disk, and three NVMe disks of which two are joined as instance store. A
worker of 512 MiB makes 1 GiB and reads it again, in each place in turn. All disks are files of one host and
the bounds are ours: the ratios show that the data goes where it should, and what a bound costs. They say
nothing about EC2's disks.
"""

from __future__ import annotations

import json
import statistics
from typing import TYPE_CHECKING, Any

from ami_builder.qemu.extra_disks import ExtraDisk
from tests.vm.conftest import ROOT, Booted, booted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ami_builder.config.schema import Image

MIB = 1 << 20
ROOT_BOUND, NVME_BOUND = 12 * MIB, 36 * MIB
"""Bytes per second. The root disk has a tenth of gp3's 125 MiB/s, because an emulated Dask is slow too."""
BLOCKS = 64
MEMORY = 900 * MIB
"""Of the container: with more, the kernel's cache would take most of what is spilled."""
SPILL = "/var/lib/dask/spill"
LAYER, FOLDER, ONE, JOINED = (
    "the container's layer",
    "a folder of the root disk",
    "one NVMe disk",
    "two, joined",
)
FOLDERS = {LAYER: "", FOLDER: "/var/lib/dask/folder", ONE: "/var/lib/dask/one", JOINED: SPILL}
_PREPARE = f"""
until dask-health; do sleep 1; done
systemctl stop dask dask-health.timer
mkdir -p {FOLDERS[FOLDER]} {FOLDERS[ONE]}
disk=$(grep -l '^vol3 *$' /sys/block/nvme*/device/serial | cut -d / -f 4)
mke2fs -q -t ext4 -m 0 -O ^has_journal -E nodiscard,lazy_itable_init=1 /dev/$disk
mount -o nodev,nosuid,noatime,noinit_itable /dev/$disk {FOLDERS[ONE]}
chmod 1777 {FOLDERS[FOLDER]} {FOLDERS[ONE]}
findmnt {SPILL}
"""


def measure(
    image: Image, disk: Path, directory: Path, turns: int = 1
) -> Mapping[str, Sequence[dict[str, Any]]]:
    """Return what each place measured, once a turn. The order of the places is reversed each time."""
    third = ExtraDisk(size=4096 * MIB, instance_store=False, serial="vol3")
    disks = (ExtraDisk(size=2048 * MIB), ExtraDisk(size=2048 * MIB), third)
    found: dict[str, list[dict[str, Any]]] = {place: [] for place in FOLDERS}
    with booted(image, disk, directory, disks=disks) as machine:
        machine.root(_PREPARE)
        machine.session.run("cat >/run/work.py", sudo=True, stdin=(ROOT / "tests/spill_work.py").read_text())
        for drive in ("root", "disk1", "disk2", "disk3"):
            _bound(machine, drive, ROOT_BOUND if drive == "root" else NVME_BOUND)
        for turn in range(turns):
            for place in list(FOLDERS)[:: -1 if turn % 2 else 1]:
                found[place].append(_work(machine, image, FOLDERS[place]))
    return found


def _bound(machine: Booted, drive: str, rate: int) -> None:
    none = dict.fromkeys(("bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
    machine.machine.execute("block_set_io_throttle", {"device": drive, "bps": rate, **none})


def _work(machine: Booted, image: Image, folder: str) -> dict[str, Any]:
    mounts = "--volume /run/work.py:/work.py:ro"
    inside = "/tmp"
    if folder:
        mounts, inside = f"{mounts} --volume {folder}:/spill", "/spill"
    run = f"docker run --rm --network host --memory {MEMORY} {mounts} {image.container.reference}"
    run = f"{run} python /work.py {inside} {BLOCKS}"
    # The cache of the machine would answer what the disk should.
    text = machine.root(f"sync; echo 3 >/proc/sys/vm/drop_caches; {run}")
    result: dict[str, Any] = json.loads(text.splitlines()[-1])
    assert result["whole"]
    return result


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[str, float, float, float, float]]:
    """Return place, seconds of writing, of reading, of CPU, and the whole time's ratio to the first place."""

    def median(place: str, *names: str) -> float:
        return statistics.median(float(sum(one[name] for name in names)) for one in found[place])

    first = next(iter(found))
    whole = median(first, "write", "read")
    return [
        (place, median(place, "write"), median(place, "read"), median(place, "cpu"),
         median(place, "write", "read") / whole)
        for place in found
    ]  # fmt: skip
