"""worker_deaths.py in real nannies; their cgroup is a folder."""

from __future__ import annotations

import json
import os
import runpy
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from distributed import Client, KilledWorker

from ami_builder.cli import app as cli
from ami_builder.system import processes, resources
from tests import real_dask

if TYPE_CHECKING:
    from collections.abc import Iterator

PRELOADS = resources.packer_dir() / "guest/usr/local/lib/dask/preload"
LIMIT, CONTAINER = 400_000_000, 500_000_000


def sleep(_: int) -> None:
    import time

    time.sleep(300)


def leak() -> None:
    import time

    held = []
    while True:
        held.append(b"\1" * 10_000_000)
        time.sleep(0.05)


def count(cgroup: Path, *, kills: int, limit_reached: int) -> None:
    """Let a cgroup count so many kills and times that its limit was reached."""
    text = f"low 0\nhigh 0\nmax 99\noom {limit_reached}\noom_kill {kills}\noom_group_kill 0\n"
    (cgroup / "memory.events.new").write_text(text)
    (cgroup / "memory.events.new").rename(cgroup / "memory.events")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A scheduler, and a worker with a nanny that reports."""

    address: str
    client: Client
    cgroup: Path
    log: Path
    reports: int
    """The end of the pipe to the machine's journal."""

    def running(self) -> tuple[str, int]:
        """Wait for the worker, and return its address and pid."""
        self.client.wait_for_workers(1, timeout=120)
        ((address, pid),) = self.client.run(os.getpid).items()
        time.sleep(0.5)  # the nanny knows the worker's address later than the scheduler
        return address, pid

    def next(self, number: int) -> dict[str, Any]:
        """Wait for the event of this number, and return it."""

        def look() -> dict[str, Any] | None:
            events = self.client.get_events("worker-deaths")
            assert len(events) <= number
            return events[-1][1] if len(events) == number else None

        return processes.wait_until(look, what=f"event {number}", timeout=120, interval=0.1)

    def lines(self) -> list[str]:
        """The lines of the nanny's log, without the time."""
        texts = [line.partition(" - WARNING - ")[2] for line in self.log.read_text().splitlines()]
        return [
            text
            for text in texts
            if text.startswith(("Worker tcp://127.0.0.1:", "The kernel")) and "): " in text
        ]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cgroup, log, reports = tmp_path / "cgroup", tmp_path / "worker.log", tmp_path / "reports"
    cgroup.mkdir()
    (cgroup / "memory.max").write_text(f"{CONTAINER}\n")
    count(cgroup, kills=3, limit_reached=4)
    os.mkfifo(reports)
    end = os.open(reports, os.O_RDWR | os.O_NONBLOCK)
    flags = ("--name", "alice", "--nthreads", "1", "--memory-limit", str(LIMIT), "--no-dashboard")
    preload = ("--preload-nanny", str(PRELOADS / "worker_deaths.py"))
    environment = {"WORKER_DEATHS_CGROUP": str(cgroup), "WORKER_DEATHS_REPORTS": str(reports)}
    with real_dask.scheduler(tmp_path) as address:
        arguments = ("worker", address, *flags, *preload, "--local-directory", str(tmp_path / "spill"))
        with real_dask.dask(*arguments, log=log, **environment), Client(address) as client:
            yield Cluster(address=address, client=client, cgroup=cgroup, log=log, reports=end)
    os.close(end)


