"""compare-memory outside a VM: real shells, and a folder of cgroups whose use grows and shrinks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ami_builder.core.units import GIB, MIB
from ami_builder.system import resources
from tests.fake_programs import calls, fake
from tests.full_run import on_full_run

PROGRAM = resources.packer_dir() / "guest/usr/local/sbin/compare-memory"
SHELLS = [name for name in ("dash", "busybox") if shutil.which(name)]
TOTAL, AVAILABLE, RESERVE = 2048 * MIB, 1800 * MIB, 32 * MIB
LIMIT = AVAILABLE - RESERVE
STEP = TOTAL // 100
PAGE = 65536
CONTAINER = "c0ffee" + "0" * 58
OTHER = "beef" * 16


class Machine:
    """A folder that compare-memory takes for /. Sizes are MiB."""

    def __init__(self, root: Path, shell: str) -> None:
        self.root, self.programs = root, root / "programs"
        self.run_is_full = False
        self.shell = [shell, "sh"] if shell == "busybox" else [shell]
        self.run = root / "run/dask"
        self.cgroups = root / "sys/fs/cgroup"
        for folder in (self.run / "containers", root / "proc", root / "run/systemd/system/docker-.scope.d"):
            folder.mkdir(parents=True)
        self.limit = LIMIT
        self.available(1800)
        self.cgroup("init.scope", 10)
        (self.cgroups / "cgroup.controllers").touch()
        self.cgroup("user.slice", 5)
        self.cgroup("system.slice", 400)
        self.cgroup("system.slice/docker.service", 90)
        self.cgroup("system.slice/agent.service", 20)
        self.cgroup("system.slice/my_agent\\x2da.service", 1)
        self.cgroup(f"system.slice/docker-{OTHER}.scope", 20)
        (self.run / "containers" / CONTAINER).touch()
        fake(self.programs, "sleep", "exit 1")  # ends --follow
        fake(self.programs, "curl", "exit ${FAKE_CURL:-0}")

    @property
    def limit(self) -> int:
        """What memory.env has now."""
        return int((self.run / "memory.env").read_text().partition("=")[2])

    @limit.setter
    def limit(self, size: int) -> None:
        (self.run / "memory.env").write_text(f"AVAILABLE_MEMORY_FOR_DASK={size}\n")

    def available(self, size: int, total: int = TOTAL) -> None:
        text = f"MemTotal: {total // 1024} kB\nMemFree: 1 kB\nMemAvailable: {size * 1024} kB\nBuffers: 0 kB\n"
        (self.root / "proc/meminfo").write_text(text)

    def cgroup(self, name: str, size: int, maximum: str = "max") -> None:
        folder = self.cgroups / name
        folder.mkdir(parents=True, exist_ok=True)
        # A part in each of two lines, beside what the kernel can reclaim.
        lines = (
            f"anon {(size - 1) * MIB}\nfile 99999999999\nkernel 99999999999\nshmem {MIB}\n"
            "inactive_anon 99999999999\nslab_reclaimable 99999999999\nslab_unreclaimable 0\nslab 9999999999\n"
        )
        (folder / "memory.stat").write_text(lines)
        (folder / "memory.max").write_text(f"{maximum}\n")

    def container(self, size: int, maximum: int | None = None) -> None:
        """Let Dask's container hold so much; what is available must be set for itself."""
        self.cgroup(f"system.slice/docker-{CONTAINER}.scope", size, str(maximum or self.limit))

    def compare(self, *arguments: str, **environment: str) -> str:
        argv = [*self.shell, str(PROGRAM), *arguments]
        done = subprocess.run(
            on_full_run(self.root, argv) if self.run_is_full else argv,
            env={
                "PATH": f"{self.programs}:{os.environ['PATH']}",
                "COMPARE_MEMORY_ROOT": str(self.root),
                **environment,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == (1 if "--follow" in arguments else 0), done.stdout
        return done.stdout

    def follow(self, times: int = 1, **environment: str) -> str:
        (self.run / "follows").touch()
        return "".join(self.compare("--follow", **environment) for _ in range(times))

    @property
    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run / "public/memory.json").read_text())
        return found

    @property
    def notice(self) -> str:
        return (self.run / "memory-notice").read_text()


@pytest.fixture(params=SHELLS)
def machine(tmp_path: Path, request: pytest.FixtureRequest) -> Machine:
    found = Machine(tmp_path, request.param)
    assert found.compare("--start") == ""
    return found


