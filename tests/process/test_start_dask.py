"""start-dask outside a VM: real shells, a fake docker, and a folder of /proc/meminfo files."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ami_builder.build import guest as render
from ami_builder.core import oom
from ami_builder.core.options import ContainerNetwork, Role
from ami_builder.core.units import AUTO_RESERVE, Reserve
from ami_builder.system.processes import wait_until
from tests.fake_programs import calls, fake
from tests.full_run import on_full_run
from tests.sample_image import image

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ami_builder.config.schema import Image

MEMINFO = Path(__file__).with_name("meminfo")
PAGE = os.sysconf("SC_PAGESIZE")
START_DASK = PurePosixPath("/usr/local/sbin/start-dask")
MEASURE_MEMORY = PurePosixPath("/usr/local/sbin/measure-memory")
COMPARE_MEMORY = PurePosixPath("/usr/local/sbin/compare-memory")
DASK_TLS = PurePosixPath("/usr/local/sbin/dask-tls")
TLS_ERRORS = PurePosixPath("/usr/local/lib/dask/tls_errors.py")
VARIABLE = "AVAILABLE_MEMORY_FOR_DASK"

SHELLS = {name: found for name in ("dash", "busybox") if (found := shutil.which(name))}
GOOD = {
    "0.5-gib": 271904,
    "1-gib": 752316,
    "2-gib": 1772004,
    "4-gib-swap": 3611420,
    "16-gib-agents": 13904112,
    "64-gib-hugepages": 29911844,
    "768-gib": 784200316,
    "24-tib": 25101204480,
}
BAD = sorted(path.name for path in MEMINFO.iterdir() if path.name.startswith(("bad-", "no-")))

HOST, FROM_ENV = "network_mode: host", "command: '${DASK_SCHEDULER_ADDRESS} ${DASK_LISTEN}'"

# Answers as Docker does, and writes down the environment that Compose gets. Dask runs until it is stopped.
DOCKER = """
case $1 in
    ps)
        [ -z "${FAKE_DOCKER_DOWN:-}" ] || exit 1
        case $* in
            *.Mounts*) printf '%b\n' "${FAKE_MOUNTS:-}" ;;
            *) printf '%s' "${FAKE_CONTAINERS:-}" ;;
        esac
        ;;
    compose) shift; env >"$0.env" ;;
    events) touch "$START_DASK_ROOT/run/dask/stopping" ;;
esac
"""
SYSTEMCTL = """
case $* in
    is-system-running*) [ -z "${FAKE_BOOT:-}" ] || exec sleep 60 ;;
    list-jobs*) echo "12 cloud-final.service start running"; echo "13 dask.target start waiting" ;;
    show*) echo "${FAKE_RESTARTS:-0}" ;;
esac
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """What one run of start-dask left."""

    status: int
    output: str
    calls: list[str]
    environment: dict[str, str]
    """What Compose got; empty when it was not started."""
    record: str | None
    """/run/dask/memory.env."""

    @property
    def exported(self) -> str | None:
        return self.environment.get(VARIABLE)


