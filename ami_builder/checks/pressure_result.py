"""What a machine under memory pressure showed, parsed from memory_pressure.sh, memory_pressure.py and the logins meanwhile."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

from ami_builder.checks.login_times import LoginTimes
from ami_builder.checks.machine_state import Incomplete, Sections, numbers, unreclaimable
from ami_builder.core import oom
from ami_builder.core.oom import Constraint, Kill

BESIDE_SECONDS = 1.0
"""A kill so soon after another is not for what was taken since: no worker is up again by then.

Where a login at rest takes longer than this, that is the bound: all is as much slower there.
"""

# They come and go with logins and D-Bus calls, and not for want of memory.
_PASSING = ("user@", "user-runtime-dir@", "ssh@", "sshd@")


class EndedBy(StrEnum):
    """Who ended a worker."""

    NANNY = "the nanny"
    CONTAINER = "the kernel, at the container's limit"
    MACHINE = "the kernel, because the whole machine had no memory left"
    NOBODY = "nobody that told of it"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceState:
    """A systemd service at one moment."""

    type: str
    active: str
    result: str
    restarts: str
    invocation: str

    def same(self, later: ServiceState | None) -> bool:
        """Tell whether nobody touched it; what D-Bus starts may end by itself."""
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
    """The process that took the container's whole limit outside Dask's eyes; times are seconds since 1970."""

    pid: int
    status: int
    began: float
    ended: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PressureResult:
    """What happened from the first step to the last; sizes are bytes, times seconds."""

    memcg: str
    limit: int | None
    """The container's; None without one."""
    total: int
    beside: int
    """What all in the container but its workers holds when they are back and idle."""
    scheduler: int
    """What the scheduler holds of that."""
    idle: int
    """What the workers hold then."""
    dask: Mapping[str, Any]
    """What memory_pressure.py wrote; without what belongs to steps that it did not come to."""
    said: str
    """What the client said that began it all; nothing when all went well."""
    grower: Grower
    kills: tuple[Kill, ...]
    before: Mapping[str, ServiceState]
    after: Mapping[str, ServiceState]
    container: tuple[str, str]
    """Id, whether it runs, start and restarts of the container, before and after."""
    watched: LoginTimes
    first_attempt: str = ""
    """Why it was all done a second time; empty at the first."""

    @classmethod
    def parse(cls, text: Sections, watched: LoginTimes) -> PressureResult:
        """Read the sections of memory_pressure.sh; raises Incomplete when one is missing or can't be read."""
        if "end" not in text:
            last = list(text)[-1] if text else "nothing"
            raise Incomplete(f"the machine did not come to an end under pressure; it last told: {last}")
        try:
            dask = json.loads(text["dask"]) if text["dask"].strip() else {}
            own = _processes(text["processes"])
            workers = sum(own.get(w["pid"], 0) for w in dask.get("back", ()))
            grower = dict(line.split(" ", 1) for line in text["grower"].splitlines() if " " in line)
            limit = text["memory.max"].strip()
            return cls(
                memcg=text["memcg"].strip(),
                limit=None if limit == "max" else int(limit),
                total=numbers(text["meminfo"])["MemTotal"],
                beside=unreclaimable(numbers(text["memory.stat"])) - workers,
                scheduler=own.get(dask.get("scheduler", 0), 0),
                idle=workers,
                dask=dask,
                said=text["client"].strip(),
                grower=Grower(
                    pid=int(grower["pid"]),
                    status=int(grower["status"]),
                    began=float(grower["began"]),
                    ended=float(grower["ended"]),
                ),
                kills=oom.kills(text["kernel"]),
                before=_services(text["services.before"]),
                after=_services(text["services.after"]),
                container=(text["container.before"].strip(), text["container.after"].strip()),
                watched=watched,
            )
        except (KeyError, ValueError, TypeError, IndexError) as wrong:
            raise Incomplete(f"the machine's answer under pressure can't be read: {wrong!r}") from wrong

    @property
    def error(self) -> str:
        """Why the steps did not all come to their end; empty when they did."""
        last = (self.said.splitlines() or ["it did not tell how it went"])[-1]
        return str(self.dask["error"]) if self.dask else last

    def worker_ends(self) -> tuple[EndedBy, ...]:
        """Return who ended each of the workers that leaked, whoever of them came first."""
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
        return min(by)[1] if by else EndedBy.NOBODY

    def kills_outside(self) -> tuple[Kill, ...]:
        """Return the kills that were not inside the container alone."""
        return tuple(
            kill for kill in self.kills if kill.constraint is Constraint.GLOBAL or not kill.inside(self.memcg)
        )

    def double_kill(self) -> str:
        """Tell whom the kernel killed in the container right after another one there; empty for nobody.

        Linux may choose a second victim while the first one's memory is on its way back, whoever then asks
        for some: seen 16 to 170 ms later on emulated machines, in three of some twenty runs. That is not the
        image's fault.
        """
        inside = [kill for kill in self.kills if kill.inside(self.memcg)]
        at_rest = sorted(wait.seconds for wait in self.watched.waits_at_rest())
        bound = max(BESIDE_SECONDS, at_rest[len(at_rest) // 2] if at_rest else 0.0)
        for first, second in pairwise(inside):
            seconds = second.seconds - first.seconds
            if seconds < bound:
                return f"the kernel killed {second.task} {seconds:.2f} s after {first.task}, in the container"
        return ""

    def changed_services(self) -> tuple[str, ...]:
        """Return the services that were up before, and are not, or not any more the same."""
        return tuple(
            name
            for name, service in self.before.items()
            if service.active == "active" and not service.same(self.after.get(name))
        )


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
