"""A page as HTML: one file that loads nothing, runs nothing, and takes no text of a record for markup."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import cache
from itertools import groupby
from pathlib import Path

import jinja2
from markupsafe import Markup

from ami_builder.console import amount, clean, duration, size
from ami_builder.core.diff import QuantityChange
from ami_builder.core.records import Outcome
from ami_builder.report.page import Check, Page, Trend

_TEMPLATE = "page.html.j2"
_PHASES = {
    "boot": "first boot",
    "restart": "service restart",
    "reboot": "reboot",
    "pressure": "memory pressure",
}


def render(page: Page) -> str:
    """Return the page; the same value gives the same text."""
    plots = [(trend, _plot(trend)) for trend in page.trends if len(trend.points) > 1]
    text = environment().get_template(_TEMPLATE).render(page=page, plots=plots)
    # A lone surrogate, from a file name that is no UTF-8, can't be written.
    return text.encode("utf-8", "replace").decode("utf-8")


@cache
def environment(*folders: Path) -> jinja2.Environment:
    """Return an environment for the templates here and in further folders."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).parent]),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters |= {
        "duration": duration,
        "size": size,
        "number": lambda value: Markup("\N{NARROW NO-BREAK SPACE}").join(f"{value:,}".split(",")),
        "percent": lambda value: f"{value:.1%}",
        "change": lambda value: "" if value is None else f"{value:+.1%}".replace("-", "\N{MINUS SIGN}"),
        "width": lambda value: f"{value:.2f}%",
        "phase": lambda name: _PHASES.get(name, name),
        "paragraph": _paragraph,
        "amount": _amount,
        "groups": _groups,
        "counts": _counts,
        "machines": _machines,
    }
    return environment


def _finalize(value: object) -> object:
    """Take what a terminal or a browser could obey out of every text of a record."""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _paragraph(text: str) -> Markup:
    return Markup("\n").join(line for each in text.strip().splitlines() if (line := clean(each)))


def _amount(measured: QuantityChange, value: float | None) -> str:
    return "–" if value is None else amount(measured.quantity, value)


def _groups(checks: Iterable[Check]) -> Mapping[str, list[tuple[str, Check]]]:
    """Return the checks by what stands before the colon of their names."""
    found: dict[str, list[tuple[str, Check]]] = {}
    for check in checks:
        group, _, name = check.name.partition(": ")
        found.setdefault(group, []).append((name or group, check))
    return found


def _counts(checks: Iterable[Check]) -> str:
    found = Counter(outcome for check in checks for outcome in check.outcomes)
    return ", ".join(f"{found[outcome]} {outcome}" for outcome in Outcome if found[outcome])


def _machines(columns: Iterable[tuple[str, str]]) -> list[tuple[str, int]]:
    """Return how many columns each machine has."""
    return [(machine, len(list(each))) for machine, each in groupby(columns, key=lambda each: each[0])]


def _plot(trend: Trend) -> Mapping[str, object]:
    from ami_builder.report.plots import draw

    values = [point.value for point in trend.points]
    first, last = trend.points[0], trend.points[-1]
    return {"svg": Markup(draw(trend)), "text": _told(trend, first.when, last.when, values)}  # noqa: S704 - ours


def _told(trend: Trend, first: datetime, last: datetime, values: list[float]) -> str:
    """Say what the plot shows, for who can't see it."""
    short = [amount(trend.quantity, value) for value in values]
    lowest, highest = short[values.index(min(values))], short[values.index(max(values))]
    return (
        f"{short[-1]} now, {short[-2]} the build before; between {lowest} and {highest} "
        f"over {len(values)} builds from {first:%Y-%m-%d} to {last:%Y-%m-%d}"
    )
