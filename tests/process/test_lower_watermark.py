"""lower-watermark outside a VM: real shells, and a folder that it takes for /."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from ami_builder.system import resources

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = resources.packer_dir() / "guest/usr/local/sbin/lower-watermark"
SHELLS = [found for name in ("dash", "busybox") if (found := shutil.which(name))]


def _run(root: Path, shell: str, total_kb: int, before: int) -> tuple[str, str]:
    """Return the file's text after the program, and what it printed."""
    watermark = root / "proc/sys/vm/min_free_kbytes"
    watermark.parent.mkdir(parents=True)
    watermark.write_text(f"{before}\n")
    (root / "proc/meminfo").write_text(f"MemTotal: {total_kb} kB\nMemFree: 1 kB\n")
    argv = [shell, *(["sh"] if shell.endswith("busybox") else []), str(PROGRAM)]
    env = {"PATH": os.environ["PATH"], "LOWER_WATERMARK_ROOT": str(root)}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return watermark.read_text(), done.stdout


@pytest.mark.parametrize("shell", SHELLS, ids=os.path.basename)
@pytest.mark.parametrize(
    ("total_kb", "before", "after"),
    [(985088, 45056, 15392), (985088, 4000, 4000), (8388608, 67584, 67584)],
    ids=["1 GiB", "low already", "8 GiB"],
)
def test_only_a_small_machine_keeps_less_free(
    tmp_path: Path, shell: str, total_kb: int, before: int, after: int
) -> None:
    found, printed = _run(tmp_path, shell, total_kb, before)
    assert found == f"{after}\n"
    assert bool(printed) is (before != after)


@pytest.mark.parametrize("shell", SHELLS, ids=os.path.basename)
def test_a_value_that_somebody_has_chosen_stays(tmp_path: Path, shell: str) -> None:
    chosen = tmp_path / "etc/sysctl.d/90-ours.conf"
    chosen.parent.mkdir(parents=True)
    chosen.write_text("# ours\n-vm/min_free_kbytes = 65536\n")
    found, printed = _run(tmp_path, shell, 985088, 65536)
    assert found == "65536\n"
    assert "as sysctl.d says" in printed
