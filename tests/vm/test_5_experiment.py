"""The experiment's small version: a leak on 1 GiB, without a limit and with it, on real machines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.vm.conftest import ami_builder

GIB = 1 << 30


def test_a_leak_with_and_without_a_limit(built: Mapping[str, Any]) -> None:
    arguments: tuple[str, ...] = ("experiment", built["artifact"]["location"], "--memory", "1GiB")
    arguments += ("--work", "leak-fast", "--repeat", "1", "--jobs", "1")
    # Without a limit the machine mostly stands still until the time is up, and beyond.
    answer = ami_builder(*arguments, "--timeout", "45s", "--json")
    assert answer.status == 0, answer.stderr
    assert answer.json["left"] == [], answer.json["failed"]
    runs = {one["case"]["policy"]: one for one in answer.json["results"]}
    free, limited = runs["none"], runs["available"]
    assert free["limit"] == free["total"]
    assert 0 < limited["limit"] == limited["available"] < limited["total"] < GIB
    # Outside the container nothing notices; the fourth attempt, after which the task fails, may be too late.
    assert limited["global_kills"] == limited["ssh_failed"] == len(limited["harmed"]) == 0
    assert limited["came_back"]
    assert limited["done"] == 0
    assert limited["by_nanny"] + limited["container_kills"] >= 1
    assert limited["peak"] <= limited["limit"]
    # How long a machine stands still without a limit differs a lot; that the kernel has to kill for want of
    # the machine's memory, or that the work does not end, does not.
    assert free["global_kills"] or free["unfinished"]
    found = {one["text"]: one["answer"] for one in answer.json["criteria"]}
    assert found["without a limit the same work breaks one of these"] == "passed"
    again = ami_builder(*arguments, "--json", timeout=60)
    assert again.json["results"] == answer.json["results"]
