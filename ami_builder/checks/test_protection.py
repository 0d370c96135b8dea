"""When Dask has taken all that it can, the system keeps its programs in memory, and what ends is Dask's."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping

import pytest

from ami_builder.checks.machine_state import ContainerState, MachineState, exact_size
from ami_builder.core.units import MIB

ANSWERING = (
    ("ssh.service", "sshd.service"),
    ("systemd-journald.service",),
    ("systemd-networkd.service", "NetworkManager.service"),
    ("docker.service",),
    ("containerd.service",),
)
"""Units that must answer; of each group, those that run."""
GUARD_MS = 1000
"""What the kernel must keep in memory: all that was used within so many milliseconds."""

_LINE = re.compile(r"(?:\./(\S+?)/)?memory\.(min|stat):(?:(\w+) )?(\d+)")
_SCORE = re.compile(r"/proc/(\d+)/oom_score_adj:(-?\d+)")


def units(machine: MachineState) -> Mapping[str, Mapping[str, int]]:
    """Return for each service, and for the slice (''), `min` and what it uses by kind; bytes."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for line in machine.lines("protection"):
        if match := _LINE.fullmatch(line):
            unit, file, name, value = match.groups()
            found[unit or ""][name or file] = int(value)
    return found


def own(uses: Mapping[str, int]) -> int:
    """Return what a unit has that the kernel can't drop; bytes."""
    return uses.get("anon", 0) + uses.get("kernel", 0) - uses.get("slab_reclaimable", 0)


def test_the_system_keeps_its_programs_in_memory(machine: MachineState, note: Callable[[str], None]) -> None:
    """Else the kernel drops their pages when memory is short, and the machine reads them again and again."""
    found = units(machine)
    answering = [unit for group in ANSWERING for unit in group if unit in found]
    assert answering, "none of the units that must answer has a cgroup"
    # It was measured before the containers started, for which Docker needs more.
    short = [
        f"{unit} keeps {exact_size(found[unit].get('min', 0))}, and uses {exact_size(own(found[unit]))}"
        for unit in answering
        if found[unit].get("min", 0) < own(found[unit]) / 2
    ]
    assert not short, "; ".join(short)
    kept, everything = (
        sum(uses.get("min", 0) for unit, uses in found.items() if unit),
        found[""].get("min", 0),
    )
    assert everything >= kept, (
        f"system.slice keeps {exact_size(everything)}, and its units {exact_size(kept)}: a unit is protected"
        " by no more than its slice is"
    )
    mib = {unit: found[unit].get("min", 0) // MIB for unit in answering}
    note("kept: " + ", ".join(f"{unit.removesuffix('.service')} {size} MiB" for unit, size in mib.items()))


def test_the_kernel_does_not_let_the_machine_thrash(machine: MachineState) -> None:
    """Without its guard a machine whose memory is full stalls for minutes before anything is ended."""
    found = machine.text["min_ttl_ms"].strip()
    if not found:
        pytest.skip("this kernel has no multi-generational LRU, whose min_ttl_ms is the guard")
    assert int(found) >= GUARD_MS, f"/sys/kernel/mm/lru_gen/min_ttl_ms is {found}, not {GUARD_MS}"


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
