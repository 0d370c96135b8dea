"""The tree of steps of a run: their names, times, details and outcomes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Self

from ami_builder.console.style import clean
from ami_builder.core.errors import Inconclusive, Interrupted
from ami_builder.core.records import RunStatus, StepRecord

NOTE = "step: "
"""How an exception's note with the innermost step begins."""

BEAT_SECONDS = 1.0
"""How often a renderer may report that steps are still running."""

_JOIN_SECONDS = 5.0


class Renderer:
    """Shows steps as they start, change and end; called by one thread at a time. This one shows nothing."""

    beats = False
    """Whether `beat` does anything."""

    def started(self, step: Step) -> None:
        """Show a new step."""

    def updated(self, step: Step) -> None:
        """Show a step's new detail, or not."""

    def announced(self, step: Step) -> None:
        """Show a step's announcement at once."""

    def ended(self, step: Step) -> None:
        """Show how a step ended."""

    def beat(self) -> None:
        """Show that steps are still running, or not; called about every second."""

    def close(self) -> None:
        """Restore the terminal."""


class Progress:
    """The tree of steps of one run; steps may start, change and end in any thread.

    Its context has a thread that calls `beat` every `beat_seconds`; with None there is no thread.
    """

    def __init__(
        self,
        renderer: Renderer,
        clock: Callable[[], float] = time.monotonic,
        *,
        beat_seconds: float | None = BEAT_SECONDS,
    ) -> None:
        self.renderer = renderer
        self.clock = clock
        self._beat_seconds = beat_seconds if renderer.beats else None
        self.lock = threading.RLock()
        self._closed = threading.Event()
        self._beating: threading.Thread | None = None
        self._steps: list[Step] = []

    def __enter__(self) -> Self:
        if self._beat_seconds is not None:
            # A daemon: the interpreter must never wait for it, whatever happens to this context.
            self._beating = threading.Thread(
                target=self._beat_until_closed, args=(self._beat_seconds,), name="progress", daemon=True
            )
            self._beating.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop drawing, so that later output is not overwritten."""
        self._closed.set()
        with self.lock:
            self.renderer.close()
        # Outside the lock, because its last beat may be waiting for the lock.
        if self._beating is not None:
            self._beating.join(_JOIN_SECONDS)

    def beat(self) -> None:
        """Let the renderer print that steps are still running, if that is due."""
        with self.lock:
            if not self._closed.is_set():
                self.renderer.beat()

    def _beat_until_closed(self, seconds: float) -> None:
        while not self._closed.wait(seconds):
            try:
                self.beat()
            except (OSError, ValueError):
                # The stream is closed or its reader has ended: the next step that starts or ends reports it.
                return

    def step(self, name: str, detail: str = "") -> AbstractContextManager[Step]:
        """Open a top-level step; it fails when the block raises, else it passes or ends as `done` says."""
        return self.run(Step(self, name, detail, None))

    @property
    def steps(self) -> tuple[StepRecord, ...]:
        """All steps so far in the order in which they started, nested ones as `parent > child`."""
        with self.lock:
            return tuple(step.record(since=self._steps[0].started) for step in self._steps)

    @contextmanager
    def run(self, step: Step) -> Iterator[Step]:
        """Start a step, and end it with the block's outcome."""
        with self.lock:
            self._steps.append(step)
            if step.parent is not None:
                step.parent.children.append(step)
            self.renderer.started(step)
        status = RunStatus.FAILED
        try:
            yield step
            status, step.detail = step.outcome, step.result
        except BaseException as exc:
            if isinstance(exc, KeyboardInterrupt | Interrupted):
                status = RunStatus.INTERRUPTED
            elif isinstance(exc, Inconclusive):
                status = RunStatus.INCONCLUSIVE
            if not getattr(exc, "__notes__", None):
                exc.add_note(f"{NOTE}{step.path}")
            raise
        finally:
            with self.lock:
                step.status = status
                step.ended = self.clock()
                self.renderer.ended(step)


class Step:
    """One step of a run, open while its block runs."""

    def __init__(self, progress: Progress, name: str, detail: str, parent: Step | None) -> None:
        self._progress = progress
        self.name = name
        self.detail = clean(detail)
        self.result = self.detail
        self.outcome = RunStatus.PASSED
        self.announced = ""
        self.parent = parent
        self.children: list[Step] = []
        self.status = RunStatus.RUNNING
        self.started = progress.clock()
        self.ended: float | None = None

    def step(self, name: str, detail: str = "") -> AbstractContextManager[Step]:
        """Open a step inside this one."""
        return self._progress.run(Step(self._progress, name, detail, self))

    def update(self, detail: str) -> None:
        """Set the current detail; cheap enough for every line of a log."""
        with self._progress.lock:
            self.detail = clean(detail)
            self._progress.renderer.updated(self)

    def announce(self, text: str) -> None:
        """Print a text at once; a terminal shows it as long as the step runs."""
        with self._progress.lock:
            self.announced = clean(text)
            self._progress.renderer.announced(self)

    def done(self, detail: str, outcome: RunStatus = RunStatus.PASSED) -> None:
        """Set the result of the step, such as `cached`, and its outcome.

        When the block ends without an error, they replace the detail and the status.
        """
        self.result = clean(detail)
        self.outcome = outcome

    @property
    def depth(self) -> int:
        """How many steps contain this one."""
        return self.parent.depth + 1 if self.parent else 0

    @property
    def is_leaf(self) -> bool:
        """Whether the step runs and no step inside it does."""
        return self.status is RunStatus.RUNNING and not any(
            child.status is RunStatus.RUNNING for child in self.children
        )

    @property
    def path(self) -> str:
        """The names of the steps that contain this one, and its own."""
        return f"{self.parent.path} > {self.name}" if self.parent else self.name

    @property
    def seconds(self) -> float:
        """How long the step took, or has taken so far."""
        return (self._progress.clock() if self.ended is None else self.ended) - self.started

    def record(self, *, since: float) -> StepRecord:
        """Return the step for the run's record; `since` is the time at which the first step began."""
        return StepRecord(
            name=self.path,
            seconds=round(self.seconds, 3),
            status=self.status,
            detail=self.detail,
            began=round(self.started - since, 3),
        )
