"""Why workers ended, from a scheduler's events."""

from __future__ import annotations

from typing import Any

import pytest

from ami_builder.doctor.history import UNKNOWN, Death, history

A, B = "tcp://10.0.0.2:40001", "tcp://10.0.0.3:40001"
REPORT = {
    "action": "worker-death",
    "worker": A,
    "name": "alice",
    "pid": 7,
    "host": "vm",
    "exitcode": -9,
    "by": "kernel-container",
    "cause": "ended by the kernel at the container's limit of 1.60 GiB",
    "limit": 1717986918,
    "memory": None,
    "tasks": ("x-1", "x-2"),
    "task-count": 2,
}


def removed(worker: str, *tasks: str, expected: bool = False) -> dict[str, Any]:
    return {"action": "remove-worker", "worker": worker, "processing-tasks": {*tasks}, "expected": expected}


def deaths(**events: list[tuple[float, Any]]) -> tuple[Death, ...]:
    return history({topic.replace("_", "-"): each for topic, each in events.items()}, None).deaths


def test_a_report_is_complete_and_the_events_of_its_removal_add_nothing() -> None:
    found = deaths(
        all=[(99.9, removed(A, "x-1", "x-2")), (100.4, REPORT)],
        worker_deaths=[(100.4, REPORT)],
        worker_restart_memory=[(99.8, {"worker": A, "pid": 7, "rss": 5})],
    )
    assert found == (
        Death(
            time=100.4,
            worker=A,
            name="alice",
            host="vm",
            pid=7,
            by="kernel-container",
            cause=str(REPORT["cause"]),
            limit=1717986918,
            tasks=("x-1", "x-2"),
            task_count=2,
        ),
    )


def test_other_workers_have_what_dask_itself_knows() -> None:
    """Their nannies report their own restarts; of all else, only the scheduler's events are left."""
    nanny, unknown = deaths(
        all=[(50, removed(B, "y")), (205, removed(A, "x")), (210, removed(A))],
        worker_restart_memory=[(204, {"worker": A, "pid": 9, "rss": 1000})],
    )[::-1]
    assert (nanny.worker, nanny.by, nanny.memory, nanny.tasks) == (A, "nanny", 1000, ("x",))
    assert (unknown.worker, unknown.by, unknown.cause) == (B, "unknown", f"ended, {UNKNOWN}")
    assert unknown.tasks == ("y",)


def test_a_worker_that_was_asked_to_end_is_none() -> None:
    assert not deaths(
        all=[
            (1, removed(A, "x", expected=True)),
            (400, removed(A)),
            (800, {"action": "retire-workers", "workers": {B: {}}}),
            (801, removed(B, "y")),
            (900, {"action": "restart-workers", "workers": {B: "OK"}}),
            (901, removed(B, "y")),
            (1200, removed(A, "z")),
            (1201, {"action": "retire-workers", "retired": [A], "could-not-retire": []}),
        ]
    )


def test_every_end_at_the_same_address_counts() -> None:
    """A worker with a port of its own comes back with it."""
    again = [(time, {"worker": A, "pid": int(time), "rss": 1}) for time in (10.0, 14.0, 18.0)]
    assert [death.pid for death in deaths(worker_restart_memory=again)] == [10, 14, 18]
    assert [death.time for death in deaths(worker_deaths=[(10, REPORT), (14, REPORT)])] == [10, 14]


def test_anybody_can_log_anything() -> None:
    found = deaths(worker_deaths=[(3, "text"), (2, {"tasks": (("a", 1),), "limit": "2"}), (1, {})])
    assert [(death.time, death.by, death.limit, death.tasks) for death in found] == [
        (1, "unknown", None, None),
        (2, "unknown", None, ("('a', 1)",)),
    ]


@pytest.mark.parametrize(
    "events",
    [
        {"worker_deaths": [(1, {"tasks": 5, "pid": float("nan"), "limit": float("inf")})]},
        {"all": [("now", {"action": "add-worker"}), (1, {"action": "retire-workers", "workers": 3})]},
        {"all": [(1, {"action": "remove-worker", "worker": A, "processing-tasks": 3})]},
    ],
)
def test_what_makes_no_sense_is_no_error(events: dict[str, Any]) -> None:
    assert all(not death.tasks and death.pid is None and death.limit is None for death in deaths(**events))


def test_how_far_back_it_reaches() -> None:
    found = history({"all": [(30, {"action": "add-worker"}), (20, {"action": "add-client"})]}, 10.0)
    assert (found.since, found.started, found.deaths) == (20, 10.0, ())