def test_a_system_that_has_not_outgrown_its_reserve_is_no_news(machine: Machine) -> None:
    machine.container(500)
    machine.available(1300)
    assert machine.compare() == ""
    machine.available(1270)
    assert machine.compare() == ""
    assert machine.record == {
        "limit_at_start": LIMIT,
        "limit": LIMIT,
        "reserve": RESERVE,
        "growth": 30 * MIB,
        "excess": -2 * MIB,
        "grown": [{"cgroup": "kernel and others", "bytes": 30 * MIB}],
    }
    assert not (machine.run / "memory-notice").exists()


def test_what_has_ended_does_not_hide_growth(machine: Machine) -> None:
    machine.container(500)
    machine.available(1300 - 84)
    shutil.rmtree(machine.root / "sys/fs/cgroup/system.slice/agent.service")
    machine.compare()
    (grown,) = machine.record["grown"]
    assert grown == {"cgroup": "kernel and others", "bytes": (84 + 20) * MIB}


def test_growth_is_reported_with_who_has_grown(machine: Machine) -> None:
    machine.container(500)
    machine.available(1300 - 84)
    machine.cgroup("system.slice/agent.service", 71)
    machine.cgroup("system.slice/my_agent\\x2da.service", 13)
    machine.cgroup(f"system.slice/docker-{OTHER}.scope", 28)
    machine.cgroup("user.slice/user-0.slice", 1000)  # its parent counts
    machine.cgroup("system.slice/new.service", 10)
    machine.cgroup("init.scope", 1)
    line = (
        "the system uses 84 MiB more than when Dask started, 52 MiB more than its reserve of 32 MiB: "
        "agent.service +51 MiB, my_agent-a.service +12 MiB, new.service +10 MiB, "
        "container beefbeefbeef +8 MiB, kernel and others +12 MiB"
    )
    first, sorted_line = machine.compare(), line.partition(": ")
    assert first.startswith(f"<4>compare-memory: {sorted_line[0]}: ")
    assert sorted(first.strip().partition(": the")[2].partition(": ")[2].split(", ")) == sorted(
        sorted_line[2].split(", ")
    )
    assert machine.notice == first.removeprefix("<4>compare-memory: ")
    assert machine.record["grown"][0] == {"cgroup": "agent.service", "bytes": 51 * MIB}


@pytest.mark.needs("unshare")
def test_growth_is_reported_though_run_is_full(machine: Machine) -> None:
    machine.container(500)
    machine.available(1300 - 84)
    machine.run_is_full = True
    assert machine.compare().startswith("<4>compare-memory: the system uses 84 MiB more than ")
    assert not list(machine.run.rglob("*.[0-9]*"))


def test_the_journal_gets_a_line_for_each_step_and_one_at_the_end(machine: Machine) -> None:
    machine.container(500)
    reports = []
    for excess in (1, 32, 33, 40, 54, 60, 20, 11, 5, 33):
        machine.available(1300 - 32 - excess)
        machine.cgroup("system.slice/agent.service", 20 + 32 + excess)
        reports.append(machine.compare()[:3])
        noticed = excess > 32 or excess == 20
        assert (machine.run / "memory-notice").exists() is noticed
        if noticed:
            assert f" {excess} MiB more than its reserve" in machine.notice
    assert reports == ["", "", "<4>", "", "<4>", "", "", "<5>", "", "<4>"]


def test_on_a_large_machine_growth_of_one_percent_is_no_news(machine: Machine) -> None:
    """The nanny leaves 5 % of the limit free, and a large machine may have no reserve."""
    machine.container(500)
    for excess, reported in ((320, False), (330, True)):
        machine.available(1300 - 32 - excess, total=32 * GIB)
        assert (machine.compare() != "") is reported
        assert (machine.run / "memory-notice").exists() is reported


def test_a_start_begins_again(machine: Machine) -> None:
    machine.container(500)
    machine.available(1200)
    machine.compare()
    machine.container(1)
    assert machine.compare("--start") == ""
    assert sorted(path.name for path in machine.run.iterdir()) == [
        *("containers", "memory-at-start", "memory.env", "public")
    ]
    assert list((machine.run / "public").iterdir()) == []
    (machine.run / "memory.env").unlink()
    assert machine.compare("--start") == ""
    assert machine.compare() == ""
    assert not (machine.run / "memory-at-start").exists()


