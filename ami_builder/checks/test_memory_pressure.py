"""What happens when memory runs out: Dask copes or a worker is restarted, and nobody else notices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from ami_builder.checks.context import Context
from ami_builder.checks.login_times import LoginTimes
from ami_builder.checks.machine_state import exact_size
from ami_builder.checks.plugin import BLOCKED, INCONCLUSIVE
from ami_builder.checks.pressure_result import EndedBy, PressureResult
from ami_builder.core import oom

pytestmark = pytest.mark.pressure

MIB = 1 << 20
GIB = 1 << 30
KILLED = 137
"""Exit status of what the kernel killed."""


def came_to(pressure: PressureResult, key: str) -> Any:
    """Return what a step showed; a check that needs it is blocked when Dask did not get there."""
    if key not in pressure.dask:
        pytest.skip(f"{BLOCKED}{pressure.error or 'the step was not gone'}")
    return pressure.dask[key]


def size(amount: int) -> str:
    """Write a size in short."""
    return f"{amount / GIB:.1f} GiB" if amount >= GIB else f"{amount / MIB:.0f} MiB"


def test_all_steps_completed(pressure: PressureResult, note: Callable[[str], None]) -> None:
    """Spill, leak, grow, come back: what stopped in between proves nothing about the rest."""
    also = "".join(f"; {why}" for why in (pressure.double_kill(), pressure.first_attempt) if why)
    assert not pressure.error, f"Dask under memory pressure: {pressure.error}{also}"
    if pressure.first_attempt:
        note(f"at the second try; at the first, {pressure.first_attempt}")


def test_work_larger_than_the_limit_finishes_by_spilling(
    pressure: PressureResult, note: Callable[[str], None]
) -> None:
    """What Dask manages itself goes to disk in time, and comes back as it was, without a restart."""
    spill, before = came_to(pressure, "spill"), came_to(pressure, "workers")
    read, limit = spill.get("read"), spill["limit"]
    if spill["size"] < 1.2 * limit:
        why = "the disk has no room for more (verify.disk_size)"
        pytest.skip(f"only {size(spill['size'])} of work were done: {why}")
    same = sorted(spill.get("pids", ())) == sorted(worker["pid"] for worker in before)
    assert same, "a worker was restarted meanwhile"
    assert read == spill["size"], f"of {exact_size(spill['size'])} of results {read} bytes came back"
    assert spill["spilled"] > spill["size"] - limit, f"only {exact_size(spill['spilled'])} were spilled"
    note(
        f"{size(spill['size'])} of work ({spill['size'] / limit:.1f} x the limit)"
        f" in {pressure.dask['seconds']['spilling']:.0f} s"
    )


def test_a_leak_ends_as_a_killed_worker(pressure: PressureResult) -> None:
    """A task that takes its worker with it fails: the cluster does not hang."""
    leaked, tried = came_to(pressure, "leaked"), len(came_to(pressure, "leaks"))
    assert leaked == "KilledWorker", (
        f"a task that leaks past the limit ended as {leaked}, tried {tried} times"
    )
    assert tried == 1, f"a task that may take one worker with it was tried {tried} times"


def test_the_leaking_worker_is_restarted(
    pressure: PressureResult, context: Context, note: Callable[[str], None]
) -> None:
    """By the nanny where all else in the container fits beside 95 % of the limit, else by the kernel."""
    came_to(pressure, "back")
    worker_ends = pressure.worker_ends()
    by = " and ".join(f"{who} ({n} times)" for who, n in Counter(worker_ends).items())
    assert worker_ends, "no worker was restarted"
    assert set(worker_ends) <= {EndedBy.NANNY, EndedBy.CONTAINER}, f"restarted by {by}"
    assert pressure.limit is not None, f"restarted by {by}, without a limit of the container"
    room = _room(pressure, pressure.limit)
    late = EndedBy.CONTAINER in worker_ends and room > 0.03 * pressure.limit
    assert not late, (
        f"restarted by {by}, though {exact_size(room)} were left when the nanny should have done it"
    )
    note(f"restarted by {by}; {_in_time(pressure, pressure.limit, context)}")


def _room(pressure: PressureResult, limit: int) -> int:
    """Return what the container has left when one worker reaches its nanny's threshold, the others idle."""
    workers = pressure.dask["workers"]
    largest = max(worker["limit"] for worker in workers)
    idle = pressure.idle * (len(workers) - 1) // len(workers)
    return oom.room(limit, beside=pressure.beside + idle, headroom=limit - largest)


