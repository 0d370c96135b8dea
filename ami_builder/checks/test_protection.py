"""When Dask has taken all that it can, the machine does not stall, and what ends is Dask's."""

import re

import pytest

from ami_builder.checks.machine_state import ContainerState, MachineState

GUARD_MS = 1000
"""What the kernel must keep in memory: all that was used within so many milliseconds."""
KEPT_FREE = 64
"""The kernel keeps at most this part of the memory free."""

_SCORE = re.compile(r"/proc/(\d+)/oom_score_adj:(-?\d+)")


def test_the_kernel_does_not_let_the_machine_thrash(machine: MachineState) -> None:
    """Without its guard a machine whose memory is full stalls for minutes before anything is ended."""
    found = machine.lines("lru_gen")
    if not found:
        pytest.skip("this kernel has no multi-generational LRU, whose min_ttl_ms is the guard")
    enabled, guard = found
    # Linux, Documentation/admin-guide/mm/multigen_lru.rst: 0x0001 is the main switch, and the guard needs it.
    assert int(enabled, 16) & 1, f"/sys/kernel/mm/lru_gen/enabled is {enabled}, so min_ttl_ms has no effect"
    assert int(guard) >= GUARD_MS, f"/sys/kernel/mm/lru_gen/min_ttl_ms is {guard}, not {GUARD_MS}"


def test_the_kernel_keeps_no_more_free_than_it_needs(machine: MachineState) -> None:
    """A small machine can't spare what the kernel keeps for huge pages, which no program can use."""
    now, *configured = machine.lines("min_free_kbytes")
    if configured:
        pytest.skip(f"sysctl.d sets it: {configured[-1]}")
    free, total = int(now), machine.meminfo["MemTotal"] // 1024
    # Not a number of kB: the kernel's own choice grows with the memory and with the NUMA nodes.
    most = total // KEPT_FREE
    assert free <= most, f"vm.min_free_kbytes is {free}, of {total} kB; expected {most} at most"


def test_dask_goes_before_the_system(machine: MachineState, container: ContainerState) -> None:
    """When all memory is used, the kernel ends the process with the highest score, whatever it belongs to."""
    own, _, everything = machine.text["oom_score_adj"].partition("all\n")
    dask = {pid: int(score) for pid, score in _SCORE.findall(own)}
    assert dask, f"container {container.name} has no process"
    others = [int(score) for pid, score in _SCORE.findall(everything) if pid not in dask]
    least, most = min(dask.values()), max(others, default=0)
    assert least > most, (
        f"a process of {container.name} has oom_score_adj {least}, and one of the system {most}"
    )
