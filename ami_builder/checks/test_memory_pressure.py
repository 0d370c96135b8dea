"""When memory runs out, Dask spills or one worker is restarted, and nothing else is affected."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from ami_builder.checks.context import Context
from ami_builder.checks.login_times import LoginTimes, waits
from ami_builder.checks.machine_state import exact_size
from ami_builder.checks.plugin import BLOCKED, INCONCLUSIVE
from ami_builder.checks.pressure_result import EndedBy, PressureResult
from ami_builder.core import oom
from ami_builder.core.units import GIB, MIB

pytestmark = pytest.mark.pressure

KILLED = 137
"""Exit status of what the kernel killed."""


def result_of(pressure: PressureResult, key: str) -> Any:
    """Return the result of a step; a check that needs it is blocked when Dask did not reach the step."""
    if key not in pressure.dask:
        pytest.skip(f"{BLOCKED}{pressure.error or 'the step was not reached'}")
    return pressure.dask[key]


def size(amount: int) -> str:
    """Return a short size: `1.5 GiB`."""
    return f"{amount / GIB:.1f} GiB" if amount >= GIB else f"{amount / MIB:.0f} MiB"


def test_all_steps_completed(pressure: PressureResult, note: Callable[[str], None]) -> None:
    """All steps (spill, leak, grow, recover) must run, else the later ones have no result."""
    also = "".join(f"; {why}" for why in (pressure.double_kill(), pressure.first_attempt) if why)
    assert not pressure.error, f"the steps under memory pressure did not complete: {pressure.error}{also}"
    if pressure.first_attempt:
        note(f"at the second try; at the first, {pressure.first_attempt}")


def test_work_larger_than_the_limit_finishes_by_spilling(
    pressure: PressureResult, note: Callable[[str], None]
) -> None:
    """Dask writes its own data to disk in time and reads it back unchanged, without a restart."""
    spill, before = result_of(pressure, "spill"), result_of(pressure, "workers")
    read, limit = spill.get("read"), spill["limit"]
    if spill["size"] < 1.2 * limit:
        why = "the disk is too small for more (verify.disk_size)"
        pytest.skip(f"only {size(spill['size'])} of data were made: {why}")
    same = sorted(spill.get("pids", ())) == sorted(worker["pid"] for worker in before)
    assert same, "a worker was restarted while it spilled"
    assert read == spill["size"], f"of {exact_size(spill['size'])} of results, {read} bytes were read back"
    assert spill["spilled"] > spill["size"] - limit, f"only {exact_size(spill['spilled'])} were spilled"
    note(
        f"{size(spill['size'])} of data ({spill['size'] / limit:.1f} x the limit)"
        f" in {pressure.dask['seconds']['spilling']:.0f} s"
    )


def test_a_leak_ends_as_a_killed_worker(pressure: PressureResult) -> None:
    """A task that ends its worker fails with KilledWorker, and the cluster does not hang."""
    leaked, tried = result_of(pressure, "leaked"), len(result_of(pressure, "leaks"))
    assert leaked == "KilledWorker", (
        f"a task that leaks past the limit ended with {leaked}, after {tried} attempts"
    )
    assert tried == 1, f"a task that may end one worker was tried {tried} times"


def test_the_leaking_worker_is_restarted(
    pressure: PressureResult, context: Context, note: Callable[[str], None]
) -> None:
    """The nanny restarts it where all else in the container fits into 5 % of the limit, else the kernel."""
    result_of(pressure, "back")
    worker_ends = pressure.worker_ends()
    by = " and ".join(f"{who} ({n} times)" for who, n in Counter(worker_ends).items())
    assert worker_ends, "no worker was restarted"
    assert set(worker_ends) <= {EndedBy.NANNY, EndedBy.CONTAINER}, f"restarted by {by}"
    assert pressure.limit is not None, f"restarted by {by}, and the container has no limit"
    room = _room(pressure, pressure.limit)
    late = EndedBy.CONTAINER in worker_ends and room > 0.03 * pressure.limit
    assert not late, (
        f"restarted by {by}, though {exact_size(room)} were left when the nanny should have done it"
    )
    note(f"restarted by {by}; {_in_time(pressure, pressure.limit, context)}")


def _room(pressure: PressureResult, limit: int) -> int:
    """Return the bytes left in the container when one worker reaches the nanny's threshold, others idle."""
    workers = pressure.dask["workers"]
    largest = max(worker["limit"] for worker in workers)
    idle = pressure.idle * (len(workers) - 1) // len(workers)
    return oom.room(limit, beside=pressure.beside + idle, headroom=limit - largest)


def _in_time(pressure: PressureResult, limit: int, context: Context) -> str:
    """Return a text: the smallest machine on which the nanny acts first when all workers are full."""
    headroom = limit - sum(worker["limit"] for worker in pressure.dask["workers"])
    system = context.machine_memory - limit

    def machine(beside: int) -> str:
        least = system + oom.smallest_limit(beside=beside, headroom=headroom)
        return f"{-(-least * 10 // GIB) / 10} GiB"

    needed = oom.least_headroom(limit, beside=pressure.beside)
    enough = f"; here it needs memory.nanny_headroom of {-(-needed // MIB)} MiB" if needed > headroom else ""
    return (
        f"besides the workers, the container uses {size(pressure.beside)}:"
        f" the nanny acts first on machines from {machine(pressure.beside)} on"
        f" ({machine(pressure.beside - pressure.scheduler)} without a scheduler in the container){enough}"
    )