def _in_time(pressure: PressureResult, limit: int, context: Context) -> str:
    """Say what machine is the smallest on which the nanny comes first when all workers are full."""
    headroom = limit - sum(worker["limit"] for worker in pressure.dask["workers"])
    system = context.machine_memory - limit

    def machine(beside: int) -> str:
        least = system + oom.smallest_limit(beside=beside, headroom=headroom)
        return f"{-(-least * 10 // GIB) / 10} GiB"

    needed = oom.least_headroom(limit, beside=pressure.beside)
    enough = f", here with a headroom of {-(-needed // MIB)} MiB" if needed > headroom else ""
    return (
        f"beside the workers {size(pressure.beside)} are in use, so the nanny is in time on machines from"
        f" {machine(pressure.beside)} on ({machine(pressure.beside - pressure.scheduler)} without a scheduler"
        f" in the container){enough}"
    )


def test_another_process_is_killed_alone(pressure: PressureResult) -> None:
    """What takes the limit outside Dask's eyes is what the kernel kills, and nothing else with it."""
    grower = pressure.grower
    killed = [k for k in pressure.kills if grower.began <= k.seconds <= grower.ended]
    others = [f"{k.task} ({k.pid})" for k in killed if k.pid != grower.pid]
    assert grower.status == KILLED, (
        f"a process in the container took the whole limit, and ended with status {grower.status}"
    )
    assert any(k.pid == grower.pid and k.inside(pressure.memcg) for k in killed), (
        "the kernel's log does not say that it was killed because of the container's limit"
    )
    assert not others, f"killed with it: {', '.join(others)}"


def test_no_kill_outside_the_container(pressure: PressureResult) -> None:
    """A kill because the whole machine has no memory left may hit anything, and freezes it before."""
    found = [f"{k.task} in {k.task_memcg} ({k.constraint})" for k in pressure.kills_outside()]
    assert not found, f"{len(found)} kills that were not inside the container alone: {', '.join(found[:5])}"


def test_services_keep_running(pressure: PressureResult) -> None:
    """Docker, ssh and all the others run on, the same ones."""
    assert pressure.before, "no service was told of"
    changed_services = pressure.changed_services()
    assert not changed_services, f"failed, ended or restarted: {', '.join(changed_services[:5])}"


def test_the_container_keeps_running(pressure: PressureResult) -> None:
    """A container that ends with its worker takes the scheduler and all results with it."""
    before, after = pressure.container
    assert before, "the container was not told of"
    assert after == before, f"the container was {before!r}, and is {after!r}"


def test_the_workers_are_back(pressure: PressureResult, context: Context) -> None:
    """As many as before, with the same limits, and at work."""
    served, back = came_to(pressure, "served"), came_to(pressure, "back")
    limits = sorted(worker["limit"] for worker in back)
    assert served == sum([20, 22]), f"20 + 22 was {served}"
    assert len(back) == (context.workers or len(back)), f"{len(back)} of {context.workers} workers are back"
    assert limits == sorted(worker["limit"] for worker in pressure.dask["workers"]), (
        f"limits are now {limits}"
    )


def test_ssh_stays_responsive(pressure: PressureResult, note: Callable[[str], None]) -> None:
    """Who can't log in can't help, and a cluster takes a machine that does not answer for dead."""
    watched = pressure.watched
    failed = [login for login in (*watched.rest, *watched.logins) if login.failed]
    starved = [login for login in failed if login.denied > oom.MOST_DENIED * login.seconds]
    own = [login for login in failed if login not in starved]
    assert not own, f"{len(own)} logins failed: {own[0].failed}"
    compared = oom.compare(watched.waits_at_rest(), watched.waits())
    assert compared.answers is not oom.Answers.LATE, str(compared)
    if starved or compared.answers is oom.Answers.UNKNOWN:
        pytest.skip(f"{INCONCLUSIVE}{_too_busy(watched, compared)}")
    note(f"{len(watched.logins)} logins; {compared}")


def _too_busy(watched: LoginTimes, compared: oom.Compared) -> str:
    denied = sum(login.denied for login in watched.logins)
    seconds = sum(login.seconds for login in watched.logins)
    return (
        f"{compared}. The host was too busy to tell: of {seconds:.0f} s of logins it did not run the machine"
        f" for {denied:.0f} s, and some process waited for a processor {min(watched.busy, 1):.0%} of the time"
    )
