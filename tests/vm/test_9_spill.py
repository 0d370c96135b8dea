"""Instance-store disks of a real VM: found, joined, used by Dask and others' containers; the rest is left."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ami_builder.qemu.extra_disks import ExtraDisk
from ami_builder.qemu.machine import boot_again
from tests.vm.conftest import GIB, ROOT, Booted, booted, red

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ami_builder.config.schema import Image

pytestmark = pytest.mark.whole

SPILL = "/var/lib/dask/spill"
MIB = 1 << 20


@pytest.fixture
def foreign(tmp_path: Path) -> Iterator[list[ExtraDisk]]:
    """Disks that must be left alone: with a file system, with partitions, and an empty EBS volume."""
    files = [tmp_path / name for name in ("fs", "parts", "ebs")]
    for path in files:
        with path.open("wb") as file:
            file.truncate(256 * MIB)
    programs = {"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-L", "mine", files[0]], env=programs, check=True)
    subprocess.run(["sfdisk", "-q", files[1]], env=programs, input=b"label: gpt\n,100M\n", check=True)
    disks = [ExtraDisk(path=path, instance_store=path.name != "ebs") for path in files]
    before = digests(disks)
    yield disks
    assert digests(disks) == before


def digests(disks: list[ExtraDisk]) -> list[str]:
    return [hashlib.sha256(disk.path.read_bytes()).hexdigest() for disk in disks if disk.path is not None]


def facts(machine: Booted) -> dict[str, str]:
    """Return where spilled data goes, and the bound that the image's own Dask has, once that answers."""
    machine.root("until dask-health; do sleep 1; done")
    names = {"source": "SOURCE", "type": "FSTYPE", "options": "OPTIONS"}
    found = {
        name: machine.root(f"findmnt -nr -o {column} {SPILL} || :").strip() for name, column in names.items()
    }
    containers = "$(docker ps -q --filter label=com.docker.compose.project=dask)"
    env = f"docker inspect -f '{{{{json .Config.Env}}}}' {containers}"
    bounds = [one for one in json.loads(machine.root(env)) if "MAX_SPILL=" in one]
    found["bound"] = bounds[0].partition("=")[2]
    found["scratch"] = machine.root(f"ls {SPILL} {SPILL}/service").strip()
    found["journal"] = machine.root("journalctl -q -b -o cat -u mount-spill")
    found["failed"] = machine.root(
        "systemctl --failed --plain --no-legend; cat /run/dask/spill-notices || :", check=False
    )
    return found


def others_container(machine: Booted, image: Image) -> dict[str, Any]:
    """Return what a worker spills that somebody starts in a container with the documented mount."""
    machine.session.run("cat >/run/work.py", sudo=True, stdin=(ROOT / "tests/spill_work.py").read_text())
    mounts = f"--volume {SPILL}:/spill --volume /run/work.py:/work.py:ro"
    command = f"docker run --rm --network host {mounts} {image.container.reference} python /work.py /spill 48"
    found: dict[str, Any] = json.loads(machine.root(command).splitlines()[-1])
    return found


@pytest.mark.parametrize("count", [0, 1, 2])
def test_dask_spills_to_instance_store(
    built: Mapping[str, Any], image: Image, tmp_path: Path, foreign: list[ExtraDisk], count: int
) -> None:
    disks = [*foreign, *(ExtraDisk(size=GIB) for _ in range(count))]
    disk = Path(built["artifact"]["location"])

    def see(attempt: int) -> None:
        folder = tmp_path / str(attempt)
        folder.mkdir()
        with booted(image, disk, folder, disks=disks) as machine:
            spills(machine, image, count)
            if count == 2:
                machine.root(f"touch {SPILL}/old; sync")
                machine.machine.expect_reboot()
                machine.session.reboot(900, machine.machine.check_alive, machine.machine.start_again)
                assert "old" not in spills(machine, image, count)["scratch"]
            if count == 1:
                assert red(machine.check("used")) == {}
                machine.root(f"systemctl stop dask; umount {SPILL}; ln -sf /bin/false /usr/local/sbin/mke2fs")
                machine.root("systemctl restart mount-spill; systemctl restart dask")
                assert "no file system" in red(machine.check("broken"))["service: instance store is used"]
                assert "no file system" in machine.root("dask-health; cat /run/dask/health", check=False)

    boot_again(see, lambda: True)


def spills(machine: Booted, image: Image, count: int) -> dict[str, str]:
    found = facts(machine)
    assert found["failed"] == ""
    source = found["source"].rstrip("n0123456789") if count == 1 else found["source"]
    assert source == ("", "/dev/nvme", "/dev/md_spill")[count]
    if count:
        assert found["type"] == "ext4"
        assert {"nosuid", "nodev", "noatime"} <= set(found["options"].split(","))
        # 80 % of nearly all of it
        assert 0.75 * count * GIB < int(found["bound"]) < 0.8 * count * GIB
    assert found["journal"].count("is left as it is: ") == 2
    assert "contains ext4 mine" in found["journal"]
    assert "it has partitions" in found["journal"]
    assert "dask-scratch-space" in found["scratch"]
    work = others_container(machine, image)
    assert work["whole"]
    assert work["spilled"] > 256 * MIB
    # Less than the whole is on the disk when the space is asked for: ext4 allocates late.
    assert work["used"] > 0
    return found
