"""Every check, held against machines that are ill in one way: it goes red there, and nothing else does."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ami_builder.checks import check_names, plugin
from ami_builder.checks.context import Context
from ami_builder.checks.machine_state import (
    Incomplete,
    ListedWorker,
    MachineState,
    SchedulerAnswer,
    WorkersAnswer,
    numbers,
    sections,
)
from ami_builder.core.options import Datasource, Role
from ami_builder.core.units import Reserve
from ami_builder.system.resources import checks_dir
from ami_builder.verify import runner

if TYPE_CHECKING:
    from types import ModuleType

Text = dict[str, str]
Change = Callable[[Text], object]

MIB = 1 << 20
RECORDED = json.loads((Path(__file__).parents[1] / "recorded" / "healthy.json").read_text())
"""What a healthy VM of 2 GiB answered on its first boot.

`identity` has what distributed 2026.8 answered on another one, with this one's memory limit.
`min_free_kbytes`, `lru_gen` and `oom_score_adj` are from a newer image on 1 GiB, and `programs` is 0.
"""

VALUE = int(RECORDED["memory.env"].split("=")[1])
PUBLIC_KEY = " ".join(RECORDED["authorized"].split("\n")[0].split(":", 1)[1].split()[-3:])
CONTEXT = Context(
    nonce=RECORDED["nonce"].strip(),
    machine="2 GiB",
    machine_memory=2048 * MIB,
    disk=int(RECORDED["disk"].split()[1]),
    reserve=Reserve(),
    headroom=0,
    datasource=Datasource.EC2,
    role=Role.LOCAL,
    workers=1,
    user="admin",
    public_key=PUBLIC_KEY,
    timeout=60,
)


@pytest.fixture(scope="module", autouse=True)
def _markers(pytestconfig: pytest.Config) -> None:
    pytestconfig.addinivalue_line("markers", "first_boot: as the plugin has it")


@dataclass(frozen=True, kw_only=True)
class Told:
    """What Dask's scheduler listed over HTTP, and what the workers answered its client."""

    identity: str
    client: str


def identity(limits: Sequence[int | None], directory: str = "/spill/dask-scratch-space/worker-a") -> str:
    """Answer as the scheduler does at /json/identity.json; it has 0 for a worker without a limit."""
    (_, like), *_ = json.loads(RECORDED["identity"].partition("\r\n\r\n")[2])["workers"].items()
    workers = {
        f"tcp://127.0.0.1:4000{n}": like | {"memory_limit": limit or 0, "local_directory": directory}
        for n, limit in enumerate(limits)
    }
    return f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{json.dumps({'workers': workers})}\n"


def client(limits: Sequence[int | None], **changed: object) -> str:
    worker = {"target": 0.6, "spill": 0.7, "pause": 0.8}
    workers = [
        {"address": f"tcp://127.0.0.1:4000{n}", "memory_limit": limit, "nanny": {"terminate": 0.95}}
        | worker
        | changed
        for n, limit in enumerate(limits)
    ]
    return json.dumps({"workers": workers}) + "\n"


def dask(
    *limits: int | None, directory: str = "/spill/dask-scratch-space/worker-a", **changed: object
) -> Told:
    return Told(identity=identity(limits, directory), client=client(limits, **changed))


NOTHING = Told(identity="", client="")


def modules() -> list[ModuleType]:
    files = [
        # They have tests of their own.
        p
        for p in runner.shipped(checks_dir())
        if p.stem not in ("test_memory_pressure", "test_tls")
    ]
    return [importlib.import_module(f"ami_builder.checks.{p.stem}") for p in files]


def each_check() -> Iterator[tuple[str, Callable[[], object], dict[str, object]]]:
    for module in modules():
        for name, check in vars(module).items():
            if not name.startswith("test_"):
                continue
            marks = [mark for mark in getattr(check, "pytestmark", []) if mark.name == "parametrize"]
            for argument, value in [(m.args[0], v) for m in marks for v in m.args[1]] or [("", "")]:
                suffix = f"[{value}]" if argument else ""
                yield (
                    check_names.readable(f"{module.__name__.rpartition('.')[2]}.py::{name}{suffix}"),
                    check,
                    {argument: value},
                )


