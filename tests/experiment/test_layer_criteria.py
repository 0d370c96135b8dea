"""The criteria for layers of defence, on invented runs."""

from __future__ import annotations

from itertools import product

import pytest

from ami_builder.core.units import GIB, MIB
from tests.experiment.cases import LimitPolicy, Work
from tests.experiment.criteria import PUBLISHED, Grade
from tests.experiment.docs import recorded_layers
from tests.experiment.layer_criteria import KINDS, WORKS, above_rest, judge_layers
from tests.experiment.results import Result
from tests.experiment.samples import result


def run(**changes: object) -> Result:
    values: dict[str, object] = {
        "layers": "image", "ssh_rest": 1.5, "container": 740 * MIB, "held_before_long_stall": 750 * MIB,
    }  # fmt: skip
    return result(**(values | changes))


TIMES = tuple(product(KINDS, WORKS, range(1, PUBLISHED + 1)))
SETTINGS = "1 GiB, 2 CPUs, default settings"
TEN_SECONDS = "no limit: no login takes 10 s longer than at rest"
DEFAULT, NONE = LimitPolicy.DEFAULT, LimitPolicy.NONE
GOOD = (
    *(run(policy=DEFAULT, work=work, memory=memory, repeat=n) for (memory, _), work, n in TIMES),
    *(
        run(policy=NONE, work=work, memory=memory, repeat=n, ssh_longest=11.0, system_oom_kills=4)
        for (memory, _), work, n in TIMES
    ),
    *(run(policy=DEFAULT, work=work, layers="off") for work in (Work.ARRAY, Work.MATRIX)),
)


def grades(*runs: Result) -> dict[str, Grade]:
    return {one.text: one.grade for one in judge_layers(runs)}


def test_good_runs_pass() -> None:
    found = grades(*GOOD)
    assert len(found) == 4 * 5 + 3 + 2
    assert set(found.values()) == {Grade.PASSED}, found


def test_nothing_is_shown_without_runs_or_with_too_few() -> None:
    assert set(grades().values()) == {Grade.NOT_SHOWN}
    few = (GOOD[0], next(one for one in GOOD if one.case.policy is NONE))
    assert set(grades(*few).values()) - {Grade.PASSED} == {Grade.NOT_SHOWN}
    assert [text for text, grade in grades(*few).items() if grade is Grade.PASSED] == []


@pytest.mark.parametrize(
    ("policy", "changes", "text"),
    [
        (DEFAULT, {"system_oom_kills": 1}, f"{SETTINGS}: no system-wide OOM kill"),
        (DEFAULT, {"ssh_failed": 1}, f"{SETTINGS}: no login fails"),
        (
            DEFAULT,
            {"ssh_longest": 6.6},
            f"{SETTINGS}: no login takes 5 s longer than at rest",
        ),
        (NONE, {"ssh_failed": 1}, "no limit: no login fails"),
        (NONE, {"killed_outside": ("sshd",)}, "no limit: no process outside the container is killed"),
        (
            NONE,
            {"ssh_longest": 3.0, "ssh_above_rest": 10.1},
            TEN_SECONDS,
        ),
        (NONE, {"ssh_longest": 11.6}, TEN_SECONDS),
    ],
)
def test_one_bad_run_fails(policy: LimitPolicy, changes: dict[str, object], text: str) -> None:
    found = grades(*GOOD, run(policy=policy, repeat=9, **changes))
    assert [name for name, grade in found.items() if grade is not Grade.PASSED] == [text]


def test_less_than_97_percent_or_a_slower_work_fails() -> None:
    less = [run(policy=DEFAULT, repeat=n, container=700 * MIB) for n in range(10, 60)]
    text = f"{SETTINGS}: Dask gets at least 97 % of what the system could give"
    assert grades(*GOOD, *less)[text] is Grade.FAILED
    fast = run(policy=DEFAULT, work=Work.ARRAY, repeat=1, layers="off", seconds=59.0)
    assert grades(*GOOD, fast)["W1 takes at most 1 % longer with the layers"] is Grade.FAILED
    assert KINDS[0][0] == GIB


def test_the_cost_is_judged_by_cpu_time_where_both_runs_have_it() -> None:
    whole = [run(policy=DEFAULT, work=Work.ARRAY, seconds=90.0, cpu_seconds=100.0)]
    for cpu, grade in ((99.5, Grade.PASSED), (98.0, Grade.FAILED)):
        off = run(policy=DEFAULT, work=Work.ARRAY, layers="off", seconds=60.0, cpu_seconds=cpu)
        assert grades(*whole, off)["W1 takes at most 1 % longer with the layers"] is grade
    old = run(policy=DEFAULT, work=Work.ARRAY, layers="off", seconds=60.0)
    assert grades(*whole, old)["W1 takes at most 1 % longer with the layers"] is Grade.FAILED


def test_runs_of_different_hours_are_no_pair() -> None:
    on = run(policy=DEFAULT, work=Work.ARRAY, when="2026-11-29T12:00:00+00:00", seconds=90.0)
    for began, grade in (("12:59", Grade.FAILED), ("13:01", Grade.NOT_SHOWN), ("10:59", Grade.NOT_SHOWN)):
        when = f"2026-11-29T{began}:00+00:00"
        off = run(policy=DEFAULT, work=Work.ARRAY, layers="off", when=when, seconds=60.0)
        assert grades(on, off)["W1 takes at most 1 % longer with the layers"] is grade


def recorded_run(policy: LimitPolicy, layers: str, work: Work) -> Result:
    wanted = (policy, layers, work)
    return next(r for r in recorded_layers() if (r.case.policy, r.case.layers, r.case.work) == wanted)


def test_recorded_leaks_without_a_limit_on_1_gib() -> None:
    off, ttl, protect, both, scored, whole = (
        recorded_run(NONE, layers, Work.LEAK_FAST)
        for layers in ("off", "ttl", "protect", "ttl+protect", "ttl+oom-score", "ttl+protect-all")
    )
    assert (off.system_oom_kills, off.ssh_failed, round(off.stalled)) == (0, 6, 106)
    assert (protect.ssh_failed, round(protect.stalled)) == (5, 80)
    for guarded in (ttl, both, scored, whole):
        assert guarded.ssh_failed == 0
        assert guarded.system_oom_kills == guarded.by_kernel > 0, "all of them Dask's"
    held = [round((run.held_before_long_stall or 0) / MIB) for run in (ttl, scored, both, whole)]
    assert held == [717, 712, 636, 639]


def test_recorded_default_settings_on_1_gib() -> None:
    for run in (r for r in recorded_layers() if r.case.policy is DEFAULT and r.case.layers == "image"):
        assert (run.system_oom_kills, run.ssh_failed, run.by_kernel) == (0, 0, 0)
        assert above_rest(run) < 5
