"""A scheduler and its client, in a process outside the VM that exchanges JSON lines with driver.py.

It writes the port it listens on, reads the tasks, and writes the progress and at last the results. It can't
connect to the worker behind QEMU's network: all communication uses the connection that the worker opened.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from distributed import Client, Future, Scheduler
from distributed.core import Status
from distributed.diagnostics.plugin import SchedulerPlugin

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_LOOK_SECONDS = 0.5


def send(**message: Any) -> None:
    """Write one message to stdout."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


async def receive() -> dict[str, Any]:
    """Return the next message from stdin."""
    line = await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    if not line:
        raise SystemExit("stdin was closed")
    message: dict[str, Any] = json.loads(line)
    return message


def load(name: str, path: str) -> Any:
    """Import a file under the name that it has in the container.

    So functions are pickled by name: this Python's byte code may not run in the container.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Watch(SchedulerPlugin):
    """Records pauses, restarts and spilling of the worker, as the scheduler sees them."""

    name = "ami-builder-watch"

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.marks: list[tuple[float, str]] = []
        self.spilled = 0
        self._paused = False

    def _mark(self, kind: str) -> None:
        self.marks.append((round(time.monotonic() - self.began, 2), kind))

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Record that a worker is back."""
        self._mark("back")

    def remove_worker(self, scheduler: Scheduler, worker: str, **_: Any) -> None:
        """Record that a worker was lost."""
        self._mark("lost")
        self._paused = False

    def look(self, scheduler: Scheduler) -> None:
        """Record changes of the current worker."""
        worker = next(iter(scheduler.workers.values()), None)
        if worker is None:
            return
        paused = worker.status is Status.paused
        if paused != self._paused:
            self._mark("paused" if paused else "resumed")
            self._paused = paused
        metrics = worker.metrics or {}
        self.spilled = max(self.spilled, int((metrics.get("spilled_bytes") or {}).get("disk", 0)))


async def work(
    client: Client,
    module: Any,
    tasks: Sequence[Mapping[str, Any]],
    *,
    timeout: float,
    look: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Submit the tasks, and wait until all have ended or `timeout` seconds have passed; return the counts.

    Writes the progress to stdout, and calls `look` in between.
    """
    began = time.monotonic()
    futures: dict[str, Future[Any]] = {}
    for task in tasks:
        arguments = [*(futures[key] for key in task["after"]), *task["arguments"]]
        futures[task["key"]] = client.submit(
            getattr(module, task["function"]), *arguments, key=task["key"], pure=False
        )
    kept = {task["key"]: futures[task["key"]] for task in tasks if task["kept"]}
    taken = {task["key"] for task in tasks if task["taken"]}
    futures.clear()
    wanted, done, reported = len(kept), 0, 0.0
    while True:
        # Release finished futures, so that their tasks are not repeated when the worker is lost.
        for key in [key for key in kept if key in taken and kept[key].status == "finished"]:
            del kept[key]
            done += 1
        counts = Counter(future.status for future in kept.values())
        ended = done + counts["finished"] + counts["error"] + counts["cancelled"]
        look()
        spent = time.monotonic() - began
        if ended == wanted or spent > timeout:
            break
        if spent - reported >= 5:
            reported = spent
            send(done=done + counts["finished"], failed=counts["error"], of=wanted)
        await asyncio.sleep(_LOOK_SECONDS)
    reasons = Counter([type(await f.exception()).__name__ for f in kept.values() if f.status == "error"])
    return {
        "done": done + counts["finished"],
        "failed": counts["error"] + counts["cancelled"],
        "unfinished": wanted - ended,
        "seconds": round(spent, 2),
        "reasons": reasons,
    }


async def run(scheduler: Scheduler, client: Client, message: dict[str, Any]) -> None:
    """Do the work of a message, and watch the worker meanwhile."""
    module = load(message["module"], message["path"])
    watch = Watch()
    scheduler.add_plugin(watch)
    ended = await work(
        client, module, message["tasks"], timeout=message["timeout"], look=lambda: watch.look(scheduler)
    )
    send(ended={**ended, "spilled": watch.spilled, "marks": watch.marks})


async def main() -> None:
    """Listen, wait for the worker, run the tasks, and stay until stdin is closed."""
    async with (
        Scheduler(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0") as scheduler,
        Client(scheduler.address, asynchronous=True, set_as_default=False) as client,
    ):
        send(port=scheduler.port)
        while not scheduler.workers:
            await asyncio.sleep(_LOOK_SECONDS)
        worker = next(iter(scheduler.workers.values()))
        send(limit=worker.memory_limit, threads=worker.nthreads)
        await run(scheduler, client, await receive())
        # Closing would wait for a worker that may not respond. driver.py ends this process.
        await receive()


if __name__ == "__main__":
    asyncio.run(main())
