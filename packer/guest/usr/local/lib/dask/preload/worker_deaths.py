"""Report why a worker's process ended: a warning in its nanny's log, and an event of the scheduler.

`dask worker --preload-nanny` loads this into a nanny. The event is on the topic `worker-deaths`, and on `all`
for the dashboard's page /events. What the kernel did not do also goes to /run/dask/reports, for the machine's
journal: watch-kills has the kernel's. A worker that was asked to end, as by `Client.restart`, is not
reported. The kernel's kills are found by the cgroup's own counters (memory.events, cgroup v2). Python 3.9,
distributed 2023 and later. For tests, WORKER_DEATHS_CGROUP is a folder in place of the cgroup's, and
WORKER_DEATHS_REPORTS another pipe.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

TOPIC = "worker-deaths"
PERIOD = 200
"""Milliseconds between two looks at the worker's process and the counters."""
GRACE = 5.0
"""Seconds after a kill in which the end of a worker explains it."""
GRACE_PER_GIB = 0.25
"""The same for each GiB of the limit, if that is more. The kernel freed one of an ended process in 0.07 s."""
AT_LIMIT = 10.0
"""Seconds before the end of a worker in which the limit was reached, if that is why it was killed."""
REPORTS = Path(os.environ.get("WORKER_DEATHS_REPORTS", "/run/dask/reports"))
"""A pipe to the machine's journal, where the container mounts it."""
MOST_TASKS = 20
"""How many tasks an event lists."""

logger = logging.getLogger("distributed.nanny")
# Dask imports this again for each nanny of a process.
_watches: dict[int, Any] = globals().get("_watches", {})


def dask_setup(nanny: Any) -> None:
    """Watch the nanny's worker. What can't be watched must not end the nanny."""
    try:
        _watches[id(nanny)] = watch = Watch(nanny, _kills())
        watch.start()
    except Exception as error:  # another version of distributed may have none of what this needs
        logger.warning("The ends of this nanny's workers will not be explained: %r", error)


def dask_teardown(nanny: Any) -> None:
    """Stop watching."""
    watch = _watches.pop(id(nanny), None)
    if watch is not None:
        watch.callback.stop()
        for report in watch.reports:
            report.cancel()


def _kills() -> Kills:
    """Return the one of this process: its nannies share the counters of their cgroup."""
    shared = globals().get("_shared")
    if shared is None:
        shared = globals()["_shared"] = Kills(own_cgroup())
    return shared


def own_cgroup() -> Path:
    """Return the folder of this process's cgroup."""
    if "WORKER_DEATHS_CGROUP" in os.environ:
        return Path(os.environ["WORKER_DEATHS_CGROUP"])
    path = ""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            path = line[3:].strip("/")
    return Path("/sys/fs/cgroup", path)


class Kills:
    """The kills that a cgroup counts, and how many of them have been explained."""

    def __init__(self, cgroup: Path) -> None:
        self.cgroup = cgroup
        self.total, self.reached = self._read()
        self.explained = self.total
        self.grew = self.at_limit = float("-inf")

    def _read(self) -> tuple[int, int]:
        try:
            lines = (self.cgroup / "memory.events").read_text().splitlines()
        except OSError:  # cgroup v1 has no such file
            return 0, 0
        found = dict(line.split() for line in lines)
        return int(found.get("oom_kill", 0)), int(found.get("oom", 0))

    def look(self) -> None:
        """Read the counters."""
        total, reached = self._read()
        now = time.monotonic()
        if total > self.total:
            self.grew = now
        if reached > self.reached:
            self.at_limit = now
        self.total, self.reached = total, reached

    def explain(self) -> str:
        """Return which memory ran out when the kernel killed a process, and take that kill as explained.

        `container` is the cgroup's limit, `machine` that of the machine or of a cgroup around this one. Empty
        if there is no such kill.
        """
        self.look()
        if self.total <= self.explained:
            return ""
        self.explained += 1
        return "container" if time.monotonic() - self.at_limit < AT_LIMIT else "machine"

    def others(self) -> int:
        """Return how many kills no worker has explained in time, and take them as explained."""
        grace = max(GRACE, GRACE_PER_GIB * (self.limit() or 0) / 2**30)
        if self.total <= self.explained or time.monotonic() - self.grew < grace:
            return 0
        left, self.explained = self.total - self.explained, self.total
        return left

    def limit(self) -> int | None:
        """Return the cgroup's limit in bytes; None without one."""
        try:
            return int((self.cgroup / "memory.max").read_text())
        except (OSError, ValueError):
            return None


