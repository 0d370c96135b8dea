"""How long an emulated machine was kept waiting by the machine that emulates it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def waited(pid: int) -> dict[int, float]:
    """Return for each thread of a process how long it has waited for a processor, in seconds.

    Linux, Documentation/scheduler/sched-stats.rst. Empty when the process has ended.
    """
    found = {}
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError, IndexError, ValueError):
            found[int(thread.name)] = int((thread / "schedstat").read_text().split()[1]) / 1e9
    return found


def starved(before: dict[int, float], after: dict[int, float]) -> float:
    """Return how long the thread that waited longest has waited in between, in seconds."""
    return max((after[thread] - before.get(thread, 0.0) for thread in after), default=0.0)