def test_every_end_has_its_reason(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    # Somebody kills it, while it runs one task and another waits.
    worker, pid = cluster.running()
    futures = cluster.client.map(sleep, range(2), key=["running", "wait\ning"])
    processes.wait_until(lambda: cluster.client.processing()[worker], what="the tasks", timeout=60)
    os.kill(pid, signal.SIGKILL)
    found.append(cluster.next(1))
    assert (found[0]["worker"], found[0]["pid"], found[0]["name"]) == (worker, pid, "alice")
    assert (found[0]["by"], found[0]["exitcode"], found[0]["limit"]) == ("signal", -9, None)
    assert (set(found[0]["tasks"]), found[0]["task-count"]) == ({"running", "wait\ning"}, 2)
    for future in futures:
        future.cancel()

    # The kernel kills it, because the machine has no memory left.
    worker, pid = cluster.running()
    count(cluster.cgroup, kills=4, limit_reached=4)
    os.kill(pid, signal.SIGKILL)
    found.append(cluster.next(2))
    assert (found[1]["by"], found[1]["worker"], found[1]["limit"]) == ("kernel-machine", worker, None)

    # The kernel kills it at the container's limit.
    worker, pid = cluster.running()
    count(cluster.cgroup, kills=5, limit_reached=5)
    os.kill(pid, signal.SIGKILL)
    found.append(cluster.next(3))
    assert (found[2]["by"], found[2]["limit"], found[2]["tasks"]) == ("kernel-container", CONTAINER, ())

    # A restart on request is none.
    cluster.running()
    cluster.client.restart(timeout=120)
    worker, pid = cluster.running()

    # The nanny ends it: from the error in the notebook to the reason is one step.
    leaking = cluster.client.submit(leak, key="leaking")
    cluster.client.run_on_scheduler(lambda dask_scheduler: setattr(dask_scheduler, "allowed_failures", 0))
    with pytest.raises(KilledWorker) as killed:
        leaking.result(timeout=120)
    found.append(cluster.next(4))
    (reason,) = [
        event["cause"]
        for _, event in cluster.client.get_events("worker-deaths")
        if event["worker"] == killed.value.last_worker.address
    ]
    assert reason.startswith("ended by its nanny at 95% of its limit of 381 MiB (it held 3")
    assert (found[3]["by"], found[3]["limit"], found[3]["tasks"]) == ("nanny", LIMIT, ("leaking",))
    assert 0.95 * LIMIT < found[3]["memory"] < 1.5 * LIMIT

    # Each is one line in the log, on the dashboard's topic, and in doctor's answer.
    who = [f"Worker {each['worker']} (alice, pid {each['pid']}): " for each in found]
    after = [
        "ended by signal SIGKILL; it had these tasks: running, wait?ing",
        "ended by the kernel because the machine had no memory left, without a task",
        "ended by the kernel at the container's limit of 477 MiB, without a task",
        f"{reason} while running task leaking",
    ]
    assert cluster.lines() == [f"{one}{text}" for one, text in zip(who, after, strict=True)]
    shown = [
        message for _, message in cluster.client.get_events("all") if message["action"] == "worker-death"
    ]
    assert shown == found
    capsys.readouterr()
    assert cli.run(["-q", "doctor", "--history", "--json", cluster.address]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [(each["worker"], each["by"], each["cause"]) for each in answer["deaths"]] == [
        (each["worker"], each["by"], each["cause"]) for each in found
    ]


def test_another_process_of_the_container(cluster: Cluster) -> None:
    cluster.running()
    count(cluster.cgroup, kills=5, limit_reached=6)
    text = "The kernel killed 2 other processes of this container at the container's limit of 477 MiB"
    assert text in real_dask.said(cluster.log, "of this container")
    assert cluster.client.get_events("worker-deaths") == ()


def test_the_end_of_a_large_process_explains_its_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel frees 100 GiB in more than five seconds."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    module = runpy.run_path(str(PRELOADS / "worker_deaths.py"))
    for limit, left in ((CONTAINER, 1), (100 << 30, 0)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        count(tmp_path, kills=0, limit_reached=0)
        kills = module["Kills"](tmp_path)
        count(tmp_path, kills=1, limit_reached=1)
        kills.look()
        now += 8
        assert (kills.others(), kills.explain()) == (left, "" if left else "container")


def test_a_nanny_that_can_not_be_watched_works(tmp_path: Path) -> None:
    """As of a version of distributed that has changed."""
    (tmp_path / "other.py").write_text(
        "from distributed import Nanny\nNanny.log_event = property(lambda self: self.missing)\n"
    )
    log = tmp_path / "worker.log"
    preloads = [str(tmp_path / "other.py"), str(PRELOADS / "worker_deaths.py")]
    flags = [word for each in preloads for word in ("--preload-nanny", each)]
    with (
        real_dask.scheduler(tmp_path) as address,
        real_dask.dask("worker", address, "--nthreads", "1", "--no-dashboard", *flags, log=log),
    ):
        assert "Traceback" not in real_dask.said(log, "Registered to")
    assert "ends of this nanny's workers will not be explained" in log.read_text()
