"""Parsing of what a VM wrote, the criteria on invented runs, and the recorded runs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ami_builder.core.oom import kills
from ami_builder.core.units import GIB, MIB
from ami_builder.system import processes
from tests.experiment import results
from tests.experiment.cases import TWO_PERCENT, LimitPolicy, Work
from tests.experiment.criteria import (
    MOST_SECONDS,
    PUBLISHED,
    Grade,
    groups,
    is_unaffected,
    judge,
    without_control,
)
from tests.experiment.criteria import given as system_gave
from tests.experiment.docs import (
    LAYERS_PLOT,
    PAGE,
    PLOT,
    curves,
    layer_curves,
    layers_plot,
    plot,
    recorded,
    with_tables,
)
from tests.experiment.findings import notes, shares
from tests.experiment.results import LoginTry, Tick
from tests.experiment.samples import BAD, GOOD, SAME, result


def tick(uptime: float, held: int = 0) -> Tick:
    return Tick(uptime=uptime, held=held, available=0, some=0.0, full=0.0)


CONSOLE = """\
[    9.000000] something\r
tick 10.100 5 700 1000000 500000 .\r
\r
tick 10.2[   10.2] Out of memory: Killed process 12 (python) total-vm:1kB
01 6 6 1 1 .\r
[   10.25] Memory cgroup out of memory: Killed process 13 (python) total-vm:1kB\r
tick 10.301 6 699 1000000 500000 .\r
tick 10.4 6"""


def test_ticks_between_lines_of_the_kernel() -> None:
    assert results.ticks(CONSOLE) == (
        Tick(uptime=10.1, held=5, available=700, some=1.0, full=0.5),
        Tick(uptime=10.301, held=6, available=699, some=1.0, full=0.5),
    )


def test_kills_are_counted_on_the_console() -> None:
    assert results.console_kills(CONSOLE) == (1, 1)


def test_the_ticker_s_output_can_be_parsed(tmp_path: Path) -> None:
    out = tmp_path / "console"
    ticker = Path(results.__file__).with_name("ticker.py")
    began = time.clock_gettime(time.CLOCK_BOOTTIME)
    with subprocess.Popen([sys.executable, ticker, out]) as process:
        try:
            processes.wait_until(
                lambda: out.exists() and len(results.ticks(out.read_text())) >= 3, what="ticks", timeout=120
            )
        finally:
            process.kill()
    first, second, *_ = results.ticks(out.read_text())
    assert began < first.uptime < second.uptime - 0.09
    assert second.uptime < time.clock_gettime(time.CLOCK_BOOTTIME)
    assert first.available > 0
    assert second.some >= second.full >= 0


def test_a_stall_at_the_end_counts() -> None:
    inside = results.watched([tick(1), tick(10), tick(10.1), tick(40)], 10, 20)
    assert [one.uptime for one in inside] == [10, 10.1]
    longest, total = results.stalls(inside, 10, 20)
    assert longest == total == pytest.approx(19.9)
    with pytest.raises(ValueError, match="no tick"):
        results.watched([tick(1)], 10, 20)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50), st.floats(0.1, 100))
def test_stalls_are_never_longer_than_the_work(times: list[float], seconds: float) -> None:
    inside = [tick(time) for time in sorted(times) if time <= seconds]
    if inside:
        longest, total = results.stalls(inside, 0.0, seconds)
        assert 0 <= longest <= seconds + 1e-9
        assert total <= seconds + 1e-6


def test_memory_held_before_the_first_stall() -> None:
    held = [tick(0, 5), tick(0.1, 9), tick(0.2, 7), tick(3, 100)]
    assert results.held_before_stall(held) == 9
    assert results.held_before_stall(held[:1]) == 5


def test_memory_held_before_a_long_stall_or_a_system_wide_kill() -> None:
    held = [tick(0, 5), tick(3, 9), tick(6, 11), tick(12, 100)]
    assert results.held_before_long_stall(held, "") == 11
    assert results.held_before_long_stall(held, "[    3.5] Out of memory: Killed process 7 (python)") == 9
    assert results.held_before_long_stall(held, "[  3.5] Memory cgroup out of memory: Killed process 7") == 11


def test_a_wait_for_a_login_goes_on_until_one_is_answered() -> None:
    tries = [(0, 1, True), (2, 12, False), (14, 24, False), (26, 27, True), (29, 39, False)]
    logins = [LoginTry(began=b, ended=e, answered=a) for b, e, a in tries]
    assert results.waits(logins) == (25, 35)
    assert results.waits([]) == (0.0, 0.0)
    stolen = [replace(login, denied=denied) for login, denied in zip(logins, (0, 3, 4, 1, 0), strict=True)]
    assert results.longest_own_wait(stolen) == 25 - 8


HEAD = "dask kernel: oom-kill:constraint=CONSTRAINT"
BODY = "nodemask=(null),cpuset=/,mems_allowed=0"
BOX = "/system.slice/docker-a.scope"
KERNEL = f"""\
[   35.1] dask kernel: python3 invoked oom-killer: gfp_mask=0x140cca(GFP_HIGHUSER_MOVABLE), order=0
[   35.2] {HEAD}_MEMCG,{BODY},oom_memcg={BOX},task_memcg={BOX},task=python,pid=900,uid=0
[   36.2] {HEAD}_NONE,{BODY},global_oom,task_memcg={BOX},task=python,pid=901,uid=0
[   37.2] {HEAD}_NONE,{BODY},global_oom,task_memcg=/system.slice/ssh.service,task=sshd,pid=300,uid=0
"""


def test_kills_are_counted_by_cause_and_process() -> None:
    assert results.counted(kills(KERNEL)) == (2, 2, 1, ("sshd",))


def test_a_trace_is_short_and_keeps_its_peaks() -> None:
    ticks = [tick(n / 10, held=n % 97) for n in range(4000)]
    thin = results.trace(ticks, 0.0, [(1.5, "paused")])
    assert len(thin.times) <= 410
    assert max(thin.held) == 96
    assert thin.marks == ((1.5, "paused"),)


def answers(runs: tuple[results.Result, ...]) -> dict[str, Grade]:
    return {one.text: one.grade for one in judge(runs)}


def test_good_runs_pass_all_criteria() -> None:
    assert set(answers(GOOD).values()) == {Grade.PASSED}, answers(GOOD)


def test_bad_runs_fail_each_criterion() -> None:
    found = answers(BAD)
    passed = [text for text, answer in found.items() if answer is not Grade.FAILED]
    assert [text for text in passed if "login" not in text and "without a limit, the same" not in text] == []
    assert found["reserve 0: no ssh login fails"] is Grade.PASSED


def test_what_was_not_run_is_not_shown() -> None:
    found = answers(GOOD[3:6])
    assert found["without a limit, the same work fails one of these"] is Grade.NOT_SHOWN
    assert (
        found["1 GiB, 2 CPUs, reserve 0: W1 takes at most 1.15 × as long as without a limit"]
        is Grade.NOT_SHOWN
    )


def test_without_stalls_no_benefit_is_shown() -> None:
    found = answers(SAME)
    assert (
        found["8 GiB, 2 CPUs, reserve 0: W3 stalls for at most 1/10 of the time without a limit"]
        is Grade.NOT_SHOWN
    )
    assert found["without a limit, the same work fails one of these"] is Grade.FAILED
    assert any("no difference" in line for line in notes(SAME))
    assert any("10 restarts of the worker with the limit, 0 without" in line for line in notes(SAME))


def test_an_array_that_is_not_finished_is_not_fast() -> None:
    short = (GOOD[6], replace(GOOD[7], seconds=10.0, failed=1))
    text = "1 GiB, 2 CPUs, reserve 0: W1 takes at most 1.15 × as long as without a limit"
    assert answers(short)[text] is Grade.FAILED


def test_the_default_reserve_is_judged_where_it_was_run() -> None:
    def judged(*extra: results.Result) -> dict[str, Grade]:
        grades = answers((*GOOD, *extra))
        return {text: answer for text, answer in grades.items() if "reserve 2 %" in text}

    given_it = [replace(one, case=replace(one.case, policy=TWO_PERCENT)) for one in (GOOD[3], GOOD[7])]
    assert judged() == {}
    well = judged(*given_it)
    assert set(well.values()) == {Grade.PASSED}
    assert len(well) == 8
    worse: dict[str, Any] = {
        "done": 100, "stalled": 20.0, "seconds": 200.0, "limit": 700 * MIB,
        "system_oom_kills": 1, "longest_stall": 5.1, "ssh_failed": 1, "killed_outside": ("sshd",),
    }  # fmt: skip
    failed = judged(*(replace(one, **worse) for one in given_it))
    assert set(failed.values()) == {Grade.FAILED}
    assert set(failed) == set(well)


def test_the_control_is_not_judged() -> None:
    control = result(work=Work.RESTARTS, system_oom_kills=1, ssh_failed=1, longest_stall=9.0)
    assert judge((*GOOD, control)) == judge(GOOD)
    assert shares((*GOOD, control)) == shares(GOOD)
    assert len(groups((*GOOD, control))) == len(groups(GOOD)) + 1


def test_one_failed_login_counts_as_affected() -> None:
    assert is_unaffected(result())
    for effect in (
        {"ssh_failed": 1},
        {"system_oom_kills": 1},
        {"killed_outside": ("x",)},
        {"longest_stall": 5.1},
    ):
        assert not is_unaffected(result(**effect)), effect


def test_what_dask_may_use_of_what_the_system_gives() -> None:
    assert system_gave((GIB, 2), GOOD) == 750 * MIB
    found = {one.policy: one for one in shares(GOOD)}
    assert found[LimitPolicy.AVAILABLE].of_given == pytest.approx(740 / 750)
    assert found[LimitPolicy.NONE].of_given == pytest.approx(980 / 750)
    assert found[LimitPolicy.NONE].affected == 4
    assert found[LimitPolicy.AVAILABLE].affected == 0


def test_a_stall_long_before_the_limit_shows_no_share() -> None:
    early = (GOOD[3], replace(GOOD[8], held_before_stall=500 * MIB))
    text = "1 GiB, 2 CPUs, reserve 0: Dask may use at least 95 % of what the system can give"
    assert answers(early)[text] is Grade.NOT_SHOWN


def test_notes_on_what_the_limit_costs() -> None:
    text = " ".join(notes(BAD))
    assert "100 tasks fail or don't end with the limit, 50 without" in text
    assert "the work takes 130 s with the limit, 100 s without" in text
    assert "something else was affected despite the limit, in 2 of 2 runs" in text


def test_a_run_that_was_cut_short_does_not_make_the_work_fast() -> None:
    cut = replace(GOOD[6], case=replace(GOOD[6].case, repeat=2), seconds=10.0, unfinished=1)
    assert "the work takes 110 s with the limit, 100 s without" in " ".join(notes((*GOOD, cut)))
    assert "the work takes" not in " ".join(notes((GOOD[7], cut)))


def test_rows_are_in_the_order_of_machines_work_and_policies() -> None:
    found = [(row.kind, row.work, row.policy, row.runs) for row in groups((*SAME, *reversed(GOOD)))]
    assert found == [
        ((GIB, 2), Work.ARRAY, LimitPolicy.NONE, 1),
        ((GIB, 2), Work.ARRAY, LimitPolicy.AVAILABLE, 1),
        ((GIB, 2), Work.LEAK_FAST, LimitPolicy.NONE, 1),
        ((GIB, 2), Work.SPIKES, LimitPolicy.NONE, 3),
        ((GIB, 2), Work.SPIKES, LimitPolicy.AVAILABLE, 3),
        ((8 * GIB, 2), Work.SPIKES, LimitPolicy.NONE, 2),
        ((8 * GIB, 2), Work.SPIKES, LimitPolicy.AVAILABLE, 2),
    ]


def test_recorded_grades() -> None:
    runs = recorded()
    found = answers(runs)
    stalled = "W3 stalls for at most 1/10 of the time without a limit"
    asked_for = (
        "W3 completes at least as many tasks as without a limit",
        stalled,
        "W1 takes at most 1.15 × as long as without a limit",
        "Dask may use at least 95 % of what the system can give",
    )
    reserves = ("reserve 0", "reserve 2 %")
    assert {text: answer for text, answer in found.items() if text.startswith("2 GiB")} == {
        f"2 GiB, 2 CPUs, {reserve}: {text}": Grade.PASSED for reserve, text in product(reserves, asked_for)
    }
    assert found[f"4 GiB, 2 CPUs, reserve 0: {stalled}"] is Grade.PASSED
    assert found[f"8 GiB, 2 CPUs, reserve 0: {stalled}"] is Grade.NOT_SHOWN
    assert [text for text, answer in found.items() if answer is Grade.FAILED] == [
        "reserve 0: no system-wide OOM kill",
        "reserve 0: no stall and no wait for ssh of more than 5 s",
        "reserve 0: no ssh login fails",
        "reserve 2 %: no stall and no wait for ssh of more than 5 s",
    ]


def test_recorded_nannies_on_1_gib() -> None:
    runs = recorded()
    control = [r for r in runs if r.case.work is Work.RESTARTS]
    assert [r.case.memory for r in control] == [GIB] * PUBLISHED
    assert all(r.ssh_longest < 1.4 and not r.psi_some for r in control)
    nanny = [r for r in runs if r.case.policy is LimitPolicy.NANNY]
    assert Counter(r.case.work for r in nanny) == dict.fromkeys((Work.SPIKES, Work.LEAK_FAST), PUBLISHED)
    assert all(r.case.memory == GIB and is_unaffected(r) and r.by_nanny and not r.by_kernel for r in nanny)
    assert max(r.ssh_longest for r in nanny) == pytest.approx(4, abs=0.05)


def test_recorded_default_reserve() -> None:
    runs = recorded()
    agent = [r for r in runs if r.case.work is Work.AGENT]
    assert {r.case.policy for r in agent if r.system_oom_kills or r.ssh_failed} == {LimitPolicy.AVAILABLE}
    assert all(r.stalled < 2 for r in agent if r.case.policy is TWO_PERCENT)
    default = [r for r in without_control(runs) if r.case.policy is TWO_PERCENT]
    assert {r.case.work for r in default if r.case.memory == 2 * GIB} == set(Work) - {Work.RESTARTS}
    assert all(r.longest_stall < 3 for r in default)
    assert [r.ssh_longest > MOST_SECONDS for r in default].count(True) == 4
    used = {one.policy: one.of_given for one in shares(runs) if one.kind == (2 * GIB, 2)}
    assert all((used[policy] or 0) > 0.95 for policy in (LimitPolicy.AVAILABLE, LimitPolicy.HEADROOM_2))
    assert (used[LimitPolicy.HEADROOM] or 1) < 0.95


def test_recorded_limit_in_w3() -> None:
    limited = (LimitPolicy.AVAILABLE, TWO_PERCENT)
    runs = recorded()
    spikes = [r for r in runs if r.case.work is Work.SPIKES and r.case.policy in limited]
    assert all(r.done == 200 for r in spikes)
    assert [r.longest_stall for r in spikes if r.longest_stall >= 1] == [2.79], "once, on 1 GiB"
    assert all(r.case.memory < 2 * GIB for r in spikes if r.longest_stall >= 1)
    late = [r for r in spikes if r.ssh_longest > MOST_SECONDS]
    assert sorted((r.case.memory // GIB, r.case.policy) for r in late) == [
        (1, LimitPolicy.AVAILABLE), (1, TWO_PERCENT), (1, TWO_PERCENT), (2, LimitPolicy.AVAILABLE),
    ]  # fmt: skip
    assert all(r.ssh_late == r.ssh_longest for r in late), "one login each"
    counts = Counter((r.case.memory // GIB, r.case.policy) for r in spikes if r.case.memory <= 4 * GIB)
    assert counts == dict.fromkeys(product((1, 2, 4), limited), PUBLISHED)


def test_recorded_w4() -> None:
    runs = recorded()
    matrix = [r for r in runs if r.case.work is Work.MATRIX and r.seconds > 300]
    assert Counter(r.case.policy for r in matrix) == {
        LimitPolicy.NONE: 4,
        LimitPolicy.AVAILABLE: 4,
        TWO_PERCENT: PUBLISHED,
    }
    assert all(
        r.done == 16 and not r.system_oom_kills for r in matrix if r.case.policy is not LimitPolicy.NONE
    )
    unlimited = [(r.done, r.system_oom_kills) for r in matrix if r.case.policy is LimitPolicy.NONE]
    assert sorted(unlimited) == [(0, 3), (9, 3), (16, 0), (16, 0)]


def test_recorded_runs_without_a_limit() -> None:
    runs = recorded()
    kinds = Counter((r.case.memory // GIB, r.case.work, r.case.policy) for r in runs)
    assert {kind for kind, count in kinds.items() if count < PUBLISHED} == set()
    unlimited = [r for r in runs if r.case.policy is LimitPolicy.NONE]
    leaks = [r for r in unlimited if r.case.work in (Work.LEAK_SLOW, Work.LEAK_FAST)]
    assert not any(is_unaffected(r) for r in leaks)
    assert all(r.system_oom_kills == r.by_kernel == 4 for r in leaks if r.case.memory == 4 * GIB)
    fraction = [r for r in runs if r.case.policy is LimitPolicy.FRACTION]
    assert sorted((r.done, r.system_oom_kills) for r in fraction) == [(1, 0), (1, 0), (2, 0), (2, 0), (85, 1)]
    cpu_steal = [*leaks, *(r for r in unlimited if r.case.work is Work.SPIKES)]
    killed = [r.system_oom_kills for r in cpu_steal if r.case.memory <= 2 * GIB and r.seconds < 200]
    assert len(killed) == 24
    assert killed.count(0) == 19
    large = [r for r in runs if r.case.memory == 8 * GIB]
    assert all(r.done == 200 and is_unaffected(r) for r in large)
    assert sorted((r.case.policy, r.stalled) for r in large if r.stalled) == [
        (LimitPolicy.NONE, 1.05), (LimitPolicy.NONE, 1.25),
    ]  # fmt: skip


def test_recorded_memory_before_a_stall_on_1_gib() -> None:
    runs = recorded()
    leaks = [r for r in runs if r.case.memory == GIB and r.case.work is Work.LEAK_FAST]
    held = [round(r.held_before_stall / MIB) for r in leaks if r.case.policy is LimitPolicy.NONE]
    assert sorted(held) == [494, 501, 536, 554, 737]
    limited = [r.stalled for r in leaks if r.case.policy is LimitPolicy.AVAILABLE and r.stalled]
    assert sorted(limited) == [1.15, 1.66]
    text = "Dask may use at least 95 % of what the system can give"
    found = answers(runs)
    for reserve in ("reserve 0", "reserve 2 %"):
        assert found[f"1 GiB, 2 CPUs, {reserve}: {text}"] is Grade.NOT_SHOWN


def test_docs_are_made_from_the_recorded_runs() -> None:
    """Otherwise run `python -m tests.experiment --docs`."""
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- recorded: ") == 6
    assert with_tables(page) == page
    assert PLOT.read_text(encoding="utf-8") == plot()
    assert LAYERS_PLOT.read_text(encoding="utf-8") == layers_plot()


def test_the_memory_of_the_plots_belongs_to_the_runs() -> None:
    assert len([*curves()]) == len([*layer_curves()]) == 2
    for run, curve in (*curves(), *layer_curves()):
        assert max(curve.held) == pytest.approx(run.peak, abs=10 * MIB)
        assert max(curve.times) <= run.seconds
        assert len(curve.lost) in (0, run.by_nanny + run.by_kernel)
