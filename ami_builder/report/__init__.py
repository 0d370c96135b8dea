"""The page of a run, a night or an experiment: pure, from what was collected to one HTML file."""

from .comparison import Comparison, Criterion, Curve, Panel, Table
from .html import render
from .page import Bar, Check, Fact, Failure, Link, Number, Page, Point, Start, Tone, Trend

__all__ = [
    "Bar",
    "Check",
    "Comparison",
    "Criterion",
    "Curve",
    "Fact",
    "Failure",
    "Link",
    "Number",
    "Page",
    "Panel",
    "Point",
    "Start",
    "Table",
    "Tone",
    "Trend",
    "render",
]
