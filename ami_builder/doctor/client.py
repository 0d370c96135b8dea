"""Read the memory of every worker of a cluster, and the machines of all, through its scheduler.

This sends the same operations as `Client.scheduler_info` and `Client.run`, without a `Client`, because a new
one does not connect to an old scheduler.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import socket
import struct
import time
import warnings
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ami_builder.core.errors import MissingTool, TimedOut, UsageError
from ami_builder.doctor import history, probe, tls
from ami_builder.doctor.rules import CgroupLimit, Cluster, Growth, Reading, Scheduler, Worker
from ami_builder.verify.executor import INSTALL, run_async

_ONE_BY_ONE = 64
"""How many workers are asked at a time after the call to all workers failed."""
_EXAMPLE = "give the address of a scheduler, such as tcp://10.0.0.5:8786, not that of its dashboard"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A function that is pickled as its source, so that any Python version can unpickle it."""

    text: str
    name: str

    def __reduce__(self) -> tuple[Any, ...]:
        made = f"(lambda names: (exec({self.text!r}, names), names[{self.name!r}])[1])"
        return eval, (f"{made}({{'__name__': 'ami_builder_probe'}})",)


def read_cluster(address: str, seconds: float, certificates: Path | None = None) -> Cluster:
    """Return every worker of a scheduler with its reading, and the scheduler, within about `seconds`.

    `certificates` is a folder for TLS; without one, Dask's own configuration applies. Raises UsageError
    (address, TLS), MissingTool (distributed) and TimedOut (the scheduler does not answer).
    """
    with _quiet():
        where = tls.address(address, certificates)
        return run_async(_read(_distributed(), where, seconds, certificates))


def read_history(address: str, seconds: float, certificates: Path | None = None) -> history.History:
    """Return why workers ended, as far as the scheduler remembers; the same errors as `read_cluster`."""
    with _quiet():
        where = tls.address(address, certificates)
        return run_async(_read_history(_distributed(), where, seconds, certificates))


def _distributed() -> Any:
    try:
        import distributed
    except ImportError as missing:
        raise MissingTool(f"Dask is not installed on this host: {missing}", hint=INSTALL) from missing
    return distributed


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress distributed's messages about lost workers and versions: the result has them."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


async def _read(distributed: Any, address: str, seconds: float, certificates: Path | None) -> Cluster:
    end = time.monotonic() + seconds
    async with _connected(distributed, address, seconds, certificates) as (scheduler, identity):
        known = dict(identity["workers"])
        answers = await _answers(scheduler, list(known), end)
        own = await _scheduler(scheduler, address, max(1.0, end - time.monotonic()))
    workers = tuple(_worker(each, known[each], answers.get(each)) for each in known)
    return Cluster(workers=workers, scheduler=own, here=probe.versions())


async def _read_history(
    distributed: Any, address: str, seconds: float, certificates: Path | None
) -> history.History:
    end = time.monotonic() + seconds
    async with _connected(distributed, address, seconds, certificates) as (scheduler, identity):
        events = {}
        for topic in history.TOPICS:
            try:
                asked = scheduler.events(topic=topic)
                events[topic] = await asyncio.wait_for(asked, max(1.0, end - time.monotonic()))
            except OSError as failed:
                hint = "give it more time with --timeout"
                raise TimedOut(
                    f"{address} did not send its events within {seconds:.0f} s", hint=hint
                ) from failed
        return history.history(events, identity.get("started"))


@asynccontextmanager
async def _connected(
    distributed: Any, address: str, seconds: float, certificates: Path | None
) -> AsyncIterator[tuple[Any, Mapping[str, Any]]]:
    """Connect to a scheduler, and yield it and what it says of itself."""
    end = time.monotonic() + seconds
    try:
        scheme, location = distributed.comm.parse_address(address)
        host, port = distributed.comm.parse_host_port(location)
        if not 0 < port < 65536:
            raise ValueError(f"there is no port {port}")
    except (ValueError, TypeError, KeyError) as wrong:
        why = "the port is no number" if str(wrong).startswith("invalid literal") else wrong
        raise UsageError(f"{address}: {why}", hint=_EXAMPLE) from wrong
    connection = tls.connection(distributed, scheme, certificates)
    await asyncio.to_thread(tls.check, connection["ssl_context"], scheme, host, port, seconds)
    try:
        scheduler = distributed.rpc(address, timeout=seconds, connection_args=connection)
    except (ValueError, TypeError, KeyError) as wrong:
        raise UsageError(f"{address}: {wrong}", hint=_EXAMPLE) from wrong
    try:
        try:
            identity = await asyncio.wait_for(_identity(scheduler), seconds)
        except OSError as failed:
            # distributed repeats the address and the time limit.
            text = str(failed).strip()
            if not text or text.startswith("Timed out"):
                text = await asyncio.to_thread(_unreachable, host, port)
            why = f": {text}" if text else ""
            if scheme == "tcp" and await asyncio.to_thread(tls.speaks_tls, host, port, seconds):
                raise UsageError(f"{address}: the scheduler uses TLS", hint=tls.HOW) from failed
            hint = "check that a scheduler listens there"
            took = seconds - max(0.0, end - time.monotonic())
            raise TimedOut(f"{address} did not answer within {took:.0f} s{why}", hint=hint) from failed
        except (MemoryError, struct.error) as wrong:
            # distributed takes the first eight bytes for a length.
            raise UsageError(f"{address}: what answers is no Dask scheduler", hint=_EXAMPLE) from wrong
        except (ValueError, RuntimeError, TypeError) as wrong:
            raise UsageError(f"{address}: {wrong}", hint=_EXAMPLE) from wrong
        yield scheduler, identity
    finally:
        await scheduler.close_rpc()


