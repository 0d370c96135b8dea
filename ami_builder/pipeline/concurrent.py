"""Independent parts side by side: the first failure ends the others, Ctrl-C ends all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

from ami_builder import proc
from ami_builder.errors import Interrupted

T = TypeVar("T")


def side_by_side(calls: Sequence[Callable[[], T]], *, workers: int | None = None) -> list[T]:
    """Run `calls` in threads and return their results in order.

    When one raises, the children of the others are stopped, and the first error is raised; likewise
    when this thread is interrupted. Nothing runs any more when this returns.
    """
    with ThreadPoolExecutor(max_workers=workers or len(calls) or 1) as pool:
        futures = [pool.submit(call) for call in calls]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            if any(f.done() and f.exception() for f in futures):
                _end(pool)
        except BaseException:
            _end(pool)
            raise
    errors = [error for f in futures if not f.cancelled() and (error := f.exception()) is not None]
    if errors:
        proc.resume()
        raise next((e for e in errors if not isinstance(e, Interrupted)), errors[0])
    return [f.result() for f in futures]


def _end(pool: ThreadPoolExecutor) -> None:
    pool.shutdown(wait=False, cancel_futures=True)
    proc.cancel()
