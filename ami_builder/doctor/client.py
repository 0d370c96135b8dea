"""Asks a scheduler for its workers, and every worker through it for its memory.

It sends the operations that a `Client` sends for `scheduler_info` and `run`, without a Client: a new one
doesn't connect to an old scheduler.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ami_builder.core.errors import MissingTool, TimedOut, UsageError
from ami_builder.doctor.rules import Level, Reading, Worker
from ami_builder.verify.executor import INSTALL

_ONE_BY_ONE = 64
"""How many workers are asked at a time when one of all didn't answer."""
_EXAMPLE = "give a scheduler's address, such as tcp://10.0.0.5:8786; the dashboard's is another one"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Travelling:
    """A function that is unpickled from its text, by whatever Python is there."""

    text: str
    name: str

    def __reduce__(self) -> tuple[Any, ...]:
        made = f"(lambda names: (exec({self.text!r}, names), names[{self.name!r}])[1])"
        return eval, (f"{made}({{'__name__': 'ami_builder_probe'}})",)


def read_cluster(address: str, seconds: float) -> tuple[Worker, ...]:
    """Return every worker of a scheduler with what it told, within about `seconds`.

    Raises UsageError (address), MissingTool (distributed) and TimedOut (the scheduler doesn't answer).
    """
    with _quiet():
        try:
            import distributed
        except ImportError as missing:
            raise MissingTool(f"Dask isn't installed here ({missing})", hint=INSTALL) from missing
        return asyncio.run(_read(distributed, address, seconds))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what distributed says about lost workers and other versions from stderr: we say it ourselves."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


async def _read(distributed: Any, address: str, seconds: float) -> tuple[Worker, ...]:
    try:
        distributed.comm.parse_host_port(distributed.comm.parse_address(address)[1])
        connection = distributed.Security().get_connection_args("client")
        scheduler = distributed.rpc(address, timeout=seconds, connection_args=connection)
    except (ValueError, TypeError, KeyError) as wrong:
        raise UsageError(f"{address}: {wrong}", hint=_EXAMPLE) from wrong
    end = time.monotonic() + seconds
    try:
        try:
            known = await asyncio.wait_for(_identity(scheduler), seconds)
        except OSError as gone:
            why = str(gone).strip() or "no answer"
            hint = (
                "is it a scheduler, and reachable from here? With TLS, `ami-builder doctor --help` says how"
            )
            took = seconds - max(0.0, end - time.monotonic())
            raise TimedOut(f"{address} gave no answer in {took:.0f} s: {why}", hint=hint) from gone
        except (ValueError, RuntimeError, TypeError) as wrong:
            raise UsageError(f"{address}: {wrong}", hint=_EXAMPLE) from wrong
        answers = await _answers(scheduler, list(known), end)
    finally:
        await scheduler.close_rpc()
    return tuple(_worker(each, known[each], answers.get(each)) for each in known)


async def _identity(scheduler: Any) -> Mapping[str, Mapping[str, Any]]:
    """Return what the scheduler knows of each worker; newer ones tell only some of them unless asked."""
    try:
        told = await scheduler.identity(n_workers=-1)
    except TypeError:
        told = await scheduler.identity()
    if told.get("type") != "Scheduler":
        raise ValueError(f"that is no scheduler, but a {told.get('type', 'stranger')}")
    return dict(told["workers"])


async def _answers(scheduler: Any, addresses: Sequence[str], end: float) -> Mapping[str, Any]:
    """Ask all workers at once, and one by one when some worker keeps that from ending in half the time."""
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


async def _ask(scheduler: Any, addresses: Sequence[str]) -> Mapping[str, Any]:
    text = Path(__file__).with_name("probe.py").read_text(encoding="utf-8")
    function = pickle.dumps(_Travelling(text=text, name="read"), protocol=4)
    message = {"op": "run", "function": function, "wait": True}
    told = await scheduler.broadcast(msg=message, workers=list(addresses), on_error="return_pickle")
    return dict(told)


def _worker(address: str, known: Mapping[str, Any], answer: Any) -> Worker:
    """Return a worker from what the scheduler knows and the worker answered, if it was reached."""
    name, host = str(known.get("name", "")), str(known.get("host", ""))
    if not isinstance(answer, Mapping):
        return Worker(address=address, name=name, host=host, silent=True, problem="it didn't answer in time")
    told = answer.get("result")
    if answer.get("status") != "OK" or not isinstance(told, Mapping):
        problem = (
            f"reading failed there: {answer.get('text') or answer.get('exception_text') or 'no reason given'}"
        )
        return Worker(address=address, name=name, host=host, problem=problem)
    if "error" in told:
        return Worker(address=address, name=name, host=host, problem=str(told["error"]))
    fields = {key: value for key, value in told.items() if key != "levels"}
    levels = tuple(Level(**level) for level in told["levels"])
    return Worker(address=address, name=name, host=host, reading=Reading(**fields, levels=levels))
