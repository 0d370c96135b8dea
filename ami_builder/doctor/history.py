"""Why the workers of a cluster ended, from the events that its scheduler keeps. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

ALL, DEATHS, RESTARTS = TOPICS = ("all", "worker-deaths", "worker-restart-memory")
"""The topics that matter: Dask's own, that of the image's worker_deaths.py, and that of Dask's nannies."""

SAME = 120.0
"""Events about one worker within so many seconds are about one end of it. Addresses are used again."""
UNKNOWN = "reason unknown: its machine may have it (journalctl -t dask)"

Event = tuple[float, Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """One worker's end. Sizes are bytes, None if unknown; times are seconds since 1970."""

    time: float
    worker: str
    """Its address; empty if it ended while it was starting."""
    name: str = ""
    host: str = ""
    pid: int | None = None
    by: str
    """`kernel-container`, `kernel-machine`, `nanny`, `signal`, `exit` or `unknown`."""
    cause: str
    limit: int | None = None
    memory: int | None = None
    """What it held."""
    tasks: tuple[str, ...] | None = None
    """The tasks it had, running or not; None if unknown. Of many, only some."""
    task_count: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The ends of workers that a scheduler remembers, the newest last."""

    deaths: tuple[Death, ...]
    started: float | None
    """When the scheduler started."""
    since: float | None
    """The oldest event that it has of all workers; it drops older ones."""


def history(events: Mapping[str, Iterable[Any]], started: float | None) -> History:
    """Return the history in a scheduler's events, by topic: each is a time and a message."""
    of = {topic: list(_messages(events.get(topic, ()))) for topic in TOPICS}
    deaths = [_reported(*event) for event in of[DEATHS]]
    deaths += _others(of[ALL], of[RESTARTS], deaths)
    return History(
        deaths=tuple(sorted(deaths, key=lambda death: death.time)),
        started=started,
        since=min((time for time, _ in of[ALL]), default=None),
    )


def _messages(events: Iterable[Any]) -> Iterator[Event]:
    """Anybody can log anything under any topic."""
    for each in events:
        if not isinstance(each, Sequence) or len(each) != 2:
            continue
        time, message = each
        if isinstance(time, int | float) and isinstance(message, Mapping):
            yield float(time), message


def _reported(time: float, message: Mapping[str, Any]) -> Death:
    tasks = message.get("tasks")
    return Death(
        time=time,
        worker=str(message.get("worker") or ""),
        name=str(message.get("name") or ""),
        host=str(message.get("host") or ""),
        pid=_number(message.get("pid")),
        by=str(message.get("by", "unknown")),
        cause=str(message.get("cause", UNKNOWN)),
        limit=_number(message.get("limit")),
        memory=_number(message.get("memory")),
        tasks=None if tasks is None else tuple(_texts(tasks)),
        task_count=_number(message.get("task-count")),
    )


def _others(all_of: Sequence[Event], restarts: Sequence[Event], known: Sequence[Death]) -> Iterator[Death]:
    """Return the ends that no worker_deaths.py has reported: those by a nanny, and those with tasks.

    A removal without tasks can be a worker that was asked to end, which Dask does not always mark.
    """
    reported = [(death.worker, death.time) for death in known]
    retired = [
        (worker, time)
        for time, message in all_of
        if message.get("action") in ("retire-workers", "restart-workers")
        for worker in _texts(message.get("retired") or message.get("workers"))  # older versions: workers
    ]
    removed = [event for event in all_of if event[1].get("action") == "remove-worker"]
    by_nanny = []
    for time, message in restarts:
        worker = str(message.get("worker") or "")
        if _near(reported, worker, time):
            continue
        by_nanny.append((worker, time))
        near = [(abs(t - time), m) for t, m in removed if m.get("worker") == worker and abs(t - time) < SAME]
        tasks = _keys(min(near, key=lambda each: each[0])[1]) if near else None
        yield Death(
            time=time,
            worker=worker,
            pid=_number(message.get("pid")),
            by="nanny",
            cause="ended by its nanny, because it held too much of its memory limit",
            memory=_number(message.get("rss")),
            tasks=tasks,
            task_count=None if tasks is None else len(tasks),
        )
    for time, message in removed:
        worker, keys = str(message.get("worker") or ""), _keys(message)
        if not keys or message.get("expected") or _near([*reported, *by_nanny, *retired], worker, time):
            continue
        yield Death(
            time=time,
            worker=worker,
            by="unknown",
            cause=f"ended, {UNKNOWN}",
            tasks=keys,
            task_count=len(keys),
        )


def _near(events: Iterable[tuple[str, float]], worker: str, time: float) -> bool:
    return any(of == worker and abs(when - time) < SAME for of, when in events)


def _keys(message: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(sorted(_texts(message.get("processing-tasks"))))


def _texts(found: object) -> Iterator[str]:
    return map(str, found) if isinstance(found, Iterable) and not isinstance(found, str) else iter(())


def _number(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) and isfinite(value) else None
