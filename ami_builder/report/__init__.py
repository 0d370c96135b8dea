"""One HTML page for the record of a run or of a nightly run."""

from ami_builder.report.html import render
from ami_builder.report.page import Bar, Check, Fact, Failure, Link, Number, Page, Point, Start, Tone, Trend

__all__ = [
    "Bar",
    "Check",
    "Fact",
    "Failure",
    "Link",
    "Number",
    "Page",
    "Point",
    "Start",
    "Tone",
    "Trend",
    "render",
]
