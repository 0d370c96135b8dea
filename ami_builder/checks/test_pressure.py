"""What happens when memory runs out: Dask copes or a worker is restarted, and nobody else notices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from ami_builder.checks.context import Context
from ami_builder.checks.plugin import BLOCKED, INCONCLUSIVE
from ami_builder.checks.pressed import Pressed, Slayer
from ami_builder.checks.state import told
from ami_builder.checks.watch import Watched
from ami_builder.core import oom

pytestmark = pytest.mark.pressure

MIB = 1 << 20
GIB = 1 << 30
KILLED = 137
"""Exit status of what the kernel killed."""


def came_to(pressed: Pressed, key: str) -> Any:
    """Return what a step showed; a check that needs it is blocked when Dask did not get there."""
    if key not in pressed.dask:
        pytest.skip(f"{BLOCKED}{pressed.error or 'the step was not gone'}")
    return pressed.dask[key]


def size(amount: int) -> str:
    """Write a size in short."""
    return f"{amount / GIB:.1f} GiB" if amount >= GIB else f"{amount / MIB:.0f} MiB"


def test_all_steps_were_gone(pressed: Pressed, note: Callable[[str], None]) -> None:
    """Spill, leak, grow, come back: what stopped in between proves nothing about the rest."""
    also = "".join(f"; {why}" for why in (pressed.beside_another(), pressed.before_this) if why)
    assert not pressed.error, f"Dask under memory pressure: {pressed.error}{also}"
    if pressed.before_this:
        note(f"at the second try; at the first, {pressed.before_this}")


def test_work_larger_than_the_limit_finishes_by_spilling(
    pressed: Pressed, note: Callable[[str], None]
) -> None:
    """What Dask manages itself goes to disk in time, and comes back as it was, without a restart."""
    spill, before = came_to(pressed, "spill"), came_to(pressed, "workers")
    read, limit = spill.get("read"), spill["limit"]
    if spill["size"] < 1.2 * limit:
        why = "the disk has no room for more (verify.disk_size)"
        pytest.skip(f"only {size(spill['size'])} of work were done: {why}")
    same = sorted(spill.get("pids", ())) == sorted(worker["pid"] for worker in before)
    assert same, "a worker was restarted meanwhile"
    assert read == spill["size"], f"of {told(spill['size'])} of results {read} bytes came back"
    assert spill["spilled"] > spill["size"] - limit, f"only {told(spill['spilled'])} were spilled"
    note(
        f"{size(spill['size'])} of work ({spill['size'] / limit:.1f} x the limit)"
        f" in {pressed.dask['seconds']['spilling']:.0f} s"
    )


def test_a_leak_ends_as_a_killed_worker(pressed: Pressed) -> None:
    """A task that takes its worker with it fails: the cluster does not hang."""
    leaked, tried = came_to(pressed, "leaked"), len(came_to(pressed, "leaks"))
    assert leaked == "KilledWorker", (
        f"a task that leaks past the limit ended as {leaked}, tried {tried} times"
    )
    assert tried == 1, f"a task that may take one worker with it was tried {tried} times"


def test_the_leaking_worker_is_restarted(
    pressed: Pressed, context: Context, note: Callable[[str], None]
) -> None:
    """By the nanny where all else in the container fits beside 95 % of the limit, else by the kernel."""
    came_to(pressed, "back")
    deaths = pressed.deaths()
    by = " and ".join(f"{who} ({n} times)" for who, n in Counter(deaths).items())
    assert deaths, "no worker was restarted"
    assert set(deaths) <= {Slayer.NANNY, Slayer.CONTAINER}, f"restarted by {by}"
    assert pressed.limit is not None, f"restarted by {by}, without a limit of the container"
    room = _room(pressed, pressed.limit)
    late = Slayer.CONTAINER in deaths and room > 0.03 * pressed.limit
    assert not late, f"restarted by {by}, though {told(room)} were left when the nanny should have done it"
    note(f"restarted by {by}; {_in_time(pressed, pressed.limit, context)}")


def _room(pressed: Pressed, limit: int) -> int:
    """Return what the container has left when one worker reaches its nanny's threshold, the others idle."""
    workers = pressed.dask["workers"]
    largest = max(worker["limit"] for worker in workers)
    idle = pressed.idle * (len(workers) - 1) // len(workers)
    return oom.room(limit, beside=pressed.beside + idle, headroom=limit - largest)


