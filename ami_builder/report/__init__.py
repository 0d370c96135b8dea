"""The page of a run or a night: pure, from what was collected about it to one self-contained HTML file."""

from .html import render
from .page import Bar, Check, Fact, Failure, Link, Number, Page, Point, Start, Tone, Trend

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
