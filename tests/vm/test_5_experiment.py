"""The experiment's small version: a leak on 1 GiB with the limit and, when asked for, without one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.vm.conftest import ami_builder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

GIB = 1 << 30


def runs(built: Mapping[str, Any], policy: str, repeat: int) -> Sequence[Mapping[str, Any]]:
    """Make some runs, two side by side, and see that asking again makes no other."""
    arguments: tuple[str, ...] = (built["artifact"]["location"], "--memory", "1GiB")
    arguments += ("--work", "leak-fast", "--policy", policy, "--repeat", str(repeat), "--jobs", "2")
    # A leak takes a few times as long as Dask does to start, which the build has measured here.
    (start,) = (m["dask_seconds"] for m in built["verdict"]["measured"] if m["phase"] == "restart")
    answer = ami_builder(
        *arguments, "--timeout", f"{max(45, 4 * start):.0f}s", "--json", module="tests.experiment"
    )
    assert answer.status == 0, answer.stderr
    assert answer.json["left"] == [], answer.json["failed"]
    again = ami_builder(*arguments, "--json", module="tests.experiment")
    assert again.json["results"] == answer.json["results"]
    found = [one for one in answer.json["results"] if one["case"]["policy"] == policy]
    assert len(found) == repeat
    return found


# In CI the phase `pressure` of test_1_build.py shows a leak with the limit, and tests/experiment the command.
@pytest.mark.whole
def test_a_leak_with_the_limit(built: Mapping[str, Any]) -> None:
    for limited in runs(built, "available", 2):
        assert 0 < limited["limit"] == limited["available"] < limited["total"] < GIB
        # Outside the container nothing notices. The fourth attempt, after which the task fails, may be too
        # late.
        assert limited["system_oom_kills"] == len(limited["killed_outside"]) == 0
        assert limited["came_back"]
        assert limited["done"] == 0
        assert limited["by_nanny"] + limited["cgroup_oom_kills"] >= 1
        assert limited["peak"] <= limited["limit"]


@pytest.mark.whole
def test_a_leak_without_a_limit(built: Mapping[str, Any]) -> None:
    (free,) = runs(built, "none", 1)
    assert free["limit"] == free["total"]
    # How long a machine stands still without a limit differs a lot; that the kernel has to kill for want of
    # the machine's memory, or that the work does not end, does not.
    assert free["system_oom_kills"] or free["unfinished"]