def _unreachable(host: str, port: int) -> str:
    """Return why nothing can be sent there, which distributed does not say; empty if something can be."""
    try:
        with socket.create_connection((host, port), 1.0):
            return ""
    except TimeoutError:
        return ""
    except OSError as wrong:
        return (wrong.strerror or str(wrong)).lower()


async def _identity(scheduler: Any) -> Mapping[str, Any]:
    """Return what the scheduler says of itself and of each worker. Newer versions list some by default."""
    try:
        answer = await scheduler.identity(n_workers=-1)
    except TypeError:
        answer = await scheduler.identity()
    except ValueError as wrong:
        # tornado's words for a connection that was closed before the handshake, as `ssh -L` does when nothing
        # listens at its other end.
        if "not idle" not in str(wrong):
            raise
        raise ConnectionResetError("the connection was closed") from wrong
    kind = answer.get("type") if isinstance(answer, Mapping) else None
    if kind != "Scheduler" or not isinstance(answer.get("workers"), Mapping):
        raise ValueError(f"expected a scheduler, got {kind or 'something else'}")
    return dict(answer)


async def _answers(scheduler: Any, addresses: Sequence[str], end: float) -> Mapping[str, Any]:
    """Ask all workers at once. If that takes more than half of the time, ask each one by itself."""
    if not addresses:
        return {}
    try:
        return await asyncio.wait_for(_ask(scheduler, addresses), max(0.0, end - time.monotonic()) / 2)
    except OSError:
        pass
    answers: dict[str, Any] = {}
    waiting = list(reversed(addresses))
    bound = max(0.5, (end - time.monotonic()) / 2)

    async def ask_next() -> None:
        while waiting:
            address = waiting.pop()
            try:
                answers.update(await asyncio.wait_for(_ask(scheduler, [address]), bound))
            except OSError:
                continue

    asking = [asyncio.ensure_future(ask_next()) for _ in range(min(_ONE_BY_ONE, len(addresses)))]
    _, late = await asyncio.wait(asking, timeout=max(0.5, end - time.monotonic()))
    for each in late:
        each.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    return answers


async def _scheduler(scheduler: Any, address: str, seconds: float) -> Scheduler:
    """Return the scheduler's machine and versions, or why it does not tell them."""
    try:
        asked = scheduler.run_function(function=_pickled("scheduler"), wait=True)
        answer = await asyncio.wait_for(asked, seconds)
    except (OSError, ValueError, RuntimeError, TypeError) as failed:
        return Scheduler(address=address, problem=str(failed) or "it did not answer in time")
    found = answer.get("result") if isinstance(answer, Mapping) else None
    if not isinstance(found, Mapping):
        reason = answer.get("text") if isinstance(answer, Mapping) else None
        return Scheduler(address=address, problem=str(reason or "unknown reason"))
    return Scheduler(address=address, **found)


def _pickled(name: str) -> bytes:
    """Return a function of the probe in the form in which it is sent."""
    text = Path(__file__).with_name("probe.py").read_text(encoding="utf-8")
    return pickle.dumps(_Source(text=text, name=name), protocol=4)


async def _ask(scheduler: Any, addresses: Sequence[str]) -> Mapping[str, Any]:
    message = {"op": "run", "function": _pickled("read"), "wait": True}
    answers = await scheduler.broadcast(msg=message, workers=list(addresses), on_error="return_pickle")
    return dict(answers)


def _worker(address: str, known: Mapping[str, Any], answer: Any) -> Worker:
    """Return a worker from what the scheduler knows, and from the worker's answer if there is one."""
    name, host = str(known.get("name", "")), str(known.get("host", ""))
    if not isinstance(answer, Mapping):
        return Worker(address=address, name=name, host=host, silent=True, problem="did not answer in time")
    found = answer.get("result")
    if answer.get("status") != "OK" or not isinstance(found, Mapping):
        reason = answer.get("text") or answer.get("exception_text") or "unknown reason"
        problem = f"reading its memory failed: {reason}"
        return Worker(address=address, name=name, host=host, problem=problem)
    if "error" in found:
        return Worker(address=address, name=name, host=host, problem=str(found["error"]))
    fields = {key: value for key, value in found.items() if key not in ("levels", "growth")}
    levels = tuple(CgroupLimit(**level) for level in found["levels"])
    growth = Growth(**found["growth"]) if found["growth"] else None
    reading = Reading(**fields, levels=levels, growth=growth)
    return Worker(address=address, name=name, host=host, reading=reading)
