"""protect-system outside a VM: real shells, a folder of cgroups, and a systemctl that records its calls."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path, PurePosixPath

import pytest

from ami_builder.build import guest
from tests.fake_programs import calls, fake
from tests.sample_image import image

MIB = 1 << 20
LOGIN = 16 * MIB
SHELLS = [found for name in ("dash", "busybox") if (found := shutil.which(name))]


def unit(root: Path, name: str, **stat: int) -> None:
    folder = root / "sys/fs/cgroup/system.slice" / name
    folder.mkdir(parents=True)
    (folder / "memory.stat").write_text("".join(f"{key} {value}\n" for key, value in stat.items()))


def protect(root: Path, shell: str = SHELLS[0], after: tuple[str, ...] = ()) -> tuple[list[str], str]:
    """Return the calls of systemctl, and what is printed."""
    programs = root / "programs"
    fake(programs, "systemctl", ":")
    script = root / "protect-system"
    script.write_bytes(
        guest.guest(image(after=after))[PurePosixPath("/usr/local/sbin/protect-system")].content
    )
    argv = [shell, *(["sh"] if shell.endswith("busybox") else []), str(script)]
    env = {"PATH": f"{programs}:{os.environ['PATH']}", "PROTECT_SYSTEM_ROOT": str(root)}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return calls(programs, "systemctl"), done.stdout


@pytest.mark.parametrize("shell", SHELLS, ids=os.path.basename)
def test_units_keep_their_own_memory_and_a_part_of_their_programs(tmp_path: Path, shell: str) -> None:
    unit(tmp_path, "docker.service", anon=40 * MIB, file=90 * MIB, kernel=8 * MIB, file_mapped=24 * MIB,
         slab_reclaimable=2 * MIB)  # fmt: skip
    unit(tmp_path, "cron.service", anon=MIB, kernel=MIB, file_mapped=MIB)
    found, printed = protect(tmp_path, shell)
    assert found == [
        f"set-property --runtime docker.service MemoryMin={52 * MIB}",
        f"set-property --runtime system.slice MemoryMin={52 * MIB}",
    ]
    assert (tmp_path / "run/dask/protected").read_text() == f"{6 * MIB}\n"
    assert "52 MiB are kept for the system, 6 MiB of which count as available" in printed


def test_a_login_has_room_for_programs_that_are_not_in_memory_yet(tmp_path: Path) -> None:
    unit(tmp_path, "ssh.service", anon=2 * MIB, kernel=MIB, file_mapped=4 * MIB)
    found, _ = protect(tmp_path)
    assert found[0] == f"set-property --runtime ssh.service MemoryMin={4 * MIB + LOGIN}"
    assert (tmp_path / "run/dask/protected").read_text() == f"{MIB + LOGIN}\n"


def test_agents_are_protected_too(tmp_path: Path) -> None:
    unit(tmp_path, "agent.service", anon=10 * MIB, kernel=0, file_mapped=0)
    found, _ = protect(tmp_path, after=("agent.service", "absent.service"))
    assert found[0] == f"set-property --runtime agent.service MemoryMin={10 * MIB}"
    assert len(found) == 2


@pytest.mark.parametrize(
    ("total_kb", "before", "after"),
    [(985088, 45056, 15392), (985088, 4000, 4000), (8388608, 67584, 67584)],
    ids=["1 GiB", "low already", "8 GiB"],
)
def test_the_kernel_keeps_less_free_on_a_small_machine(
    tmp_path: Path, total_kb: int, before: int, after: int
) -> None:
    watermark = tmp_path / "proc/sys/vm/min_free_kbytes"
    watermark.parent.mkdir(parents=True)
    watermark.write_text(f"{before}\n")
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {total_kb} kB\nMemFree: 1 kB\n")
    protect(tmp_path)
    assert watermark.read_text() == f"{after}\n"
