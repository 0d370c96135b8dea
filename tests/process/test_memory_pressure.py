"""memory_pressure.py with a real Dask, whose worker has a limit but no cgroup; and the logins meanwhile."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path

import pytest

from ami_builder.checks import login_times, memory_pressure
from ami_builder.core.oom import Wait
from ami_builder.system import host_load
from ami_builder.system.processes import wait_until
from tests.fake_programs import fake
from tests.real_dask import dask, said, scheduler

MIB = 1 << 20
LIMIT = 320 * MIB


WORK = 1.3
"""How many times the limit, as under real memory pressure."""


def press_until(path: Path, address: str, seconds: float, work: float = WORK) -> None:
    program = Path(memory_pressure.__file__).read_text().replace(memory_pressure.SCHEDULER, address)
    argv = [sys.executable, "-c", program, "1", str(work), str(memory_pressure.uptime() + seconds), str(path)]
    subprocess.run(argv, check=True, timeout=600)


def test_it_spills_is_killed_once_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "steps"
    progress, reported = Path(f"{path}.progress"), list[str]()

    def reached(name: str) -> bool:
        with suppress(OSError):
            text = progress.read_text()
            assert text.endswith("\n"), "it is never read half written"
            if text.strip() not in reported[-1:]:
                reported.append(text.strip())
        return Path(f"{path}.{name}").exists()

    with ExitStack() as stack:
        address = stack.enter_context(scheduler(tmp_path))
        flags = ["--nthreads", "1", "--memory-limit", str(LIMIT), "--local-directory", str(tmp_path)]
        log = tmp_path / "worker.log"
        stack.enter_context(dask("worker", address, *flags, "--no-dashboard", log=log))
        said(log, "Registered to")
        press_until(path, address, 600)
        assert wait_until(lambda: reached("leaked"), what="a leak", timeout=600, interval=0.05)
        assert not Path(f"{path}.json").exists()
        Path(f"{path}.grown").touch()
        assert wait_until(Path(f"{path}.json").exists, what="the end", timeout=600)
    told = json.loads(Path(f"{path}.json").read_text())
    assert told["error"] == ""
    assert told["leaked"] == "KilledWorker"
    assert told["served"] == 42
    spill = told["spill"]
    assert spill["size"] - LIMIT < spill["spilled"] < spill["size"] == spill["read"] <= WORK * LIMIT
    assert spill["size"] > 1.2 * LIMIT
    assert [worker["limit"] for worker in told["workers"] + told["back"]] == [LIMIT, LIMIT]
    (leak,) = told["leaks"]
    assert [leak["pid"]] == [event["pid"] for event in told["nanny"]]
    assert leak["pid"] == told["workers"][0]["pid"] != told["back"][0]["pid"]
    assert all(0.95 * LIMIT < event["rss"] < 1.1 * LIMIT for event in told["nanny"])
    # What goes on is reported, each step in its turn.
    size = spill["size"] / memory_pressure.GIB
    steps = [
        rf"(spilling|reading back) \d\.\d of {size:.1f} GiB",
        r"leaking: a worker uses \d+ % of its limit",
    ]
    assert [text for text in reported if not any(re.fullmatch(step, text) for step in steps)] == []
    names = list(dict.fromkeys(text.split(" ")[0] for text in reported))
    assert names == ["spilling", "reading", "leaking:"]


def test_a_step_that_does_not_end_is_named(tmp_path: Path) -> None:
    began = memory_pressure.uptime()
    with scheduler(tmp_path) as address:
        # A few times what a program that imports Dask takes to get this far.
        press_until(tmp_path / "steps", address, max(10.0, 4 * (memory_pressure.uptime() - began)))
        done = tmp_path / "steps.json"
        assert wait_until(done.exists, what="the end", timeout=600)
    assert re.fullmatch(r"asking: not finished after \d+ s in all", json.loads(done.read_text())["error"])


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
        press_until(path, address, 600, work=2.0)
        Path(f"{path}.grown").touch()
        assert wait_until(Path(f"{path}.json").exists, what="the end", timeout=600)
    told = json.loads(Path(f"{path}.json").read_text())
    assert told["error"] == ""
    assert not {"spilled", "read"} & told["spill"].keys()
    assert told["spill"]["pids"] != [worker["pid"] for worker in told["workers"]]
    assert told["leaked"] == "KilledWorker"
    assert told["served"] == 42


COUNT = 'echo >>"$0.count"; n=$(wc -l <"$0.count")'


class Machine:
    """An ssh that answers as a machine does, and what is done with its answers."""

    def __init__(self, folder: Path, script: str = "") -> None:
        """Run `script` at each login, which knows its number `n` and may set `end` and `line`."""
        self.folder = folder
        program = f"{COUNT}\nend=; line=\n{script}\necho 0 100 $end; echo $line"
        self.ssh = [str(fake(folder, "ssh", program)), "dask-vm", "--"]
        self.progress: list[str] = []

    def monitor(self, emulator: int = 0, patience: float = 3.0) -> login_times.LoginMonitor:
        timing = login_times.LoginTiming(every=0.01, pause_at_rest=0.01, patience=patience, times_at_rest=2.0)
        return login_times.LoginMonitor(self.ssh, emulator, self.progress.append, timing)


def test_logins_go_on_until_the_end(tmp_path: Path) -> None:
    """One that fails and one that takes too long are kept, and the watch goes on."""
    script = """case $n in
        2) echo "Connection reset" >&2; exit 255 ;;
        3) sleep 60 ;;
        5) end=end ;;
    esac"""
    watching = Machine(tmp_path, script).monitor()
    watching.until_end(300)
    seen = watching.watched
    assert seen.ended
    assert [login.failed for login in seen.logins] == [
        "",
        "Connection reset",
        "a login took longer than 3 s",
        "",
        "",
    ]
    assert all(a.began + a.seconds <= b.began for a, b in pairwise(seen.logins))
    assert 3 <= seen.logins[2].seconds < 60


def test_a_watch_that_never_ends_ends_in_time(tmp_path: Path) -> None:
    watching = Machine(tmp_path, "exit 255").monitor()
    watching.until_end(0.3)
    seen = watching.watched
    assert not seen.ended
    assert {login.failed for login in seen.logins} == {"exit status 255"}
    last = seen.logins[-1]
    assert 0.2 <= last.began + last.seconds - seen.logins[0].began < 60
    assert len(login_times.waits(seen.logins)) == 1, "it never answered, and that is one long wait"


def test_logins_at_rest_are_a_few_and_say_how_long_one_may_take(tmp_path: Path) -> None:
    """On a host where one takes 3 s at rest, one under pressure may take 6."""
    machine = Machine(tmp_path, "case $n in 2) sleep 3 ;; 5) sleep 4.5; end=end ;; esac")
    watching = machine.monitor(patience=4.0)
    watching.at_rest()
    assert len(watching.watched.rest) == login_times.AT_REST == 3
    watching.until_end(300)
    assert [login.failed for login in watching.watched.rest + watching.watched.logins] == [""] * 5
    assert watching.watched.ended


def test_no_login_at_rest_is_waited_for_for_ever(tmp_path: Path) -> None:
    watching = Machine(tmp_path, "sleep 60").monitor()
    watching.at_rest()
    assert 1 <= len(watching.watched.rest) <= login_times.AT_REST
    assert all(login.failed for login in watching.watched.rest)


def test_what_goes_on_is_passed_on(tmp_path: Path) -> None:
    machine = Machine(
        tmp_path, "case $n in 1) ;; 4) end=end; line=done ;; *) line='spilling 1.1 of 2.0 GiB' ;; esac"
    )
    machine.monitor().until_end(300)
    assert machine.progress == ["spilling 1.1 of 2.0 GiB", "spilling 1.1 of 2.0 GiB", "done"]


@pytest.mark.parametrize("answer", ["", "what is this", "1", "0 x"])
def test_an_answer_that_cannot_be_read_is_none(tmp_path: Path, answer: str) -> None:
    watching = Machine(tmp_path, f"case $n in 2) echo {answer}; exit ;; 3) end=end ;; esac").monitor()
    watching.until_end(300)
    first, odd, last = watching.watched.logins
    assert (first.failed, last.failed) == ("", "")
    assert odd.failed.startswith("the answer can't be read: ")
    assert watching.watched.ended


def test_what_the_host_denied_the_vm_is_part_of_each_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the VM's threads waited for a processor, never more than the login took."""
    loads = iter(
        [
            host_load.HostLoad(waited={7: 1.0}),  # the whole watch
            host_load.HostLoad(waited={7: 1.0}),
            host_load.HostLoad(waited={7: 1.01, 8: 0.03}),
            host_load.HostLoad(waited={7: 1.01, 8: 0.03}),
            host_load.HostLoad(waited={7: 901.0}),
            host_load.HostLoad(pressure=0.5),
        ]
    )
    asked: list[int] = []

    def load(pid: int) -> host_load.HostLoad:
        asked.append(pid)
        return next(loads)

    monkeypatch.setattr(host_load, "load", load)
    watching = Machine(tmp_path, "sleep 0.1; [ $n = 1 ] || end=end").monitor(emulator=4711)
    watching.until_end(300)
    first, last = watching.watched.logins
    assert first.denied == pytest.approx(0.03)
    assert last.denied == last.seconds
    assert set(asked) == {4711}
    assert 0 < watching.watched.busy <= 0.5


