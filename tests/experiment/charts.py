"""Coordinates for the plots of the experiment. The templates draw them as SVG."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from ami_builder.core.units import GIB, MIB
from ami_builder.report.plot import ticks

if TYPE_CHECKING:
    from collections.abc import Sequence

LEFT, RIGHT, TOP, BOTTOM = 58.0, 392.0, 6.0, 106.0
"""The edges of the area for a curve, in a viewBox that is 400 wide and 126 high."""
BAR_LEFT, BAR_HEIGHT = 84.0, 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCurve:
    """Memory over time in one run. Sizes are bytes, times seconds."""

    times: Sequence[float]
    held: Sequence[int]
    """Anonymous memory of Dask's container."""
    seconds: float
    """The duration of the run. The curve of a VM that stops responding ends earlier."""
    limit: int | None
    available: int
    """Before Dask started."""
    total: int
    paused: Sequence[float] = ()
    lost: Sequence[float] = ()
    """When the worker was lost. It is restarted."""

    @property
    def description(self) -> str:
        """The curve in words."""
        limit = "no limit" if self.limit is None else f"limit {self.limit / MIB:.0f} MiB"
        return (
            f"at most {max(self.held) / MIB:.0f} MiB in Dask's container, {limit}; "
            f"{self.available / MIB:.0f} of {self.total / MIB:.0f} MiB were available; "
            f"worker paused {len(self.paused)} times, lost {len(self.lost)} times"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryChart:
    """A curve in coordinates. Labels have their position along their axis."""

    points: str
    total: float
    available: float
    limit: float | None
    paused: tuple[float, ...]
    lost: tuple[float, ...]
    last: float | None
    """Where the curve ends, if it ends before the run does."""
    end: float
    """Where the run ends."""
    y_labels: tuple[tuple[float, str], ...]
    x_labels: tuple[tuple[float, str], ...]


def memory_chart(curve: MemoryCurve, seconds: float | None = None) -> MemoryChart:
    """Return the chart of a curve, with a time axis of `seconds` or as long as the run."""
    width = seconds or max(curve.seconds, *curve.times)
    height = curve.total * 1.02
    unit, name = (GIB, "GiB") if curve.total >= 4 * GIB else (MIB, "MiB")

    def x(time: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * min(1.0, time / width), 1)

    def y(size: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * size / height, 1)

    ends_early = curve.seconds - curve.times[-1] > curve.seconds / 20
    return MemoryChart(
        points=" ".join(f"{x(time)},{y(held)}" for time, held in zip(curve.times, curve.held, strict=True)),
        total=y(curve.total),
        available=y(curve.available),
        limit=None if curve.limit is None else y(curve.limit),
        paused=tuple(map(x, curve.paused)),
        lost=tuple(map(x, curve.lost)),
        last=x(curve.times[-1]) if ends_early else None,
        end=x(curve.seconds),
        y_labels=tuple((y(n * unit), f"{n:g} {name}" if n else "0") for n in ticks(height / unit)),
        x_labels=tuple((x(n), f"{n:g} s" if n else "0") for n in ticks(width, 5)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A policy's median as a bar, and its runs as dots."""

    label: str
    y: float
    end: float
    dots: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BarChart:
    """One quantity under each policy."""

    title: str
    description: str
    bars: tuple[Bar, ...]
    height: float
    x_labels: tuple[tuple[float, str], ...]


def bar_chart(title: str, unit: str, values: Sequence[tuple[str, Sequence[float]]]) -> BarChart:
    """Return the chart of a quantity: policy -> its value in each run."""
    highest = max(max(each) for _, each in values) * 1.05 or 1.0

    def x(value: float) -> float:
        return round(BAR_LEFT + (RIGHT - BAR_LEFT) * value / highest, 1)

    return BarChart(
        title=title,
        description=", ".join(
            f"{name} {median(v):.4g} {unit}".strip() + f" (n={len(v)})" for name, v in values
        ),
        bars=tuple(
            Bar(label=name, y=TOP + n * BAR_HEIGHT, end=x(median(each)), dots=tuple(map(x, each)))
            for n, (name, each) in enumerate(values)
        ),
        height=TOP + len(values) * BAR_HEIGHT,
        x_labels=tuple((x(n), f"{n:g} {unit}".strip()) for n in ticks(highest)),
    )