def test_where_dask_service_starts_nothing_all_containers_are_dasks(machine: Machine) -> None:
    shutil.rmtree(machine.run / "containers")
    machine.compare("--start")
    machine.container(500)
    machine.cgroup(f"system.slice/docker-{'d' * 64}.scope", 300)
    machine.available(1800 - 300 - 500)
    machine.compare()
    assert machine.record["growth"] == 0
    assert machine.record["grown"] == []


@pytest.mark.parametrize("whose", ["dask.service", "its own"])
def test_a_container_that_ran_before_dask_is_the_systems(machine: Machine, whose: str) -> None:
    """Such as an agent's: what it held at the start is no growth, and its growth is not Dask's."""
    shutil.rmtree(machine.run / "containers")
    machine.compare("--start")
    if whose == "dask.service":
        (machine.run / "containers").mkdir()
        (machine.run / "containers" / CONTAINER).touch()
    machine.container(500)
    machine.cgroup(f"system.slice/docker-{OTHER}.scope", 60)
    machine.available(1800 - 40 - 500)
    machine.compare()
    assert machine.record["growth"] == 40 * MIB
    assert machine.record["grown"] == [{"cgroup": "container beefbeefbeef", "bytes": 40 * MIB}]


def test_with_another_cgroup_parent_nothing_is_compared(machine: Machine) -> None:
    """Else what Dask holds would be reported as growth of the system."""
    machine.cgroup(f"dask.slice/docker-{CONTAINER}.scope", 700, str(LIMIT))
    machine.cgroup("dask.slice", 700)
    machine.available(1100)
    assert machine.compare() == ""
    assert machine.follow() == ""


@pytest.mark.parametrize("layout", ["version 1", "cgroupfs"])
def test_where_dasks_containers_are_not_found_nothing_is_compared(machine: Machine, layout: str) -> None:
    """Else all that Dask uses would be reported as growth of the system."""
    if layout == "version 1":
        (machine.cgroups / "cgroup.controllers").unlink()
    else:
        (machine.root / "etc/docker").mkdir(parents=True)
        settings = '{"exec-opts": ["native.cgroupdriver=cgroupfs"]}'
        (machine.root / "etc/docker/daemon.json").write_text(settings)
    machine.compare("--start")
    machine.available(1000)
    assert machine.compare() == ""
    assert not (machine.run / "memory-notice").exists()


def test_the_end_is_reported_on_a_large_machine_without_a_reserve(machine: Machine) -> None:
    """Something small always starts after Dask, and stays."""
    meminfo = machine.root / "proc/meminfo"
    machine.limit = AVAILABLE
    machine.container(0)
    reports: list[str] = []
    for available in (1800, 1100, 1400, 1500):
        meminfo.write_text(f"MemTotal: {64 << 20} kB\nMemAvailable: {available * 1024} kB\n")
        reports.append(machine.compare(*(() if reports else ("--start",)))[:3])
    assert reports == ["", "<4>", "", "<5>"]
    assert not (machine.run / "memory-notice").exists()


def test_the_limit_follows_down_in_whole_steps_and_everywhere(machine: Machine) -> None:
    drop_in = machine.root / "run/systemd/system/docker-.scope.d/10-dask.conf"
    drop_in.write_text("")
    machine.container(500)
    machine.available(1800 - 500 - 32 - 10)
    assert machine.follow().startswith("<5>compare-memory: the limit of Dask is ")
    expected = (LIMIT - STEP) // PAGE * PAGE
    assert machine.limit == expected
    assert drop_in.read_text() == f"[Scope]\nMemoryMax={expected}\nMemorySwapMax=0\n"
    (call,) = calls(machine.programs, "curl")
    assert f'{{"Memory": {expected}, "MemorySwap": {expected}}}' in call
    assert call.endswith(f"http://localhost/containers/{CONTAINER}/update")
    machine.container(500)
    assert machine.follow() == ""
    machine.available(1800 - 500 - 32 - 40)
    machine.follow()
    assert machine.limit == (LIMIT - 2 * STEP) // PAGE * PAGE
    machine.container(500)
    machine.compare()
    assert "; so Dask's limit is 1727 MiB, not 1768 MiB" in machine.notice
    assert machine.record["limit"] == machine.limit