def test_what_the_hypervisor_stole_since_the_last_login_is_denied_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the VM's own /proc/stat has it: steal and total, in ticks."""
    monkeypatch.setattr(host_load, "load", lambda _: host_load.HostLoad())
    machine = Machine(tmp_path)
    script = "sleep 0.2; case $n in 1) echo 100 1000 ;; 2) echo 150 1100 ;; *) echo 150 1100 end ;; esac"
    fake(tmp_path, "ssh", f"{COUNT}\n{script}")
    watching = machine.monitor()
    watching.until_end(300)
    first, second, third = watching.watched.logins
    assert first.denied == 0, "nobody knows since when"
    assert second.denied == pytest.approx(0.5 * second.seconds)
    assert third.denied == 0


def test_the_question_is_answered_by_a_shell(tmp_path: Path) -> None:
    """dash, as on Debian; the files are written by memory_pressure.sh."""
    answer = tmp_path / "answer"
    question = login_times._ASK.replace(login_times.ANSWER, str(answer))

    def ask() -> list[str]:
        done = subprocess.run(["dash", "-c", question], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout.splitlines()

    first, line = ask()
    steal, total = map(int, first.split())
    assert 0 <= steal < total
    assert line == ""
    answer.write_text("\n\036end\nend\n")
    Path(f"{answer}.progress").write_text("spilling 1.1 of 2.0 GiB\n")
    first, line = ask()
    assert first.split()[2:] == ["end"]
    assert int(first.split()[1]) >= total
    assert line == "spilling 1.1 of 2.0 GiB"
    answer.write_text("\n\036client\nnot yet\n")
    assert "end" not in ask()[0].split()


def login(began: float, seconds: float, denied: float = 0.0, failed: str = "") -> login_times.LoginAttempt:
    return login_times.LoginAttempt(began=began, seconds=seconds, denied=denied, failed=failed)


@pytest.mark.parametrize(
    ("logins", "waits"),
    [
        ([login(10, 1), login(14, 2, 0.5)], [(1, 0), (2, 0.5)]),
        # From the first attempt to the one that gets through.
        ([login(10, 1), login(14, 2, 0.5, "no"), login(19, 3, 1)], [(1, 0), (8, 1.5)]),
        ([login(10, 1, 0, "no"), login(14, 1, 0, "no"), login(18, 1), login(22, 1)], [(9, 0), (1, 0)]),
        # None gets through any more.
        ([login(10, 1), login(14, 60, 2, "no"), login(77, 60, 3, "no")], [(1, 0), (123, 5)]),
    ],
)
def test_attempts_that_failed_are_part_of_a_wait(
    logins: list[login_times.LoginAttempt], waits: list[tuple[float, float]]
) -> None:
    expected = [Wait(seconds=seconds, denied=denied) for seconds, denied in waits]
    assert login_times.waits(logins) == expected
    assert login_times.waits([]) == []
