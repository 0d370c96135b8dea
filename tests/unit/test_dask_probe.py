"""What the probe reads of cgroups, from folders that stand for /sys/fs/cgroup."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ami_builder.core.units import GIB
from ami_builder.doctor import probe


def machine(monkeypatch: pytest.MonkeyPatch, own: str, mounts: str) -> None:
    said = {"/proc/self/cgroup": own, "/proc/self/mountinfo": mounts}
    real = probe.text
    monkeypatch.setattr(probe, "text", lambda path: said[path] if path in said else real(path))


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"memory.{name.replace('__', '.')}").write_text(f"{content}\n")


def test_v2_has_every_level_above_that_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = "anon 500\nfile 9000\nshmem 40\nkernel 30\nslab_reclaimable 20\nsock 1"
    write(tmp_path / "dask.slice", max=3 * GIB, high=2 * GIB, swap__max=0, stat=stat)
    write(tmp_path / "dask.slice/worker", max="max")
    mounts = f"1 2 0:3 / {tmp_path} rw - cgroup2 cgroup2 rw"
    machine(monkeypatch, "0::/dask.slice/worker", mounts)
    (level,) = probe.levels()
    assert (level["path"], level["limit"], level["swap"]) == (str(tmp_path / "dask.slice"), 2 * GIB, 0)
    assert level["held"] == 500 + 40 + 10 + 1


def test_v1_in_a_container_that_is_told_the_host_s_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = f"cache 0\nhierarchical_memory_limit {GIB}\ntotal_rss 500\ntotal_shmem 40"
    write(tmp_path, limit_in_bytes=2 * GIB, memsw__limit_in_bytes=3 * GIB, stat=stat)
    mounts = f"1 2 0:3 /docker/abc {tmp_path} ro - cgroup cgroup rw,memory"
    machine(monkeypatch, "4:memory:/docker/abc\n0::/", mounts)
    (level,) = probe.levels()
    assert (level["path"], level["limit"], level["swap"]) == (str(tmp_path), GIB, GIB)
    assert level["held"] == 540


def test_v1_without_a_limit_has_no_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = 9223372036854771712
    write(tmp_path, limit_in_bytes=none, stat=f"hierarchical_memory_limit {none}")
    machine(monkeypatch, "4:memory:/", f"1 2 0:3 / {tmp_path} ro - cgroup cgroup rw,memory")
    assert probe.levels() == []


def test_the_innermost_and_last_mount_is_the_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = "1 0 8:1 / / rw - ext4 a rw\n2 1 0:3 / /tmp rw - tmpfs b rw\n3 1 0:4 / /tmpx rw - xfs c rw"
    machine(monkeypatch, "", mounts)
    assert [probe.file_system(f) for f in ("/tmp/spill", "/tmpx", "/var")] == ["tmpfs", "xfs", "ext4"]


def test_the_growth_of_a_machine_is_what_the_limit_has_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    assert probe.growth(str(path)) is None
    record = {"limit_at_start": 900, "limit": 880, "reserve": 32, "growth": 84, "excess": 52}
    path.write_text(json.dumps({**record, "grown": [{"cgroup": "a.service", "bytes": 61}]}))
    assert probe.growth(str(path)) == {"reserve": 32, "growth": 84, "excess": 32, "by": {"a.service": 61}}
    os.utime(path, (0, 0))
    assert probe.growth(str(path)) is None, "nothing has compared for a long time"
    path.write_text("{")
    assert probe.growth(str(path)) is None
