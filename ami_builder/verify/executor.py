"""Runs independent calls side by side, in threads of this process or on a Dask cluster; Ctrl-C ends all."""

from __future__ import annotations

import asyncio
import logging
import pkgutil
import struct
import threading
import warnings
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ami_builder import __version__
from ami_builder.core.errors import (
    AmiBuilderError,
    BuildFailed,
    Interrupted,
    MissingTool,
    TimedOut,
    UsageError,
)
from ami_builder.system import processes

if TYPE_CHECKING:
    from distributed import Client

P = ParamSpec("P")
T = TypeVar("T")

FLAG = "--dask-scheduler"
INSTALL = "install ami-builder with its extra 'dask', or distributed beside it"
"""What installs the library that talks to clusters."""
_ANSWER_SECONDS = 15.0
_LOOK_SECONDS = 5.0
_ALONE_LOOKS = 24
_CLOSE_SECONDS = 5.0
_SCOPE_SECONDS = 0.3
_ADDRESS = "an address looks like tcp://10.0.0.7:8786"


def open_executor(dask_scheduler: str | None, workers: int) -> AbstractContextManager[Executor]:
    """Return an executor for a `with` statement: `workers` threads, or the Dask cluster at that address.

    Entering a cluster raises MissingTool, UsageError or TimedOut when it can't be used.
    """
    return threads(workers) if dask_scheduler is None else _cluster(dask_scheduler)