def _in_time(pressed: Pressed, limit: int, context: Context) -> str:
    """Say what machine is the smallest on which the nanny comes first when all workers are full."""
    headroom = limit - sum(worker["limit"] for worker in pressed.dask["workers"])
    system = context.machine_memory - limit

    def machine(beside: int) -> str:
        least = system + oom.smallest_limit(beside=beside, headroom=headroom)
        return f"{-(-least * 10 // GIB) / 10} GiB"

    needed = oom.least_headroom(limit, beside=pressed.beside)
    enough = f", here with a headroom of {-(-needed // MIB)} MiB" if needed > headroom else ""
    return (
        f"beside the workers {size(pressed.beside)} are in use, so the nanny is in time on machines from"
        f" {machine(pressed.beside)} on ({machine(pressed.beside - pressed.scheduler)} without a scheduler"
        f" in the container){enough}"
    )


def test_another_process_dies_alone(pressed: Pressed) -> None:
    """What takes the limit outside Dask's eyes is what the kernel kills, and nothing else with it."""
    grower = pressed.grower
    killed = [k for k in pressed.kills if grower.began <= k.seconds <= grower.ended]
    others = [f"{k.task} ({k.pid})" for k in killed if k.pid != grower.pid]
    assert grower.status == KILLED, (
        f"a process in the container took the whole limit, and ended with status {grower.status}"
    )
    assert any(k.pid == grower.pid and k.inside(pressed.memcg) for k in killed), (
        "the kernel's log does not say that it was killed because of the container's limit"
    )
    assert not others, f"killed with it: {', '.join(others)}"


def test_the_kernel_kills_nobody_else(pressed: Pressed) -> None:
    """A kill because the whole machine has no memory left may hit anything, and freezes it before."""
    found = [f"{k.task} in {k.task_memcg} ({k.constraint})" for k in pressed.elsewhere()]
    assert not found, f"{len(found)} kills that were not inside the container alone: {', '.join(found[:5])}"


def test_no_service_is_touched(pressed: Pressed) -> None:
    """Docker, ssh and all the others run on, the same ones."""
    assert pressed.before, "no service was told of"
    touched = pressed.touched()
    assert not touched, f"failed, ended or restarted: {', '.join(touched[:5])}"


def test_the_container_goes_on(pressed: Pressed) -> None:
    """A container that ends with its worker takes the scheduler and all results with it."""
    before, after = pressed.container
    assert before, "the container was not told of"
    assert after == before, f"the container was {before!r}, and is {after!r}"


def test_the_workers_are_back(pressed: Pressed, context: Context) -> None:
    """As many as before, with the same limits, and at work."""
    served, back = came_to(pressed, "served"), came_to(pressed, "back")
    limits = sorted(worker["limit"] for worker in back)
    assert served == sum([20, 22]), f"20 + 22 was {served}"
    assert len(back) == (context.workers or len(back)), f"{len(back)} of {context.workers} workers are back"
    assert limits == sorted(worker["limit"] for worker in pressed.dask["workers"]), f"limits are now {limits}"


def test_ssh_answers_all_the_time(pressed: Pressed, note: Callable[[str], None]) -> None:
    """Who can't log in can't help, and a cluster takes a machine that does not answer for dead."""
    watched = pressed.watched
    failed = [login for login in (*watched.rest, *watched.logins) if login.failed]
    starved = [login for login in failed if login.denied > oom.MOST_DENIED * login.seconds]
    own = [login for login in failed if login not in starved]
    assert not own, f"{len(own)} logins failed: {own[0].failed}"
    compared = oom.compare(watched.waits_at_rest(), watched.waits())
    assert compared.answers is not oom.Answers.LATE, str(compared)
    if starved or compared.answers is oom.Answers.UNKNOWN:
        pytest.skip(f"{INCONCLUSIVE}{_too_busy(watched, compared)}")
    note(f"{len(watched.logins)} logins; {compared}")


def _too_busy(watched: Watched, compared: oom.Compared) -> str:
    denied = sum(login.denied for login in watched.logins)
    seconds = sum(login.seconds for login in watched.logins)
    return (
        f"{compared}. The host was too busy to tell: of {seconds:.0f} s of logins it did not run the machine"
        f" for {denied:.0f} s, and some process waited for a processor {min(watched.busy, 1):.0%} of the time"
    )
