"""Render a page as one HTML file that loads nothing and runs no script. All text of a record is escaped."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup

from ami_builder.console import amount, clean, duration, size
from ami_builder.core.records import Outcome
from ami_builder.report.plot import plot

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ami_builder.report.page import Page, Trend

_TEMPLATE = "page.html.j2"
_PHASES = {
    "boot": "first boot",
    "restart": "service restart",
    "reboot": "reboot",
    "pressure": "memory pressure",
}


def render(page: Page) -> str:
    """Return the page as HTML. The same page gives the same bytes."""
    text = environment().get_template(_TEMPLATE).render(page=page)
    # A file name that is not UTF-8 contains lone surrogates, which can't be encoded.
    return text.encode("utf-8", "replace").decode("utf-8")


@cache
def environment(*folders: Path) -> jinja2.Environment:
    """Return an environment for the templates here and in further folders."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).parent]),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    made.filters |= {
        "duration": duration,
        "size": size,
        "number": lambda value: Markup("\N{NARROW NO-BREAK SPACE}").join(f"{value:,}".split(",")),
        "percent": lambda value: f"{value:.1%}",
        "change": lambda value: "" if value is None else f"{value:+.1%}".replace("-", "\N{MINUS SIGN}"),
        "width": lambda value: f"{value:.2f}%",
        "phase": lambda name: _PHASES.get(name, name),
        "paragraph": _paragraph,
        "amount": amount,
        "groups": _groups,
        "counts": _counts,
        "machines": _machines,
        "plot": plot,
        "description": _description,
    }
    return made


def _finalize(value: object) -> object:
    """Remove control characters from the text of a record."""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _paragraph(text: str) -> Markup:
    return Markup("\n").join(line for each in text.strip().splitlines() if (line := clean(each)))


def _groups(
    checks: Mapping[str, Sequence[Outcome | None]],
) -> Mapping[str, list[tuple[str, Sequence[Outcome | None]]]]:
    """Return the checks by the part of their names before the colon."""
    found: dict[str, list[tuple[str, Sequence[Outcome | None]]]] = {}
    for check, outcomes in checks.items():
        group, _, name = check.partition(": ")
        found.setdefault(group, []).append((name or group, outcomes))
    return found


def _counts(checks: Mapping[str, Sequence[Outcome | None]]) -> str:
    found = Counter(outcome for outcomes in checks.values() for outcome in outcomes)
    return ", ".join(f"{found[outcome]} {outcome}" for outcome in Outcome if found[outcome])


def _machines(columns: Iterable[tuple[str, str]]) -> list[tuple[str, int]]:
    """Return the number of columns of each machine."""
    return [(machine, len(list(each))) for machine, each in groupby(columns, key=lambda each: each[0])]


def _description(trend: Trend) -> str:
    """Describe the plot of a trend, for readers who can't see it."""
    values = [value for _, value in trend.points]
    short = [amount(trend.quantity, value) for value in values]
    lowest, highest = short[values.index(min(values))], short[values.index(max(values))]
    first, last = trend.points[0][0], trend.points[-1][0]
    return (
        f"{short[-1]} now, {short[-2]} in the previous build; between {lowest} and {highest} "
        f"in {len(values)} builds from {first:%Y-%m-%d} to {last:%Y-%m-%d}"
    )
