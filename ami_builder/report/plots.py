"""Plots as SVG that takes the page's colours and font; matplotlib is imported here alone."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ami_builder.core.diff import Quantity, Unit
from ami_builder.core.units import GIB, MIB
from ami_builder.report.page import Trend

_INCHES = (3.7, 1.6)
# Stand for what the page's style sheet decides, in the light and in the dark.
_COLOURS = {
    "#010203": "currentColor",
    "#010204": "var(--accent)",
    "#010205": "var(--line)",
    "#010206": "var(--bad)",
    "#010207": "var(--warn)",
}
TEXT, ACCENT, LINE, BAD, WARN = _COLOURS
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": TEXT,
    "text.parse_math": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "ytick.left": False,
    "figure.constrained_layout.use": True,
}
_IDS = re.compile(r' id="(?:figure|axes|patch|line2d|text|matplotlib\.axis|xtick|ytick)_\d+"')


def draw(trend: Trend) -> str:
    """Return an `<svg>` of a quantity over builds that stand evenly spaced, with the last one marked."""
    one, name = _unit(trend.quantity, max(point.value for point in trend.points))
    values = [point.value / one for point in trend.points]
    with drawing(trend.title, _INCHES) as (axes, finished):
        axes.plot(range(len(values)), values, color=ACCENT, linewidth=1.6, marker="o", markersize=3)
        axes.plot(len(values) - 1, values[-1], color=ACCENT, marker="o", markersize=7)
        # From zero: a change of one percent is to look like one.
        axes.set_ylim(0, max(values) * 1.15 or 1)
        axes.set_xlim(-0.3, len(values) - 0.7)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} {name}" if value else "0"))
        ends = [0, len(values) - 1]
        axes.set_xticks(ends, [f"{trend.points[end].when:%Y-%m-%d}" for end in ends])
        left, right = axes.get_xticklabels()
        left.set_horizontalalignment("left")
        right.set_horizontalalignment("right")
    return finished()


@contextmanager
def drawing(title: str, inches: tuple[float, float]) -> Iterator[tuple[Axes, Callable[[], str]]]:
    """Yield the axes of a plot, and what returns its `<svg>` once the block has ended.

    Whatever a user's matplotlibrc says, the same plot is the same picture, with ids that no other one has.
    """
    out = io.StringIO()
    with style.context(["default", _STYLE, {"svg.hashsalt": title}]):
        figure = Figure(figsize=inches)
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        yield axes, lambda: _inline(out.getvalue())
        canvas.print_svg(out)  # type: ignore[no-untyped-call]


def _unit(quantity: Quantity, highest: float) -> tuple[float, str]:
    """Return what to divide by, and what to call that, so that the axis has short and round numbers."""
    if quantity.unit is Unit.CONTROLS:
        return 1, "x"
    if quantity.unit is Unit.SECONDS:
        return (60, "min") if highest >= 120 else (1, "s")
    return (GIB, "GiB") if highest >= 4 * GIB else (MIB, "MiB")


def _inline(document: str) -> str:
    """Return the element alone, in the page's colours, without the ids that all plots have."""
    svg = _IDS.sub("", document[document.index("<svg") :])
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for stand_in, colour in _COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return svg