def judge(text: Text, answer: Told, context: Context = CONTEXT) -> dict[str, str]:
    """Run every check as pytest would, and return those that did not pass with their message."""
    machine, client = (
        MachineState.parse(text | {"identity": answer.identity}),
        WorkersAnswer.parse(answer.client, "", 0),
    )
    makers: dict[str, Callable[[], object]] = {
        "machine": lambda: machine,
        "context": lambda: context,
        "client": lambda: client,
        "container": partial(inspect.unwrap(plugin.container), machine),
        "variable": partial(inspect.unwrap(plugin.variable), machine),
        "dask": partial(inspect.unwrap(plugin.dask), machine),
        "workers": partial(inspect.unwrap(plugin.workers), client),
        "note": lambda: lambda text: None,
    }
    failed: dict[str, str] = {}
    for name, check, given in each_check():
        try:
            wanted = inspect.signature(check).parameters
            check(**{key: given[key] if key in given else makers[key]() for key in wanted})
        except (AssertionError, pytest.fail.Exception) as wrong:
            failed[name] = str(wrong)
        except pytest.skip.Exception as skipped:
            failed[name] = f"skipped: {skipped}"
    return failed


def red(text: Text, answer: Told, context: Context = CONTEXT) -> set[str]:
    return {name for name, why in judge(text, answer, context).items() if not why.startswith("skipped: ")}


def blocked(text: Text, answer: Told, context: Context = CONTEXT) -> set[str]:
    return {
        name for name, why in judge(text, answer, context).items() if why.startswith("skipped: blocked: ")
    }


def sub(section: str, pattern: str, new: str, count: int = 0) -> Change:
    def change(text: Text) -> None:
        text[section], hits = re.subn(pattern, new, text[section], count=count, flags=re.MULTILINE)
        assert hits, f"{section} has no {pattern}"

    return change


def put(section: str, content: str) -> Change:
    return lambda text: text.__setitem__(section, content)


def add(section: str, line: str) -> Change:
    return lambda text: text.__setitem__(section, f"{text[section].rstrip()}\n{line}\n".lstrip())


def inspected(*keys: str, value: object) -> Change:
    """Change one entry of `docker inspect`."""

    def change(text: Text) -> None:
        found = json.loads(text["containers"])
        place = found[0]
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        text["containers"] = json.dumps(found)

    return change


def level(path: str, file: str, value: str) -> Change:
    """Change one memory.* file of one cgroup; empty: there is no such file."""

    def change(text: Text) -> None:
        lines = text["cgroups"].splitlines()
        start = next(n for n, line in enumerate(lines) if re.fullmatch(path, line))
        at = next(n for n in range(start, len(lines)) if lines[n].startswith(f"memory.{file}:"))
        lines[at : at + 1] = [f"memory.{file}:{value}"] if value else []
        text["cgroups"] = "\n".join(lines)

    return change


def meminfo(field: str, delta: int) -> Change:
    def change(text: Text) -> None:
        now = numbers(text["meminfo"])[field]
        sub("meminfo", rf"^{field}:.*$", f"{field}: {(now + delta) // 1024} kB")(text)

    return change


def second_container(text: Text) -> None:
    first = json.loads(text["containers"])[0]
    text["containers"] = json.dumps([first, {**first, "Id": "f" * 64, "Name": "/another"}])


def measured(offset: float) -> Change:
    return lambda text: text.__setitem__("memory.env.time", str(float(text["memory.env.time"]) + offset))


def all_values(value: int) -> Change:
    """A machine that measured something else, and applied that faithfully."""

    def change(text: Text) -> None:
        for name, content in text.items():
            text[name] = content.replace(str(VALUE), str(value))

    return change


SCOPE = r"/system\.slice/docker-[0-9a-f]+\.scope"

