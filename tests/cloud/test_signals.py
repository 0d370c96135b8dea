"""A build that is stopped by a signal at any of its calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.cloud import matrix
from tests.cloud.faulting import BUILD, Place, collect, only_the_ami
from tests.cloud.flow import captured
from tests.cloud.stopping import POWER_LOSS, SIGNALS, stopped

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.fake_ec2.server import Cloud


@pytest.mark.long
def test_a_signal_at_any_call_leaves_nothing(
    cloud: Cloud, places: Sequence[Place], tmp_path: Path, subtests: pytest.Subtests
) -> None:
    for place, column in matrix.cells(places):
        if column in SIGNALS:
            with subtests.test(str(place), signal=column):
                matrix.tried(cloud, place, column, tmp_path)


@pytest.mark.parametrize(
    ("action", "column"),
    [
        ("CreateLaunchTemplate", POWER_LOSS),
        ("CreateFleet", "SIGINT"),
        ("CreateFleet", "SIGKILL"),
        ("DeleteLaunchTemplate", POWER_LOSS),
    ],
)
def test_a_spot_build_that_is_stopped_leaves_nothing(
    cloud: Cloud, places: Sequence[Place], tmp_path: Path, action: str, column: str
) -> None:
    place = Place(step="Packer", action=action, nth=1)
    ran = stopped(cloud, place, column, tmp_path, "--set", "aws.spot=true")
    if column != "SIGINT":
        collect()
    assert cloud.left() == {}, ran.err


def test_the_next_build_takes_the_ami_that_a_killed_one_had_made(
    cloud: Cloud, places: Sequence[Place], tmp_path: Path
) -> None:
    made = next(number for number, place in enumerate(places) if place.action == "CreateImage")
    stopped(cloud, places[made + 1], POWER_LOSS, tmp_path / "killed")
    snapshots = cloud.left()["snapshot"]
    assert cloud.count("CreateTags") == 0
    before = cloud.count("RunInstances")
    ami = captured(*BUILD).out.splitlines()[-1]
    assert cloud.left()["snapshot"] == snapshots, "another AMI of the same snapshot, by its root's name"
    assert cloud.count("RunInstances") == before + 1, "verified, and not baked again"
    collect()
    only_the_ami(cloud)
    assert cloud.left()["image"] == [ami]