def test_another_process_is_killed_alone(pressure: PressureResult) -> None:
    """The kernel kills the process that takes memory without Dask, and no other."""
    grower = pressure.grower
    during = [k for k in pressure.kills if grower.began <= k.seconds <= grower.ended]
    others = [f"{k.task} ({k.pid})" for k in during if k.pid != grower.pid]
    assert grower.status == KILLED, (
        f"a process took the container's whole limit and ended with status {grower.status}, expected {KILLED}"
    )
    assert any(k.pid == grower.pid and k.inside(pressure.memcg) for k in pressure.kills), (
        f"the kernel's log has no kill of that process (pid {grower.pid}) at the container's limit, only of:"
        f" {', '.join(f'{k.task} ({k.pid})' for k in pressure.kills) or 'none'}"
    )
    assert not others, f"the kernel killed other processes too: {', '.join(others)}"


def test_each_kill_is_reported_at_once(pressure: PressureResult) -> None:
    """What the kernel kills is in /run/dask/kills within a second, and in the journal, with the reason."""
    missing = [
        f"{kill.task} ({kill.pid})" for kill in pressure.kills if not _reported_at_once(pressure, kill)
    ]
    assert not missing, f"the kernel's kills are not reported by watch-kills.service: {', '.join(missing)}"


def _reported_at_once(pressure: PressureResult, kill: oom.Kill) -> bool:
    # watch-kills computes its times from the second of the boot: they are up to 1 s early. The journal's
    # times are when journald received the lines.
    recorded = any(
        other["pid"] == kill.pid
        and -1 - pressure.moment < (other["time"] or 0) - kill.seconds < pressure.moment
        for other in pressure.recorded
    )
    return recorded and f"(pid {kill.pid}," in pressure.journal


def test_each_end_of_a_worker_has_its_reason(pressure: PressureResult) -> None:
    """Else KilledWorker is all that a user sees: the scheduler's events and the container's log have it."""
    result_of(pressure, "back")
    events = {death["pid"]: death["by"] for death in pressure.dask.get("deaths", ())}
    for leak, ended_by in zip(pressure.dask["leaks"], pressure.worker_ends(), strict=False):
        pid = leak["pid"]
        by = events.get(pid)
        assert by, f"the scheduler has no event of the end of the worker with pid {pid}"
        assert by == (ended_by.reported_as or by), (
            f"the worker with pid {pid} was ended by {ended_by}, but reported as {by}"
        )
        assert f"pid {pid}): ended " in pressure.container_log, (
            f"the container's log has no line about the end of the worker with pid {pid}"
        )
        if ended_by is EndedBy.NANNY:
            assert f"pid {pid}): ended " in pressure.journal, (
                f"the journal has no line about the end of the worker with pid {pid}"
            )


def test_no_kill_outside_the_container(pressure: PressureResult) -> None:
    """A system-wide OOM kill may hit any process, and the machine freezes before it."""
    found = [
        f"{k.task} in {k.task_memcg} ({k.constraint})"
        for k in pressure.kills
        if k.constraint is oom.Constraint.GLOBAL or not k.inside(pressure.memcg)
    ]
    assert not found, f"{len(found)} OOM kills outside the container: {', '.join(found[:5])}"


def test_services_keep_running(pressure: PressureResult) -> None:
    """Docker, ssh and all other services keep running, without a restart."""
    assert pressure.before, "no service was listed"
    changed = [
        name
        for name, service in pressure.before.items()
        if service.active == "active" and not service.same(pressure.after.get(name))
    ]
    assert not changed, f"services failed, ended or restarted: {', '.join(changed[:5])}"


def test_the_container_keeps_running(pressure: PressureResult) -> None:
    """If the container ended with a worker, the scheduler and all results would be lost."""
    before, after = pressure.container
    assert before, "the container was not listed"
    assert after == before, f"the container was {before!r}, and is {after!r}"


def test_the_workers_are_back(pressure: PressureResult, context: Context) -> None:
    """All workers are back, with the same limits, and run tasks."""
    served, back = result_of(pressure, "served"), result_of(pressure, "back")
    limits = sorted(worker["limit"] for worker in back)
    assert served == sum([20, 22]), f"the task 20 + 22 returned {served}"
    assert len(back) == (context.workers or len(back)), f"{len(back)} of {context.workers} workers are back"
    assert limits == sorted(worker["limit"] for worker in pressure.dask["workers"]), (
        f"limits are now {limits}"
    )


def test_ssh_stays_responsive(pressure: PressureResult, note: Callable[[str], None]) -> None:
    """A cluster gives up a machine that is unresponsive, and nobody can log in to help."""
    watched = pressure.watched
    failed = [login for login in (*watched.rest, *watched.logins) if login.failed]
    without_cpu = [login for login in failed if login.denied > oom.MOST_DENIED * login.seconds]
    own = [login for login in failed if login not in without_cpu]
    assert not own, f"{len(own)} logins failed: {own[0].failed}"
    compared = oom.compare(waits(watched.rest), waits(watched.logins))
    assert compared.answers is not oom.Answers.LATE, str(compared)
    if without_cpu or compared.answers is oom.Answers.UNKNOWN:
        pytest.skip(f"{INCONCLUSIVE}{_too_busy(watched, compared)}")
    note(f"{len(watched.logins)} logins; {compared}")


def _too_busy(watched: LoginTimes, compared: oom.Compared) -> str:
    denied = sum(login.denied for login in watched.logins)
    seconds = sum(login.seconds for login in watched.logins)
    return (
        f"{compared}. The host was too busy to judge: in {seconds:.0f} s of logins it did not run the machine"
        f" for {denied:.0f} s, and processes waited for a CPU {min(watched.busy, 1):.0%} of the time"
    )