class Machine:
    """A folder that start-dask takes for /, with fake programs on PATH."""

    def __init__(self, root: Path, shell: str = "dash") -> None:
        self.root = root
        self.shell = [SHELLS[shell], "sh"] if shell == "busybox" else [SHELLS[shell]]
        self.programs = root / "programs"
        self.spill = root / "var/lib/dask/spill"
        self.record = root / "run/dask/memory.env"
        self.drop_in = root / "run/systemd/system/docker-.scope.d/10-dask.conf"
        for folder in ("proc", "etc/dask", "etc/docker", "sys/fs/cgroup", "usr/local/sbin"):
            (root / folder).mkdir(parents=True)
        fake(self.programs, "docker", DOCKER)
        fake(self.programs, "systemctl", SYSTEMCTL)
        self.write("etc/dask/compose.yaml", f"services: {{w: {{{HOST}, {FROM_ENV}}}}}\n")
        self.write("etc/dask/dask.env", "DASK_ROLE=local\nDASK_SCHEDULER_ADDRESS=\n")
        self.write("sys/fs/cgroup/cgroup.controllers", "cpu memory pids\n")
        self.meminfo("2-gib")

    def write(self, name: str, text: str) -> None:
        (self.root / name).write_text(text)

    def meminfo(self, name: str) -> None:
        shutil.copyfile(MEMINFO / name, self.root / "proc/meminfo")

    def install(self, of: Image) -> None:
        """Write the guest's programs."""
        guest = render.guest(of)
        for path in (START_DASK, MEASURE_MEMORY, COMPARE_MEMORY, DASK_TLS, TLS_ERRORS):
            script = self.root / path.relative_to("/")
            script.parent.mkdir(parents=True, exist_ok=True)
            script.write_bytes(guest[path].content)
            script.chmod(0o755)

    def start(
        self,
        of: Image | None = None,
        environment: Mapping[str, str] | None = None,
        *,
        program: PurePosixPath = START_DASK,
        full: bool = False,
    ) -> Started:
        """Run start-dask, or another program; with `full`, while /run is full."""
        self.install(of or image())
        argv = [*self.shell, str(self.root / program.relative_to("/"))]
        done = subprocess.run(
            on_full_run(self.root, argv) if full else argv,
            env=self.environment(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        seen = self.programs / "docker.env"
        lines = seen.read_text().splitlines() if seen.exists() else []
        return Started(
            status=done.returncode,
            output=done.stdout,
            calls=calls(self.programs, "docker"),
            environment=dict(line.partition("=")[::2] for line in lines),
            record=self.record.read_text() if self.record.exists() else None,
        )

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        return {
            "PATH": f"{self.programs}:{os.environ['PATH']}",
            "START_DASK_ROOT": str(self.root),
            "MEASURE_MEMORY_ROOT": str(self.root),
            "COMPARE_MEMORY_ROOT": str(self.root),
            **more,
        }

    @property
    def health(self) -> list[str]:
        return (self.root / "run/dask/health").read_text().splitlines()


@pytest.fixture(params=sorted(SHELLS))
def machine(tmp_path: Path, request: pytest.FixtureRequest) -> Machine:
    return Machine(tmp_path, request.param)


@pytest.fixture
def one(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_dash_is_here() -> None:
    assert "dash" in SHELLS, "Debian's /bin/sh is what runs start-dask"


@pytest.mark.parametrize(("name", "kilobytes"), GOOD.items())
def test_what_is_available_reaches_compose(machine: Machine, name: str, kilobytes: int) -> None:
    machine.meminfo(name)
    started = machine.start()
    expected = kilobytes * 1024 // PAGE * PAGE
    assert started.status == 0, started.output
    assert started.exported == str(expected)
    assert started.record == f"{VARIABLE}={expected}\n"
    assert machine.drop_in.read_text() == f"[Scope]\nMemoryMax={expected}\nMemorySwapMax=0\n"
    assert "<3>" not in started.output


def test_the_journal_gets_one_clear_line(one: Machine) -> None:
    assert one.start().output == (
        "<6>measure-memory: AVAILABLE_MEMORY_FOR_DASK=1814532096 (1730 MiB of 1965 MiB; reserve 0)\n"
    )


@pytest.mark.parametrize("name", [*BAD, "missing"])
def test_what_cannot_be_measured_is_loud_and_leaves_the_variable_unset(machine: Machine, name: str) -> None:
    if name == "missing":
        (machine.root / "proc/meminfo").unlink()
    else:
        machine.meminfo(name)
    machine.record.parent.mkdir(parents=True)
    machine.record.write_text(f"{VARIABLE}=123\n")
    machine.drop_in.parent.mkdir(parents=True)
    machine.drop_in.write_text("[Scope]\nMemoryMax=123\n")
    started = machine.start(environment={VARIABLE: "123"})
    assert started.status == 0, started.output
    assert started.environment, "Dask must start all the same"
    assert started.exported is None
    assert started.record is None
    assert not machine.drop_in.exists()
    assert re.search(
        rf"^<3>measure-memory: {VARIABLE} is not set, and each .* may use 75 % .*: .+", started.output
    )
    assert len(started.output.splitlines()) == 1, started.output


@pytest.mark.needs("unshare")
def test_on_a_full_run_there_is_no_old_limit(machine: Machine) -> None:
    for file in (machine.record, machine.drop_in):
        file.parent.mkdir(parents=True)
        file.write_text(f"{VARIABLE}=123\n")
    started = machine.start(program=MEASURE_MEMORY, full=True)
    assert started.status == 1
    assert started.output.startswith(f"<3>measure-memory: {VARIABLE} is not set")
    assert started.output.endswith("memory.env can't be written; is /run full?\n")
    assert not [path for path in (machine.root / "run").rglob("*") if path.is_file()]


@pytest.mark.needs("unshare")
@pytest.mark.parametrize("failures", ["", "3\n"])
def test_on_a_full_run_dask_waits_and_says_why(machine: Machine, failures: str) -> None:
    fake(machine.programs, "sleep", "")
    machine.record.parent.mkdir(parents=True)
    machine.write("run/dask/health", "healthy\n")
    if failures:
        machine.write("run/dask/failures", failures)
    started = machine.start(full=True)
    assert started.status == 1
    assert "is /run full?" in started.output
    assert "I/O" not in started.output
    word, reason = machine.health
    assert word == "unhealthy"
    assert reason.endswith("can't be written; is /run full?")
    assert failures or calls(machine.programs, "sleep"), "systemd starts it again at once"


def test_the_corpus_is_whole() -> None:
    assert {*GOOD, *BAD} == {path.name for path in MEMINFO.iterdir()}
    assert len(BAD) > 10


def test_the_value_is_not_the_published_snippets(one: Machine) -> None:
    """A basic regular expression takes `+` literally: the seed snippet exports a whole line of text."""
    snippet = r"grep -i memavailable proc/meminfo | sed 's/[a-zA-Z]+:\s+//'"
    text = subprocess.check_output(["sh", "-c", snippet], cwd=one.root, text=True)
    assert text == "MemAvailable:    1772004 kB\n"
    exported = one.start().exported
    assert exported is not None
    assert exported.isdecimal()
    assert exported not in (text.strip(), "1772004 kB", "1772004")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("machine"))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    total_kb=st.integers(min_value=256 * 1024, max_value=24 << 30),
    share=st.floats(min_value=0.05, max_value=0.999),
    reserve_bytes=st.one_of(st.just(0), st.integers(min_value=0, max_value=1 << 34)),
    reserve_millipercent=st.one_of(st.just(0), st.integers(min_value=0, max_value=99_999)),
    capped=st.booleans(),
)
def test_the_limit_is_whole_pages_of_what_is_available_less_the_reserve(
    shared: Machine, total_kb: int, share: float, reserve_bytes: int, reserve_millipercent: int, capped: bool
) -> None:
    available_kb = int(total_kb * share)
    shared.write("proc/meminfo", f"MemTotal: {total_kb} kB\nMemAvailable: {available_kb} kB\n")
    reserve = Reserve(bytes=reserve_bytes, percent=reserve_millipercent / 1000, capped=capped)
    started = shared.start(image(reserve=reserve))
    available = available_kb * 1024
    off = reserve_bytes - -available * reserve_millipercent // 100_000
    if capped:
        off = min(off, max(0, (64 << 20) - available * 3 // 200))
    assert reserve.of(available) == off
    room = available - off
    if room // PAGE * PAGE < 6 << 20:
        assert started.exported is None
        assert "<3>" in started.output
        return
    assert started.exported is not None, started.output
    limit = int(started.exported)
    assert limit % PAGE == 0
    assert limit <= room
    assert limit > room - PAGE


@pytest.mark.parametrize(
    ("reserve", "expected"),
    [
        (Reserve(bytes=256 << 20), 1814532096 - (256 << 20)),
        (Reserve(percent=10.0), 1633075200),
        (AUTO_RESERVE, 1778237440),
        (Reserve(bytes=1814532096), None),
        (Reserve(bytes=1 << 60), None),
        (Reserve(percent=100.0), None),
    ],
)
def test_the_reserve_stays_with_the_system(machine: Machine, reserve: Reserve, expected: int | None) -> None:
    started = machine.start(image(reserve=reserve))
    assert started.exported == (None if expected is None else str(expected))
    assert ("<3>" in started.output) == (expected is None)


def test_what_the_systems_programs_need_is_not_available(machine: Machine) -> None:
    """A quarter of what the programs have mapped that must answer, and the programs of a login."""
    mapped_by = {"docker": 64 << 20, "agent": 16 << 20, "cron": 1 << 20, "ssh": 4 << 20}
    for unit, mapped in mapped_by.items():
        folder = machine.root / f"sys/fs/cgroup/system.slice/{unit}.service"
        folder.mkdir(parents=True)
        (folder / "memory.stat").write_text(f"anon 4096\nfile {mapped * 2}\nfile_mapped {mapped}\n")
    started = machine.start(image(after=("agent.service", "absent.service")))
    assert (machine.root / "run/dask/programs").read_text() == f"{(16 + 1 + 20) << 20}\n"
    assert started.exported == str(1814532096 - (37 << 20))


@pytest.mark.parametrize("units", [("ssh.service",), ("ssh.socket",), ("ssh.service", "ssh.socket")])
def test_a_login_is_counted_once_also_before_the_first(machine: Machine, units: tuple[str, ...]) -> None:
    """Ubuntu 24.04 starts sshd at the first login."""
    for unit in units:
        folder = machine.root / f"sys/fs/cgroup/system.slice/{unit}"
        folder.mkdir(parents=True)
        (folder / "memory.stat").write_text("anon 4096\nfile_mapped 0\n")
    machine.start()
    assert (machine.root / "run/dask/programs").read_text() == f"{16 << 20}\n"


@pytest.mark.parametrize(("workers", "share"), [(1, 1797754880), (3, 599251626)])
def test_a_headroom_is_off_the_workers_limits_alone(machine: Machine, workers: int, share: int) -> None:
    started = machine.start(image(headroom=16 << 20, workers=workers))
    assert started.exported == "1814532096"
    assert started.environment["DASK_WORKER_MEMORY"] == str(share)
    assert (16 << 20) + workers * share <= 1814532096 < (16 << 20) + workers * (share + 1)


@pytest.mark.parametrize("memory", ["0.5-gib", "1-gib", "2-gib", "4-gib-swap"])
@pytest.mark.parametrize(("role", "workers"), [("local", 1), ("worker", 3)])
def test_the_automatic_headroom_is_what_the_checks_expect(
    machine: Machine, memory: str, role: str, workers: int
) -> None:
    machine.meminfo(memory)
    machine.write("etc/dask/dask.env", f"DASK_ROLE={role}\nDASK_SCHEDULER_ADDRESS=ucx://unasked\n")
    started = machine.start(image(headroom=None, workers=workers))
    limit = int(started.exported or 0)
    headroom = oom.nanny_headroom(None, limit=limit, role=Role(role))
    expected = str((limit - headroom) // workers) if headroom else None
    assert started.environment.get("DASK_WORKER_MEMORY") == expected


def test_the_automatic_headroom_is_for_small_machines() -> None:
    beside = oom.BESIDE[Role.WORKER]
    small, large = 600 << 20, oom.SMALL
    headroom = oom.nanny_headroom(None, limit=small, role=Role.WORKER)
    assert 0 <= oom.room(small, beside=beside, headroom=headroom) <= 1
    assert oom.nanny_headroom(None, limit=large, role=Role.WORKER) == 0
    assert oom.nanny_headroom(None, limit=small, role=Role.SCHEDULER) == 0


def test_an_automatic_headroom_that_leaves_too_little_is_none(machine: Machine) -> None:
    """A worker does not start with a limit below zero."""
    machine.write("proc/meminfo", "MemTotal: 400000 kB\nMemAvailable: 102400 kB\n")
    machine.write("etc/dask/dask.env", "DASK_ROLE=local\n")
    started = machine.start(image(headroom=None))
    limit = int(started.exported or 0)
    assert 0 < limit < oom.BESIDE[Role.LOCAL]
    assert "DASK_WORKER_MEMORY" not in started.environment
    assert oom.nanny_headroom(None, limit=limit, role=Role.LOCAL) == 0
    assert "<3>start-dask: the nanny gets no headroom" in started.output


def test_a_headroom_that_leaves_too_little_is_none(machine: Machine) -> None:
    started = machine.start(image(headroom=1 << 30))
    assert started.exported == "1814532096"
    assert "DASK_WORKER_MEMORY" not in started.environment
    assert "<3>start-dask: the nanny gets no headroom" in started.output


@pytest.mark.parametrize("headroom", [0, 16 << 20])
def test_no_share_comes_from_outside_or_without_a_limit(machine: Machine, headroom: int) -> None:
    (machine.root / "proc/meminfo").unlink()
    started = machine.start(image(headroom=headroom), {"DASK_WORKER_MEMORY": "123"})
    assert started.environment
    assert "DASK_WORKER_MEMORY" not in started.environment
    assert started.output.count("<3>") == 1


def test_older_containers_are_gone_before_anything_is_measured(machine: Machine) -> None:
    # The container's removal is what makes the memory available.
    full, empty = MEMINFO / "0.5-gib", MEMINFO / "2-gib"
    machine.meminfo(full.name)
    removal = f'case $1 in rm) cp "{empty}" "$START_DASK_ROOT/proc/meminfo" ;; esac'
    fake(machine.programs, "docker", DOCKER + removal)
    started = machine.start(environment={"FAKE_CONTAINERS": "11aa\n22bb\n"})
    assert started.calls[:2] == [
        "ps --all --quiet --filter label=com.docker.compose.project=dask",
        "rm --force --volumes 11aa 22bb",
    ]
    assert started.exported == str(GOOD["2-gib"] * 1024 // PAGE * PAGE)


def test_docker_is_asked_as_seldom_as_possible(one: Machine) -> None:
    assert len(one.start().calls) == 3


def test_without_docker_nothing_is_measured_and_systemd_tries_again(one: Machine) -> None:
    started = one.start(environment={"FAKE_DOCKER_DOWN": "1"})
    assert started.status == 1
    assert started.record is None
    assert "<3>start-dask: Docker does not answer (see journalctl -u docker)" in started.output


def test_compose_runs_the_pinned_project(one: Machine) -> None:
    started = one.start()
    etc = one.root / "etc/dask"
    (compose,) = [call for call in started.calls if call.startswith("compose")]
    assert compose == (
        f"compose --ansi never --project-directory {etc} --file {etc}/compose.yaml up --detach --quiet-pull"
    )
    assert started.environment["COMPOSE_PROJECT_NAME"] == "dask"


def test_docker_is_asked_for_starts_before_there_are_any(machine: Machine) -> None:
    """It keeps 256 events, and none that a clock which steps back has made older."""
    wait = 'for _ in $(seq 50); do ! grep -q "^events " "$0.calls" || exit 0; sleep 0.1; done; exit 1'
    fake(machine.programs, "docker", DOCKER.replace('env >"$0.env"', wait))
    assert "Compose could not start Dask" not in machine.start().output


def test_composes_own_program_is_preferred(one: Machine) -> None:
    plugins = one.root / "usr/libexec/docker/cli-plugins"
    fake(plugins, "docker-compose", 'env >"$0.env"')
    assert [call.split()[0] for call in one.start().calls] == ["ps", "events"]
    assert calls(plugins, "docker-compose")[0].endswith("up --detach --quiet-pull")
    assert f"{VARIABLE}=1814532096" in (plugins / "docker-compose.env").read_text()


def test_a_failure_of_compose_is_a_failure(one: Machine) -> None:
    fake(one.programs, "docker", "case $1 in compose) exit 37 ;; esac")
    started = one.start()
    assert started.status == 1
    assert "<3>start-dask: Compose could not start Dask" in started.output
    assert one.health == ["unhealthy", "Compose could not start Dask"]


EVENTS = """
case $1 in
    ps) cat "$START_DASK_ROOT/running" 2>/dev/null; : ;;
    inspect) echo "$FAKE_COMMAND" ;;
    events) printf "${FAKE_STARTS:-}${FAKE_EVENTS:-}" | sed "s/^/${FAKE_TIME:-$(date +%s)999999999} /" ;;
esac
"""


@pytest.mark.parametrize(
    ("events", "running", "command", "said"),
    [
        (
            "die c1 dask-worker-1 0\n",
            "c2\n",
            "dask [worker tcp://10.0.0.1:8786]",
            "container dask-worker-1 has ended",
        ),
        (
            "die c1 dask-worker-1 0\\n",
            "c2\\n",
            "/sbin/docker-init [-- dask-scheduler]",
            "container dask-worker-1 has ended",
        ),
        ("die c1 dask-init-1 0\n", "", "true []", "container dask-init-1 has ended"),
        (
            "die c1 dask-worker-1 137\n",
            "c2\n",
            "dask []",
            "container dask-worker-1 has ended with status 137",
        ),
        ("die c1 dask-logs-1 1\n", "c2\n", "logs []", "container dask-logs-1 has ended with status 1"),
        (
            "die c1 dask-init-1 0\ndie c2 dask-x-1 3\n",
            "c2\n",
            "true []",
            "container dask-x-1 has ended with status 3",
        ),
        ("die c1 dask-init-1 0\n", "c2\n", "true []", "Docker has ended (see journalctl -u docker)"),
    ],
    ids=[
        "dask",
        "dask under init",
        "the last",
        "killed",
        "a sidecar fails",
        "one after another",
        "docker ends",
    ],
)
def test_an_end_is_a_failure_unless_something_beside_dask_has_done_its_work(
    machine: Machine, events: str, running: str, command: str, said: str
) -> None:
    fake(machine.programs, "docker", EVENTS)
    (machine.root / "running").write_text("")
    # Nothing runs before Compose has started it.
    fake(
        machine.programs,
        "docker",
        EVENTS + f'case $1 in compose) printf "{running}" >"$START_DASK_ROOT/running" ;; esac',
    )
    started = machine.start(environment={"FAKE_EVENTS": events, "FAKE_COMMAND": command})
    assert started.status == 1
    assert started.output.splitlines()[-1] == f"<3>start-dask: {said}"
    assert machine.health == ["unhealthy", said]
    assert ("<6>start-dask: container dask-init-1 has completed" in started.output) is (
        events.startswith("die c1 dask-init-1 0") and bool(running)
    )


def test_dask_goes_before_the_system_when_the_machine_has_no_memory_left(machine: Machine) -> None:
    """Whatever the Compose file: an older one has no oom_score_adj."""
    scope = machine.root / "sys/fs/cgroup/system.slice/docker-c1.scope"
    scope.mkdir(parents=True)
    (scope / "cgroup.procs").write_text("7\n8\n9\n")
    for process, score in ((7, 0), (8, 900)):  # the third has ended
        (machine.root / f"proc/{process}").mkdir()
        machine.write(f"proc/{process}/oom_score_adj", f"{score}\n")
    fake(machine.programs, "docker", EVENTS)
    machine.start(environment={"FAKE_STARTS": "start c1 dask-w-1 <no value>\\n"})
    scores = [(machine.root / f"proc/{process}/oom_score_adj").read_text() for process in (7, 8)]
    assert scores == ["500\n", "900\n"]


def test_a_process_that_was_just_starting_goes_before_the_system_too(machine: Machine) -> None:
    """A VM on a busy host kept three processes with the score 0: both looks were before they were listed."""
    scope = machine.root / "sys/fs/cgroup/system.slice/docker-c1.scope"
    scope.mkdir(parents=True)
    (scope / "cgroup.procs").write_text("1\n")
    for process in (1, 2, 3):
        (machine.root / f"proc/{process}").mkdir()
        machine.write(f"proc/{process}/oom_score_adj", "0\n")
    fake(machine.programs, "docker", EVENTS)
    # One more is listed after each of the first two looks.
    fake(
        machine.programs,
        "sleep",
        f"n=$(wc -l <{scope}/cgroup.procs); [ $n = 3 ] || echo $((n + 1)) >>{scope}/cgroup.procs",
    )
    machine.start(environment={"FAKE_STARTS": "start c1 dask-w-1 <no value>\\n"})
    assert [(machine.root / f"proc/{n}/oom_score_adj").read_text() for n in (1, 2, 3)] == ["500\n"] * 3


@pytest.mark.parametrize(
    ("maximum", "said"),
    [
        ("max", "container dask-w-1 runs WITHOUT a memory limit"),
        (
            "1814532097",
            "container dask-w-1 has a limit of 1814532097 bytes,"
            " more than the 1814532096 that were available",
        ),
        ("1814532096", ""),
        ("1048576", ""),
        (None, ""),
    ],
)
def test_a_container_that_may_use_more_is_said(machine: Machine, maximum: str | None, said: str) -> None:
    fake(machine.programs, "docker", EVENTS)
    if maximum is not None:
        scope = machine.root / "sys/fs/cgroup/system.slice/docker-c1.scope"
        scope.mkdir(parents=True)
        (scope / "memory.max").write_text(f"{maximum}\n")
    started = machine.start(environment={"FAKE_STARTS": "start c1 dask-w-1 <no value>\\n"})
    assert (f"<3>start-dask: {said}\n" in started.output) is bool(said)
    notices = machine.root / "run/dask/notices"
    assert (notices.read_text() if notices.exists() else "") == (f"{said}\n" if said else "")


def test_what_mount_spill_reports_is_a_notice_at_each_start(machine: Machine) -> None:
    (machine.root / "run/dask").mkdir(parents=True)
    machine.write("run/dask/spill-notices", "no file system on instance store\n")
    for _ in range(2):
        machine.start()
        assert (machine.root / "run/dask/notices").read_text() == "no file system on instance store\n"


def test_the_end_of_an_older_container_is_none_of_this_start(machine: Machine) -> None:
    """Docker takes whole seconds: on a fast machine a restart of the service is within one."""
    fake(machine.programs, "docker", EVENTS)
    fake(machine.programs, "date", "echo 1700000000500000000")
    events = {"FAKE_EVENTS": "die c0 dask-worker-1 143\\n", "FAKE_COMMAND": "dask worker"}
    older = machine.start(environment={**events, "FAKE_TIME": "1700000000400000000"})
    assert "has ended with status" not in older.output
    for time in (
        "1700000000600000000",
        "1700000009400000000",
        "1699999400000000000",
    ):  # the clock stepped back
        ended = machine.start(environment={**events, "FAKE_TIME": time})
        assert "dask-worker-1 has ended with status 143" in ended.output


def test_a_container_with_another_cgroup_parent_has_its_limit_checked_too(one: Machine) -> None:
    fake(one.programs, "docker", EVENTS)
    folder = one.root / "sys/fs/cgroup/dask.slice/docker-c1.scope"
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text("max\n")
    (folder / "cgroup.procs").write_text("77\n")
    (one.root / "proc/77").mkdir(parents=True)
    one.write("proc/77/oom_score_adj", "0\n")
    started = one.start(environment={"FAKE_STARTS": "start c1 dask-w-1 <no value>\\n"})
    assert "container dask-w-1 runs WITHOUT a memory limit" in started.output
    assert (one.root / "proc/77/oom_score_adj").read_text() == "500\n"


def test_a_stop_while_compose_still_starts_ends_compose_first(one: Machine) -> None:
    """What it started afterwards would run on without the service."""
    script = """
case $1 in compose)
    trap 'echo ended >"$0.ended"; exit 1' TERM
    echo up >"$0.up"
    sleep 30 &
    wait
    ;;
esac
"""
    fake(one.programs, "docker", script)
    one.install(image())
    argv = [*one.shell, str(one.root / START_DASK.relative_to("/"))]
    with subprocess.Popen(argv, env=one.environment({}), stdout=subprocess.DEVNULL) as process:
        wait_until(lambda: (one.programs / "docker.up").exists(), what="Compose", timeout=60)
        process.terminate()
        assert process.wait(60) == 143
        assert (one.programs / "docker.ended").exists()


def test_an_end_that_was_asked_for_is_none(machine: Machine) -> None:
    fake(
        machine.programs,
        "docker",
        '[ "$1" != events ] || touch "$START_DASK_ROOT/run/dask/stopping"' + EVENTS,
    )
    events = {"FAKE_EVENTS": "die c1 dask-worker-1 137\n", "FAKE_COMMAND": "dask"}
    assert machine.start(environment=events).status == 0


def test_a_start_after_a_failure_waits_longer_each_time_and_not_by_hand(machine: Machine) -> None:
    fake(machine.programs, "sleep", "")
    fake(machine.programs, "docker", "case $1 in compose) exit 1 ;; esac")
    for restarts in range(8):
        machine.start(environment={"FAKE_RESTARTS": str(restarts)})
    assert calls(machine.programs, "sleep") == ["5", "10", "20", "40", "60", "60", "60"]
    machine.start(environment={"FAKE_RESTARTS": "0"})
    assert len(calls(machine.programs, "sleep")) == 7
    machine.start(environment={"FAKE_RESTARTS": "1"})
    assert calls(machine.programs, "sleep")[-1] == "5"


def test_a_boot_that_goes_on_is_said_and_not_waited_for_for_good(machine: Machine) -> None:
    # 31 times a second of waiting stand for half an hour.
    script = SYSTEMCTL.replace("exec sleep 60", "exit 124")
    fake(machine.programs, "systemctl", script)
    fake(machine.programs, "timeout", '[ "$1" != -k ] || shift 2; shift; exec "$@"')
    started = machine.start(environment={"FAKE_BOOT": "1"})
    assert started.status == 0
    lines = started.output.splitlines()
    assert (
        lines[0]
        == "<6>start-dask: waiting for the end of the boot: cloud-final.service is still starting (1 min)"
    )
    assert lines[29].startswith("<4>start-dask: the boot has not ended after 30 minutes")


def test_a_worker_waits_for_its_scheduler(one: Machine) -> None:
    """It is looked for without starting Dask, and nothing is measured before it is there."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    one.write("etc/dask/dask.env", f"DASK_ROLE=worker\nDASK_SCHEDULER_ADDRESS=tcp://127.0.0.1:{port}\n")
    found: list[Started] = []
    waiting = threading.Thread(target=lambda: found.append(one.start()))
    waiting.start()
    wait_until(lambda: (one.root / "run/dask/health").exists() and one.health, what="its health", timeout=60)
    assert one.health == ["waiting", f"for the scheduler at tcp://127.0.0.1:{port}"]
    assert not one.record.exists()
    with socket.create_server(("127.0.0.1", port)):
        waiting.join(60)
    (started,) = found
    assert started.status == 0
    assert started.output.count("waiting for the scheduler") == 1
    assert started.exported == "1814532096"


@pytest.mark.parametrize(
    "address",
    ["", "ucx://10.0.0.1:8786", "tcp://[::1]", "inproc://a/b/1", "tcp://$(touch x):1", "tls://a b:1"],
)
def test_an_address_that_is_no_host_and_port_is_dasks_own_affair(machine: Machine, address: str) -> None:
    machine.write("etc/dask/dask.env", f"DASK_ROLE=worker\nDASK_SCHEDULER_ADDRESS={address}\n")
    machine.write("etc/dask/compose.yaml", f"services: {{w: {{{HOST}}}}}\n")
    assert machine.start().status == 0


@pytest.mark.parametrize(
    ("settings_text", "compose", "warned"),
    [
        ("DASK_ROLE=local\n", "# dask scheduler --host ${DASK_LISTEN}\n", False),
        ("DASK_ROLE=local\nDASK_LISTEN=127.0.0.1\n", "# dask scheduler --host 127.0.0.1\n", False),
        ("DASK_ROLE=local\n", "# dask scheduler\n", True),
        ("DASK_ROLE=local\nDASK_LISTEN=0.0.0.0\n", "", True),
        ("DASK_ROLE=scheduler\n", "", True),
        ("DASK_ROLE=scheduler\nDASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION=true\n", "", False),
        ("DASK_ROLE=scheduler\n", "# DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION: 'true'\n", False),
    ],
)
def test_ports_that_are_open_without_tls_are_said(
    machine: Machine, settings_text: str, compose: str, warned: bool
) -> None:
    machine.write("etc/dask/dask.env", settings_text)
    machine.write("etc/dask/compose.yaml", f"services: {{w: {{{HOST}}}}}\n{compose}")
    assert ("<4>start-dask: Dask's ports are open" in machine.start().output) is warned


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (("etc/docker/daemon.json", '{"exec-opts": ["native.cgroupdriver=cgroupfs"]}'), "driver is cgroupfs"),
        (("sys/fs/cgroup/cgroup.controllers", None), "cgroups v1"),
    ],
)
def test_a_docker_without_scopes_is_said(
    machine: Machine, break_it: tuple[str, str | None], said: str
) -> None:
    """There a drop-in would limit nothing."""
    path, text = break_it
    (machine.root / path).unlink() if text is None else machine.write(path, text)
    machine.drop_in.parent.mkdir(parents=True)
    machine.drop_in.write_text("[Scope]\nMemoryMax=123\n")
    started = machine.start()
    assert started.exported == "1814532096"
    assert not machine.drop_in.exists()
    assert re.search(
        f"^<3>measure-memory: only containers with mem_limit have a limit: .*{said}", started.output
    )


@pytest.mark.parametrize("role", ["local", "scheduler", "worker"])
def test_the_role_chooses_the_profile(machine: Machine, role: str) -> None:
    machine.write("etc/dask/dask.env", f"DASK_ROLE={role}\nDASK_SCHEDULER_ADDRESS=tcp://10.0.0.1:8786\n")
    started = machine.start()
    assert started.status == 0, started.output
    assert started.environment["COMPOSE_PROFILES"] == role
    assert started.environment["DASK_SCHEDULER_ADDRESS"] == "tcp://10.0.0.1:8786"


def test_a_control_planes_compose_file_may_name_the_scheduler(machine: Machine) -> None:
    machine.write("etc/dask/dask.env", "DASK_ROLE=worker\nDASK_SCHEDULER_ADDRESS=\n")
    machine.write("etc/dask/compose.yaml", "services: {w: {command: dask worker tcp://10.0.0.1:8786}}\n")
    assert machine.start().status == 0


@pytest.mark.parametrize(
    "compose",
    [
        "services:\n  w:\n    network_mode: host\n",
        'services:\n  w:\n    network_mode: "host"\n',
        "services:\n  w:\n    network_mode:   'host'  # as Dask wants it\n",
        "services: {w: {image: a, network_mode: host}}\n",
        '{"services": {"w": {"network_mode": "host"}}}\n',
        '{"services":{"w":{"network_mode":"host"}}}\n',
        '{"services": {"w": {"network_mode" : "host"}}}\n',
        "services:\n  w:\n    network_mode: host\n  agent:\n    image: a\n",
    ],
    ids=["plain", "double", "single", "flow", "json", "dense json", "spaced json", "one of two"],
)
def test_a_compose_file_on_the_machines_network_is_no_news(machine: Machine, compose: str) -> None:
    machine.write("etc/dask/compose.yaml", compose)
    started = machine.start()
    assert started.status == 0
    assert "<3>" not in started.output


@pytest.mark.parametrize(
    "compose",
    [
        "services:\n  w:\n    image: a\n",
        "services:\n  w:\n    network_mode: bridge\n",
        'services:\n  w:\n    network_mode: "none"\n',
        "services:\n  w:\n    network_mode: hostile\n",
        "services:\n  w:\n    # network_mode: host\n    image: a\n",
        "services:\n  w:\n    networks: [host]\n",
        '{"services": {"w": {"network_mode": "service:host"}}}\n',
        "",
    ],
    ids=["nothing", "bridge", "none", "hostile", "comment", "networks", "json", "empty"],
)
def test_a_compose_file_on_another_network_is_loud_and_starts_all_the_same(
    machine: Machine, compose: str
) -> None:
    machine.write("etc/dask/compose.yaml", compose)
    started = machine.start()
    assert started.status == 0
    assert started.exported == "1814532096"
    (line,) = [line for line in started.output.splitlines() if line.startswith("<3>")]
    said = r"no service in \S+/etc/dask/compose.yaml has network_mode: host, .*\(container.network\)"
    assert re.fullmatch(f"<3>start-dask: {said}", line)
    other = machine.start(image(network=ContainerNetwork.BRIDGE))
    assert other.status == 0
    assert "<3>" not in other.output, "an image with a bridge has a network for it"


@pytest.mark.parametrize(
    ("settings_text", "said"),
    [
        ("DASK_ROLE=boss\n", "DASK_ROLE='boss' in .* is not local, worker, scheduler or none"),
        ("DASK_ROLE=\n", "DASK_ROLE='' in .* is not local"),
        ("", "DASK_ROLE='' in .* is not local"),
        ("DASK_ROLE=worker\nDASK_SCHEDULER_ADDRESS=\n", "DASK_ROLE=worker needs DASK_SCHEDULER_ADDRESS"),
        (
            "DASK_ROLE=local\nDASK_LISTEN=10.0.0.5\n",
            r"DASK_LISTEN='10\.0\.0\.5' in .* is not 127\.0\.0\.1 or 0\.0\.0\.0",
        ),
        (None, "dask.env can't be read"),
    ],
)
def test_what_it_cannot_start_it_refuses(machine: Machine, settings_text: str | None, said: str) -> None:
    if settings_text is None:
        (machine.root / "etc/dask/dask.env").unlink()
    else:
        machine.write("etc/dask/dask.env", settings_text)
    started = machine.start()
    assert started.status == 78
    assert started.calls == []
    assert re.fullmatch(rf"<3>start-dask: .*{said}.*\n", started.output), started.output
    assert machine.health[0] == "refused"


def test_a_value_from_outside_never_gets_through(machine: Machine) -> None:
    machine.write("etc/dask/dask.env", f"DASK_ROLE=local\n{VARIABLE}=777216\n")
    assert machine.start(environment={VARIABLE: "999424"}).exported == "1814532096"
    machine.meminfo("bad-zero")
    assert machine.start(environment={VARIABLE: "999424"}).exported is None


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("A_NAME=a b", "a b"),
        ('A_NAME="a b"', "a b"),
        ("A_NAME='$(id) `id` $HOME'", "$(id) `id` $HOME"),
        ("A_NAME=a;touch ran", "a;touch ran"),
        ("A_NAME=(", "("),
        ("A_NAME=a=b", "a=b"),
        ("export A_NAME=a", "a"),
        ("  A_NAME=a", "a"),
        ("A_NAME=a\r", "a"),
        ("A_NAME=", ""),
    ],
)
def test_settings_are_data(machine: Machine, line: str, value: str) -> None:
    machine.write("etc/dask/dask.env", f"# what it does\r\nDASK_ROLE=local\r\n\r\n{line}")
    started = machine.start()
    assert started.status == 0, started.output
    assert started.environment["A_NAME"] == value
    assert not list(machine.root.rglob("ran"))


@pytest.mark.parametrize(
    "line", ["DASK ROLE=a", "DASK_ROLE", "=a", "PATH/A=b", "settings=/etc/shadow", "1A=b"]
)
def test_a_line_that_is_no_setting_is_named(machine: Machine, line: str) -> None:
    machine.write("etc/dask/dask.env", f"DASK_ROLE=local\n{line}\n")
    started = machine.start()
    assert started.status == 78
    assert started.calls == []
    assert f"dask.env, line 2: '{line}' is not NAME=VALUE" in started.output


def test_the_spill_directory_is_purged_and_open_to_any_user(machine: Machine) -> None:
    old = machine.spill / "worker-abc/storage"
    old.mkdir(parents=True)
    (old / "key").write_text("left by a killed worker")
    (machine.spill / ".hidden").write_text("")
    machine.start()
    assert list(machine.spill.rglob("*")) == [machine.spill / "service"]
    for folder in (machine.spill, machine.spill / "service"):
        assert folder.stat().st_mode & 0o7777 == 0o1777


@pytest.mark.parametrize("mount", ["", "/mine"])
def test_files_of_others_running_containers_are_not_purged(machine: Machine, mount: str) -> None:
    own, others = (machine.spill / name / "key" for name in ("service/worker-abc", "worker-def"))
    for file in (own, others):
        file.parent.mkdir(parents=True)
        file.write_text("spilled")
    for mounts, left in (
        (f"/srv\n/etc/hosts,{machine.spill}{mount},/srv", True),
        (f"/srv,{machine.spill}2\n{machine.root}", False),
    ):
        started = machine.start(environment={"FAKE_MOUNTS": mounts})
        assert started.status == 0, started.output
        assert others.exists() is left
        assert list((machine.spill / "service").iterdir()) == []


def test_purging_follows_no_link_of_others(machine: Machine, tmp_path: Path) -> None:
    kept = tmp_path / "kept/file"
    kept.parent.mkdir()
    kept.write_text("")
    machine.spill.mkdir(parents=True)
    (machine.spill / "service").symlink_to(kept.parent)
    machine.start(environment={"FAKE_MOUNTS": str(machine.spill)})
    assert kept.exists()
    assert not (machine.spill / "service").is_symlink()


def test_the_spill_directory_may_be_a_link_to_another_disk(one: Machine, tmp_path: Path) -> None:
    disk = tmp_path / "nvme"
    disk.mkdir()
    (disk / "old").write_text("")
    one.spill.parent.mkdir(parents=True)
    one.spill.symlink_to(disk)
    one.start()
    assert one.spill.is_symlink()
    assert list(disk.iterdir()) == [disk / "service"]


def test_spilling_has_a_bound_for_each_worker(machine: Machine) -> None:
    table = (
        "Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/sda1 8000000 2000000 6000000 25% /\n"
    )
    machine.write("table", table)
    fake(machine.programs, "df", f"cat '{machine.root}/table'")
    bound = 6_000_000 * 1024 * 80 // 100
    assert machine.start().environment["DASK_MAX_SPILL"] == str(bound)
    assert machine.start(image(workers=3)).environment["DASK_MAX_SPILL"] == str(bound // 3)


def test_unknown_free_space_is_said_and_does_not_stop_dask(machine: Machine) -> None:
    fake(machine.programs, "df", "exit 1")
    started = machine.start(environment={"DASK_MAX_SPILL": "5"})
    assert "DASK_MAX_SPILL" not in started.environment
    assert started.exported == "1814532096"
    assert "<3>start-dask: the free space of" in started.output


@pytest.mark.parametrize(
    ("workers", "threads", "expected"), [(1, None, None), (3, None, "2"), (16, None, "1"), (3, 4, None)]
)
def test_more_workers_share_the_cpus(
    one: Machine, workers: int, threads: int | None, expected: str | None
) -> None:
    fake(one.programs, "getconf", "case $1 in PAGESIZE) echo 4096 ;; *) echo 8 ;; esac")
    started = one.start(image(workers=workers, threads=threads))
    assert started.environment.get("DASK_THREADS") == expected


@pytest.mark.parametrize("answer", ["exit 1", "echo", "echo undefined", "echo 0"])
def test_an_unknown_page_is_the_largest_of_all_kernels(machine: Machine, answer: str) -> None:
    fake(machine.programs, "getconf", answer)
    assert machine.start().exported == str(1814532096 // 65536 * 65536)


@pytest.mark.parametrize("page", [4096, 16384, 65536])
def test_the_limit_is_whole_pages_of_this_kernel(machine: Machine, page: int) -> None:
    fake(machine.programs, "getconf", f"echo {page}")
    assert machine.start().exported == str(1814532096 // page * page)


@pytest.mark.parametrize(
    "of",
    [
        image(),
        image(workers=3, headroom=16 << 20),
        image(threads=2, reserve=Reserve(bytes=1 << 28, percent=2.5)),
        image(network=ContainerNetwork.BRIDGE),
    ],
    ids=["default", "workers", "reserve", "bridge"],
)
def test_the_rendered_scripts_pass_shellcheck(tmp_path: Path, of: Image) -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    for path, file in render.guest(of).items():
        if file.content.startswith(b"#!/bin/sh") or path.suffix == ".sh":
            script = tmp_path / path.name
            script.write_bytes(file.content)
            argv = [shellcheck, "--shell=sh", str(script)]
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout


def _health(tmp_path: Path, port: int) -> tuple[int, str]:
    script = render.guest(image())[PurePosixPath("/usr/local/sbin/dask-health")]
    (tmp_path / "dask-health").write_bytes(script.content)
    done = subprocess.run(
        ["sh", tmp_path / "dask-health"],
        env={
            "PATH": os.environ["PATH"],
            "DASK_HEALTH_PORT": str(port),
            "DASK_HEALTH_STATE": str(tmp_path / "run/health"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("answer", "before", "status", "said"),
    [
        ("200 OK", None, 0, "<5>dask-health: healthy"),
        ("200 OK", "healthy\n", 0, ""),
        ("200 OK", "unhealthy\n", 0, "<5>dask-health: healthy"),
        ("503 Service Unavailable", "healthy\n", 1, "<4>dask-health: unhealthy"),
        ("503 Service Unavailable", "unhealthy\n", 1, ""),
        (None, "healthy\n", 1, "<4>dask-health: unhealthy"),
    ],
)
def test_health_is_kept_and_said_only_when_it_changes(
    tmp_path: Path, answer: str | None, before: str | None, status: int, said: str
) -> None:
    state = tmp_path / "run/health"
    if before is not None:
        state.parent.mkdir()
        state.write_text(before)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        asked: list[bytes] = []

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                asked.append(connection.recv(100))
                connection.sendall(f"HTTP/1.1 {answer}\r\n\r\nok".encode())

        if answer is None:
            server.close()
            got, line = _health(tmp_path, port)
        else:
            thread = threading.Thread(target=serve)
            thread.start()
            got, line = _health(tmp_path, port)
            thread.join()
            assert asked[0].startswith(b"GET /health HTTP/1.0\r\n")
    assert got == status
    word, *reason = state.read_text().splitlines()
    assert word == ("healthy" if status == 0 else "unhealthy")
    assert reason == {"<4>": [f"Dask does not answer on port {port}"]}.get(said[:3], [])
    assert line.startswith(said)
    assert bool(line) == bool(said)


def test_what_the_system_uses_is_recorded_after_the_measurement(machine: Machine) -> None:
    started = machine.start(image(reserve=Reserve(bytes=64 << 20)))
    assert started.status == 0, started.output
    limit, available, _ = (
        line.split() for line in (machine.root / "run/dask/memory-at-start").read_text().splitlines()
    )
    assert limit == ["limit", started.exported]
    assert int(available[1]) - int(limit[1]) == pytest.approx(64 << 20, abs=PAGE)


def test_the_ids_of_dasks_running_containers_are_known(one: Machine) -> None:
    one.write("running", "c2\n")
    (one.root / "run/dask/containers").mkdir(parents=True)
    one.write("run/dask/containers/c0", "")
    fake(one.programs, "docker", EVENTS)
    events = "start c1 dask-init-1 -\\nstart c2 dask-worker-1 -\\ndie c1 dask-init-1 0\\n"
    one.start(environment={"FAKE_EVENTS": events, "FAKE_COMMAND": "true []"})
    (container,) = (one.root / "run/dask/containers").iterdir()
    assert (container.name, container.read_text()) == ("c2", "dask-worker-1\n")


def test_a_limit_that_follows_needs_a_dask_that_knows(machine: Machine) -> None:
    following = image(follow=True)
    started = machine.start(following)
    assert "<4>start-dask: memory.follow: the limit stays as it is" in started.output
    assert not (machine.root / "run/dask/follows").exists()
    preload = "command: dask worker --preload-nanny /run/dask/preload/follow_limit.py"
    machine.write("etc/dask/compose.yaml", f"services: {{w: {{{HOST}, {FROM_ENV}}}}}\n# {preload}\n")
    assert "the limit stays" in machine.start(following).output
    machine.write("etc/dask/compose.yaml", f"services: {{w: {{{HOST}, {preload}}}}}\n")
    assert "the limit stays" not in machine.start(following).output
    assert (machine.root / "run/dask/follows").exists()
    machine.meminfo("bad-zero")
    assert "the limit stays as it is, because nothing was measured" in machine.start(following).output
    assert not (machine.root / "run/dask/follows").exists()
    assert not any("follow" in path.name for path in render.guest(image()) if path.name != "follow_limit.py")
