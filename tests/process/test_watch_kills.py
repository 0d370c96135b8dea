"""watch-kills outside a VM: real shells, the kernel's own lines, and a folder that it takes for /."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ami_builder.system import resources
from tests.fake_programs import fake
from tests.full_run import on_full_run

PROGRAM = resources.packer_dir() / "guest/usr/local/sbin/watch-kills"
SHELLS = [found for name in ("dash", "busybox") if (found := shutil.which(name))]
ID = "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"
SCOPE = f"/system.slice/docker-{ID}.scope"
MIB = 1 << 20


def summary(pid: int, task: str, cgroup: str = SCOPE, full: str = "") -> str:
    """The line of mm/oom_kill.c, dump_oom_summary; `full` is the cgroup at its limit."""
    constraint = "CONSTRAINT_MEMCG" if full else "CONSTRAINT_NONE"
    memory = f"oom_memcg={full}" if full else "global_oom"
    return (
        f"<6>[   71.106231] oom-kill:constraint={constraint},nodemask=(null),cpuset=docker-{ID}.scope,"
        f"mems_allowed=0,{memory},task_memcg={cgroup},task={task},pid={pid},uid=0"
    )


def kill(
    pid: int, task: str, message: str = "Memory cgroup out of memory", anonymous: int = 1571 * 1024
) -> str:
    """The line of mm/oom_kill.c, __oom_kill_process; sizes are kB."""
    return (
        f"<3>[   71.106281] {message}: Killed process {pid} ({task}) total-vm:2290112kB,"
        f" anon-rss:{anonymous}kB, file-rss:4444kB, shmem-rss:0kB, UID:0 pgtables:3508kB oom_score_adj:0"
    )


class Stderr:
    """A pipe with somebody who reads it, as Docker does."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path, self.end = path, os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def read_text(self) -> str:
        """Return what was written since the last call."""
        try:
            return os.read(self.end, 1 << 16).decode()
        except BlockingIOError:
            return ""


class Machine:
    """A folder that watch-kills takes for /."""

    def __init__(self, root: Path, shell: str) -> None:
        self.root, self.shell = root, shell
        self.state = root / "run/dask"
        (root / "proc").mkdir()
        (root / "proc/stat").write_text("cpu  1 2 3\nctxt 5\nbtime 1795939690\nprocesses 7\n")
        (root / "proc/uptime").write_text("71.13 120.05\n")

    def container(self, arguments: str = '["worker"]', limit: str = str(1638 * MIB)) -> Stderr:
        """Add a container, and return what its first process has as its stderr."""
        settings = self.root / f"var/lib/docker/containers/{ID}/config.v2.json"
        settings.parent.mkdir(parents=True)
        settings.write_text(
            f'{{"ID":"{ID}","Args":{arguments},"Config":{{}},"Name":"/dask-worker-1","Driver":"x"}}'
        )
        self.cgroup(SCOPE, limit, "40\n41\n")
        for process, inside in ((40, 9), (41, 1)):
            (self.root / f"proc/{process}/fd").mkdir(parents=True)
            (self.root / f"proc/{process}/status").write_text(f"Name:\tx\nNSpid:\t{process}\t{inside}\n")
        return Stderr(self.root / "proc/41/fd/2")

    def cgroup(self, path: str, limit: str, processes: str = "") -> None:
        folder = self.root / f"sys/fs/cgroup{path}"
        folder.mkdir(parents=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "cgroup.procs").write_text(processes)

    def watch(self, *lines: str, more: str = ":", full: bool = False) -> list[str]:
        """Run until the kernel has logged these lines and `more`, a script, has ended; return the log.

        With `full`, /run is full.
        """
        (self.root / "lines").write_text("".join(f"{line}\n" for line in lines))
        fake(self.root / "programs", "dmesg", f'cat "$WATCH_KILLS_ROOT/lines"; {more}')
        environment = {
            "PATH": f"{self.root}/programs:{os.environ['PATH']}",
            "WATCH_KILLS_ROOT": str(self.root),
        }
        argv = [self.shell, *(["sh"] if self.shell.endswith("busybox") else []), str(PROGRAM)]
        argv = on_full_run(self.root, argv) if full else argv
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, timeout=120)
        assert done.stderr == ""
        assert done.returncode == 1, "systemd starts it again"
        *log, last = done.stdout.splitlines()
        assert last == "<3>watch-kills: dmesg has ended"
        return log

    def kills(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.state / "kills").read_text().splitlines()]