def test_on_a_large_machine_the_limit_follows_from_one_percent_on(machine: Machine) -> None:
    """It may have no memory.reserve: a few MiB are no reason to take 1 % of it from Dask."""
    total, step = 32 * GIB, 32 * GIB // 100
    machine.container(500)
    machine.available(1300 - 32 - 290, total=total)
    assert machine.follow() == ""
    machine.available(1300 - 32 - 300, total=total)
    assert "the limit of Dask is " in machine.follow()
    assert machine.limit == (LIMIT - step) // PAGE * PAGE
    machine.container(500)
    machine.available(1300 - 32 - 10, total=total)
    assert machine.follow(20) == "", "it goes up when all of it is there again"
    machine.available(1300 - 32 + 5, total=total)
    machine.compare()
    assert "; so Dask's limit is " in machine.notice
    assert "than its reserve" not in machine.notice
    machine.limit = LIMIT
    machine.container(500)
    machine.available(1300 - 32, total=total)
    machine.compare()
    assert not (machine.run / "memory-notice").exists()


def test_the_limit_leaves_room_above_what_the_container_holds(machine: Machine) -> None:
    """Its nanny would end a worker at 95 % of it."""
    machine.container(1360)
    machine.available(1800 - 1360 - 32 - 100)
    machine.follow()
    assert machine.limit == 1700 * MIB
    machine.container(1300)
    machine.available(1800 - 1300 - 32 - 100)
    machine.follow()
    assert machine.limit == (LIMIT - 5 * STEP) // PAGE * PAGE


def test_the_limit_is_never_less_than_half(machine: Machine) -> None:
    machine.container(100)
    machine.available(100)
    machine.follow()
    assert machine.limit == LIMIT // 2


