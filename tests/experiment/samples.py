"""Invented runs for the tests."""

from __future__ import annotations

from typing import Any

from ami_builder.core.units import GIB, MIB
from tests.experiment.cases import METHOD, Case, LimitPolicy, Work
from tests.experiment.results import Result


def case(**changes: Any) -> Case:
    """Return a case of W3 on 1 GiB."""
    values: dict[str, Any] = {
        "memory": GIB, "cpus": 2, "policy": LimitPolicy.AVAILABLE, "work": Work.SPIKES,
        "repeat": 1, "seed": 1, "layers": "off",
    }  # fmt: skip
    return Case(**(values | {name: value for name, value in changes.items() if name in values}))


_NEW = ("ssh_rest", "ssh_above_rest", "held_before_long_stall", "container", "protected", "cpu_seconds")


def result(**changes: Any) -> Result:
    """Return a run in which nothing outside the container was affected."""
    values: dict[str, Any] = {
        "method": METHOD, "when": "2026-11-25T16:00:00+00:00", "accelerator": "tcg",
        "total": 980 * MIB, "available": 740 * MIB, "limit": 740 * MIB,
        "done": 200, "failed": 0, "unfinished": 0, "came_back": True,
        "seconds": 60.0, "by_nanny": 0, "by_kernel": 9,
        "system_oom_kills": 0, "cgroup_oom_kills": 9, "killed_outside": (), "longest_stall": 0.6,
        "stalled": 0.0,
        "ssh_tries": 20, "ssh_failed": 0, "ssh_longest": 1.9, "ssh_late": 0.0,
        "psi_some": 2.0,
        "psi_full": 1.0, "spilled": 0, "peak": 730 * MIB, "held_before_stall": 730 * MIB,
        "cpu_steal": 0.3,
    }  # fmt: skip
    known = values | {name: value for name, value in changes.items() if name in values or name in _NEW}
    return Result(case=case(**changes), **known)


GOOD = (
    *(result(repeat=n, policy=LimitPolicy.NONE, limit=980 * MIB, done=150, unfinished=50, seconds=600,
             stalled=80, longest_stall=30.0, system_oom_kills=8, cgroup_oom_kills=0,
             ssh_failed=4, ssh_longest=40.0,
             ssh_late=90.0) for n in (1, 2, 3)),
    *(result(repeat=n) for n in (1, 2, 3)),
    result(policy=LimitPolicy.NONE, work=Work.ARRAY, seconds=100.0, limit=980 * MIB),
    result(work=Work.ARRAY, seconds=110.0),
    result(policy=LimitPolicy.NONE, work=Work.LEAK_FAST, limit=980 * MIB, held_before_stall=750 * MIB,
           system_oom_kills=4),
)  # fmt: skip
"""The limit helps."""

BAD = (
    *GOOD[:3],
    *(result(repeat=n, done=100, failed=100, system_oom_kills=2, killed_outside=("sshd",), stalled=20.0,
             longest_stall=9.0) for n in (1, 2)),
    GOOD[6],
    result(work=Work.ARRAY, seconds=130.0),
    result(policy=LimitPolicy.NONE, work=Work.LEAK_FAST, limit=980 * MIB, held_before_stall=900 * MIB,
           system_oom_kills=4),
)  # fmt: skip
"""The limit does not help."""

SAME = (
    *(result(repeat=n, policy=LimitPolicy.NONE, memory=8 * GIB, limit=8 * GIB, by_kernel=0,
             cgroup_oom_kills=0)
      for n in (1, 2)),
    *(result(repeat=n, memory=8 * GIB, limit=8 * GIB - 300 * MIB, by_kernel=0, by_nanny=10) for n in (1, 2)),
)  # fmt: skip
"""On a large VM nothing is affected."""
