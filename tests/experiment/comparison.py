"""What the page of an experiment tells, as values: sizes in bytes, durations in seconds."""

from __future__ import annotations

from dataclasses import dataclass

from ami_builder.report.page import Tone


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """What was to be reached, and what was found."""

    text: str
    tone: Tone
    word: str
    found: str
    runs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One quantity of one work, under each policy."""

    title: str
    unit: str
    bars: tuple[tuple[str, tuple[float, ...]], ...]
    """Policy -> its value in each run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Memory over time in one run."""

    title: str
    times: tuple[float, ...]
    held: tuple[int, ...]
    seconds: float
    """How long the run went on: a machine that stands still tells nothing for the rest of it."""
    limit: int | None
    """None without one."""
    available: int
    """What was available before Dask started."""
    total: int
    paused: tuple[float, ...]
    lost: tuple[float, ...]
    """When the worker went away, to be started again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Texts in rows; the first `named` cells of a row say what it is about."""

    title: str
    text: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    named: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All that an experiment's page shows beside its verdict."""

    criteria: tuple[Criterion, ...]
    panels: tuple[Panel, ...]
    curves: tuple[Curve, ...]
    tables: tuple[Table, ...]
    notes: tuple[str, ...]
    commands: tuple[str, ...]
    """What makes the same again."""
