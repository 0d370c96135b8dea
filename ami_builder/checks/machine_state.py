"""The state of a machine after Dask has started, parsed from wait_for_dask.sh and machine_state.sh."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any, Self

VARIABLE = "AVAILABLE_MEMORY_FOR_DASK"
PROJECT = "dask"
ANSWERS = "Dask answers"
"""What wait_for_dask.sh reports when Dask answered."""

CLOCK_SECONDS = 2.0
"""The boot time is reported in whole seconds, and the clock may be corrected while the machine runs."""

_LINE = re.compile(rf"{VARIABLE}=([0-9]{{1,18}})\n?")

Sections = Mapping[str, str]


class Incomplete(ValueError):
    """The machine's answer is not what the scripts print."""


def exact_size(size: int) -> str:
    """Return a size in bytes and MiB."""
    return f"{size} bytes ({size / (1 << 20):.1f} MiB)"


def sections(text: str) -> Sections:
    """Split a script's output at its section marks; return name -> text."""
    parts = (part.partition("\n") for part in text.split("\n\036")[1:])
    return {name: body for name, _, body in parts}


def numbers(text: str) -> dict[str, int]:
    """Read `name value [kB]` lines (meminfo, memory.stat) into bytes or plain counts."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        name, *rest = line.replace(":", " ").split()[:3] or [""]
        if rest and rest[0].isdigit():
            found[name] = int(rest[0]) * (1024 if rest[1:] == ["kB"] else 1)
    return found


def unreclaimable(stat: Mapping[str, int]) -> int:
    """Return how many bytes of a cgroup cannot be reclaimed: all but page cache and reclaimable slab.

    Kernel, Documentation/admin-guide/cgroup-v2.rst, memory.stat: `file` has shmem in it, which can't be
    dropped; `kernel` has all slab in it, of which slab_reclaimable can.
    """
    kernel = stat.get("kernel", 0) - stat.get("slab_reclaimable", 0)
    return stat.get("anon", 0) + stat.get("shmem", 0) + stat.get("sock", 0) + kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerState:
    """A container, as `docker inspect` describes it; sizes are bytes."""

    id: str
    name: str
    project: str
    running: bool
    created: float
    """Seconds since 1970."""
    memory: int
    memory_swap: int
    reservation: int
    privileged: bool
    cgroup_namespace: str
    oom_kill_disable: bool
    oom_killed: bool
    restart_policy: str
    restart_count: int
    log_driver: str
    log_options: Mapping[str, str]
    health_check: tuple[str, ...]

    @classmethod
    def parse(cls, inspected: Mapping[str, Any]) -> Self:
        """Read one element of `docker inspect`."""
        host, state, config = inspected["HostConfig"], inspected["State"], inspected["Config"]
        return cls(
            id=inspected["Id"],
            name=inspected["Name"].lstrip("/"),
            project=(config.get("Labels") or {}).get("com.docker.compose.project", ""),
            running=state["Running"],
            created=datetime.fromisoformat(inspected["Created"]).timestamp(),
            memory=host["Memory"],
            memory_swap=host["MemorySwap"],
            reservation=host["MemoryReservation"],
            privileged=host["Privileged"],
            cgroup_namespace=host["CgroupnsMode"],
            oom_kill_disable=bool(host["OomKillDisable"]),
            oom_killed=state["OOMKilled"],
            restart_policy=host["RestartPolicy"]["Name"] or "no",
            restart_count=inspected["RestartCount"],
            log_driver=host["LogConfig"]["Type"],
            log_options=host["LogConfig"]["Config"] or {},
            health_check=tuple((config.get("Healthcheck") or {}).get("Test") or ()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupLevel:
    """One cgroup, from the container's own (first) up to the one below the root."""

    path: str
    files: Mapping[str, str]
    """`max`, `high`, `low`, `min`, `swap.max` -> content of memory.*; missing files are left out."""

    def get(self, file: str) -> str:
        """Return a file's content; empty when there is no such file."""
        return self.files.get(file, "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """One mount that the container sees."""

    point: PurePosixPath
    type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedWorker:
    """One worker, as the scheduler's HTTP server describes it."""

    address: str
    memory_limit: int
    """Bytes; 0 for none."""
    directory: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerAnswer:
    """The answer of the scheduler's HTTP server at /json/identity.json."""

    workers: tuple[ListedWorker, ...]
    error: str
    """Why there is no answer; empty when there is one."""

    @classmethod
    def parse(cls, answer: str) -> Self:
        """Read an HTTP response; `error` has the reason if that fails."""
        head, _, body = answer.replace("\r\n", "\n").partition("\n\n")
        status = (head.splitlines() or ["nothing"])[0].strip()
        try:
            workers = tuple(
                ListedWorker(
                    address=address,
                    memory_limit=int(worker["memory_limit"] or 0),
                    directory=str(worker["local_directory"]),
                )
                for address, worker in sorted(json.loads(body)["workers"].items())
            )
        except (KeyError, ValueError, TypeError, AttributeError):
            return cls(workers=(), error=f"http://127.0.0.1:8787/json/identity.json answers {status!r}")
        return cls(workers=workers, error="")


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineState:
    """The state after one start; sizes are bytes. `text` keeps the sections that only one check reads."""

    text: Sections
    booted: float
    """Seconds since 1970 in the machine's own clock, as it is set now."""
    page: int
    variable: int | None
    """The measured value; None if it is missing or not integer bytes."""
    measured: float | None
    """When it was written, seconds since 1970."""
    service: Mapping[str, str]
    service_started: float
    containers: tuple[ContainerState, ...]
    main_container: str
    """Id of the container whose cgroup, mounts and limits were read; empty without one."""
    levels: tuple[CgroupLevel, ...]
    mounts: tuple[Mount, ...]
    meminfo: Mapping[str, int]
    unreclaimable: int
    """How many bytes the end of the Dask container would free."""
    dask: SchedulerAnswer

    @classmethod
    def parse(cls, text: Sections) -> Self:
        """Read the sections of both scripts; raises Incomplete when one is missing."""
        if "end" not in text or "memory.stat" not in text:
            raise Incomplete("the machine's answer stops half-way")
        try:
            booted = float(text["booted"])
            service = dict(line.split("=", 1) for line in text["service"].splitlines() if "=" in line)
            started = int(service.get("ExecMainStartTimestampMonotonic") or 0)
            value = _LINE.fullmatch(text["memory.env"])
            return cls(
                text=text,
                booted=booted,
                page=int(text["pagesize"]),
                variable=int(value[1]) if value else None,
                measured=float(text["memory.env.time"]) if text["memory.env.time"].strip() else None,
                service=service,
                service_started=booted + started / 1e6,
                containers=_containers(text["containers"]),
                main_container=text["container"].split("\n")[0],
                levels=_levels(text["cgroups"]),
                mounts=tuple(_mount(line) for line in text["mounts"].splitlines() if " - " in line),
                meminfo=numbers(text["meminfo"]),
                unreclaimable=unreclaimable(numbers(text["memory.stat"])),
                dask=SchedulerAnswer.parse(text.get("identity", "")),
            )
        except (KeyError, ValueError, TypeError) as wrong:
            raise Incomplete(f"the machine's answer can't be read: {wrong!r}") from wrong

    def lines(self, section: str) -> tuple[str, ...]:
        """Return the lines of a section that are not empty; none if the section was not read."""
        return tuple(line for line in self.text.get(section, "").splitlines() if line.strip())

    @property
    def container(self) -> ContainerState | None:
        """The running Dask container, if there is one."""
        running = [c for c in self.containers if c.project == PROJECT and c.running]
        return next((c for c in running if c.id == self.main_container), running[0] if running else None)

    def own(self, file: str) -> str:
        """Return a memory.* file of the container's own cgroup; empty when it has none."""
        return self.levels[0].get(file) if self.levels else ""

    def mount_of(self, directory: str) -> Mount | None:
        """Return the mount that a path in the container is on."""
        path = PurePosixPath(directory)
        over = [m for m in self.mounts if path == m.point or m.point in path.parents]
        return max(over, key=lambda m: len(m.point.parts), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerThresholds:
    """The memory thresholds of one worker; False for a threshold that is off."""

    address: str
    memory_limit: int | None
    target: float | bool
    spill: float | bool
    pause: float | bool
    terminate: float | bool | None
    """The nanny's; None without a nanny."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersAnswer:
    """The workers' answer to Dask's own client."""

    workers: tuple[WorkerThresholds, ...]
    error: str
    """Why there is no answer; empty when there is one."""

    @classmethod
    def parse(cls, stdout: str, stderr: str, status: int) -> Self:
        """Read the line of JSON that ask_workers.py prints; `error` has the reason if that fails."""
        try:
            answer = json.loads(stdout.strip().splitlines()[-1])["workers"]
            workers = tuple(
                WorkerThresholds(
                    address=w["address"],
                    memory_limit=w["memory_limit"],
                    target=w["target"],
                    spill=w["spill"],
                    pause=w["pause"],
                    terminate=w["nanny"]["terminate"] if w["nanny"] else None,
                )
                for w in answer
            )
        except (IndexError, KeyError, ValueError, TypeError):
            lines = [line for line in stderr.splitlines() if line.strip() and not line.startswith("xargs:")]
            return cls(workers=(), error=lines[-1] if lines else f"the client ended with status {status}")
        return cls(workers=workers, error="")


def _containers(text: str) -> tuple[ContainerState, ...]:
    try:
        return tuple(ContainerState.parse(inspected) for inspected in json.loads(text))
    except ValueError:
        return ()  # Docker does not answer: another check finds that no container runs


def _levels(text: str) -> tuple[CgroupLevel, ...]:
    levels: dict[str, dict[str, str]] = {}
    files: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("/"):
            files = levels.setdefault(line, {})
        elif ":" in line:
            name, _, value = line.removeprefix("memory.").partition(":")
            files[name] = value
    return tuple(CgroupLevel(path=path, files=found) for path, found in levels.items())


def _mount(line: str) -> Mount:
    # proc_pid_mountinfo(5): id parent major:minor root point options [optional…] - type source options
    left, _, right = line.partition(" - ")
    return Mount(point=PurePosixPath(left.split(" ")[4]), type=right.split(" ")[0])
