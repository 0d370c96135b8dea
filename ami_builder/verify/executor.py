"""A running Dask cluster as an executor: looked over before it gets work, given up when nobody is left."""

from __future__ import annotations

import logging
import pkgutil
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
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

if TYPE_CHECKING:
    from distributed import Client

P = ParamSpec("P")
T = TypeVar("T")

FLAG = "--dask-scheduler"
INSTALL = "pip install 'ami-builder[dask]'"
"""What installs the library that talks to clusters."""
_ANSWER_SECONDS = 15.0
_LOOK_SECONDS = 5.0
_ALONE_LOOKS = 24
_CLOSE_SECONDS = 5.0
_ADDRESS = "an address looks like tcp://10.0.0.7:8786"


@contextmanager
def executor(address: str) -> Iterator[Executor]:
    """Yield an executor whose calls run on the cluster's workers.

    A call that is lost with its worker is run again by another; once there has been no worker for two
    minutes, or the scheduler has gone, all futures are cancelled.
    Raises MissingTool without Dask here or this version of ours on each worker, UsageError for a wrong
    address or a cluster without workers, TimedOut when there is no answer.
    """
    with ExitStack() as stack:
        # It logs each lost connection; what matters of that is said by what becomes of the futures.
        stack.enter_context(_silenced(logging.getLogger("distributed")))
        client = _connected(address)
        stack.callback(client.close, timeout=_CLOSE_SECONDS)
        _require_workers(client, address)
        crew = _Crew(client)
        stack.enter_context(_watched(client, crew))
        try:
            yield crew
        except Interrupted as stopped:
            stopped.hint = (
                "what a worker has begun goes on to its end, and is removed then; should the worker die,"
                " the instance ends itself after aws.lifetime, and `ami-builder gc` finds what is left"
            )
            raise


def lost(error: BaseException, what: str) -> AmiBuilderError | None:
    """Return a cluster's own failure to run a call as one of ours; None for any other error."""
    if isinstance(error, AmiBuilderError) or not type(error).__module__.startswith(
        ("distributed", "concurrent.futures")
    ):
        return None
    said = str(error).partition("\n")[0]
    return BuildFailed(
        f"the Dask cluster has given up {what}" + (f": {said}" if said else ""),
        hint="are its workers large enough, and its scheduler up? `ami-builder gc` finds what they have left",
    )


class _Crew(Executor):
    """The cluster's own executor, whose futures can be cancelled all at once."""

    def __init__(self, client: Client) -> None:
        # Not pure: each call is one of its own, whatever its arguments.
        self._executor = client.get_executor(pure=False)
        self._futures: list[Future[Any]] = []

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a call on some worker; function, arguments and result must pickle."""
        future: Future[T] = self._executor.submit(fn, *args, **kwargs)
        self._futures.append(future)
        return future

    def cancel(self) -> None:
        """Cancel what has not ended."""
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
        # A client that finds this out itself has been started by half.
        get_address_host_port(address)
    except (ValueError, TypeError) as wrong:
        raise UsageError(f"{FLAG} {address}: {wrong}", hint=_ADDRESS) from wrong
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
            # Other versions of NumPy or of Python's patch level are none of our business.
            warnings.simplefilter("ignore")
            # Where something accepts and says nothing, a client waits beyond its own timeout.
            threading.Thread(target=start, name="dask-client", daemon=True).start()
            return started.result(_ANSWER_SECONDS + _CLOSE_SECONDS)
    except OSError as silent:  # a timeout is one too
        raise TimedOut(
            f"{FLAG} {address}: no scheduler of Dask answers there",
            hint="is it up, and may this machine reach that port?",
        ) from silent


def _require_workers(client: Client, address: str) -> None:
    try:
        # A function of Python's own, so that a worker without ami-builder can say that it has none.
        told = _asked(
            client, lambda: client.run(pkgutil.resolve_name, "ami_builder:__version__", on_error="return")
        )
    except (OSError, RuntimeError) as late:
        raise TimedOut(f"{FLAG} {address}: its workers don't answer within {_ANSWER_SECONDS:.0f} s") from late
    if not told:
        raise UsageError(
            f"{FLAG} {address}: the cluster has no workers", hint=f"start some: dask worker {address}"
        )
    if wrong := {worker: found for worker, found in told.items() if found != __version__}:
        raise MissingTool(
            f"{FLAG} {address}: {len(wrong)} of {len(told)} workers don't have ami-builder {__version__}",
            tail=tuple(f"{worker}: {found}" for worker, found in sorted(wrong.items())),
            hint=f"install that version in each worker's environment: {INSTALL}",
        )


def _asked(client: Client, call: Callable[[], Any]) -> Any:
    """Return what the cluster answers; raises OSError or RuntimeError when it is late, or has gone."""

    async def ask() -> Any:
        return await call()

    return client.sync(ask, callback_timeout=_ANSWER_SECONDS)


@contextmanager
def _watched(client: Client, crew: _Crew) -> Iterator[None]:
    """Cancel all futures once there has been no worker for `_ALONE_LOOKS` looks: none would ever end."""
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
        crew.cancel()

    watcher = threading.Thread(target=watch, name="dask-watcher", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join(_ANSWER_SECONDS)


@contextmanager
def _silenced(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
