"""Reading what a machine showed under memory pressure."""

from __future__ import annotations

import pytest

from ami_builder import pressure
from ami_builder.pressure import Constraint, Kill, Silence
from ami_builder.spelling import GIB, MIB

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
1764086399.000001 dask kernel: python invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0, oom_score_adj=0
1764086400.250000 dask kernel: {MEMCG}
1764086400.250001 dask kernel: Memory cgroup out of memory: Killed process 1733 (dask worker [tc) total-vm:2kB
"""
    assert pressure.kills(log) == (KILL,)


@pytest.mark.parametrize("stamp", ["[   90.500000] ", "<6>[   90.500000] ", "[90.500000] "])
def test_a_global_kill_by_dmesg(stamp: str) -> None:
    (kill,) = pressure.kills(stamp + GLOBAL)
    assert (kill.seconds, kill.constraint, kill.oom_memcg) == (90.5, Constraint.GLOBAL, "")
    assert (kill.task_memcg, kill.task, kill.pid) == (SCOPE, "python", 99)


def test_a_task_named_like_the_line() -> None:
    (kill,) = pressure.kills("[1.0] " + MEMCG.replace("dask worker [tc", "a,task=b,pid=1"))
    assert (kill.task, kill.pid) == ("a,task=b,pid=1", 1733)


def test_a_cpuset_is_the_machines_memory() -> None:
    (kill,) = pressure.kills("[1.0] " + GLOBAL.replace("CONSTRAINT_NONE", "CONSTRAINT_CPUSET"))
    assert kill.constraint is Constraint.GLOBAL


@pytest.mark.parametrize("line", [MEMCG, f"[1.0] {MEMCG[:90]}", f"Nov 25 16:00:00 dask kernel: {GLOBAL}"])
def test_what_cannot_be_read_is_not_passed_over(line: str) -> None:
    with pytest.raises(ValueError, match="can't be read"):
        pressure.kills(line)


def test_inside_a_container() -> None:
    assert KILL.inside(SCOPE)
    assert KILL.inside("/system.slice")
    assert KILL.inside("/")
    assert not KILL.inside("/system.slice/docker-4f6b")
    (stray,) = pressure.kills("[1.0] " + MEMCG.replace(f"task_memcg={SCOPE}", "task_memcg=/init.scope"))
    assert not stray.inside(SCOPE)
    (machines,) = pressure.kills("[1.0] " + GLOBAL)
    assert not machines.inside("/")


def test_silence() -> None:
    assert pressure.silence([0, 1, 2, 7, 8, 11], over=1.5) == Silence(longest=5, total=8)
    assert pressure.silence([0, 1, 2], over=1.5) == Silence(longest=1, total=0)


@pytest.mark.parametrize("times", [[], [1.0], [1.0, 0.5]])
def test_no_silence_without_times(times: list[float]) -> None:
    with pytest.raises(ValueError, match=r"times (have|go)"):
        pressure.silence(times, over=1)


@pytest.mark.parametrize("headroom", [0, 16 * MIB])
def test_the_smallest_limit_leaves_no_room(headroom: int) -> None:
    least = pressure.smallest_limit(beside=70 * MIB, headroom=headroom)
    assert 0 <= pressure.room(least, beside=70 * MIB, headroom=headroom) <= 1
    assert pressure.room(least - MIB, beside=70 * MIB, headroom=headroom) < 0


def test_a_nanny_alone_needs_nearly_1400_mib() -> None:
    """1 GiB: the kernel, 2 GiB: the nanny, as seen on machines of those sizes."""
    least = pressure.smallest_limit(beside=68 * MIB)
    assert least == pytest.approx(1360 * MIB, abs=2)
    assert GIB < least < 1.6 * GIB


def test_the_least_headroom_is_just_enough() -> None:
    headroom = pressure.least_headroom(GIB, beside=70 * MIB)
    assert pressure.room(GIB, beside=70 * MIB, headroom=headroom) >= 0
    assert pressure.room(GIB, beside=70 * MIB, headroom=headroom - 2) < 0
    assert pressure.least_headroom(4 * GIB, beside=70 * MIB) == 0
    assert pressure.smallest_limit(beside=MIB, headroom=GIB) == 0