def test_a_container_that_holds_too_much_does_not_raise_the_limit(machine: Machine) -> None:
    machine.limit = lowered = LIMIT - 4 * STEP // PAGE * PAGE
    machine.container(1600)
    machine.available(1800 - 1600 - 32 - 2 * STEP // MIB - 60)
    assert machine.follow(20) == ""
    assert machine.limit == lowered


def test_the_limit_follows_up_when_there_was_room_for_half_a_minute(machine: Machine) -> None:
    fake(machine.programs, "sleep", '[ "$(wc -l <"$0.calls")" -lt "$FAKE_SLEEPS" ]')
    machine.limit = lowered = LIMIT - 4 * STEP // PAGE * PAGE
    machine.container(500)
    machine.available(1290)
    assert machine.follow(FAKE_SLEEPS="14") == ""
    assert machine.limit == lowered
    (machine.programs / "sleep.calls").unlink()
    assert f"the limit of Dask is {LIMIT} bytes" in machine.follow(FAKE_SLEEPS="15")
    assert machine.limit == LIMIT


def test_what_does_not_follow_is_left_alone(machine: Machine) -> None:
    machine.available(1200)
    assert machine.follow() == "", "there is no container yet"
    machine.container(500, maximum=LIMIT // 2)
    machine.available(700)
    assert machine.follow() == "", "its limit is its own"
    machine.container(500)
    (machine.run / "follows").unlink()
    assert machine.compare("--follow") == "", "Dask would not know"
    assert calls(machine.programs, "curl") == []
    assert machine.limit == LIMIT


def test_a_container_that_starts_later_follows_too(machine: Machine) -> None:
    """Compose makes all containers at once, but may start one after another has ended."""
    machine.container(100)
    machine.available(1800 - 100 - 32 - 40)
    machine.follow()
    lowered, late = machine.limit, "d00d" * 16
    machine.container(100)
    (machine.run / "containers" / late).touch()
    machine.cgroup(f"system.slice/docker-{late}.scope", 100, str(LIMIT))
    machine.available(1800 - 200 - 32 - 40)
    assert f"the limit of Dask is {lowered} bytes" in machine.follow()
    assert any(f'"Memory": {lowered},' in call and late in call for call in calls(machine.programs, "curl"))
    machine.cgroup(f"system.slice/docker-{late}.scope", 100, str(lowered))
    assert machine.follow() == ""


def test_a_change_that_fails_at_the_second_container_is_completed(machine: Machine) -> None:
    second = "d00d" * 16
    update = f"""
        all="$*" && id=${{all##*/containers/}} && id=${{id%/update}} && size=${{all#*\\"Memory\\": }}
        [ "$id" != {second} ] || [ "$(wc -l <"$0.calls")" -gt 4 ] || exit 7
        echo "${{size%%,*}}" >"$COMPARE_MEMORY_ROOT/sys/fs/cgroup/system.slice/docker-$id.scope/memory.max"
    """
    fake(machine.programs, "curl", update)
    fake(machine.programs, "sleep", '[ "$(wc -l <"$0.calls")" -lt 3 ]')
    machine.container(100)
    (machine.run / "containers" / second).touch()
    machine.cgroup(f"system.slice/docker-{second}.scope", 100, str(LIMIT))
    machine.available(1800 - 200 - 32 - 40)
    machine.follow()
    assert len(calls(machine.programs, "curl")) == 6
    scopes = machine.cgroups.glob("system.slice/docker-[cd]0*/memory.max")
    assert machine.limit < LIMIT
    assert [int(scope.read_text()) for scope in scopes] == [machine.limit, machine.limit]


def test_a_limit_that_one_container_refuses_for_long_is_remembered_once(machine: Machine) -> None:
    fake(machine.programs, "curl", f"case $* in *{CONTAINER}*) ;; *) exit 7 ;; esac")
    (machine.run / "follows").touch()
    late = "d00d" * 16
    (machine.run / "containers" / late).touch()
    machine.container(100)
    machine.cgroup(f"system.slice/docker-{late}.scope", 100, str(LIMIT))
    machine.available(1800 - 200 - 32 - 40)
    fake(machine.programs, "sleep", '[ $(wc -l <"$0.calls") -lt 20 ]')
    done = subprocess.run(
        [*machine.shell, "-x", str(PROGRAM), "--follow"],
        env={
            "PATH": f"{machine.programs}:{os.environ['PATH']}",
            "COMPARE_MEMORY_ROOT": str(machine.root),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    found = [line for line in done.stderr.splitlines() if line.startswith("+ changed=") and CONTAINER in line]
    assert found
    assert {line.count(CONTAINER) for line in found} == {1}


def test_a_full_run_keeps_what_was_there(machine: Machine) -> None:
    """Else the limit would follow no more, and shells would have no variable."""
    update = f"""
        size=${{*#*\\"Memory\\": }}
        cd "$COMPARE_MEMORY_ROOT/sys/fs/cgroup/system.slice"
        echo "${{size%%,*}}" >docker-{CONTAINER}.scope/memory.max
    """
    fake(machine.programs, "curl", update)
    fake(machine.programs, "mv", '[ "$(wc -l <"$0.calls")" -gt "$FAKE_FULL" ] && exec /bin/mv "$@"; exit 1')
    fake(machine.programs, "sleep", '[ "$(wc -l <"$0.calls")" -lt 3 ]')
    drop_in = machine.root / "run/systemd/system/docker-.scope.d/10-dask.conf"
    drop_in.write_text("before")
    machine.container(500)
    machine.available(1200)
    log = machine.follow(FAKE_FULL="9")
    assert log.startswith("<3>compare-memory: the limit of Dask could not be changed to ")
    assert (machine.limit, drop_in.read_text()) == (LIMIT, "before")
    assert sorted(path.name for path in machine.run.iterdir() if "." in path.name) == ["memory.env"]
    for name in ("mv", "sleep"):
        (machine.programs / f"{name}.calls").unlink()
    machine.container(500)
    machine.follow(FAKE_FULL="1")
    assert machine.limit == (LIMIT - 4 * STEP) // PAGE * PAGE
    assert drop_in.read_text() == f"[Scope]\nMemoryMax={machine.limit}\nMemorySwapMax=0\n"


def test_a_dask_without_a_container_is_not_the_systems_growth(machine: Machine) -> None:
    """User data may start `dask worker` by itself, and with role none there may be no Dask."""
    machine.container(500)
    machine.available(1000)
    assert machine.compare().startswith("<4>")
    shutil.rmtree(machine.run / "containers")
    shutil.rmtree(machine.cgroups / f"system.slice/docker-{CONTAINER}.scope")
    assert machine.compare() == ""
    assert not (machine.run / "memory-notice").exists()
    assert not (machine.run / "public/memory.json").exists()


def test_a_docker_that_does_not_answer_is_reported_once_and_asked_again(machine: Machine) -> None:
    fake(machine.programs, "sleep", '[ "$(wc -l <"$0.calls")" -lt 3 ]')
    machine.container(500)
    machine.available(1200)
    assert machine.follow(FAKE_CURL="7").count("<3>") == 1
    assert len(calls(machine.programs, "curl")) == 3
    assert machine.limit == LIMIT