@pytest.fixture(params=SHELLS, ids=os.path.basename)
def machine(tmp_path: Path, request: pytest.FixtureRequest) -> Machine:
    return Machine(tmp_path, request.param)


def test_a_kill_at_a_containers_limit(machine: Machine) -> None:
    stderr = machine.container()
    text = (
        "the kernel killed python (pid 812, which held 1571 MiB) of container dask-worker-1"
        " at its limit of 1638 MiB"
    )
    log = machine.watch("<6>[   70.0] another line", summary(812, "python", full=SCOPE), kill(812, "python"))
    assert log == [f"<4>watch-kills: {text}"]
    assert stderr.read_text() == f"{text}\n"
    (found,) = machine.kills()
    assert found == {
        "number": 1,
        "time": 1795939761.13,
        "pid": 812,
        "process": "python",
        "held": 1571 * MIB,
        "cgroup": SCOPE,
        "container": "dask-worker-1",
        "cause": "own",
        "limit": 1638 * MIB,
        "text": text,
    }
    notice = (machine.state / "kill-notice").read_text()
    assert notice == f"processes that the kernel has killed since the boot: 1; the last: {text}\n"


def test_the_container_that_reports_itself_is_not_told(machine: Machine) -> None:
    stderr = machine.container('["worker","a:1","--preload-nanny","/run/dask/preload/worker_deaths.py"]')
    assert len(machine.watch(summary(812, "python", full=SCOPE), kill(812, "python"))) == 1
    assert stderr.read_text() == ""


def test_the_end_of_a_nanny_or_scheduler_is_in_the_containers_log(machine: Machine) -> None:
    """Nobody in the container is left to report it."""
    stderr = machine.container('["worker","a:1","--preload-nanny","/run/dask/preload/worker_deaths.py"]')
    machine.watch(summary(812, "dask", full=SCOPE), kill(812, "dask"))
    assert stderr.read_text().startswith("the kernel killed dask (pid 812,")


def test_a_kill_for_the_whole_machine(machine: Machine) -> None:
    machine.container()
    unit = "/system.slice/amazon-ssm-agent.service"
    log = machine.watch(
        summary(812, "python"),
        kill(812, "python", "Out of memory"),
        summary(500, "ssm-agent", unit),
        kill(500, "ssm-agent", "Out of memory", 61 * 1024),
    )
    why = "because the machine had no memory left"
    python, agent = "python (pid 812, which held 1571 MiB)", "ssm-agent (pid 500, which held 61 MiB)"
    assert log == [
        f"<4>watch-kills: the kernel killed {python} of container dask-worker-1 {why}",
        f"<3>watch-kills: the kernel killed {agent} of amazon-ssm-agent.service {why}",
    ]
    assert [(each["cause"], each["limit"], each["container"]) for each in machine.kills()] == [
        ("machine", None, "dask-worker-1"),
        ("machine", None, ""),
    ]


def test_a_kill_for_numa_nodes(machine: Machine) -> None:
    """Compose's `cpuset`, or a program's own policy: other nodes may have memory."""
    line = summary(812, "python").replace("CONSTRAINT_NONE", "CONSTRAINT_CPUSET").replace("global_oom,", "")
    (first, second) = machine.watch(
        line, kill(812, "python", "Out of memory"), kill(813, "python", "Out of memory")
    )
    assert first.endswith(" because its NUMA nodes had no memory left")
    assert second.endswith(" because the machine had no memory left"), "its summary was lost"