class Threads(ThreadPoolExecutor):
    """Threads whose calls run in the context of the thread that submits them, and so in its scope."""

    def __init__(self, workers: int, scope: processes.Scope) -> None:
        super().__init__(max_workers=workers)
        self._scope = scope

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Schedule a call."""
        return super().submit(partial(copy_context().run, partial(fn, *args, **kwargs)))

    def end(self) -> None:
        """Begin no other call, and stop the processes of those that have begun."""
        self.shutdown(wait=False, cancel_futures=True)
        self._scope.cancel()


@contextmanager
def threads(workers: int) -> Iterator[Threads]:
    """Yield an executor of threads. When the block raises, the processes that they wait for are stopped.

    Other processes of this program go on.
    """
    with processes.scope() as scope, Threads(workers, scope) as pool:
        try:
            yield pool
        except BaseException:
            pool.end()
            raise


def side_by_side(calls: Sequence[Callable[[], T]], *, workers: int | None = None) -> list[T]:
    """Run `calls` in threads and return their results in order.

    When one raises, or this thread is interrupted, the child processes of the others are stopped and the
    first error is raised. All threads have ended when this returns. One call alone runs in this thread, where
    an interruption ends it at once.
    """
    if len(calls) == 1:
        return [calls[0]()]
    with threads(workers or len(calls) or 1) as pool:
        futures = [pool.submit(call) for call in calls]
        wait(futures, return_when=FIRST_EXCEPTION)
        if any(f.done() and f.exception() for f in futures):
            pool.end()
    errors = [error for f in futures if not f.cancelled() and (error := f.exception()) is not None]
    if errors:
        raise next((e for e in errors if not isinstance(e, Interrupted)), errors[0])
    return [f.result() for f in futures]


def ask_side_by_side(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Run `calls`, which only ask, in threads and return their results in order.

    When one raises, or this thread or its scope is interrupted, this does not wait for the others: AWS may
    not answer for minutes. They end with the program, and their child processes are stopped.
    """
    with processes.scope() as scope:
        futures = [_begin(call) for call in calls]
        pending = set(futures)
        try:
            while pending:
                scope.refuse_when_cancelled()
                done, pending = wait(pending, timeout=_SCOPE_SECONDS, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            return [future.result() for future in futures]
        except BaseException:
            scope.cancel()
            raise


def _begin(call: Callable[[], T]) -> Future[T]:
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as failed:
            future.set_exception(failed)

    threading.Thread(target=copy_context().run, args=(run,), name="asking", daemon=True).start()
    return future


def run_async(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run `asyncio.run` in a thread: here, asyncio would swallow what the handler of a signal raises."""
    return ask_side_by_side([partial(asyncio.run, coroutine)])[0]


@contextmanager
def _cluster(address: str) -> Iterator[Executor]:
    """Yield an executor whose calls run on the cluster's workers.

    Dask repeats a call whose worker dies. When there has been no worker or no scheduler for two minutes,
    all futures are cancelled. Raises MissingTool when Dask is not installed here or a worker has another
    version of ami-builder, UsageError for a wrong address or a cluster without workers, and TimedOut when
    the cluster does not answer.
    """
    with ExitStack() as stack:
        # distributed logs each lost connection; the futures report what matters.
        stack.enter_context(_silenced(logging.getLogger("distributed")))
        client = _connected(address)
        stack.callback(client.close, timeout=_CLOSE_SECONDS)
        _require_workers(client, address)
        executor = _ClusterExecutor(client)
        stack.enter_context(_watched(client, executor))
        try:
            yield executor
        except Interrupted as stopped:
            stopped.hint = (
                "workers finish and clean up the jobs that they have started; if a worker dies,"
                " its instance ends itself after aws.lifetime, and `ami-builder gc` finds what is left"
            )
            raise


def lost(error: BaseException, what: str) -> AmiBuilderError | None:
    """Return a cluster's failure to run a call as a BuildFailed; None for any other error."""
    if isinstance(error, AmiBuilderError) or not type(error).__module__.startswith(
        ("distributed", "concurrent.futures")
    ):
        return None
    reason = str(error).partition("\n")[0]
    return BuildFailed(
        f"the Dask cluster gave up on {what}" + (f": {reason}" if reason else ""),
        hint="check that its workers have enough memory and its scheduler is up;"
        " `ami-builder gc` finds what they left",
    )


class _ClusterExecutor(Executor):
    """The cluster's own executor, whose futures can be cancelled all at once."""

    def __init__(self, client: Client) -> None:
        # Not pure: two calls with equal arguments are still two calls.
        self._executor = client.get_executor(pure=False)
        self._futures: list[Future[Any]] = []

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a call on some worker; function, arguments and result must pickle."""
        future: Future[T] = self._executor.submit(fn, *args, **kwargs)
        self._futures.append(future)
        return future

    def cancel(self) -> None:
        """Cancel the futures that are not done."""
        for future in self._futures:
            future.cancel()


def _connected(address: str) -> Client:
    try:
        from distributed import Client
        from distributed.comm.addressing import get_address_host_port
    except ImportError as missing:
        raise MissingTool(
            f"{FLAG} needs Dask (distributed), which is not installed", hint=INSTALL
        ) from missing
    if not address:  # for which Dask would start a cluster here
        raise UsageError(f"{FLAG}: the address is empty", hint=_ADDRESS)
    try:
        # A Client that fails on this itself stays half started.
        get_address_host_port(address)
    except (ValueError, TypeError) as wrong:
        raise UsageError(f"{FLAG} {address}: {wrong}", hint=_ADDRESS) from wrong
    _require_dask(address)
    started: Future[Client] = Future()

    def start() -> None:
        try:
            started.set_result(
                Client(address, timeout=_ANSWER_SECONDS, set_as_default=False, name="ami-builder")
            )
        except Exception as wrong:
            started.set_exception(wrong)

    try:
        with warnings.catch_warnings():
            # Workers may have another NumPy or patch level of Python.
            warnings.simplefilter("ignore")
            # A Client waits longer than its timeout when something accepts and never answers.
            threading.Thread(target=start, name="dask-client", daemon=True).start()
            return started.result(_ANSWER_SECONDS + _CLOSE_SECONDS)
    except OSError as unanswered:  # including TimeoutError
        raise TimedOut(
            f"{FLAG} {address}: no Dask scheduler answers",
            hint="check that it is up and that this host can reach the port",
        ) from unanswered


def _require_dask(address: str) -> None:
    """Connect once. What another server sends is taken for a length, and a Client would stay half started."""
    from distributed import Security
    from distributed.comm.core import connect

    async def ask() -> None:
        arguments = Security().get_connection_args("client")
        connecting = connect(address, timeout=_ANSWER_SECONDS, **arguments)
        # Its own timeout does not hold when something accepts and never answers.
        (await asyncio.wait_for(connecting, _ANSWER_SECONDS)).abort()

    try:
        run_async(ask())
    except (MemoryError, struct.error) as wrong:
        raise UsageError(f"{FLAG} {address}: what answers is no Dask scheduler", hint=_ADDRESS) from wrong
    except (OSError, RuntimeError, TypeError):
        pass  # the Client says more


def _require_workers(client: Client, address: str) -> None:
    try:
        # A function of the standard library, so that a worker without ami-builder can report that.
        versions = _asked(
            client, lambda: client.run(pkgutil.resolve_name, "ami_builder:__version__", on_error="return")
        )
    except (OSError, RuntimeError) as late:
        raise TimedOut(
            f"{FLAG} {address}: its workers did not answer within {_ANSWER_SECONDS:.0f} s"
        ) from late
    if not versions:
        raise UsageError(
            f"{FLAG} {address}: the cluster has no workers", hint=f"start some: dask worker {address}"
        )
    if wrong := {worker: found for worker, found in versions.items() if found != __version__}:
        raise MissingTool(
            f"{FLAG} {address}: {len(wrong)} of {len(versions)} workers don't have ami-builder {__version__}",
            tail=tuple(f"{worker}: {found}" for worker, found in sorted(wrong.items())),
            hint=f"install that version in each worker's environment: {INSTALL}",
        )


def _asked(client: Client, call: Callable[[], Any]) -> Any:
    """Return the cluster's answer. Raises OSError or RuntimeError when there is none in time."""

    async def ask() -> Any:
        return await call()

    return client.sync(ask, callback_timeout=_ANSWER_SECONDS)


@contextmanager
def _watched(client: Client, executor: _ClusterExecutor) -> Iterator[None]:
    """Cancel all futures after `_ALONE_LOOKS` looks without a worker: none of them would ever end."""
    over = threading.Event()

    def watch() -> None:
        alone = 0
        while alone < _ALONE_LOOKS:
            if over.wait(_LOOK_SECONDS):
                return
            try:
                alone = 0 if _asked(client, client.nthreads) else alone + 1
            except (OSError, RuntimeError):
                alone += 1
        executor.cancel()

    watcher = threading.Thread(target=watch, name="dask-watcher", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join(_ANSWER_SECONDS)


_silenced_lock = threading.Lock()
_silenced_clusters = 0
_former_level = logging.NOTSET


@contextmanager
def _silenced(logger: logging.Logger) -> Iterator[None]:
    """Silence a logger as long as any cluster is in use: each region that is verified has its own client."""
    global _silenced_clusters, _former_level
    with _silenced_lock:
        if not _silenced_clusters:
            _former_level = logger.level
            logger.setLevel(logging.CRITICAL)
        _silenced_clusters += 1
    try:
        yield
    finally:
        with _silenced_lock:
            _silenced_clusters -= 1
            if not _silenced_clusters:
                logger.setLevel(_former_level)
