"""The content of a page, as one value. Names are as recorded, sizes in bytes, durations in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from ami_builder.core.diff import Difference, Quantity
    from ami_builder.core.records import NightlyRun, Outcome, StepRecord


class Tone(StrEnum):
    """The colour of a verdict."""

    GOOD = "good"
    WARN = "warn"
    """Nothing failed, but a person has to decide."""
    UNSURE = "unsure"
    """Inconclusive: the host was too busy."""
    BAD = "bad"
    IDLE = "idle"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One line about the run or the nightly run."""

    name: str
    text: str
    exact: bool = False
    """Whether people copy it, like a digest or a path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainNumber:
    """One of the numbers that must equal AVAILABLE_MEMORY_FOR_DASK."""

    name: str
    value: int | None
    """0 means no limit, None that it was not recorded."""
    equal: bool
    """Whether it equals the variable. Sharing among several workers may round it down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The chain of numbers at one start of one machine."""

    machine: str
    phase: str
    total: int | None
    available: int | None
    """AVAILABLE_MEMORY_FOR_DASK; None if the machine had none."""
    times: tuple[str, ...]
    """Wall time and CPU time until ssh and Dask answered; empty if not measured."""
    growth: str
    """Of the system since Dask started; empty if it is not known."""
    further: tuple[ChainNumber, ...]
    holds: bool | None
    """Whether the checks of the chain passed; None if none ran or all were inconclusive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """One quantity over at least two builds of an image, the oldest first."""

    title: str
    quantity: Quantity
    points: tuple[tuple[datetime, float], ...]
    """The time of each build, and its value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """All content of a page. Empty fields have no section."""

    title: str
    tone: Tone
    word: str
    """The verdict."""
    sentence: str
    facts: tuple[Fact, ...]
    nightly: NightlyRun | None = None
    """Only for the page of a nightly run."""
    starts: tuple[Start, ...] = ()
    failures: Mapping[tuple[Outcome, str, str], Sequence[tuple[str, str]]] = field(default_factory=dict)
    """Outcome, name and message of a check that did not pass -> the machine and the phase of each start."""
    columns: tuple[tuple[str, str], ...] = ()
    """The machine and the phase of each column of `checks`."""
    checks: Mapping[str, tuple[Outcome | None, ...]] = field(default_factory=dict)
    """Check -> its outcome in each column; None where it did not run."""
    steps: tuple[tuple[int, StepRecord], ...] = ()
    """Nesting depth and step, which begins relative to the first one and is named within the outer one."""
    trends: tuple[Trend, ...] = ()
    before: str = ""
    """The digest of the image that `difference` compares with."""
    difference: Difference | None = None
    links: Mapping[str, Mapping[str, str]]
    """Folder -> file -> its address, relative to the page and quoted."""

    @property
    def length(self) -> float:
        """The time from the first step's start to the last one's end; never 0."""
        return max((step.began + step.seconds for _, step in self.steps), default=0.0) or 1.0
