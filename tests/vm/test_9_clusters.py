"""An unmodified EC2Cluster on real machines: what one worker does, and the experiment's work on three."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ami_builder.core.units import GIB, MIB
from tests.vm import ec2cluster
from tests.vm.clusters import launcher_row, same_limits
from tests.vm.conftest import HOME
from tests.vm.namespace import scenario

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ami_builder.config.schema import Image

MOST_USER_DATA = 16_384


def started(found: Mapping[str, Any], workers: int, filesystem: int) -> None:
    """Check what holds of every cluster: limits, TLS, the root's size, where it spills, what is left."""
    assert found["scheduler"].startswith("tls://")
    assert found["refused"], "a client without TLS got in"
    assert len(found["user_data"]) == workers + 1
    assert max(found["user_data"]) <= MOST_USER_DATA
    for machines in (found["machines"], found["after"]):
        assert len(machines) == workers
        assert all(one["address"].startswith("tls://") for one in machines)
        assert same_limits(machines), machines
    for one in found["machines"]:
        assert one["spills_to"].startswith("/spill/")
        # The file system's own tables take some of it.
        assert filesystem * GIB * 9 // 10 < one["root"] <= one["disk"] == filesystem * GIB
        assert one["devices"] == ["nvme0n1"], "the size went to a second, empty disk"
    assert [one["system"] for one in found["kills"]] == [0] * (workers + 1), "system-wide OOM kills"
    assert {one["health"] for one in found["doctor"]["workers"]} == {"right"}
    spilled = found["spilled"]
    assert spilled["bytes"] > 100 * MIB
    assert spilled["layer"] < MIB, "it went into the container's layer"
    assert found["left"]


@pytest.mark.whole
def test_ec2cluster_does_all_that_its_documentation_says(
    built: Mapping[str, Any], image: Image, tmp_path: Path
) -> None:
    ec2cluster.install()
    found = scenario(
        "ec2cluster",
        timeout=3600,
        disk=built["artifact"]["location"],
        directory=tmp_path,
        image=image.container.reference,
        workers=1,
        whole=False,
    )
    started(found, 1, 40)
    assert found["leak"] == {"leak": "KilledWorker", "next": "done"}
    (before,), (after,) = found["machines"], found["after"]
    assert after["address"] != before["address"], "the worker was not restarted"
    assert after["container"] == before["container"], "the container was"


@pytest.mark.whole
def test_a_cluster_of_three_workers_does_the_experiments_work(
    built: Mapping[str, Any], image: Image, tmp_path: Path
) -> None:
    ec2cluster.install()
    found = scenario(
        "ec2cluster",
        timeout=7200,
        disk=built["artifact"]["location"],
        directory=tmp_path,
        image=image.container.reference,
        workers=3,
        whole=True,
        filesystem=20,
    )
    started(found, 3, 20)
    for work in found["work"].values():
        assert (work["failed"], work["unfinished"]) == (0, 0), found["work"]
    assert found["spot"]["computed_again"] == []
    assert found["spot"]["bytes"] == found["spot"]["of"] * MIB
    row = {**found, "limits": found["machines"], "spill": found["spilled"], "replaced": "by nothing"}
    (HOME / "launcher-ec2cluster.md").write_text(launcher_row("`EC2Cluster`", row) + "\n")
