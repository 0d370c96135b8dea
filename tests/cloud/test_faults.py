"""A fault at each call of a build leaves nothing behind."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

from ami_builder.build import plugins
from tests.cloud import matrix
from tests.cloud.faulting import FAULTS, Place, Verdict, rows

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.fake_ec2.server import Cloud


@pytest.mark.long
def test_a_fault_at_any_call_leaves_nothing(
    cloud: Cloud, places: Sequence[Place], tmp_path: Path, subtests: pytest.Subtests
) -> None:
    for place, column in matrix.cells(places):
        if column in FAULTS:
            with subtests.test(str(place), fault=column):
                matrix.tried(cloud, place, column, tmp_path)


def test_the_table_is_of_the_calls_that_a_build_makes(places: Sequence[Place]) -> None:
    columns, shown = matrix.shown(matrix.PAGE.read_text(encoding="utf-8"))
    assert columns == list(matrix.COLUMNS)
    # Not their order: Packer and we call at the same time.
    expected = Counter(row.name for row in rows(places))
    if plugins.has_plugins():
        # The table is of Packer 1.6.6; others launch with IMDSv2.
        expected["bake | `ModifyInstanceMetadataOptions`"] += 1
    assert {name: len(verdicts) // len(columns) for name, verdicts in shown.items()} == expected
    assert {verdict for verdicts in shown.values() for verdict in verdicts} == set(Verdict)


def test_every_fault_and_signal_has_its_turn(places: Sequence[Place]) -> None:
    assert {column for _, column in matrix.share(places)} == set(matrix.COLUMNS)
    assert {place.action for place, _ in matrix.share(places)} == {place.action for place in places}
