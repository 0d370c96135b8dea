"""How long something gave no sign of life."""

from __future__ import annotations

import pytest

from tests.experiment.silence import Silence, silence


def test_the_longest_silence_and_the_sum_of_those_over_a_bound() -> None:
    assert silence([0, 1, 2, 7, 8, 11], over=1.5) == Silence(longest=5, total=8)
    assert silence([0, 1, 2], over=1.5) == Silence(longest=1, total=0)


@pytest.mark.parametrize("times", [[], [1.0], [1.0, 0.5]])
def test_no_silence_without_times(times: list[float]) -> None:
    with pytest.raises(ValueError, match=r"times (have|go)"):
        silence(times, over=1)
