"""Each way to launch a cluster from the image, on real machines behind the emulated EC2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.vm.clusters import launcher_row, same_limits
from tests.vm.conftest import HOME, ROOT
from tests.vm.namespace import scenario

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PAGE = ROOT / "docs" / "explanation" / "launchers.md"
HEADER = ("launcher", "limit", "TLS", "interrupted", "spills to", "replaced")
EC2CLUSTER = "`EC2Cluster`"
"""test_9_clusters.py makes its row."""
LAUNCHERS = {
    "auto_scaling": "launch template, Auto Scaling group",
    "user_data": "user data of `ami-builder certificates`",
}
"""Scenario -> the launcher's name in the table."""


@pytest.mark.whole
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_keeps_every_promise(built: Mapping[str, Any], tmp_path: Path, name: str) -> None:
    found = scenario(name, timeout=5400, disk=built["artifact"]["location"], directory=tmp_path / name)
    (HOME / f"launcher-{name}.md").write_text(launcher_row(LAUNCHERS[name], found) + "\n")
    assert same_limits(found["limits"]), found["limits"]
    assert found["refused"], "a client without TLS was served"
    assert {address.partition("://")[0] for address in found["workers"]} == {"tls"}
    assert found["doctor"]["status"] == 0, found["doctor"]
    assert {one["health"] for one in found["doctor"]["workers"]} == {"right"}
    spot = found["spot"]
    assert spot["results"], "results were lost"
    assert spot["computed_again"] == [], spot
    assert found["spill"]["bytes"] > 0, found["spill"]
    assert found["left"] == {}, found["left"]


def test_the_page_has_a_row_for_each_launcher() -> None:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert lines[0] == f"| {' | '.join(HEADER)} |"
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[1:]] == [
        EC2CLUSTER,
        *LAUNCHERS.values(),
    ]
