"""Coordinates for the plot of a trend. The template draws them as SVG."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ami_builder.core.diff import Quantity
from ami_builder.core.units import GIB, MIB

if TYPE_CHECKING:
    from ami_builder.report.page import Trend

LEFT, RIGHT, TOP, BOTTOM = 60.0, 312.0, 8.0, 114.0
"""The edges of the area for the curve, in units of the page's viewBox. The labels are outside of it."""
_MARGIN = 6.0
_INTERVALS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """The curve of a trend, one point for each build at equal distances, above its gridlines."""

    points: tuple[tuple[float, float], ...]
    gridlines: tuple[tuple[float, str], ...]
    """The height of each, and its label."""


def plot(trend: Trend) -> Plot:
    """Return the plot of a trend. Its scale starts at zero, so that a change of one percent looks small."""
    values = [value for _, value in trend.points]
    highest = max(values)
    unit, name = _unit(trend.quantity, highest)
    top = highest * 1.1 if highest > unit / 1e6 else unit

    def y(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * value / top, 1)

    step = (RIGHT - LEFT - 2 * _MARGIN) / max(1, len(values) - 1)
    return Plot(
        points=tuple((round(LEFT + _MARGIN + n * step, 1), y(value)) for n, value in enumerate(values)),
        gridlines=tuple((y(tick * unit), f"{tick:g} {name}" if tick else "0") for tick in ticks(top / unit)),
    )


def ticks(highest: float, most: int = _INTERVALS) -> tuple[float, ...]:
    """Return round numbers from 0 up to `highest`, with at most `most` equal intervals between them.

    Raises ValueError unless `highest` is above 0.
    """
    if highest <= 0:
        raise ValueError(f"a scale can't end at {highest}")
    power = 10.0 ** math.floor(math.log10(highest / most))
    step = next(
        power * factor for factor in (0.5, 1, 2, 2.5, 5, 10, 20) if highest / (power * factor) < most + 1
    )
    return tuple(float(f"{step * n:.12g}") for n in range(int(highest / step) + 1))


def _unit(quantity: Quantity, highest: float) -> tuple[float, str]:
    """Return the unit for the labels, and its name, so that they are short."""
    if quantity in (Quantity.SIZE, Quantity.AVAILABLE):
        return (GIB, "GiB") if highest >= 4 * GIB else (MIB, "MiB")
    if quantity is Quantity.BOOT:
        return 1, "x"
    return (60, "min") if highest >= 120 else (1, "s")
