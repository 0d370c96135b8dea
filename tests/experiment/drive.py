"""A scheduler and its client in a process of their own, outside the machine, spoken to line by line.

First it says where it listens. Then it is told the tasks, and says how many have ended, at last all it saw.
It never connects to the worker, which is behind QEMU's network: what a worker tells comes over the connection
that the worker has made.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import time
from collections import Counter
from typing import Any

from distributed import Client, Future, Scheduler
from distributed.core import Status
from distributed.diagnostics.plugin import SchedulerPlugin

_LOOK_SECONDS = 0.5


def say(**message: Any) -> None:
    """Write one line to whoever has started this."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


async def hear() -> dict[str, Any]:
    """Return the next line that we are told."""
    line = await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    if not line:
        raise SystemExit("nobody is there any more")
    told: dict[str, Any] = json.loads(line)
    return told


def load(name: str, path: str) -> Any:
    """Import the file under the name that it has in the container: functions travel by their names alone.

    Python here and there differ, and so do their byte codes.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Watch(SchedulerPlugin):
    """What is seen of the worker from outside: its memory as it tells it, pauses, restarts."""

    name = "ami-builder-watch"

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.marks: list[tuple[float, str]] = []
        self.spilled = 0
        self._paused = False

    def _mark(self, kind: str) -> None:
        self.marks.append((round(time.monotonic() - self.began, 2), kind))

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Note that a worker is back; the scheduler tells, as a look now and then would miss a quick one."""
        self._mark("back")

    def remove_worker(self, scheduler: Scheduler, worker: str, **_: Any) -> None:
        """Note that it is gone."""
        self._mark("lost")
        self._paused = False

    def look(self, scheduler: Scheduler) -> None:
        """Note what has changed of the worker that is there."""
        worker = next(iter(scheduler.workers.values()), None)
        if worker is None:
            return
        paused = worker.status is Status.paused
        if paused != self._paused:
            self._mark("paused" if paused else "resumed")
            self._paused = paused
        metrics = worker.metrics or {}
        self.spilled = max(self.spilled, int((metrics.get("spilled_bytes") or {}).get("disk", 0)))


async def run(scheduler: Scheduler, client: Client, told: dict[str, Any]) -> None:
    """Give the tasks to the worker, and wait until all have ended or the time is up."""
    module = load(told["module"], told["path"])
    watch = Watch()
    scheduler.add_plugin(watch)
    futures: dict[str, Future[Any]] = {}
    for task in told["tasks"]:
        arguments = [*(futures[key] for key in task["after"]), *task["arguments"]]
        futures[task["key"]] = client.submit(
            getattr(module, task["function"]), *arguments, key=task["key"], pure=False
        )
    kept = {task["key"]: futures[task["key"]] for task in told["tasks"] if task["kept"]}
    taken = {task["key"] for task in told["tasks"] if task["taken"]}
    futures.clear()
    wanted, done, reported = len(kept), 0, 0.0
    while True:
        # A client that takes each result at once does not want it again when the worker is lost.
        for key in [key for key in kept if key in taken and kept[key].status == "finished"]:
            del kept[key]
            done += 1
        counts = Counter(future.status for future in kept.values())
        ended = done + counts["finished"] + counts["error"] + counts["cancelled"]
        watch.look(scheduler)
        spent = time.monotonic() - watch.began
        if ended == wanted or spent > told["timeout"]:
            break
        if spent - reported >= 5:
            reported = spent
            say(done=done + counts["finished"], failed=counts["error"], of=wanted)
        await asyncio.sleep(_LOOK_SECONDS)
    reasons = Counter([type(await f.exception()).__name__ for f in kept.values() if f.status == "error"])
    say(
        ended={
            "done": done + counts["finished"],
            "failed": counts["error"] + counts["cancelled"],
            "unfinished": wanted - ended,
            "seconds": round(spent, 2),
            "spilled": watch.spilled,
            "marks": watch.marks,
            "reasons": reasons,
        }
    )


async def main() -> None:
    """Listen, wait for the worker, run what we are told, and stay until the input ends."""
    async with (
        Scheduler(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0") as scheduler,
        Client(scheduler.address, asynchronous=True, set_as_default=False) as client,
    ):
        say(port=scheduler.port)
        while not scheduler.workers:
            await asyncio.sleep(_LOOK_SECONDS)
        worker = next(iter(scheduler.workers.values()))
        say(limit=worker.memory_limit, threads=worker.nthreads)
        await run(scheduler, client, await hear())
        # Closing would wait for a worker that may be frozen: we are ended from outside.
        await hear()


if __name__ == "__main__":
    asyncio.run(main())