def test_a_full_run_hides_no_kill(machine: Machine) -> None:
    (machine.state / "kills").mkdir(parents=True)
    stderr = machine.container()
    lines = [summary(812, "python", full=SCOPE), kill(812, "python")]
    lines += [summary(813, "python", full=SCOPE), kill(813, "python")]
    assert [" (pid 81" in line for line in machine.watch(*lines)] == [True, True]
    assert len(stderr.read_text().splitlines()) == 2


def test_a_kill_at_the_limit_of_an_outer_cgroup(machine: Machine) -> None:
    machine.container()
    machine.cgroup("/system.slice/outer.slice", str(100 * MIB))
    (line,) = machine.watch(summary(812, "python", full="/system.slice/outer.slice"), kill(812, "python"))
    assert line.endswith("of container dask-worker-1 at the limit of 100 MiB of outer.slice")


def test_two_kills_that_end_a_container(machine: Machine) -> None:
    """The kernel may kill the nanny a moment after the worker, and then the container has ended."""
    machine.container()
    later = machine.root / "later"
    later.write_text(f"{summary(700, 'dask', full=SCOPE)}\n{kill(700, 'dask')}\n")
    log = machine.watch(
        summary(812, "python", full=SCOPE),
        kill(812, "python"),
        more=f"""until [ -s {machine.state}/kills ]; do sleep 0.05; done
            rm -r {machine.root}/sys/fs/cgroup{SCOPE} {machine.root}/var/lib/docker
            cat {later}""",
    )
    assert [line.partition("MiB) of ")[2] for line in log] == [
        "container dask-worker-1 at its limit of 1638 MiB"
    ] * 2


def test_without_the_summary_the_process_is_asked(machine: Machine) -> None:
    """The kernel prints ten summaries in five seconds, and each kill."""
    machine.container()
    (machine.root / "proc/813").mkdir()
    (machine.root / "proc/813/cgroup").write_text(f"0::{SCOPE}\n")
    log = machine.watch(summary(812, "python", full=SCOPE), kill(813, "dask"), kill(814, "dask"))
    assert [line.partition("MiB) of ")[2] for line in log] == [
        "container dask-worker-1 at its limit of 1638 MiB",
        "an unknown unit at its limit",
    ]


def test_an_unknown_container_goes_by_its_id(machine: Machine) -> None:
    (line,) = machine.watch(summary(812, "python", full=SCOPE), kill(812, "python"))
    assert line.endswith(f"of container {ID[:12]} at its limit")


def test_a_process_can_have_any_name(machine: Machine) -> None:
    machine.container()
    name = '") total-vm:"\\n'
    (line,) = machine.watch(summary(812, name, full=SCOPE), kill(812, name))
    assert "killed ?? total-vm:??n (pid 812, which held 1571 MiB)" in line
    assert machine.kills()[0]["process"] == "?? total-vm:??n"


def test_a_name_of_several_lines_hides_no_kill(machine: Machine) -> None:
    """The kernel escapes a newline, and dmesg decodes it."""
    machine.container()
    (line,) = machine.watch(summary(812, "a\nb\nc", full=SCOPE), kill(812, "a\nb\nc"))
    assert "killed a?b?c (pid 812, which held 1571 MiB) of container dask-worker-1 at its limit" in line


def test_a_name_cannot_look_like_the_next_message(machine: Machine) -> None:
    """Dmesg indents what comes after a newline."""
    machine.container()
    name = "x\n            <1"
    (line,) = machine.watch(summary(812, name, full=SCOPE), kill(812, name))
    assert "killed x?" in line
    assert "of container dask-worker-1 at its limit" in line


def test_a_worker_that_names_itself_is_no_nanny(machine: Machine) -> None:
    """With setproctitle its name is `dask worker [tcp://...`; the kernel keeps 15 characters."""
    stderr = machine.container('["worker","--preload-nanny","/run/dask/preload/worker_deaths.py"]')
    machine.watch(summary(812, "dask worker [tc", full=SCOPE), kill(812, "dask worker [tc"))
    assert stderr.read_text() == "", "its nanny writes there"
    machine.watch(summary(700, "dask", full=SCOPE), kill(700, "dask"))
    assert "killed dask (pid 700" in stderr.read_text()


