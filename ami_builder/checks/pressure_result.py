"""What a machine under memory pressure reported: memory_pressure.sh, memory_pressure.py and the logins."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any, Self

from ami_builder.checks.login_times import LoginTimes, waits
from ami_builder.checks.machine_state import Incomplete, Sections, numbers, unreclaimable
from ami_builder.core import oom
from ami_builder.core.oom import Kill

BESIDE_SECONDS = 1.0
"""A kill this soon after another has the same cause: no worker has restarted by then.

On a machine where a login at rest takes longer than this, the bound is the time of that login.
"""

# Logins and D-Bus calls start and end these, whatever memory there is.
_PASSING = ("user@", "user-runtime-dir@", "ssh@", "sshd@")


class EndedBy(StrEnum):
    """What ended a worker."""

    NANNY = "the nanny"
    CONTAINER = "the kernel, at the container's limit"
    MACHINE = "the kernel, because the whole machine had no memory left"
    UNKNOWN = "an unknown cause"

    @property
    def reported_as(self) -> str:
        """Return what worker_deaths.py calls this; empty for an unknown cause."""
        return _REPORTED_AS.get(self, "")


_REPORTED_AS = {
    EndedBy.NANNY: "nanny",
    EndedBy.CONTAINER: "kernel-container",
    EndedBy.MACHINE: "kernel-machine",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceState:
    """A systemd service at one moment."""

    type: str
    active: str
    result: str
    restarts: str
    invocation: str

    def same(self, later: Self | None) -> bool:
        """Return whether the service still runs unchanged; one that D-Bus started may end by itself."""
        if later is None or later.result != "success":
            return False
        idle = self.type == "dbus" and later.active == "inactive"
        return idle or (later.active, later.restarts, later.invocation) == (
            self.active,
            self.restarts,
            self.invocation,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Grower:
    """The process that took the container's whole limit without Dask; times are seconds since 1970."""

    pid: int
    status: int
    began: float
    ended: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PressureResult:
    """What happened from the first step to the last; sizes are bytes, times are seconds."""

    memcg: str
    limit: int | None
    """The container's; None without one."""
    beside: int
    """Memory of everything in the container but its workers, when they are back and idle."""
    scheduler: int
    """The scheduler's part of that."""
    idle: int
    """Memory of the workers then."""
    dask: Mapping[str, Any]
    """What memory_pressure.py wrote; results of steps that it did not reach are missing."""
    client_output: str
    """What the client printed that started the steps; empty if all went well."""
    grower: Grower
    kills: tuple[Kill, ...]
    journal: str
    """The journal's lines about ends, of watch-kills and worker_deaths.py."""
    recorded: tuple[Mapping[str, Any], ...]
    """What /run/dask/kills has."""
    container_log: str
    """The container's own lines about ends of workers."""
    before: Mapping[str, ServiceState]
    after: Mapping[str, ServiceState]
    container: tuple[str, str]
    """Id, whether it runs, start and restarts of the container, before and after."""
    watched: LoginTimes
    first_attempt: str = ""
    """Why this is the second attempt; empty for the first."""

    @classmethod
    def parse(cls, text: Sections, watched: LoginTimes) -> Self:
        """Read the sections of memory_pressure.sh; raises Incomplete when one is missing or can't be read."""
        if "end" not in text:
            last = list(text)[-1] if text else "nothing"
            raise Incomplete(f"the script under memory pressure did not end; its last section is: {last}")
        try:
            dask = json.loads(text["dask"]) if text["dask"].strip() else {}
            own = _processes(text["processes"])
            workers = sum(own.get(w["pid"], 0) for w in dask.get("back", ()))
            grower = dict(line.split(" ", 1) for line in text["grower"].splitlines() if " " in line)
            limit = text["memory.max"].strip()
            return cls(
                memcg=text["memcg"].strip(),
                limit=None if limit == "max" else int(limit),
                beside=unreclaimable(numbers(text["memory.stat"])) - workers,
                scheduler=own.get(dask.get("scheduler", 0), 0),
                idle=workers,
                dask=dask,
                client_output=text["client"].strip(),
                grower=Grower(
                    pid=int(grower["pid"]),
                    status=int(grower["status"]),
                    began=float(grower["began"]),
                    ended=float(grower["ended"]),
                ),
                kills=oom.kills(text["kernel"], booted=_booted(text["kernel"])),
                journal=text["journal"],
                recorded=tuple(json.loads(line) for line in text["recorded"].splitlines()),
                container_log=text["container.log"],
                before=_services(text["services.before"]),
                after=_services(text["services.after"]),
                container=(text["container.before"].strip(), text["container.after"].strip()),
                watched=watched,
            )
        except (KeyError, ValueError, TypeError, IndexError) as wrong:
            raise Incomplete(
                f"the machine's answer under memory pressure can't be read: {wrong!r}"
            ) from wrong

    @property
    def error(self) -> str:
        """Why the steps did not complete; empty if they did."""
        last = (self.client_output.splitlines() or ["it reported no result"])[-1]
        return str(self.dask["error"]) if self.dask else last

    @property
    def moment(self) -> float:
        """Seconds that count as at once: a second, or as long as a login takes at rest."""
        at_rest = sorted(wait.seconds for wait in waits(self.watched.rest))
        return max(BESIDE_SECONDS, at_rest[len(at_rest) // 2] if at_rest else 0.0)

    def worker_ends(self) -> tuple[EndedBy, ...]:
        """Return for each worker that leaked what ended it first."""
        leaks = self.dask.get("leaks", [])
        ends = [*(leak["time"] for leak in leaks[1:]), self.grower.began]
        return tuple(self._end_of(leak, end) for leak, end in zip(leaks, ends, strict=False))

    def _end_of(self, leak: Mapping[str, Any], end: float) -> EndedBy:
        by: list[tuple[float, EndedBy]] = [
            (event["time"], EndedBy.NANNY) for event in self.dask["nanny"] if event["pid"] == leak["pid"]
        ]
        by += [
            (kill.seconds, EndedBy.CONTAINER if kill.inside(self.memcg) else EndedBy.MACHINE)
            for kill in self.kills
            if leak["time"] <= kill.seconds < end
        ]
        return min(by)[1] if by else EndedBy.UNKNOWN

    def double_kill(self) -> str:
        """Return a text on a process that the kernel killed right after another in the container, or nothing.

        Linux may choose a second victim while the memory of the first is being freed: 16 to 170 ms later
        on emulated VMs, in three of about twenty runs. The image does not cause this.
        """
        inside = [kill for kill in self.kills if kill.inside(self.memcg)]
        for first, second in pairwise(inside):
            seconds = second.seconds - first.seconds
            if seconds < self.moment:
                return f"the kernel killed {second.task} {seconds:.2f} s after {first.task}, in the container"
        return ""


def _booted(log: str) -> float:
    """Return when the kernel's clock began, in seconds since 1970."""
    found = re.search(r"^\[ *([\d.]+)\] ami-builder: the time is ([\d.]+)$", log, re.MULTILINE)
    if found is None:
        raise ValueError("the kernel's log took no line of a program (kernel parameter printk.devkmsg)")
    return float(found[2]) - float(found[1])


def _processes(text: str) -> dict[int, int]:
    # Lines of /proc/PID/status, of which Name is the first.
    each = [numbers(part) for part in text.split("Name: ")[1:]]
    return {process["NSpid"]: process.get("RssAnon", 0) for process in each}


def _services(text: str) -> dict[str, ServiceState]:
    found: dict[str, ServiceState] = {}
    for part in text.strip().split("\n\n"):
        of = dict(line.split("=", 1) for line in part.splitlines() if "=" in line)
        if of and not of["Id"].startswith(_PASSING):
            found[of["Id"]] = ServiceState(
                type=of.get("Type", ""),
                active=of["ActiveState"],
                result=of.get("Result", ""),
                restarts=of.get("NRestarts", ""),
                invocation=of.get("InvocationID", ""),
            )
    return found
