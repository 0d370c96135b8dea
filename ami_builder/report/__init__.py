"""The page of a run, a night or an experiment: pure, from what was collected to one HTML file."""

from ami_builder.report.html import render
from ami_builder.report.page import Bar, Check, Fact, Failure, Link, Number, Page, Point, Start, Tone, Trend
from tests.experiment.comparison import Comparison, Criterion, Curve, Panel, Table

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