def test_a_base_may_keep_dockers_files_elsewhere(machine: Machine) -> None:
    machine.container()
    (machine.root / "data").mkdir()
    (machine.root / "var/lib/docker").rename(machine.root / "data/docker")
    settings = machine.root / "etc/docker/daemon.json"
    settings.parent.mkdir(parents=True)
    for text in (
        '{"data-root": "/data/docker"}',
        '{\n  "bip": "10.1.0.1/24",\n  "data-root" : "/data/docker",\n}\n',
    ):
        settings.write_text(text)
        (line,) = machine.watch(summary(812, "python", full=SCOPE), kill(812, "python"))
        assert "of container dask-worker-1 at its limit" in line


def test_the_records_are_bounded_and_outlive_the_program(machine: Machine) -> None:
    machine.watch(*(kill(pid, "dask") for pid in range(1, 151)))
    machine.watch(*(kill(pid, "dask") for pid in range(151, 301)))
    kills = machine.kills()
    assert 100 <= len(kills) <= 200
    assert [each["number"] for each in kills] == list(range(301 - len(kills), 301))
    assert (
        (machine.state / "kill-notice")
        .read_text()
        .startswith("processes that the kernel has killed since the boot: 300;")
    )


def test_a_full_pipe_does_not_hang_it(machine: Machine) -> None:
    stderr = machine.container()
    with suppress(BlockingIOError):
        while True:
            os.write(stderr.end, b"x" * 4096)
    assert len(machine.watch(summary(812, "python", full=SCOPE), kill(812, "python"))) == 1
    os.close(stderr.end)
    assert len(machine.watch(summary(812, "python", full=SCOPE), kill(812, "python"))) == 1, "nobody reads"


def test_a_file_is_not_written_to(machine: Machine) -> None:
    """Root may write to a file that the container's process may only read."""
    stderr = machine.container()
    stderr.path.unlink()
    stderr.path.write_text("somebody's\n")
    assert len(machine.watch(summary(812, "python", full=SCOPE), kill(812, "python"))) == 1
    assert stderr.path.read_text() == "somebody's\n"


@pytest.mark.parametrize("shell", SHELLS, ids=os.path.basename)
def test_reports_of_containers_are_harmless_lines(shell: str) -> None:
    """A report may be hostile: lines of other priorities, escape sequences, and more than anybody reads."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    os.write(write, b"Worker a: ended by its nanny\n<0>\x1b[31mpanic \xc3\xa4\n\n" + b"x" * 50000)
    os.set_blocking(read, False)
    argv = [shell, *(["sh"] if shell.endswith("busybox") else []), str(PROGRAM.with_name("log-reports"))]
    done = subprocess.run(argv, stdin=read, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == [
        "<4>a container reports: Worker a: ended by its nanny",
        "<4>a container reports: <0>?[31mpanic ??",
        f"<4>a container reports: {'x' * 1000}",
    ]
    os.close(read)
    os.close(write)


@pytest.mark.needs("unshare")
def test_a_record_that_a_full_run_cut_off_spoils_no_other(machine: Machine) -> None:
    machine.state.mkdir(parents=True)
    (machine.state / "kills").write_text('{"number": 7, "x": "' + "x" * 4000 + '"}\n')
    filler = machine.root / "run/filler"
    later = f'sleep 1; rm {filler}; echo "{kill(9, "c")}"; touch {filler}'
    log = machine.watch(kill(8, "b"), more=later, full=True)
    assert len(log) == 2
    first, torn, last = (machine.state / "kills").read_text().splitlines()
    assert json.loads(first)["number"] == 7
    assert torn.startswith('{"number": 8')
    assert json.loads(last)["pid"] == 9
