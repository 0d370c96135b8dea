"""What is said of workers' limits: by example, and for any cluster."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from ami_builder.core.units import GIB, MIB
from ami_builder.doctor.rules import (
    RUNTIME,
    CgroupLimit,
    Diagnosis,
    Growth,
    Health,
    Reading,
    Worker,
    diagnose,
)

PAGE = 4096
HELD = {"worker": 100 * MIB, "nanny": 64 * MIB}


def reading(limit: int | None, **more: object) -> Reading:
    plain = Reading(
        boot="one",
        limit=limit,
        nthreads=2,
        total=8 * GIB,
        available=7 * GIB - sum(HELD.values()),
        processes=HELD,
        nanny_process="nanny",
        target=0.6,
        spill=0.7,
        pause=0.8,
        terminate=0.95,
        spill_system="ext4",
    )
    return replace(plain, **more)  # type: ignore[arg-type]


def judged(*readings: Reading) -> tuple[Diagnosis, ...]:
    return diagnose([Worker(address=f"w{n}", reading=each) for n, each in enumerate(readings)])


def healths(*readings: Reading) -> list[Health]:
    return [each.health for each in judged(*readings)]


def test_what_was_available_before_dask_started_is_right() -> None:
    (one,) = judged(reading(7 * GIB))
    assert (one.health, one.advised, one.excess, one.warnings) == (Health.RIGHT, None, None, ())


def test_none_and_0_are_missing_and_the_advice_is_what_is_available() -> None:
    for limit in (None, 0):
        (one,) = judged(reading(limit))
        assert (one.health, one.advised) == (Health.MISSING, 7 * GIB)


def test_the_whole_machine_is_too_high_however_large_it_is() -> None:
    (one,) = judged(reading(8 * GIB))
    assert (one.health, one.advised, one.excess) == (Health.TOO_HIGH, 7 * GIB, GIB)
    assert "all memory of the machine" in one.reason
    large = 24 * 1024 * GIB
    assert healths(reading(large, total=large, available=large - GIB)) == [Health.TOO_HIGH]
    assert healths(reading(large - GIB, total=large, available=large - GIB)) == [Health.RIGHT]


def test_dask_divides_the_whole_machine_among_workers_and_drops_fractions_of_bytes() -> None:
    total = 8 * GIB + 1
    auto = int(total / 3)
    assert (
        healths(*[reading(auto, total=total, available=total - 50 * MIB, processes={})] * 3)
        == [Health.TOO_HIGH] * 3
    )


def test_a_reading_s_noise_is_no_fault() -> None:
    assert healths(reading(7 * GIB + 7 * GIB // 200)) == [Health.RIGHT]
    assert healths(reading(7 * GIB + 7 * GIB // 50)) == [Health.TOO_HIGH]


def test_workers_of_a_machine_share_it_and_the_greedy_one_is_blamed() -> None:
    own = {"a": 100 * MIB}, {"b": 100 * MIB}
    available = 7 * GIB - 200 * MIB
    modest, greedy = judged(
        reading(3 * GIB, processes=own[0], available=available),
        reading(6 * GIB, processes=own[1], available=available),
    )
    assert modest.health is Health.RIGHT
    assert (greedy.health, greedy.advised, greedy.excess) == (Health.TOO_HIGH, 7 * GIB // 2, 5 * GIB // 2)
    assert healths(reading(6 * GIB), reading(6 * GIB, boot="two")) == [Health.TOO_LOW] * 2


def test_one_process_with_several_workers_is_counted_once() -> None:
    assert healths(*[reading(7 * GIB // 4)] * 4) == [Health.RIGHT] * 4


def test_a_quarter_of_the_machine_is_needlessly_low_and_a_reserve_is_not() -> None:
    (low,) = judged(reading(2 * GIB))
    assert (low.health, low.advised, low.excess) == (Health.TOO_LOW, 7 * GIB, -5 * GIB)
    assert healths(reading(7 * GIB - 600 * MIB)) == [Health.RIGHT]


def test_more_than_the_cgroup_allows_is_too_high_and_a_page_is_rounding() -> None:
    levels = (CgroupLimit(id="1", path="/sys/fs/cgroup", limit=2 * GIB),)
    (one,) = judged(reading(4 * GIB, levels=levels))
    assert (one.health, one.advised, one.excess) == (Health.TOO_HIGH, 2 * GIB, 2 * GIB)
    assert healths(reading(2 * GIB + PAGE - 1, levels=levels)) == [Health.RIGHT]
    assert healths(reading(2 * GIB + PAGE + 1, levels=levels)) == [Health.TOO_HIGH]


def test_a_limit_above_the_worker_s_own_cgroup_counts_for_all_below_it() -> None:
    above = CgroupLimit(id="slice", path="/sys/fs/cgroup/dask.slice", limit=3 * GIB)
    both = [
        reading(2 * GIB, levels=(CgroupLimit(id=str(n), path=f"/c{n}", limit=2 * GIB), above))
        for n in range(2)
    ]
    told = judged(*both)
    assert [(each.health, each.advised) for each in told] == [(Health.TOO_HIGH, 3 * GIB // 2)] * 2
    assert "dask.slice" in told[0].reason


def test_a_small_container_on_a_large_machine_is_what_it_is_meant_to_be() -> None:
    levels = (CgroupLimit(id="1", path="/sys/fs/cgroup", limit=2 * GIB),)
    assert healths(reading(2 * GIB, levels=levels)) == [Health.RIGHT]
    assert healths(reading(GIB, levels=levels)) == [Health.TOO_LOW]


def test_who_was_not_read_is_told_apart() -> None:
    told = diagnose([Worker(address="a", silent=True, problem="late"), Worker(address="b", problem="a Mac")])
    assert [(each.health, each.reason) for each in told] == [
        (Health.NO_ANSWER, "late"),
        (Health.UNKNOWN, "a Mac"),
    ]


def warned(one: Reading) -> str:
    return " | ".join(judged(one)[0].warnings)


def test_warnings() -> None:
    level = CgroupLimit(id="1", path="/sys/fs/cgroup", limit=2 * GIB)
    assert "spills to tmpfs (/tmp/x)" in warned(reading(7 * GIB, spill_system="tmpfs", directory="/tmp/x"))
    assert "may use swap" in warned(reading(2 * GIB, levels=(level,), swap=GIB))
    assert "may use swap" not in warned(reading(2 * GIB, levels=(replace(level, swap=0),), swap=GIB))
    assert "no nanny" in warned(reading(7 * GIB, nanny=False))
    assert "terminate is off" in warned(reading(7 * GIB, terminate=None))
    assert "spill is off" in warned(reading(7 * GIB, spill=None))


def test_a_nanny_that_does_not_fit_into_the_last_5_percent_comes_too_late() -> None:
    small = CgroupLimit(id="1", path="/sys/fs/cgroup", limit=GIB)
    text = warned(reading(GIB, levels=(small,)))
    assert "the kernel kills it before its nanny does" in text
    remedy = int(text.split("a limit of ")[1].split()[0])
    assert remedy % PAGE == 0
    assert remedy * 0.95 + HELD["nanny"] <= GIB
    assert warned(reading(remedy, levels=(small,))) == ""
    assert warned(reading(4 * GIB, levels=(replace(small, limit=4 * GIB),))) == ""


def test_a_scheduler_in_the_worker_s_container_is_in_its_limit() -> None:
    limit = 7 * GIB - sum(HELD.values())
    alone = reading(limit, available=limit - sum(HELD.values()) - 90 * MIB)
    container = CgroupLimit(id="1", path="/sys/fs/cgroup", limit=limit, held=sum(HELD.values()) + 90 * MIB)
    assert healths(replace(alone, available=alone.available - GIB)) == [Health.TOO_HIGH]
    assert healths(replace(alone, levels=(container,))) == [Health.RIGHT]
    # As one of our 2 GiB machines told: what Docker and Compose themselves take came after measuring.
    small = {"total": 2064457728, "available": 1645735936}
    own = CgroupLimit(id="1", path="/sys/fs/cgroup", limit=1791090688, held=118812648)
    ours = reading(1791090688, **small, processes={"w": 36597760, "nanny": 36134912}, levels=(own,))
    assert healths(ours) == [Health.RIGHT]
    assert healths(replace(ours, available=ours.available - 10 * MIB)) == [Health.TOO_HIGH]
    # Two workers in there hold it once; and what a cgroup around it holds is not all Dask's.
    above = CgroupLimit(id="pods", path="/pods", limit=8 * GIB, held=4 * GIB)
    half = replace(alone, limit=limit // 2, levels=(container, above))
    assert healths(half, half) == [Health.RIGHT] * 2
    assert healths(replace(half, limit=limit * 3 // 4), half) == [Health.TOO_HIGH, Health.RIGHT]


def test_a_worker_in_a_cgroup_around_another_s_holds_it_too() -> None:
    inner = CgroupLimit(id="in", path="/out/in", limit=3 * GIB, held=2 * GIB)
    outer = CgroupLimit(id="out", path="/out", limit=6 * GIB, held=3 * GIB)
    both = (
        reading(3 * GIB, available=2 * GIB, levels=(inner, outer)),
        reading(3 * GIB, available=2 * GIB, levels=(outer,)),
    )
    assert healths(*both) == [Health.TOO_HIGH] * 2
    assert [each.advised for each in judged(*both)] == [5 * GIB // 2] * 2


def test_what_else_is_in_the_container_makes_a_nanny_late() -> None:
    level = CgroupLimit(id="1", path="/c", limit=4 * GIB, held=sum(HELD.values()))
    assert warned(reading(4 * GIB, levels=(level,))) == ""
    assert "what else runs there" in warned(reading(4 * GIB, levels=(replace(level, held=GIB),)))


@st.composite
def clusters(draw: st.DrawFn) -> list[Worker]:
    """Machines on which the system takes 2 % and more, with workers, some in containers or a slice."""
    workers: list[Worker] = []
    for boot in range(draw(st.integers(1, 3))):
        total = draw(st.integers(512 * MIB, 64 * GIB))
        held = draw(st.integers(64 * MIB, total // 4))
        available = draw(st.integers(0, int(total * 0.98) - held))
        sizes = st.integers(32 * MIB, 2 * total)
        top = (CgroupLimit(id="top", path="/top", limit=draw(sizes)),) if draw(st.booleans()) else ()
        for group in range(draw(st.integers(1, 3))):
            full = draw(st.just(0) | st.integers(held, total - available))
            own = (
                (CgroupLimit(id=str(group), path=f"/{group}", limit=draw(sizes), held=full),)
                if draw(st.booleans())
                else ()
            )
            for _ in range(draw(st.integers(1, 3))):
                one = reading(
                    draw(st.none() | sizes),
                    boot=str(boot),
                    total=total,
                    available=available,
                    processes={"all": held},
                    nanny_process=None,
                    nthreads=draw(st.integers(1, 64)),
                    levels=own + top,
                )
                workers.append(Worker(address=str(len(workers)), reading=one))
    return workers


def advised(each: Diagnosis) -> Worker:
    assert each.worker.reading is not None
    limit = each.worker.reading.limit if each.advised is None else each.advised
    return replace(each.worker, reading=replace(each.worker.reading, limit=limit))


@given(clusters())
def test_advice_that_all_follow_leaves_no_limit_missing_or_too_high(workers: list[Worker]) -> None:
    told = diagnose(workers)
    assert [each.worker for each in told] == workers
    followed = diagnose([advised(each) for each in told])
    wrong = {Health.MISSING, Health.TOO_HIGH}
    assert not [each for each in followed if each.health in wrong]


@given(clusters())
def test_advice_is_whole_pages_and_on_the_right_side_of_the_limit(workers: list[Worker]) -> None:
    for each in diagnose(workers):
        assert each.worker.reading is not None
        limit = each.worker.reading.limit
        assert (each.advised is None) == (each.health is Health.RIGHT)
        assert (each.health is Health.MISSING) == (not limit)
        if each.advised is not None:
            assert each.advised % PAGE == 0
            if limit:
                assert each.excess == limit - each.advised
                assert (each.excess > 0) == (each.health is Health.TOO_HIGH)


@given(clusters())
def test_limits_that_exceed_a_machine_are_never_all_right(workers: list[Worker]) -> None:
    told = diagnose(workers)
    for boot in {w.reading.boot for w in workers if w.reading}:
        here = [each for each in told if each.worker.reading and each.worker.reading.boot == boot]
        first = here[0].worker.reading
        assert first is not None
        limits = sum(each.worker.reading.limit or 0 for each in here if each.worker.reading)
        readings = [each.worker.reading for each in here if each.worker.reading]
        held = {name: size for one in readings for name, size in one.processes.items()}
        held |= {level.id: level.held for one in readings for level in one.levels}
        capacity = first.available + sum(held.values())
        if limits > capacity + max(capacity // 50, RUNTIME) + PAGE:
            assert any(each.health is Health.TOO_HIGH for each in here)


def test_a_machine_that_can_not_give_what_the_limit_promises_is_a_warning() -> None:
    (one,) = judged(reading(7 * GIB, available=7 * GIB - 300 * MIB - sum(HELD.values())))
    assert one.health is Health.TOO_HIGH
    (warning,) = one.warnings
    assert warning.startswith("its machine can give 300 MiB less than the limits promise")
    assert judged(reading(7 * GIB))[0].warnings == ()


def test_a_machine_says_who_has_grown() -> None:
    grown = Growth(reserve=32 * MIB, growth=122 * MIB, excess=90 * MIB, by={"agent.service": 61 * MIB})
    (one,) = judged(reading(7 * GIB, available=7 * GIB - 90 * MIB - sum(HELD.values()), growth=grown))
    assert one.health is Health.TOO_HIGH
    (warning,) = one.warnings
    assert "90 MiB less" in warning
    assert "122 MiB since Dask started (agent.service +61 MiB)" in warning


def test_growth_that_a_machine_does_not_report_is_no_warning() -> None:
    grown = Growth(reserve=0, growth=60 * MIB, excess=60 * MIB, by={})
    (one,) = judged(reading(7 * GIB, available=7 * GIB - 60 * MIB - sum(HELD.values()), growth=grown))
    assert (one.health, one.warnings) == (Health.RIGHT, ())
    assert [grown.is_news(total) for total in (4 * GIB, 8 * GIB)] == [True, False]


def test_a_limit_that_has_followed_its_machine_down_is_right() -> None:
    """The kernel's limit is as low, and the worker has no more to get."""
    low, left = 5 * GIB, 5 * GIB + 10 * MIB
    level = CgroupLimit(id="a", path="/sys/fs/cgroup", limit=low, swap=0, held=sum(HELD.values()))
    grown = Growth(reserve=32 * MIB, growth=2 * GIB, excess=-10 * MIB, by={})
    (one,) = judged(
        reading(low, available=left - sum(HELD.values()), levels=(level,), growth=grown, nanny_process=None)
    )
    assert (one.health, one.warnings) == (Health.RIGHT, ())
