"""CPU time that a VM used on this host, and CPU steal: time in which the host did not run the VM.

The values are read from /proc; they are 0 or missing without /proc, or after the process has ended.
"""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLoad:
    """Totals up to one moment, in seconds."""

    waited: Mapping[int, float] = field(default_factory=dict)
    """Thread of the VM's process -> how long it has waited for a CPU."""
    steal: float = 0.0
    """How long this host itself was not run by its own host, per CPU."""
    pressure: float = 0.0
    """How long at least one process here has waited for a CPU (pressure stall information)."""


def load(pid: int) -> HostLoad:
    """Return the totals for the VM whose process is `pid`; 0 stands for a machine elsewhere."""
    return HostLoad(waited=cpu_waits(pid) if pid else {}, steal=_steal(), pressure=_pressure())


def cpu_steal(before: HostLoad, after: HostLoad) -> float:
    """Return for how many seconds the VM did not run between two moments, because the host was busy.

    This is the longest wait of a thread of the VM, plus the time in which this host itself was not run.
    """
    return longest_wait(before.waited, after.waited) + max(0.0, after.steal - before.steal)


def cpu_waits(pid: int) -> dict[int, float]:
    """Return for each thread of a process how long it has waited for a CPU, in seconds.

    Linux, Documentation/scheduler/sched-stats.rst. Empty if the process has ended.
    """
    found = {}
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError, IndexError, ValueError):
            found[int(thread.name)] = int((thread / "schedstat").read_text().split()[1]) / 1e9
    return found


def longest_wait(before: Mapping[int, float], after: Mapping[int, float]) -> float:
    """Return the longest time that one thread has waited in between, in seconds."""
    return max((after[thread] - before.get(thread, 0.0) for thread in after), default=0.0)


def cpu_seconds(pid: int) -> float | None:
    """Return the CPU seconds that a process and its threads have used; None if it has ended.

    proc_pid_stat(5): utime and stime follow the command's name, which can contain any character.
    """
    with suppress(OSError, IndexError, ValueError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return None


def _steal() -> float:
    # proc_stat(5): "cpu user nice system idle iowait irq softirq steal", in ticks of all CPUs.
    with suppress(OSError, IndexError, ValueError):
        ticks = int(Path("/proc/stat").read_text().split("\n", 1)[0].split()[8])
        return ticks / os.sysconf("SC_CLK_TCK") / (os.cpu_count() or 1)
    return 0.0


def _pressure() -> float:
    # Linux, Documentation/accounting/psi.rst: total is in microseconds.
    with suppress(OSError):
        found = re.search(r"^some .*total=(\d+)", Path("/proc/pressure/cpu").read_text())
        return int(found[1]) / 1e6 if found else 0.0
    return 0.0