class Watch:
    """Watches one nanny."""

    def __init__(self, nanny: Any, kills: Kills) -> None:
        from tornado.ioloop import PeriodicCallback

        self.nanny, self.kills = nanny, kills
        self.pid: int | None = None
        self.address: str | None = None
        self.last: str | None = None
        """The address of the worker that ended last: the nanny has it until the next one is up."""
        self.requested = False
        self.terminated: dict[str, Any] = {}
        self.reports: set[Any] = set()
        self.callback = PeriodicCallback(self.look, PERIOD)

    def start(self) -> None:
        """Look at what the nanny sees and sends: it has no hook for the end of its worker."""
        nanny, on_exit, log_event = self.nanny, self.nanny._on_worker_exit_sync, self.nanny.log_event

        def exited(code: int) -> Any:
            try:
                self.ended(code)
            except Exception as error:
                logger.warning("The end of a worker can't be explained: %r", error)
            return on_exit(code)

        def logged(topic: Any, msg: Any) -> Any:
            if topic == "worker-restart-memory":
                self.terminated = msg
            return log_event(topic, msg)

        nanny._on_worker_exit_sync, nanny.log_event = exited, logged
        self.callback.start()

    def look(self) -> None:
        """Look at the worker and the counters; after an error, never again."""
        try:
            self._look()
        except Exception as error:
            self.callback.stop()
            logger.warning("The ends of this nanny's workers will not be explained: %r", error)

    def _look(self) -> None:
        # This is not known any more when the worker has ended.
        worker = self.nanny.process
        process = getattr(worker, "process", None)
        if process is not None:
            self.pid = process.pid or self.pid
            self.requested = worker.status.name == "stopping"
            if worker.status.name == "running":
                self.address = worker.worker_address
        self.kills.look()
        others = self.kills.others()
        if others:
            processes = "another process" if others == 1 else f"{others} other processes"
            at_limit = self.kills.grew - self.kills.at_limit < AT_LIMIT
            where = of_container(self.kills.limit()) if at_limit else MACHINE
            logger.warning("The kernel killed %s of this container %s", processes, where)

    def ended(self, code: int) -> None:
        """Report the end of the worker's process, unless somebody asked for it."""
        nanny, pid = self.nanny, self.pid
        address = nanny.worker_address if nanny.worker_address != self.last else self.address
        asked = self.requested or nanny.status.name in ("closing", "closed", "closing_gracefully", "failed")
        self.pid, self.address, self.requested, self.last = None, None, False, nanny.worker_address
        if code == 0 or asked:
            return
        memory = nanny.memory_manager.memory_limit
        event: dict[str, Any] = {
            "action": "worker-death",
            "worker": address,
            "name": nanny.name if nanny.name is None else str(nanny.name),
            "pid": pid,
            "host": socket.gethostname(),
            "exitcode": code,
            "memory": None,
            "limit": None,
        }
        exhausted = self.kills.explain() if code in (-signal.SIGKILL, 255) else ""
        if exhausted:
            event["by"] = f"kernel-{exhausted}"
            event["limit"] = self.kills.limit() if exhausted == "container" else None
            why = of_container(event["limit"]) if exhausted == "container" else MACHINE
            event["cause"] = f"ended by the kernel {why}"
        elif self._nanny_did(pid):
            event.update(by="nanny", limit=memory, memory=self.terminated.get("rss"))
            share = getattr(nanny.memory_manager, "memory_terminate_fraction", 0.95) or 0.95
            event["cause"] = f"ended by its nanny at {share:.0%} of its limit of {size(memory)}"
            if event["memory"]:
                event["cause"] += f" (it held {size(event['memory'])})"
        elif code < 0:
            event.update(by="signal", cause=f"ended by signal {signal_name(-code)}")
        else:
            event.update(by="exit", cause=f"ended with exit status {code}")
        report = asyncio.ensure_future(self.report(event))
        self.reports.add(report)
        report.add_done_callback(self.reports.discard)

    def _nanny_did(self, pid: int | None) -> bool:
        # Older versions send no event.
        last = getattr(self.nanny.memory_manager, "_last_terminated_pid", None)
        return pid is not None and self.terminated.get("pid", last) == pid

    async def report(self, event: dict[str, Any]) -> None:
        """Add the worker's tasks, and write the line and the event."""
        try:
            tasks = await self.tasks(event["worker"])
        except Exception:
            tasks = None
        event["tasks"] = None if tasks is None else sorted(tasks)[:MOST_TASKS]
        event["task-count"] = None if tasks is None else len(tasks)
        pid = event["pid"]
        doing = while_doing(event["tasks"], len(tasks or ()), self.nanny.nthreads)
        who = f"{event['name']}, pid {pid}" if event["name"] else f"pid {pid}"
        worker = event["worker"] or "that was starting"
        line = f"Worker {worker} ({who}): {event['cause']}{doing}"
        # A task's key is any text; a second line would look like another report.
        line = "".join(one if one.isprintable() else "?" for one in line)
        logger.warning("%s", line)
        if not event["by"].startswith("kernel"):
            to_journal(line)
        for pause in (1, 5, 20, 60):
            try:
                sent = self.nanny.scheduler.log_event(topic=[TOPIC, "all"], msg=event)
                await asyncio.wait_for(sent, 10)
                return
            except Exception:  # the scheduler does not answer
                await asyncio.sleep(pause)

    async def tasks(self, address: str | None) -> list[str] | None:
        """Return the worker's tasks from the scheduler's event of its removal; None if that does not come."""
        if address is None:
            return None
        for pause in (0.05, 0.1, 0.2, 0.4, 0):
            asked = self.nanny.scheduler.events(topic=address)
            for _, event in reversed(await asyncio.wait_for(asked, 2)):
                action = event.get("action") if isinstance(event, dict) else None
                if action == "remove-worker":
                    return [str(key) for key in event["processing-tasks"]]
                if action == "add-worker":
                    break
            await asyncio.sleep(pause)
        return None


MACHINE = "because the machine had no memory left"


def to_journal(line: str) -> None:
    """Write a line to the machine's journal, if it takes it."""
    try:
        pipe = os.open(REPORTS, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # nothing is mounted there
        return
    try:
        os.write(pipe, line.encode(errors="replace")[:1000] + b"\n")
    except OSError:  # it is full
        pass
    finally:
        os.close(pipe)


def of_container(limit: int | None) -> str:
    """Return a text about the container's limit."""
    return "at the container's limit" + (f" of {size(limit)}" if limit else "")


def while_doing(tasks: list[str] | None, count: int, threads: int) -> str:
    """Return a text about the worker's tasks; those beyond its threads were waiting."""
    if not tasks:
        return "" if tasks is None else ", without a task"
    listed = ", ".join(tasks) + (f" and {count - len(tasks)} more" if count > len(tasks) else "")
    if count > threads:
        return f"; it had these tasks: {listed}"
    return f" while running {'task' if count == 1 else 'tasks'} {listed}"


def signal_name(number: int) -> str:
    """Return a signal's name, or its number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def size(number: float | None) -> str:
    """Return a size for people."""
    if number is None:
        return "?"
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
