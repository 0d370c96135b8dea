"""Let the memory limits of a nanny and its worker follow that of their container while they run.

`dask worker --preload-nanny` loads this into a nanny, which adds it to its worker's preloads. Both read
memory.max of their cgroup (v2) every second, and keep the part of it that they had at the nanny's start. The
scheduler lists the new limit too. Python 3.9, distributed 2023 and later.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
from contextlib import suppress
from typing import Any

PERIOD = 1000
"""Milliseconds between two readings."""
FILE = "FOLLOW_LIMIT_FILE"
"""The variable that names another file than the cgroup's; for tests."""
MAXIMUM = "FOLLOW_LIMIT_MAXIMUM"
"""The variable that has the container's limit when it was made: until Dask has started, it may go down."""
PART = "FOLLOW_LIMIT_PART"
"""The variable by which a nanny tells its workers `LIMIT/MAXIMUM` at its start: a later one finds others."""
BELOW = 0.9
"""A nanny's limit does not go down so far that its worker holds more of it than this: at 0.95 it ends it."""

logger = logging.getLogger("distributed.worker.memory")
# Dask imports this again for each nanny of a process.
_followers: dict[int, Any] = globals().get("_followers", {})


def dask_setup(server: Any) -> None:
    """Follow the container's limit in a worker or a nanny. What fails here must not end them."""
    try:
        follower = Nanny(server) if hasattr(server, "instantiate") else Worker(server)
        if follower.limit:
            _followers[id(server)] = follower
            follower.start()
    except Exception as error:  # another version of distributed may not have what this needs
        logger.warning("The memory limit does not follow that of the container: %r", error)


def dask_teardown(server: Any) -> None:
    """Stop following."""
    follower = _followers.pop(id(server), None)
    if follower is not None:
        follower.callback.stop()
        os.close(follower.file)


def memory_max(own: str = "/proc/self/cgroup") -> str:
    """Return the path of the file that has the limit of this process's cgroup."""
    path = ""
    with open(own) as file:
        for line in file:
            if line.startswith("0::"):
                path = line[3:].strip().strip("/")
    return os.environ.get(FILE) or f"/sys/fs/cgroup/{path}/memory.max"


class Follower:
    """What a worker and a nanny have in common."""

    def __init__(self, server: Any) -> None:
        from tornado.ioloop import PeriodicCallback

        self.server, self.manager = server, server.memory_manager
        self.file = os.open(memory_max(), os.O_RDONLY | os.O_CLOEXEC)
        self.read = os.pread(self.file, 32, 0)
        self.limit, self.maximum = self.part()
        self.callback = PeriodicCallback(self.look, PERIOD)

    def part(self) -> tuple[int, int]:
        """Return the limit and the cgroup's at the start; 0 if there is nothing to follow."""
        limit, first = self.manager.memory_limit, os.environ.get(MAXIMUM, "")
        if not limit or not self.read.strip().isdigit():
            return 0, 1
        return int(limit), max(int(self.read), int(first) if first.isdigit() else 0)

    def start(self) -> None:
        """Begin to follow."""
        self.callback.start()

    def look(self) -> None:
        """Read the file, and use what it says."""
        self.read = os.pread(self.file, 32, 0)
        if self.read.strip().isdigit():
            self.use(self.limit * int(self.read) // self.maximum)

    def use(self, limit: int) -> None:
        """Make this the limit."""
        raise NotImplementedError


class Nanny(Follower):
    """Follows in a nanny, which ends its worker at 95 % of the limit."""

    def start(self) -> None:
        """Let the workers of this nanny follow too, beside the preloads that they are configured to have."""
        import dask

        nanny = self.server
        own = [each.name for each in nanny.preloads if each.name.endswith("follow_limit.py")]
        configured = nanny.preload or dask.config.get("distributed.worker.preload") or []
        names = [configured] if isinstance(configured, str) else [*configured]
        arguments = nanny.preload_argv or dask.config.get("distributed.worker.preload-argv") or []
        if arguments:
            arguments = [*([arguments] * len(names) if isinstance(arguments[0], str) else arguments), []]
        nanny.preload, nanny.preload_argv = [*names, *own[:1]], arguments
        os.environ[PART] = f"{self.limit}/{self.maximum}"
        super().start()

    def use(self, limit: int) -> None:
        """Go down no faster than the worker spills."""
        current = self.manager.memory_limit
        if limit < current:
            limit = min(current, max(limit, int(self.held() / BELOW)))
        self.manager.memory_limit = limit

    def held(self) -> int:
        """Return what the worker's process holds, as the nanny sees it."""
        import psutil  # type: ignore[import-untyped]

        process = getattr(getattr(self.server, "process", None), "process", None)
        with suppress(psutil.Error):
            return int(psutil.Process(process.pid).memory_info().rss) if process and process.pid else 0
        return 0


class Worker(Follower):
    """Follows in a worker, which spills and pauses at shares of the limit."""

    def start(self) -> None:
        """Begin before the worker registers: it may have started again in a container that is smaller now."""
        self.look()
        super().start()

    def part(self) -> tuple[int, int]:
        """Return what the nanny had: a worker that starts again has its old limit in a smaller container."""
        limit, _, maximum = os.environ.get(PART, "").partition("/")
        own = super().part()
        return (int(limit), int(maximum)) if own[0] and limit.isdigit() and maximum.isdigit() else own

    def use(self, limit: int) -> None:
        """Set the limit, and what Dask derived from it at the start."""
        manager, before = self.manager, self.manager.memory_limit
        if limit == before:
            return
        manager.memory_limit = limit
        logger.info(
            "The memory limit is %d bytes now, as that of the container changed; it was %d", limit, before
        )
        fast: Any = getattr(manager.data, "fast", None)
        if manager.memory_target_fraction and hasattr(fast, "n"):
            fast.n = int(limit * manager.memory_target_fraction)
        state: Any = getattr(self.server, "state", None)
        incoming = getattr(state, "transfer_incoming_bytes_limit", float("inf"))
        if incoming != float("inf"):
            state.transfer_incoming_bytes_limit = int(incoming * limit / before)
        self.listing = asyncio.ensure_future(self.list(limit))

    async def list(self, limit: int) -> None:
        """Let the scheduler list the limit. It has no other way than that of `Client.run_on_scheduler`."""
        source = LISTED.format(address=self.server.address, limit=limit)
        with suppress(Exception):  # the worker's own limit is right without
            await self.server.scheduler.run_function(
                function=pickle.dumps(_Source(source), protocol=4), wait=True
            )


LISTED = """
def listed(dask_scheduler):
    worker = dask_scheduler.workers.get({address!r})
    if worker is not None:
        if hasattr(dask_scheduler, "total_memory"):
            dask_scheduler.total_memory += {limit} - worker.memory_limit
        worker.memory_limit = {limit}
"""


class _Source:
    """The function `listed`, pickled as its source: a scheduler lacks this file, maybe this Python."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"(lambda names: (exec({self.text!r}, names), names['listed'])[1])(dict())",)
