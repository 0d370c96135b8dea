"""Independent parts side by side, in threads of this process or on a Dask cluster; Ctrl-C ends all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

from ami_builder.core.errors import Interrupted
from ami_builder.system import processes
from ami_builder.verify import executor as cluster

T = TypeVar("T")


def open_executor(dask_scheduler: str | None, workers: int) -> AbstractContextManager[Executor]:
    """Return an executor to use in a `with`: `workers` threads, or the Dask cluster of that address.

    Entering that of a cluster raises MissingTool, UsageError or TimedOut when it can't be used.
    """
    return threads(workers) if dask_scheduler is None else cluster.executor(dask_scheduler)


@contextmanager
def threads(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Yield an executor of threads; when the block raises, what they run ends, and they with it."""
    try:
        with ThreadPoolExecutor(max_workers=workers) as pool:
            try:
                yield pool
            except BaseException:
                _end(pool)
                raise
    except Exception:
        # Unlike after Ctrl-C, work may go on elsewhere.
        processes.resume()
        raise


def side_by_side(calls: Sequence[Callable[[], T]], *, workers: int | None = None) -> list[T]:
    """Run `calls` in threads and return their results in order.

    When one raises, the children of the others are stopped, and the first error is raised; likewise
    when this thread is interrupted. Nothing runs any more when this returns.
    """
    with threads(workers or len(calls) or 1) as pool:
        futures = [pool.submit(call) for call in calls]
        wait(futures, return_when=FIRST_EXCEPTION)
        if any(f.done() and f.exception() for f in futures):
            _end(pool)
    errors = [error for f in futures if not f.cancelled() and (error := f.exception()) is not None]
    if errors:
        processes.resume()
        raise next((e for e in errors if not isinstance(e, Interrupted)), errors[0])
    return [f.result() for f in futures]


def _end(pool: ThreadPoolExecutor) -> None:
    pool.shutdown(wait=False, cancel_futures=True)
    processes.cancel()
