"""press.py with a real Dask, whose worker has a limit but no cgroup; and the logins meanwhile."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from ami_builder.checks import press, watch
from ami_builder.proc import wait_until
from tests.real_dask import dask, said, scheduler
from tests.unit.fakes import fake

MIB = 1 << 20
LIMIT = 320 * MIB


def test_it_spills_is_killed_twice_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "steps"
    with ExitStack() as stack:
        address = stack.enter_context(scheduler(tmp_path))
        flags = ["--nthreads", "1", "--memory-limit", str(LIMIT), "--local-directory", str(tmp_path)]
        log = tmp_path / "worker.log"
        stack.enter_context(dask("worker", address, *flags, "--no-dashboard", log=log))
        said(log, "Registered to")
        program = Path(press.__file__).read_text().replace(press.SCHEDULER, address)
        subprocess.run(
            [sys.executable, "-c", program, "1", "2.0", str(press.uptime() + 600), str(path)],
            check=True,
            timeout=600,
        )
        assert wait_until(Path(f"{path}.leaked").exists, what="a leak", timeout=600)
        assert not Path(f"{path}.json").exists()
        Path(f"{path}.grown").touch()
        assert wait_until(Path(f"{path}.json").exists, what="the end", timeout=600)
    told = json.loads(Path(f"{path}.json").read_text())
    assert told["error"] == ""
    assert told["leaked"] == "KilledWorker"
    assert told["served"] == 42
    spill = told["spill"]
    assert LIMIT < spill["spilled"] < spill["size"] == spill["read"] <= 2 * LIMIT
    assert [worker["limit"] for worker in told["workers"] + told["back"]] == [LIMIT, LIMIT]
    pids = [leak["pid"] for leak in told["leaks"]]
    assert pids == [event["pid"] for event in told["nanny"]]
    assert len({*pids, told["back"][0]["pid"]}) == 3
    assert all(0.95 * LIMIT < event["rss"] < 1.1 * LIMIT for event in told["nanny"])


def test_a_step_that_does_not_end_is_named(tmp_path: Path) -> None:
    began = press.uptime()
    with scheduler(tmp_path) as address:
        program = Path(press.__file__).read_text().replace(press.SCHEDULER, address)
        # A few times what a program that imports Dask takes to get that far.
        end = press.uptime() + max(10.0, 4 * (press.uptime() - began))
        argv = [sys.executable, "-c", program, "1", "2.0", str(end), str(tmp_path / "steps")]
        subprocess.run(argv, check=True, timeout=600)
        done = tmp_path / "steps.json"
        assert wait_until(done.exists, what="the end", timeout=600)
    assert re.fullmatch(r"asking had not ended after \d+ s in all", json.loads(done.read_text())["error"])


def test_a_worker_that_goes_while_it_spills_ends_that_step(tmp_path: Path) -> None:
    """Without spilling it is restarted again and again: what was the first time is enough."""
    path = tmp_path / "steps"
    memory = "DASK_DISTRIBUTED__WORKER__MEMORY__"
    with ExitStack() as stack:
        address = stack.enter_context(scheduler(tmp_path))
        flags = ["--nthreads", "1", "--memory-limit", str(LIMIT), "--local-directory", str(tmp_path)]
        log = tmp_path / "worker.log"
        off = {f"{memory}{name}": "False" for name in ("TARGET", "SPILL", "PAUSE")}
        stack.enter_context(dask("worker", address, *flags, "--no-dashboard", log=log, **off))
        said(log, "Registered to")
        program = Path(press.__file__).read_text().replace(press.SCHEDULER, address)
        end = str(press.uptime() + 600)
        subprocess.run([sys.executable, "-c", program, "1", "2.0", end, str(path)], check=True, timeout=600)
        Path(f"{path}.grown").touch()
        assert wait_until(Path(f"{path}.json").exists, what="the end", timeout=600)
    told = json.loads(Path(f"{path}.json").read_text())
    assert told["error"] == ""
    assert not {"spilled", "read"} & told["spill"].keys()
    assert told["spill"]["pids"] != [worker["pid"] for worker in told["workers"]]
    assert told["leaked"] == "KilledWorker"
    assert told["served"] == 42


def test_logins_go_on_until_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails and one that takes too long are kept, and the watch goes on."""
    monkeypatch.setattr(watch, "EVERY_SECONDS", 0.01)
    monkeypatch.setattr(watch, "_LOGIN_SECONDS", 3)
    ssh = fake(
        tmp_path,
        "ssh",
        """
n=$(wc -l <"$0.calls")
case $n in
    2) echo "Connection reset" >&2; exit 255 ;;
    3) sleep 600 ;;
    5) echo end ;;
esac
""",
    )
    seen = watch.watch([str(ssh), "dask-vm", "--"], 300)
    assert seen.ended
    assert seen.failed == ["Connection reset", "a login took longer than 3 s"]
    assert len(seen.times) == 1 + 3
    assert seen.times == sorted(seen.times)


def test_a_watch_that_never_ends_has_its_end_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "EVERY_SECONDS", 0.01)
    ssh = fake(tmp_path, "ssh", "exit 255")
    seen = watch.watch([str(ssh)], 0.3)
    assert not seen.ended
    assert len(seen.times) == 2
    assert seen.times[1] - seen.times[0] >= 0.3
    assert set(seen.failed) == {"exit status 255"}
