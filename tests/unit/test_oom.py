"""Reading what a machine showed under memory pressure, and comparing how it answers with itself at rest."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ami_builder.core import oom
from ami_builder.core.oom import Answers, Constraint, Kill, Wait
from ami_builder.core.units import GIB, MIB

SCOPE = "/system.slice/docker-4f6b.scope"
# As Linux 6.12 writes them.
MEMCG = (
    "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=docker-4f6b.scope,mems_allowed=0,"
    f"oom_memcg={SCOPE},task_memcg={SCOPE},task=dask worker [tc,pid=1733,uid=0"
)
GLOBAL = (
    "oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=docker-4f6b.scope,mems_allowed=0,"
    f"global_oom,task_memcg={SCOPE},task=python,pid=99,uid=0"
)
KILL = Kill(
    seconds=1764086400.25,
    constraint=Constraint.MEMCG,
    oom_memcg=SCOPE,
    task_memcg=SCOPE,
    task="dask worker [tc",
    pid=1733,
)


def test_a_kill_in_a_container() -> None:
    log = f"""
[   90.249999] dask kernel: python invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0, oom_score_adj=0
[   90.250000] dask kernel: {MEMCG}
[   90.250001] dask kernel: Memory cgroup out of memory: Killed process 1733 (dask worker [tc) total-vm:2kB
"""
    assert oom.kills(log) == (replace(KILL, seconds=90.25),)
    assert oom.kills(log, booted=1764086310.0) == (KILL,)


@pytest.mark.parametrize("stamp", ["[   90.500000] ", "<6>[   90.500000] ", "[90.500000] "])
def test_a_global_kill_by_dmesg(stamp: str) -> None:
    (kill,) = oom.kills(stamp + GLOBAL)
    assert (kill.seconds, kill.constraint, kill.oom_memcg) == (90.5, Constraint.GLOBAL, "")
    assert (kill.task_memcg, kill.task, kill.pid) == (SCOPE, "python", 99)


def test_a_task_named_like_the_line() -> None:
    (kill,) = oom.kills("[1.0] " + MEMCG.replace("dask worker [tc", "a,task=b,pid=1"))
    assert (kill.task, kill.pid) == ("a,task=b,pid=1", 1733)


def test_a_cpuset_is_the_machines_memory() -> None:
    (kill,) = oom.kills("[1.0] " + GLOBAL.replace("CONSTRAINT_NONE", "CONSTRAINT_CPUSET"))
    assert kill.constraint is Constraint.GLOBAL


@pytest.mark.parametrize("line", [MEMCG, f"[1.0] {MEMCG[:90]}", f"1764086400.25 dask kernel: {GLOBAL}"])
def test_what_cannot_be_read_is_not_passed_over(line: str) -> None:
    with pytest.raises(ValueError, match="can't parse"):
        oom.kills(line)


def test_inside_a_container() -> None:
    assert KILL.inside(SCOPE)
    assert KILL.inside("/system.slice")
    assert KILL.inside("/")
    assert not KILL.inside("/system.slice/docker-4f6b")
    (stray,) = oom.kills("[1.0] " + MEMCG.replace(f"task_memcg={SCOPE}", "task_memcg=/init.scope"))
    assert not stray.inside(SCOPE)
    (machines,) = oom.kills("[1.0] " + GLOBAL)
    assert not machines.inside("/")


def waits(*seconds: float | tuple[float, float]) -> list[Wait]:
    """Waits of so many seconds; of a pair, the second is how long the host did not run the VM."""
    pairs = [each if isinstance(each, tuple) else (each, 0.0) for each in seconds]
    return [Wait(seconds=seconds, denied=denied) for seconds, denied in pairs]


def test_what_the_host_denied_is_not_the_vms_own() -> None:
    assert [wait.own for wait in waits(5, (5, 2), (5, 5), (5, 7))] == [5, 3, 0, 0]


@pytest.mark.parametrize(
    ("rest", "longest", "answers"),
    [
        # On a fast host the bound is 10 s for one login.
        (0.0, 10.0, Answers.IN_TIME),
        (0.0, 10.001, Answers.LATE),
        (0.7, 10.0, Answers.IN_TIME),
        (0.7, 10.001, Answers.LATE),
        (1.4, 10.0, Answers.IN_TIME),
        (1.4, 10.001, Answers.LATE),
        # On a slow one it is five times what is usual at rest.
        (3.0, 15.0, Answers.IN_TIME),
        (3.0, 15.001, Answers.LATE),
        (5.0, 12.0, Answers.IN_TIME),
        (5.0, 25.0, Answers.IN_TIME),
        (5.0, 25.001, Answers.LATE),
        (20.0, 100.001, Answers.LATE),
        # Where it takes longer than that at rest, nobody can tell.
        (20.001, 100.1, Answers.UNKNOWN),
        (20.001, 100.0, Answers.IN_TIME),
        (60.0, 1000.0, Answers.UNKNOWN),
    ],
)
def test_the_longest_wait_is_held_against_the_bound_of_that_host(
    rest: float, longest: float, answers: Answers
) -> None:
    compared = oom.compare(waits(rest), waits(0.1, longest, 0.2))
    assert compared.answers is answers
    assert compared.longest.seconds == longest
    assert compared.allowed == max(10.0, 5 * rest)


def test_a_fast_host_allows_a_login_ten_seconds() -> None:
    """However quick one is at rest."""
    assert oom.LEAST_ALLOWED == 10.0
    assert oom.TIMES_ALLOWED * 0.7 < oom.LEAST_ALLOWED


@pytest.mark.parametrize(
    ("rest", "median"),
    [
        ([3.0], 3.0),
        ([1.0, 9.0, 2.0], 2.0),
        ([0.7, 0.7, 0.7, 30.0], 0.7),
        ([(9.0, 8.0), 3.0, (9.0, 7.0)], 2.0),
    ],
)
def test_one_slow_login_at_rest_is_no_measure(rest: list[float | tuple[float, float]], median: float) -> None:
    assert oom.compare(waits(*rest), waits(1.0)).rest.own == median


@pytest.mark.parametrize(
    ("longest", "answers"),
    [
        # What the host denied is not counted,
        ((30.0, 23.0), Answers.IN_TIME),
        ((40.0, 20.0), Answers.LATE),
        # and where it denied more than three quarters of what is too long, nobody can tell.
        ((60.0, 45.0), Answers.LATE),
        ((60.0, 45.1), Answers.UNKNOWN),
        ((600.0, 500.0), Answers.UNKNOWN),
    ],
)
def test_time_in_which_the_host_did_not_run_the_vm(longest: tuple[float, float], answers: Answers) -> None:
    assert oom.compare(waits(0.7), waits(1.0, longest)).answers is answers


def test_the_longest_is_the_vms_own_not_the_hosts() -> None:
    """One that the host kept from answering for long hides none that the VM did."""
    compared = oom.compare(waits(0.7), waits((600.0, 599.0), 11.0))
    assert compared.longest.seconds == 11.0
    assert compared.answers is Answers.LATE


@pytest.mark.parametrize(("rest", "under"), [([], [1.0]), ([1.0], []), ([], [])])
def test_nothing_is_not_compared(rest: list[float], under: list[float]) -> None:
    with pytest.raises(ValueError, match="nothing to compare"):
        oom.compare(waits(*rest), waits(*under))


@pytest.mark.parametrize(
    ("rest", "longest", "line"),
    [
        (5.0, 12.0, "longest wait for a login 12.0 s, 5.0 s at rest: 2.4 x, allowed 5 x or 10 s"),
        (0.0, 12.0, "longest wait for a login 12.0 s, 0.0 s at rest: -, allowed 5 x or 10 s"),
        (2.0, (8.0, 0.05), "longest wait for a login 8.0 s, 2.0 s at rest: 4.0 x, allowed 5 x or 10 s"),
        (
            2.0,
            (20.0, 14.0),
            "longest wait for a login 6.0 s, 2.0 s at rest: 3.0 x, allowed 5 x or 10 s"
            " (not counted: 14.0 s of CPU steal)",
        ),
    ],
)
def test_both_are_shown_side_by_side(rest: float, longest: float | tuple[float, float], line: str) -> None:
    assert str(oom.compare(waits(rest), waits(longest))) == line


@pytest.mark.parametrize("headroom", [0, 16 * MIB])
def test_the_smallest_limit_leaves_no_room(headroom: int) -> None:
    least = oom.smallest_limit(beside=70 * MIB, headroom=headroom)
    assert 0 <= oom.room(least, beside=70 * MIB, headroom=headroom) <= 1
    assert oom.room(least - MIB, beside=70 * MIB, headroom=headroom) < 0


def test_a_nanny_alone_needs_nearly_1400_mib() -> None:
    """1 GiB: the kernel, 2 GiB: the nanny, as seen on machines of those sizes."""
    least = oom.smallest_limit(beside=68 * MIB)
    assert least == pytest.approx(1360 * MIB, abs=2)
    assert GIB < least < 1.6 * GIB


def test_the_least_headroom_is_just_enough() -> None:
    headroom = oom.least_headroom(GIB, beside=70 * MIB)
    assert oom.room(GIB, beside=70 * MIB, headroom=headroom) >= 0
    assert oom.room(GIB, beside=70 * MIB, headroom=headroom - 2) < 0
    assert oom.least_headroom(4 * GIB, beside=70 * MIB) == 0
    assert oom.smallest_limit(beside=MIB, headroom=GIB) == 0
