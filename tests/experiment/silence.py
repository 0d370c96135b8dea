"""How long something that should give a sign of life again and again gave none; pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Silence:
    """How long something that should give a sign of life again and again gave none."""

    longest: float
    """The longest time between two signs, however short."""
    total: float
    """The sum of all times between two signs that were over the bound."""


def silence(times: Iterable[float], over: float) -> Silence:
    """Return how long there was silence between signs of life at these times, in their order.

    The first and the last time are the beginning and the end of the watch: without them a watch that ended in
    silence looks well. Raises ValueError for fewer than two, or when they go back.
    """
    gaps = list(_gaps(list(times)))
    return Silence(longest=max(gaps), total=math.fsum(gap for gap in gaps if gap > over))


def _gaps(times: list[float]) -> Iterator[float]:
    if len(times) < 2:
        raise ValueError(f"{len(times)} times have nothing between them")
    for before, after in pairwise(times):
        if after < before:
            raise ValueError(f"the times go back from {before} to {after}")
        yield after - before
