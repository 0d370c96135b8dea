"""Runs of an experiment: invented ones, and those of docs/explanation/experiment.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ami_builder.core.units import GIB, MIB
from ami_builder.state import jsonl
from tests.experiment.cases import DEFAULT, METHOD, Case, LimitPolicy, Work
from tests.experiment.criteria import Group, judge, groups, said
from tests.experiment.findings import shares
from tests.experiment.results import Result


def case(**changes: Any) -> Case:
    """Return a case of W3 on 1 GiB."""
    told: dict[str, Any] = {
        "memory": GIB, "cpus": 2, "policy": LimitPolicy.AVAILABLE, "work": Work.SPIKES, "repeat": 1, "seed": 1,
    }  # fmt: skip
    return Case(**(told | {name: value for name, value in changes.items() if name in told}))


def result(**changes: Any) -> Result:
    """Return a run in which nothing was hurt."""
    told: dict[str, Any] = {
        "method": METHOD, "when": "2026-11-25T16:00:00+00:00", "accelerator": "tcg",
        "total": 980 * MIB, "available": 740 * MIB, "limit": 740 * MIB,
        "done": 200, "failed": 0, "unfinished": 0, "came_back": True,
        "seconds": 60.0, "by_nanny": 0, "by_kernel": 9,
        "system_oom_kills": 0, "cgroup_oom_kills": 9, "killed_outside": (), "longest_stall": 0.6, "stalled": 0.0,
        "ssh_tries": 20, "ssh_failed": 0, "ssh_longest": 1.9, "ssh_late": 0.0,
        "psi_some": 2.0,
        "psi_full": 1.0, "spilled": 0, "peak": 730 * MIB, "held_before_stall": 730 * MIB,
        "cpu_steal": 0.3,
    }  # fmt: skip
    known = told | {name: value for name, value in changes.items() if name in told}
    return Result(case=case(**changes), **known)


GOOD = (
    *(result(repeat=n, policy=LimitPolicy.NONE, limit=980 * MIB, done=150, unfinished=50, seconds=600, stalled=80,
             longest_stall=30.0, system_oom_kills=8, cgroup_oom_kills=0, ssh_failed=4, ssh_longest=40.0,
             ssh_late=90.0) for n in (1, 2, 3)),
    *(result(repeat=n) for n in (1, 2, 3)),
    result(policy=LimitPolicy.NONE, work=Work.ARRAY, seconds=100.0, limit=980 * MIB),
    result(work=Work.ARRAY, seconds=110.0),
    result(policy=LimitPolicy.NONE, work=Work.LEAK_FAST, limit=980 * MIB, held_before_stall=750 * MIB, system_oom_kills=4),
)  # fmt: skip
"""What is hoped for."""

BAD = (
    *GOOD[:3],
    *(result(repeat=n, done=100, failed=100, system_oom_kills=2, killed_outside=("sshd",), stalled=20.0,
             longest_stall=9.0) for n in (1, 2)),
    GOOD[6],
    result(work=Work.ARRAY, seconds=130.0),
    result(policy=LimitPolicy.NONE, work=Work.LEAK_FAST, limit=980 * MIB, held_before_stall=900 * MIB, system_oom_kills=4),
)  # fmt: skip
"""The limit does not help."""

SAME = (
    *(result(repeat=n, policy=LimitPolicy.NONE, memory=8 * GIB, limit=8 * GIB, by_kernel=0, cgroup_oom_kills=0)
      for n in (1, 2)),
    *(result(repeat=n, memory=8 * GIB, limit=8 * GIB - 300 * MIB, by_kernel=0, by_nanny=10) for n in (1, 2)),
)  # fmt: skip
"""A large machine, which nothing hurts."""


def recorded() -> tuple[Result, ...]:
    """Return the runs of docs/explanation/experiment.md, as they were recorded."""
    kept = jsonl.read(Path(__file__).with_name("test_experiment_recorded.jsonl"))
    return tuple(map(TypeAdapter(Result).validate_python, kept))


def told(results: Sequence[Result]) -> Iterator[str]:
    """Yield the lines of that page's tables: the main work, all runs, the criteria, and the shares."""
    main = (LimitPolicy.NONE, LimitPolicy.AVAILABLE, DEFAULT)
    for row in groups(results):
        if row.work is Work.SPIKES and row.policy in main:
            yield _main(row)
    for row in groups(results):
        cells = (
            f"{said(row.kind)}, {row.work.text.split(':')[0]} ({row.work})",
            f"`{row.policy}`",
            str(row.runs),
            _spread(row, lambda r: r.done),
            _spread(row, lambda r: r.seconds) + " s" + (", the time was up" if _late(row) else ""),
            _restarts(row),
            _spread(row, lambda r: r.system_oom_kills),
            _spread(row, lambda r: r.longest_stall, 1) + " s",
            _spread(row, lambda r: r.stalled) + " s",
            f"{sum(r.ssh_failed for r in row.results)} of {sum(r.ssh_tries for r in row.results)}",
            _spread(row, lambda r: r.ssh_longest, 1) + " s",
        )
        yield f"| {' | '.join(cells)} |"
    for one in judge(results):
        yield f"| {one.text} | **{one.answer}** | {one.found} | {one.runs} |"
    for share in shares(results):
        given = "–" if share.of_given is None else f"{share.of_given:.1%}"
        yield (
            f"| {said(share.kind)} | `{share.policy}` | {share.limit / MIB:.0f} MiB | {share.of_total:.1%} |"
            f" {given} | {share.hurt} of {share.runs} |"
        )


def _main(row: Group) -> str:
    cells = (
        f"{row.kind[0] // GIB} GiB",
        f"`{row.policy}`",
        str(row.runs),
        _spread(row, lambda r: r.done),
        _spread(row, lambda r: r.stalled) + " s",
        _spread(row, lambda r: r.ssh_longest) + " s",
        _spread(row, lambda r: r.system_oom_kills),
    )
    return f"| {' | '.join(cells)} |"


def _spread(row: Group, value: Callable[[Result], float], digits: int = 0) -> str:
    spread = row.spread(value)
    least, middle, most = (f"{each:.{digits}f}" for each in (spread.least, spread.median, spread.most))
    return middle if least == most else f"{middle} ({least} to {most})"


def _late(row: Group) -> bool:
    return all(result.unfinished for result in row.results)


def _restarts(row: Group) -> str:
    by = (("the nanny", lambda r: r.by_nanny), ("the kernel", lambda r: r.by_kernel))
    found = [f"{_spread(row, value)} by {who}" for who, value in by if row.spread(value).most]
    return ", ".join(found) or "0"
