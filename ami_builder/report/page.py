"""What a page tells, as one value: names as they were recorded, sizes in bytes, durations in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from ami_builder.core.diff import Difference, Quantity
from ami_builder.core.records import NightlyRun, Outcome


class Tone(StrEnum):
    """How a verdict is meant; its word says it too."""

    GOOD = "good"
    WARN = "warn"
    """Nothing is wrong, and a person decides what happens next."""
    UNSURE = "unsure"
    """The host was too busy to tell."""
    BAD = "bad"
    IDLE = "idle"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One line about the subject."""

    name: str
    text: str
    exact: bool = False
    """Whether it is to be copied: a digest, a path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A file beside the page."""

    text: str
    href: str
    """Relative to the page, quoted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """One further number of the chain."""

    name: str
    value: int | None
    """0 is no limit; None when there is no evidence of it."""
    equal: bool
    """Whether it is the variable's, as far as it was rounded for several workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The chain of numbers at one start of one machine."""

    machine: str
    phase: str
    total: int | None
    available: int | None
    """AVAILABLE_MEMORY_FOR_DASK; None where the machine had none."""
    times: tuple[str, ...]
    """What it took, in wall time and in CPU time; empty where that was not measured."""
    further: tuple[Number, ...]
    holds: bool | None
    """What the checks of the chain found; None when none of them ran, or could be judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A check that failed or is inconclusive, with the starts at which it was so in the same words."""

    name: str
    outcome: Outcome
    message: str
    starts: tuple[tuple[str, str], ...]
    """Machine and phase."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """How one check ended at every start, in the order of `Page.columns`; None where it did not run."""

    name: str
    outcomes: tuple[Outcome | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One step: how deep it is nested, when it began after the first one, and how long it took."""

    name: str
    depth: int
    begin: float
    seconds: float
    status: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What one build came to."""

    when: datetime
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """One quantity over the builds of an image, the oldest first, this one last."""

    title: str
    quantity: Quantity
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """All that a page shows; what is empty has no section."""

    title: str
    tone: Tone
    word: str
    """The verdict."""
    sentence: str
    facts: tuple[Fact, ...]
    night: NightlyRun | None = None
    """For the parts that only a night has."""
    starts: tuple[Start, ...] = ()
    failures: tuple[Failure, ...] = ()
    columns: tuple[tuple[str, str], ...] = ()
    """The machine and the phase of each column of `checks`."""
    checks: tuple[Check, ...] = ()
    steps: tuple[Bar, ...] = ()
    trends: tuple[Trend, ...] = ()
    before: str = ""
    """The digest of the image that `difference` compares with."""
    difference: Difference | None = None
    links: Mapping[str, tuple[Link, ...]]
    """Folder -> its files."""

    @property
    def length(self) -> float:
        """How long all steps took together; never 0, to be divided by."""
        return max((step.begin + step.seconds for step in self.steps), default=0.0) or 1.0