# name of the machine -> (what is changed, Dask's answers, the checks that must be red)
ILL: dict[str, tuple[list[Change], Told, set[str]]] = {
    # chain
    "nothing measured": ([put("memory.env", "")], dask(VALUE), {"memory limit chain: variable was measured"}),
    "seed snippet's text": (
        [put("memory.env", "AVAILABLE_MEMORY_FOR_DASK=MemAvailable:    1704780 kB\n")],
        dask(VALUE),
        {"memory limit chain: variable was measured"},
    ),
    "kB text": (
        [put("memory.env", "AVAILABLE_MEMORY_FOR_DASK=1704780 kB\n")],
        dask(VALUE),
        {"memory limit chain: variable was measured"},
    ),
    "two lines": (
        [add("memory.env", f"AVAILABLE_MEMORY_FOR_DASK={VALUE}")],
        dask(VALUE),
        {"memory limit chain: variable was measured"},
    ),
    "MemTotal": (
        [all_values(numbers(RECORDED["meminfo"])["MemTotal"])],
        dask(numbers(RECORDED["meminfo"])["MemTotal"]),
        {
            "memory limit chain: variable is less than the machine has",
            "measurement: variable is not more than was available",
        },
    ),
    "not whole pages": (
        [
            all_values(VALUE - 1),
            sub("cgroups", rf"{VALUE - 1}", str(VALUE - 4096)),
            put("inside", str(VALUE - 4096)),
        ],
        dask(VALUE - 1),
        {
            "memory limit chain: variable is whole pages",
            "memory limit chain: kernel enforces the variable",
            "memory limit chain: container sees the variable",
        },
    ),
    "silent zero": (
        [
            inspected("HostConfig", "Memory", value=0),
            inspected("HostConfig", "MemorySwap", value=0),
            level(SCOPE, "max", "max"),
            put("inside", "max\n"),
        ],
        dask(VALUE * 2),
        {
            "memory limit chain: container has a limit",
            "memory limit chain: kernel enforces the variable",
            "memory limit chain: container sees the variable",
            "memory limit chain: workers share the variable",
        },
    ),
    "another number in docker": (
        [
            inspected("HostConfig", "Memory", value=VALUE + 4096),
            inspected("HostConfig", "MemorySwap", value=VALUE + 4096),
        ],
        dask(VALUE),
        {"memory limit chain: docker has the variable"},
    ),
    "kernel enforces less": (
        [level(SCOPE, "max", str(VALUE - 4096))],
        dask(VALUE),
        {"memory limit chain: kernel enforces the variable"},
    ),
    "container sees no limit": (
        [put("inside", "")],
        dask(VALUE),
        {"memory limit chain: container sees the variable"},
    ),
    "the kernel keeps memory for huge pages": (
        [put("min_free_kbytes", "45056\n")],
        dask(VALUE),
        {"protection: the kernel keeps no more free than it needs"},
    ),
    "a large machine with several NUMA nodes": (
        [
            sub("meminfo", r"^MemTotal: .*", f"MemTotal: {384 << 20} kB"),
            put("min_free_kbytes", "90112\n"),
        ],
        dask(VALUE),
        {"measurement: machine has the memory it was booted with"},  # but what the kernel keeps free is right
    ),
    "no guard against thrashing": (
        [put("lru_gen", "0x0007\n0\n")],
        dask(VALUE),
        {"protection: the kernel does not let the machine thrash"},
    ),
    "a guard that the kernel has switched off": (
        [put("lru_gen", "0x0000\n1000\n")],
        dask(VALUE),
        {"protection: the kernel does not let the machine thrash"},
    ),
    "Dask is no better a victim than an agent": (
        [sub("oom_score_adj", r":500$", ":0")],
        dask(VALUE),
        {"protection: dask goes before the system"},
    ),
    "a login would be ended first": (
        [add("oom_score_adj", "/proc/9999/oom_score_adj:800")],
        dask(VALUE),
        {"protection: dask goes before the system"},
    ),
    "two workers of the whole": (
        [],
        dask(VALUE, VALUE),
        {"memory limit chain: workers share the variable", "service: all workers are there"},
    ),
    "a worker with half": ([], dask(VALUE // 2), {"memory limit chain: workers share the variable"}),
    "no worker": (
        [],
        dask(),
        {"memory limit chain: workers share the variable", "service: all workers are there"},
    ),
    "a worker has another limit than the scheduler lists": (
        [],
        replace(dask(VALUE), client=client([VALUE // 2])),
        {"memory limit chain: workers confirm what the scheduler lists"},
    ),
    "a worker has no limit, whatever the scheduler lists": (
        [],
        replace(dask(VALUE), client=client([None])),
        {"memory limit chain: workers confirm what the scheduler lists"},
    ),
    "the scheduler lists a worker that nobody is": (
        [],
        replace(dask(VALUE), client=client([])),
        {"memory limit chain: workers confirm what the scheduler lists"},
    ),
    "a worker that the scheduler does not list": (
        [],
        replace(dask(VALUE), client=client([VALUE, VALUE])),
        {"memory limit chain: workers confirm what the scheduler lists"},
    ),
    # available
    "measured in an earlier start": (
        [measured(-300)],
        dask(VALUE),
        {"measurement: measured at this start", "service: measured after the commands of user data"},
    ),
    "measured after the container": (
        [measured(60)],
        dask(VALUE),
        {"measurement: container was made after the measurement"},
    ),
    "measured while Dask ran": (
        [all_values((VALUE - 100 * MIB) // 4096 * 4096)],
        dask((VALUE - 100 * MIB) // 4096 * 4096),
        {"measurement: variable is not less than was available"},
    ),
    "measured before Docker": (
        [all_values((VALUE + 157 * MIB) // 4096 * 4096)],
        dask((VALUE + 157 * MIB) // 4096 * 4096),
        {"measurement: variable is not more than was available"},
    ),
    "another machine size": (
        [sub("meminfo", r"^MemTotal:.*$", "MemTotal: 3900000 kB")],
        dask(VALUE),
        {"measurement: machine has the memory it was booted with"},
    ),
    # limit
    "two containers": ([second_container], dask(VALUE), {"container: one container runs"}),
    "memory.high": ([level(SCOPE, "high", str(VALUE // 2))], dask(VALUE), {"container: no soft limit"}),
    "memory.low": ([level(SCOPE, "low", str(VALUE // 2))], dask(VALUE), {"container: no memory low"}),
    "memory.min": ([level(SCOPE, "min", "4096")], dask(VALUE), {"container: no memory min"}),
    "swap by docker": (
        [inspected("HostConfig", "MemorySwap", value=2 * VALUE)],
        dask(VALUE),
        {"container: no swap by docker"},
    ),
    "swap by the kernel": (
        [level(SCOPE, "swap.max", "max")],
        dask(VALUE),
        {"container: no swap by the kernel"},
    ),
    "host's namespace by docker": (
        [inspected("HostConfig", "CgroupnsMode", value="host")],
        dask(VALUE),
        {"container: cgroup namespace is private"},
    ),
    "host's namespace by the kernel": (
        [lambda text: put("namespaces", "\n".join([text["namespaces"].split()[0]] * 2))(text)],
        dask(VALUE),
        {"container: cgroup namespace is private"},
    ),
    "privileged": (
        [inspected("HostConfig", "Privileged", value=True)],
        dask(VALUE),
        {"container: not privileged"},
    ),
    "a slice's memory.max": (
        [level(r"/system\.slice", "max", str(VALUE - 4096))],
        dask(VALUE),
        {"container: no parent has a lower limit"},
    ),
    "a slice's memory.high": (
        [level(r"/system\.slice", "high", str(VALUE - 4096))],
        dask(VALUE),
        {"container: no parent has a lower limit"},
    ),
    "no OOM killer": (
        [inspected("HostConfig", "OomKillDisable", value=True)],
        dask(VALUE),
        {"container: oom killer is on"},
    ),
    "RLIMIT_RSS": (
        [add("limits", "Max resident set          1000000   1000000   bytes")],
        dask(VALUE),
        {"container: no resource limits"},
    ),
    "soft RLIMIT_AS": (
        [add("limits", "Max address space          1000000   unlimited   bytes")],
        dask(VALUE),
        {"container: no resource limits"},
    ),
    "restart always": (
        [inspected("HostConfig", "RestartPolicy", "Name", value="always")],
        dask(VALUE),
        {"container: restart policy starts nothing at boot"},
    ),
    "OOM killed": (
        [inspected("State", "OOMKilled", value=True)],
        dask(VALUE),
        {"container: not killed"},
    ),
    "restarted by docker": (
        [inspected("RestartCount", value=2)],
        dask(VALUE),
        {"container: not killed"},
    ),
    "health check inside": (
        [inspected("Config", "Healthcheck", value={"Test": ["CMD", "python", "-c", "import distributed"]})],
        dask(VALUE),
        {"container: no health check inside"},
    ),
    "logs without bound": (
        [inspected("HostConfig", "LogConfig", value={"Type": "json-file", "Config": {}})],
        dask(VALUE),
        {"container: logs are bounded"},
    ),
    "spill on tmpfs": (
        [sub("mounts", r"^(.* /spill .* - )\S+ \S+", r"\1tmpfs tmpfs")],
        dask(VALUE),
        {"container: spill is on disk"},
    ),
    "spill in /dev/shm": ([], dask(VALUE, directory="/dev/shm/x"), {"container: spill is on disk"}),
    "spill in the layer": (
        [],
        dask(VALUE, directory="/tmp/x"),
        {"container: spill is outside the container"},
    ),
    "no memory management": (
        [],
        dask(None),
        {"memory limit chain: workers share the variable", "container: workers manage memory"},
    ),
    "no spilling": ([], dask(VALUE, spill=False), {"container: workers spill before they are restarted"}),
    "no nanny": ([], dask(VALUE, nanny=None), {"container: workers spill before they are restarted"}),
    "nanny that never ends": (
        [],
        dask(VALUE, nanny={"terminate": False}),
        {"container: workers spill before they are restarted"},
    ),
    "pause before spill": (
        [],
        dask(VALUE, pause=0.65),
        {"container: workers spill before they are restarted"},
    ),
    # service
    "service failed": (
        [sub("service", "^ActiveState=.*", "ActiveState=failed")],
        dask(VALUE),
        {"service: service is active"},
    ),
    "service disabled": (
        [sub("service", "^UnitFileState=.*", "UnitFileState=disabled")],
        dask(VALUE),
        {"service: service is enabled"},
    ),
    "service before Docker": (
        [sub("service", r"docker\.service", "")],
        dask(VALUE),
        {"service: service starts after the system"},
    ),
    "instance store broken": (
        [put("spill-notices", "no file system on instance store (nvme1n1)")],
        dask(VALUE),
        {"service: instance store is used"},
    ),
    "nothing compares": (
        [put("growth", ""), put("growth.grown", "healthy\n"), put("growth.ended", "healthy\n")],
        dask(VALUE),
        {"growth: growth is compared", "growth: who has grown is reported"},
    ),
    "growth stays": (
        [lambda text: text.__setitem__("growth.ended", text["growth.grown"])],
        dask(VALUE),
        {"growth: growth that has ended is no longer reported"},
    ),
    "service restarted": (
        [sub("service", "^NRestarts=.*", "NRestarts=1")],
        dask(VALUE),
        {"service: service started once"},
    ),
    "journal silent": ([put("journal", "")], dask(VALUE), {"service: journal has the value"}),
    "journal repeats": (
        [lambda text: add("journal", text["journal"].strip())(text)],
        dask(VALUE),
        {"service: journal has the value"},
    ),
    "unhealthy": ([put("health", "HTTP/1.1 500 no\n")], dask(VALUE), {"service: dask is healthy"}),
    "nothing on 8787": (
        [put("health", "bash: connect: Connection refused")],
        dask(VALUE),
        {"service: dask is healthy"},
    ),
    "unit without it": ([put("service.environment", "")], dask(VALUE), {"service: service has the variable"}),
    "unit with another": (
        [put("service.environment", "AVAILABLE_MEMORY_FOR_DASK=0\n")],
        dask(VALUE),
        {"service: service has the variable"},
    ),
    "sudo -i without it": (
        [put("shell sudo -i", "")],
        dask(VALUE),
        {"service: login shell has the variable (sudo -i)"},
    ),
    "bash with kB": (
        [put("shell bash -l", "1704780 kB\n")],
        dask(VALUE),
        {"service: login shell has the variable (bash -l)"},
    ),
    "sh without it": (
        [put("shell sh -l", "")],
        dask(VALUE),
        {"service: login shell has the variable (sh -l)"},
    ),
    "value in /etc": (
        [put("stored", "/etc/environment:AVAILABLE_MEMORY_FOR_DASK=1704779776\n")],
        dask(VALUE),
        {"service: variable is not stored"},
    ),
    "failed unit": (
        [put("failed", "logrotate.service loaded failed failed Rotate log files\n")],
        dask(VALUE),
        {"service: no unit failed"},
    ),
    "no answer to the client": (
        [],
        replace(dask(VALUE), client=""),
        {"service: dask answers its client"},
    ),
    "no list of workers": (
        [],
        replace(dask(VALUE), identity="HTTP/1.1 404 Not Found\r\n\r\n<html>404</html>\n"),
        {"service: the scheduler lists its workers"},
    ),
    "no HTTP server": ([], replace(dask(VALUE), identity=""), {"service: the scheduler lists its workers"}),
    "no answer at all": (
        [],
        NOTHING,
        {"service: the scheduler lists its workers", "service: dask answers its client"},
    ),
    # compose
    "compose without the line": (
        [sub("compose", r"^\s*mem_limit:.*\n", "")],
        dask(VALUE),
        {"compose: compose file has mem limit (in place)"},
    ),
    "compose without the fallback": (
        [sub("compose", ":-0}", "}")],
        dask(VALUE),
        {"compose: compose file has mem limit (in place)"},
    ),
    "image's compose not kept": (
        [put("compose.image", "")],
        dask(VALUE),
        {"compose: compose file has mem limit (the image's own)"},
    ),
    "compose refused without it": (
        [put("compose.unset", "services.cluster.mem_limit: invalid size: ''\n")],
        dask(VALUE),
        {"compose: no variable means no limit (in place)"},
    ),
    "image's compose refused": (
        [put("image.unset", "yaml: line 3: mapping values are not allowed\n")],
        dask(VALUE),
        {"compose: no variable means no limit (the image's own)"},
    ),
    # first boot
    "disk not grown": (
        [sub("disk", r"\A\d+", str(3 << 30))],
        dask(VALUE),
        {"first boot: root fills the disk"},
    ),
    "another disk": (
        [sub("disk", r"^\d+\s*\Z", "8589934592")],
        dask(VALUE),
        {"first boot: root fills the disk"},
    ),
    "builder's key": (
        [add("authorized", "/home/admin/.ssh/authorized_keys:ssh-ed25519 AAAAother packer")],
        dask(VALUE),
        {"first boot: only our key is authorized"},
    ),
    "root logs in": (
        [add("authorized", f"/root/.ssh/authorized_keys:{PUBLIC_KEY}")],
        dask(VALUE),
        {"first boot: root cannot log in"},
    ),
    "old host key": (
        [put("hostkeys.old", "/etc/ssh/ssh_host_ed25519_key\n")],
        dask(VALUE),
        {"first boot: host keys are new"},
    ),
    "no machine id": (
        [put("machine-id", "uninitialized\n")],
        dask(VALUE),
        {"first boot: machine id is new", "first boot: journal starts at this boot"},
    ),
    "old machine id": (
        [put("machine-id.old", "/etc/machine-id\n")],
        dask(VALUE),
        {"first boot: machine id is new"},
    ),
    "builder's boot": ([add("boots", "0" * 32)], dask(VALUE), {"first boot: journal starts at this boot"}),
    "builder's journal": (
        [add("journals", "0" * 32)],
        dask(VALUE),
        {"first boot: journal starts at this boot"},
    ),
    "builder's logs": ([put("logs", "/var/log/dpkg.log\n")], dask(VALUE), {"first boot: no old logs"}),
    "builder's script": (
        [put("temporary", "/var/tmp/script_1.sh\n")],
        dask(VALUE),
        {"first boot: no files of the build"},
    ),
    "apt lists": ([put("apt", "/var/lib/apt/lists/x\n")], dask(VALUE), {"first boot: no package lists"}),
    "history": ([put("histories", "/root/.bash_history\n")], dask(VALUE), {"first boot: no histories"}),
    "credentials": ([put("secrets", "/root/.aws\n")], dask(VALUE), {"first boot: no secrets"}),
    "container of the builder": (
        [lambda text: add_old_container(text)],
        dask(VALUE),
        {"first boot: no old containers"},
    ),
    "builder's instance": (
        [add("instances", "iid-builder")],
        dask(VALUE),
        {"first boot: cloud init ran for one instance"},
    ),
    "another datasource": (
        [put("cloud-id", "nocloud\n")],
        dask(VALUE),
        {"first boot: cloud init used the datasource"},
    ),
    "cloud-init not finished": (
        [put("cloud-result", "")],
        dask(VALUE),
        {"first boot: cloud init has no errors"},
    ),
    "cloud-init module fails": (
        [put("cloud-result", '{"v1": {"datasource": "x", "errors": ["(\'scripts_user\', boom)"]}}')],
        dask(VALUE),
        {"first boot: cloud init has no errors"},
    ),
    "user data too late": (
        [lambda text: put("compose", text["compose.image"])(text)],
        dask(VALUE),
        {"first boot: user data replaced the compose file"},
    ),
    "no default for containers": (
        [put("scope", ""), sub("plain", r"\A\d+$", "max", 1)],
        dask(VALUE),
        {
            "memory limit chain: systemd has the variable",
            "memory limit chain: any container has the variable",
        },
    ),
    "a default of an earlier start": (
        [put("scope", "[Scope]\nMemoryMax=1073741824\nMemorySwapMax=0\n")],
        dask(VALUE),
        {"memory limit chain: systemd has the variable"},
    ),
    "no container starts": (
        [put("plain", "")],
        dask(VALUE),
        {
            "memory limit chain: any container has the variable",
            "first boot: containers cannot reach the metadata",
        },
    ),
    "user data's commands still run": (
        [sub("cloud-final", "ActiveState=active", "ActiveState=activating")],
        dask(VALUE),
        {"service: measured after the commands of user data"},
    ),
    "measured before user data's commands": (
        [sub("cloud-final", r"Monotonic=\d+", "Monotonic=430000000")],
        dask(VALUE),
        {"service: measured after the commands of user data"},
    ),
    "dask for everybody": (
        [sub("listening", r"127\.0\.0\.1:8786", "0.0.0.0:8786")],
        dask(VALUE),
        {"first boot: dask listens on loopback only"},
    ),
    "a worker for everybody": (
        [sub("listening", r"127\.0\.0\.1:40001", "*:40001")],
        dask(VALUE),
        {"first boot: dask listens on loopback only"},
    ),
    "a worker's HTTP server for everybody": (
        [sub("listening", r"127\.0\.0\.1:40003", "0.0.0.0:40003")],
        dask(VALUE),
        {"first boot: dask listens on loopback only"},
    ),
    "metadata in reach": (
        [put("plain", f"{VALUE}\nreached\n")],
        dask(VALUE),
        {"first boot: containers cannot reach the metadata"},
    ),
    "passwords": (
        [sub("sshd", "^passwordauthentication no", "passwordauthentication yes")],
        dask(VALUE),
        {"first boot: ssh accepts keys only"},
    ),
}


@pytest.mark.parametrize(("section", "content"), [("metadata", ""), ("metadata.host", "")])
def test_metadata_that_is_open_or_not_there_is_no_fault(section: str, content: str) -> None:
    text = dict(RECORDED) | {section: content, "plain": f"{VALUE}\nreached\n"}
    assert "first boot: containers cannot reach the metadata" not in red(text, dask(VALUE))


def add_old_container(text: Text) -> None:
    first = json.loads(text["containers"])[0]
    state = {**first["State"], "Running": False}
    old = {
        **first,
        "Id": "e" * 64,
        "Name": "/old",
        "State": state,
        "Created": "2020-01-01T00:00:00.123456789Z",
    }
    text["containers"] = json.dumps([first, old])


def test_a_healthy_machine_passes() -> None:
    assert judge(dict(RECORDED), dask(VALUE)) == {}


@pytest.mark.parametrize("name", ILL)
def test_ill_machine_is_found_out(name: str) -> None:
    changes, answer, expected = ILL[name]
    text = dict(RECORDED)
    for change in changes:
        change(text)
    assert red(text, answer) == expected


def test_every_check_can_fail() -> None:
    found_out = set(chain.from_iterable(expected for _, _, expected in ILL.values()))
    assert {name for name, _, _ in each_check()} <= found_out


def test_every_check_says_why_it_matters() -> None:
    assert [name for name, check, _ in each_check() if not (check.__doc__ or "").strip()] == []


def test_messages_have_the_numbers_side_by_side() -> None:
    text = dict(RECORDED)
    inspected("HostConfig", "Memory", value=123456)(text)
    message = judge(text, dask(VALUE))["memory limit chain: docker has the variable"]
    assert "123456 bytes" in message
    assert f"{VALUE} bytes" in message


def test_without_a_container_one_check_is_red_and_the_rest_blocked() -> None:
    text = dict(RECORDED) | {
        "containers": "[]",
        "container": "\n",
        "cgroups": "",
        "mounts": "",
        "memory.stat": "",
    }
    text |= {"inside": "", "namespaces": "", "limits": ""}
    meminfo("MemAvailable", MachineState.parse(RECORDED).unreclaimable)(text)
    assert red(text, NOTHING) == {
        "container: one container runs",
        "service: the scheduler lists its workers",
        "service: dask answers its client",
    }
    assert {
        "memory limit chain: docker has the variable",
        "memory limit chain: workers share the variable",
        "container: no soft limit",
        "container: workers spill before they are restarted",
    } <= blocked(text, NOTHING)


def test_docker_that_does_not_answer_is_no_container() -> None:
    text = dict(RECORDED) | {"containers": "Cannot connect to the Docker daemon\n"}
    assert "container: one container runs" in red(text, dask(VALUE))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
def test_workers_may_lose_less_than_a_byte_each(count: int) -> None:
    context = replace(CONTEXT, workers=count)
    assert red(dict(RECORDED), dask(*[VALUE // count] * count), context) == set()
    assert red(dict(RECORDED), dask(*[VALUE // count - 1] * count), context) == {
        "memory limit chain: workers share the variable"
    }


@pytest.mark.parametrize("count", [1, 3])
def test_headroom_is_off_the_workers_alone(count: int) -> None:
    context = replace(CONTEXT, workers=count, headroom=32 * MIB)
    share = (VALUE - 32 * MIB) // count
    assert red(dict(RECORDED), dask(*[share] * count), context) == set()
    whole = judge(dict(RECORDED), dask(*[VALUE // count] * count), context)
    assert whole.keys() == {"memory limit chain: workers share the variable"}
    assert f"less a headroom of {32 * MIB} bytes" in whole["memory limit chain: workers share the variable"]


def test_a_scheduler_has_no_workers_to_ask() -> None:
    context = replace(CONTEXT, role=Role.SCHEDULER, workers=0)
    found = judge(dict(RECORDED), dask(), context)
    assert found["memory limit chain: workers share the variable"] == (
        "skipped: a scheduler has no workers: the chain ends at memory.max"
    )
    assert red(dict(RECORDED), dask(), context) == set()


@pytest.mark.parametrize(
    ("reserve", "off"),
    [
        (Reserve(), 0),
        (Reserve(bytes=512 * MIB), 512 * MIB),
        (Reserve(percent=20.0), None),
    ],
)
def test_reserve_is_taken_off(reserve: Reserve, off: int | None) -> None:
    less = off if off is not None else VALUE * 20 // 100
    value = (VALUE - less) // 4096 * 4096
    text = dict(RECORDED)
    all_values(value)(text)
    assert red(text, dask(value), replace(CONTEXT, reserve=reserve)) == set()
    if less:
        assert red(text, dask(value)) == {"measurement: variable is not less than was available"}
        assert red(dict(RECORDED), dask(VALUE), replace(CONTEXT, reserve=reserve)) == {
            "measurement: variable is not more than was available"
        }


def test_a_capped_reserve_is_small_on_a_large_machine() -> None:
    capped = Reserve(percent=20.0, capped=True)
    value = (VALUE - capped.of(VALUE)) // 4096 * 4096
    text = dict(RECORDED)
    all_values(value)(text)
    assert red(text, dask(value), replace(CONTEXT, reserve=capped)) == set()
    assert red(text, dask(value), replace(CONTEXT, reserve=Reserve(percent=20.0))) == {
        "measurement: variable is not more than was available"
    }


def test_swap_needs_no_file_on_a_kernel_without_swap() -> None:
    text = dict(RECORDED)
    level(SCOPE, "swap.max", "")(text)
    assert red(text, dask(VALUE)) == set()


@pytest.mark.parametrize("missing", ["end", "booted", "meminfo", "memory.stat", "containers", "service"])
def test_half_an_answer_is_none(missing: str) -> None:
    with pytest.raises(Incomplete):
        MachineState.parse({name: text for name, text in RECORDED.items() if name != missing})


def test_sections_are_read_as_the_scripts_print_them() -> None:
    assert sections("noise\n\036a b\n1\n2\n\n\036c\n\n\036d\nx") == {"a b": "1\n2\n", "c": "", "d": "x"}


def test_the_scheduler_lists_each_worker_with_its_limit() -> None:
    """As distributed 2026.8 answers."""
    (worker,) = MachineState.parse(RECORDED).dask.workers
    assert worker == ListedWorker(
        address="tcp://127.0.0.1:41923",
        memory_limit=VALUE,
        directory="/spill/dask-scratch-space/worker-o4i8o5wd",
    )
    assert judge(RECORDED, Told(identity=RECORDED["identity"], client=client([VALUE]))).keys() == {
        "memory limit chain: workers confirm what the scheduler lists"
    }, "the client's worker has another address here"


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ("", "'nothing'"),
        ("HTTP/1.1 500 Internal Server Error\r\n\r\n500", "'HTTP/1.1 500 Internal Server Error'"),
        ('HTTP/1.1 200 OK\r\n\r\n{"workers": {"tcp://127.0.0.1:1": {"memory_', "'HTTP/1.1 200 OK'"),
        ('HTTP/1.1 200 OK\r\n\r\n{"type": "Scheduler"}', "'HTTP/1.1 200 OK'"),
        ('HTTP/1.1 200 OK\r\n\r\n{"workers": {"tcp://127.0.0.1:1": {}}}', "'HTTP/1.1 200 OK'"),
        ('HTTP/1.1 200 OK\r\n\r\n{"workers": []}', "'HTTP/1.1 200 OK'"),
        ("HTTP/1.1 200 OK\r\n\r\n[]", "'HTTP/1.1 200 OK'"),
    ],
)
def test_a_list_that_cannot_be_read_is_none(answer: str, status: str) -> None:
    assert SchedulerAnswer.parse(answer) == SchedulerAnswer(
        workers=(), error=f"http://127.0.0.1:8787/json/identity.json answers {status}"
    )


def test_a_machine_that_was_not_asked_for_the_list_has_none() -> None:
    text = {name: content for name, content in RECORDED.items() if name != "identity"}
    assert MachineState.parse(text).dask.error


@pytest.mark.parametrize(
    ("stdout", "stderr", "error"),
    [
        ("", "", "the client ended with status 7"),
        ("{}", "OSError: Timed out\n", "OSError: Timed out"),
        (
            "noise",
            "a\nModuleNotFoundError: no distributed\nxargs: sh: exited\n",
            "ModuleNotFoundError: no distributed",
        ),
    ],
)
def test_client_without_an_answer_says_why(stdout: str, stderr: str, error: str) -> None:
    assert WorkersAnswer.parse(stdout, stderr, 7).error == error


def test_client_may_be_chatty() -> None:
    assert WorkersAnswer.parse("a warning\n" + client([5]), "", 0).workers[0].memory_limit == 5


@pytest.mark.parametrize(
    ("nodeid", "name"),
    [
        ("../x/test_chain.py::test_swap_is_off", "chain: swap is off"),
        ("test_first_boot.py::test_a[in place]", "first boot: a (in place)"),
        ("gpu_checks.py::TestGpu::test_driver", "gpu checks: TestGpu driver"),
    ],
)
def test_names_are_for_people(nodeid: str, name: str) -> None:
    assert check_names.readable(nodeid) == name
