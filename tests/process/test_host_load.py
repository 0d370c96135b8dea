"""What this host takes from a VM, read from a /proc of its own and from the real one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from ami_builder.system import host_load
from ami_builder.system.host_load import HostLoad

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
CPUS = os.cpu_count() or 1
PRESSURE = (
    "some avg10=12.00 avg60=3.10 avg300=0.80 total=1500000\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=9\n"
)


class Proc:
    """A folder that `host` takes for /proc."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, name: str, text: str) -> None:
        file = self.root / "proc" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def stat(self, steal: int) -> None:
        self.write("stat", f"cpu  10 20 30 40 50 60 70 {steal} 90 100\ncpu0 1 2 3 4 5 6 7 8 9 10\n")


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Proc:
    monkeypatch.setattr(host_load, "Path", lambda name: tmp_path / str(name).lstrip("/"))
    return Proc(tmp_path)


def test_each_thread_s_wait_for_a_processor_is_read(proc: Proc) -> None:
    proc.write("4711/task/4711/schedstat", "123456789 1500000000 42\n")
    proc.write("4711/task/4712/schedstat", "1 250000000 3\n")
    proc.write("4711/task/4713/schedstat", "0 0 0\n")
    proc.write("4711/task/4714/schedstat", "\n")  # it has ended meanwhile
    (proc.root / "proc/4711/task/4715").mkdir()
    assert host_load.cpu_waits(4711) == {4711: 1.5, 4712: 0.25, 4713: 0.0}
    assert host_load.cpu_waits(4712) == {}


def test_the_thread_that_waited_longest_counts() -> None:
    assert host_load.longest_wait({1: 1.0, 2: 5.0}, {1: 1.5, 2: 7.0, 3: 1.0}) == 2.0
    assert host_load.longest_wait({1: 1.0}, {1: 1.0, 2: 3.0}) == 3.0, (
        "a new thread has waited since it was there"
    )
    assert host_load.longest_wait({1: 1.0}, {}) == 0.0


def test_the_load_of_a_vm(proc: Proc) -> None:
    proc.write("4711/task/4711/schedstat", "0 1500000000 42\n")
    proc.write("pressure/cpu", PRESSURE)
    proc.stat(steal=3 * TICKS * CPUS)
    assert host_load.load(4711) == HostLoad(waited={4711: 1.5}, steal=3.0, pressure=1.5)


def test_a_vm_elsewhere_has_no_process_here(proc: Proc) -> None:
    proc.write("0/task/1/schedstat", "0 1500000000 42\n")
    proc.stat(steal=TICKS * CPUS)
    assert host_load.load(0) == HostLoad(waited={}, steal=1.0)


@pytest.mark.parametrize("text", ["", "cpu\n", "cpu 1 2 3 4 5 6 7\n", "cpu a b c d e f g h i\n"])
def test_where_nothing_can_be_read_nothing_is_known(proc: Proc, text: str) -> None:
    assert host_load.load(4711) == HostLoad()
    proc.write("stat", text)
    proc.write("pressure/cpu", "what is this\n")
    assert host_load.load(4711) == HostLoad()
    assert host_load.cpu_seconds(4711) is None


def test_what_this_host_was_denied_itself_is_denied_to_the_vm() -> None:
    before = HostLoad(waited={1: 1.0, 2: 2.0}, steal=10.0, pressure=5.0)
    after = HostLoad(waited={1: 1.5, 2: 4.0}, steal=10.25, pressure=500.0)
    assert host_load.cpu_steal(before, after) == 2.25
    assert host_load.cpu_steal(after, after) == 0.0
    # Linux may report a little less steal than before.
    assert host_load.cpu_steal(HostLoad(steal=10.0), HostLoad(steal=9.0)) == 0.0


@pytest.mark.parametrize("name", ["qemu-system-x86", "a ) 1 2 (b"])
def test_cpu_seconds_are_user_and_system_time(proc: Proc, name: str) -> None:
    rest = f"S 1 1 1 0 -1 4194560 10 0 0 0 {5 * TICKS} {2 * TICKS} 77 88 20 0 4 0 100"
    proc.write("4711/stat", f"4711 ({name}) {rest}\n")
    assert host_load.cpu_seconds(4711) == 7.0


@pytest.mark.parametrize("text", ["", "4711 (qemu) S 1", "4711 (qemu) " + "x " * 20])
def test_cpu_seconds_of_what_has_ended_are_unknown(proc: Proc, text: str) -> None:
    proc.write("4711/stat", text)
    assert host_load.cpu_seconds(4711) is None


def test_this_kernel_tells_all_that(tmp_path: Path) -> None:
    before = host_load.cpu_waits(os.getpid())
    assert threading.get_native_id() in before
    used = host_load.cpu_seconds(os.getpid())
    assert used is not None
    total = sum(os.times()[:2])
    assert used == pytest.approx(total, abs=1)


@pytest.fixture
def busy() -> Iterator[int]:
    """Run a process that takes all of a processor, with two threads on it."""
    program = """
import os, threading
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
threading.Thread(target=lambda: all(iter(lambda: 1, 0)), daemon=True).start()
print(flush=True)
all(iter(lambda: 1, 0))
"""
    argv = [sys.executable, "-c", program]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


def test_a_busy_process_uses_cpu_seconds_and_an_ended_one_is_not_there(busy: int) -> None:
    first = host_load.cpu_seconds(busy)
    assert first is not None
    deadline = time.monotonic() + 30
    while (now := host_load.cpu_seconds(busy)) is not None and now < first + 0.2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(host_load.load(busy).waited) == 2
