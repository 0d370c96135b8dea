"""The plots of an experiment, in the page's colours."""

from __future__ import annotations

from statistics import median

from matplotlib import ticker

from ami_builder.core.units import GIB, MIB
from ami_builder.report.plots import ACCENT, BAD, LINE, TEXT, WARN, drawing
from tests.experiment.comparison import Curve, Panel

_WIDE = 3.7


def _labels(unit: str) -> ticker.FuncFormatter:
    return ticker.FuncFormatter(lambda value, _: f"{value:g} {unit}".strip() if value else "0")


def bars(panel: Panel) -> str:
    """Return an `<svg>` with a bar a policy, as long as the median, and a dot for each run."""
    count = len(panel.bars)
    with drawing(panel.title, (_WIDE, 0.55 + 0.3 * count)) as (axes, finished):
        for place, (_, values) in enumerate(panel.bars):
            axes.barh(place, median(values), height=0.6, color=ACCENT, alpha=0.45)
            axes.plot(values, [place] * len(values), color=TEXT, linestyle="", marker="o", markersize=3)
        axes.set_yticks(range(count), [name for name, _ in panel.bars])
        axes.set_ylim(count - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x", color=LINE)
        highest = max(max(values) for _, values in panel.bars)
        axes.set_xlim(0, highest * 1.08 or 1)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=not panel.unit))
        axes.xaxis.set_major_formatter(_labels(panel.unit))
    return finished()


def told_bars(panel: Panel) -> str:
    """Say what the bars show, for who can't see it."""
    return ", ".join(
        f"{name} {median(values):.4g} {panel.unit}".strip() + f" (n={len(values)})"
        for name, values in panel.bars
    )


def curve(one: Curve) -> str:
    """Return an `<svg>` of what the container held over time, its limit, what was available, and all."""
    unit, word = (GIB, "GiB") if one.total >= 4 * GIB else (MIB, "MiB")
    with drawing(one.title, (_WIDE, 1.9)) as (axes, finished):
        axes.plot(one.times, [held / unit for held in one.held], color=ACCENT, linewidth=1.4)
        axes.axhline(one.total / unit, color=LINE, linewidth=1)
        axes.axhline(one.available / unit, color=TEXT, linewidth=0.8, linestyle=(0, (1, 2)))
        if one.limit is not None:
            axes.axhline(one.limit / unit, color=BAD, linewidth=1.2, linestyle=(0, (4, 2)))
        ground = -0.03 * one.total / unit
        axes.plot(one.paused, [ground] * len(one.paused), color=WARN, linestyle="", marker="s", markersize=4)
        axes.plot(one.lost, [ground] * len(one.lost), color=BAD, linestyle="", marker="x", markersize=5)
        axes.set_ylim(2 * ground, one.total / unit * 1.06)
        axes.set_xlim(0, max(*one.times, *one.lost, *one.paused, one.seconds))
        axes.yaxis.set_major_locator(ticker.MaxNLocator(4))
        axes.yaxis.set_major_formatter(_labels(word))
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
        axes.xaxis.set_major_formatter(_labels("s"))
    return finished()


def told_curve(one: Curve) -> str:
    """Say what the curve shows, for who can't see it."""
    limit = "no limit" if one.limit is None else f"limit {one.limit / MIB:.0f} MiB"
    return (
        f"at most {max(one.held) / MIB:.0f} MiB in Dask's container, {limit}; {one.available / MIB:.0f} MiB "
        f"were available of {one.total / MIB:.0f} MiB; "
        f"paused {len(one.paused)} times, lost {len(one.lost)} times"
    )
