"""Renderers of progress: a live tree, plain lines, GitHub's groups, none."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import IO, TYPE_CHECKING

from ami_builder.console.progress import BEAT_SECONDS, Progress, Renderer, Step
from ami_builder.console.style import MARKS, STYLES, Mode, duration, marks, overflow, rich_console, write_line
from ami_builder.core.records import RunStatus

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

QUIET_SECONDS = (10.0, 20.0, 30.0)
"""After how many seconds plain progress repeats a running step: at first, after one repetition, and later.

A new detail is printed as soon as the step's last line is older than the first of these.
"""
WIDTH = 100
"""On a wider terminal a step's name and time would be too far apart."""


def open_progress(
    mode: Mode,
    *,
    stream: IO[str] | None = None,
    clock: Callable[[], float] = time.monotonic,
    beat_seconds: float | None = BEAT_SECONDS,
) -> Progress:
    """Return the progress of one run; use it in a `with`, so that the terminal is restored.

    With `beat_seconds` None, a step without news prints nothing unless `Progress.beat` is called.
    """
    out = stream or sys.stderr
    renderer: Renderer
    match mode:
        case Mode.LIVE:
            renderer = _Live(out)
        case Mode.PLAIN:
            renderer = _Plain(out)
        case Mode.GITHUB:
            renderer = _GitHub(out)
        case Mode.QUIET:
            renderer = Renderer()
    return Progress(renderer, clock, beat_seconds=beat_seconds)


@dataclass(slots=True, kw_only=True)
class _Printed:
    """The last line that was printed about a running step."""

    at: float
    """When, in the step's own seconds."""
    detail: str
    repeats: int = 0
    """How many lines in a row had no new detail."""


class _Plain(Renderer):
    """Prints a line with the time of day when a step starts and ends, and some in between."""

    beats = True

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self._printed: dict[Step, _Printed] = {}

    def started(self, step: Step) -> None:
        self._printed[step] = _Printed(at=0.0, detail=step.detail)
        self._line(f"{step.path} ...", step.detail)

    def updated(self, step: Step) -> None:
        last = self._printed.get(step)
        if last is None:
            return
        news = step.detail != last.detail
        repeats = 0 if news else last.repeats
        if step.seconds - last.at < QUIET_SECONDS[min(repeats, len(QUIET_SECONDS) - 1)]:
            return
        self._printed[step] = _Printed(
            at=step.seconds, detail=step.detail, repeats=0 if news else repeats + 1
        )
        self._line(f"{step.path} ... {duration(step.seconds)}", step.detail)

    def announced(self, step: Step) -> None:
        self._line(f"{step.path}: {step.announced}", "")

    def ended(self, step: Step) -> None:
        self._printed.pop(step, None)
        if step.parent is not None and step.parent in self._printed:
            # Its time without a line begins here: until now the steps inside it have reported.
            self._printed[step.parent].at = step.parent.seconds
            self._printed[step.parent].repeats = 0
        self._line(f"{step.path}: {step.status} in {duration(step.seconds)}", step.detail)

    def beat(self) -> None:
        for step in [step for step in self._printed if step.is_leaf]:
            self.updated(step)

    def _line(self, text: str, detail: str) -> None:
        detail = f" - {detail}" if detail else ""
        write_line(self._out, f"{datetime.now().astimezone():%H:%M:%S} {text}{detail}")


class _GitHub(_Plain):
    """Plain lines, in one group for each top-level step; steps that overlap share a group."""

    def __init__(self, out: IO[str]) -> None:
        super().__init__(out)
        self._open: list[Step] = []
        self._outcomes: list[Step] = []

    def started(self, step: Step) -> None:
        if step.parent is None:
            if not self._open:
                write_line(self._out, f"::group::{step.name}")
            self._open.append(step)
        super().started(step)

    def ended(self, step: Step) -> None:
        if step.parent is not None:
            super().ended(step)
            return
        self._open.remove(step)
        self._outcomes.append(step)
        if not self._open:
            # Lines outside the group are visible while it is folded.
            write_line(self._out, "::endgroup::")
            for each in self._outcomes:
                super().ended(each)
            self._outcomes.clear()


class _Live(Renderer):
    """Draws a tree of steps several times a second; the last picture stays."""

    beats = False

    def __init__(self, out: IO[str]) -> None:
        from rich.live import Live
        from rich.spinner import Spinner

        self._top: list[Step] = []
        self._closed = False
        self._console = rich_console(out)
        self._marks = marks(self._console)
        self._spinner = Spinner("dots" if self._marks is MARKS else "line", style=STYLES["running"])
        self._live = Live(
            console=self._console,
            get_renderable=self._picture,
            refresh_per_second=8,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def started(self, step: Step) -> None:
        if step.parent is None:
            self._top.append(step)
        if not self._live.is_started and not self._closed:
            self._live.start()

    def close(self) -> None:
        self._closed = True
        self._live.stop()

    def _picture(self) -> RenderableType:
        """Draw what fits; if the terminal is too low, steps inside passed steps are left out first."""
        from rich.table import Table
        from rich.text import Text

        rows = list(_walk(self._top))
        room = self._console.height - 3
        if len(rows) > room and not self._closed:
            rows = list(_walk(self._top, folded=True))
        hidden = 0 if self._closed else max(0, len(rows) - room)
        picture = Table.grid(padding=(0, 2, 0, 0), expand=True)
        picture.width = min(self._console.width, WIDTH)
        picture.add_column(no_wrap=True, overflow=overflow(self._console))
        picture.add_column(no_wrap=True, overflow=overflow(self._console), ratio=1)
        picture.add_column(no_wrap=True, justify="right")
        if hidden:
            picture.add_row(Text(f"{self._marks['running']} {hidden} more", "dim"))
        for step in rows[hidden:]:
            picture.add_row(*self._row(step))
        return picture

    def _row(self, step: Step) -> tuple[Text, Text, Text]:
        from rich.text import Text

        style = STYLES[step.status]
        mark = Text(self._marks[step.status], style)
        if step.status is RunStatus.RUNNING and not self._closed:
            drawn = self._spinner.render(self._console.get_time())
            mark = drawn if isinstance(drawn, Text) else mark
        name = Text.assemble("  " * step.depth, mark, " ", (step.name, "bold" if not step.depth else ""))
        took = Text(duration(step.seconds), style if step.status is RunStatus.RUNNING else "dim")
        detail = step.detail
        if step.status is RunStatus.RUNNING:
            detail = "; ".join(filter(None, (step.announced, step.detail)))
        return name, Text(detail, "red" if step.status is RunStatus.FAILED else "dim"), took


def _walk(steps: Sequence[Step], *, folded: bool = False) -> Iterator[Step]:
    for step in tuple(steps):
        yield step
        if not (folded and step.status is RunStatus.PASSED):
            yield from _walk(step.children, folded=folded)
