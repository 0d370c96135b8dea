"""`doctor` on a real scheduler with real workers: a healthy one, one without a limit and one with too little.

They share this machine, so each is told a boot id and a /proc/meminfo of its own; its processes, nannies,
limits and cgroups are real.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ami_builder.cli import app as cli
from ami_builder.core.errors import UsageError
from ami_builder.core.units import GIB, MIB
from ami_builder.doctor import client
from ami_builder.doctor.rules import Cluster, Reading, Scheduler, Worker
from ami_builder.doctor.tls import speaks_tls
from ami_builder.system.certificates import Authority
from ami_builder.verify.executor import open_executor
from tests.real_dask import said, scheduler, tls_flags, tls_folder, worker

if TYPE_CHECKING:
    from collections.abc import Iterator

TOTAL, AVAILABLE = 8 * GIB, 7500 * MIB
LIMITS = {"healthy": AVAILABLE, "unlimited": 0, "low": GIB}
INSTANCES = {"healthy": "i-0123456789abcdef0"}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("cluster")
    with ExitStack() as stack:
        address = stack.enter_context(scheduler(folder))
        for name, limit in LIMITS.items():
            flags = ("--memory-limit", str(limit))
            instance = INSTANCES.get(name, "")
            made = worker(
                *(folder, address, name, *flags), total=TOTAL, available=AVAILABLE, instance=instance
            )
            stack.enter_context(made)
        for name in LIMITS:
            said(folder / f"{name}.log", "Registered to")
        yield address


def examined(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    status = cli.run(["-q", "doctor", "--json", *arguments])
    printed = capsys.readouterr()
    assert printed.err == ""
    return status, json.loads(printed.out)


def test_it_tells_a_healthy_worker_from_an_unlimited_and_a_low_one(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, told = examined(capsys, address)
    found = {each["worker"]["name"]: each for each in told["workers"]}
    assert {name: each["health"] for name, each in found.items()} == {
        "healthy": "right",
        "unlimited": "missing",
        "low": "needlessly low",
    }
    assert (status, told["healthy"], told["right"]) == (5, False, 1)
    for each in found.values():
        reading = each["worker"]["reading"]
        assert reading["nanny"] is True
        assert len(reading["processes"]) == 2
        assert min(reading["processes"].values()) > 10 * MIB
    assert found["healthy"]["worker"]["reading"]["limit"] == AVAILABLE
    for name in ("unlimited", "low"):
        assert abs(found[name]["advised"] - AVAILABLE) < 75 * MIB
        assert found[name]["advised"] % 4096 == 0
    assert found["low"]["excess"] == GIB - found["low"]["advised"]


def test_the_verdict_comes_first_and_the_rows_go_to_programs(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["-q", "doctor", address]) == 5
    printed = capsys.readouterr()
    assert printed.err.splitlines()[0] == "1 of 3 workers has a right limit: 1 missing, 1 needlessly low"
    rows = [line.split("\t") for line in printed.out.splitlines()]
    assert [(row[0], row[2]) for row in rows] == [
        ("low", "needlessly low"),
        ("unlimited", "missing"),
        ("healthy", "right"),
    ]
    assert rows[0][3] == f"{GIB} (1 GiB)"


def test_machines_and_what_they_have(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    _, told = examined(capsys, address)
    scheduler, *others = told["machines"]
    assert (scheduler["scheduler"], scheduler["workers"]) == (True, [])
    assert scheduler["host"] == told["scheduler"]["host"] == socket.gethostname()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert scheduler["boot"] == told["scheduler"]["boot"] == boot
    found = {one["boot"].removeprefix("boot-of-"): one for one in others}
    assert found.keys() == LIMITS.keys()
    assert found["healthy"]["name"] == found["healthy"]["instance"] == INSTANCES["healthy"]
    assert (found["low"]["name"], found["low"]["instance"]) == (socket.gethostname(), "")
    assert found["low"]["total"] == TOTAL
    (spill,) = found["low"]["spills"]
    assert spill["folder"].endswith("/low")
    assert (spill["system"], spill["bound"]) != ("", 0)
    assert 0 < spill["free"] <= spill["size"]
    assert told["here"]["dask"] == version("dask")
    assert [one["versions"] for one in told["machines"]] == [[told["here"]]] * 4
    assert told["warnings"] == []


@pytest.mark.parametrize("columns", [80, 100])
def test_a_terminal_of_that_width_is_enough(
    address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli.run(["-q", "doctor", address]) == 5
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= columns
    text = " ".join(" ".join(lines).split())
    for whole in (INSTANCES["healthy"], "set it to", "unbounded", "needlessly low"):
        assert whole in text
    # One header for workers, one for machines.
    assert sum(line.startswith("─") for line in lines) == 2


@pytest.mark.parametrize("columns", [80, 100])
def test_of_a_thousand_workers_those_that_differ_are_on_the_last_screen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(client, "read_cluster", lambda *_: thousand())
    assert cli.run(["-q", "doctor", "10.0.0.1:8786"]) == 5
    printed = capsys.readouterr()
    lines = re.sub(r"\x1b\[[0-9;]*m", "", printed.out).splitlines()
    screen = lines[-24 + len(printed.err.splitlines()) - 1 :]
    text = " ".join(" ".join(screen).split())
    for whole in ("dask-17", "missing", "dask-500", "needlessly low", "and 997 more"):
        assert whole in text
    first, differs, last = printed.err.splitlines()
    assert first == last == "998 of 1000 workers have a right limit: 1 missing, 1 needlessly low"
    assert differs == "warning: dask differs: 2025.1.0 on worker dask-900; 2026.8.0 on 999 workers"
    assert "at least 20 GiB free" in " ".join(" ".join(lines).split())
    # In all, what is alike is together, though no two machines have the same memory.
    assert len(lines) < 40


def thousand() -> Cluster:
    """A thousand machines of one type with a worker each, three of which differ."""

    def made(number: int) -> Worker:
        available = AVAILABLE - number * 4096
        limit = {17: None, 500: GIB}.get(number, available)
        reading = Reading(
            boot=str(number),
            limit=limit,
            nthreads=1,
            total=TOTAL - number % 7 * 4096,
            available=available,
            instance=f"i-{number:017x}",
            directory="/var/lib/dask/spill/dask-scratch-space/worker",
            spill_system="xfs",
            spill_size=30 * GIB,
            spill_free=20 * GIB + number * MIB,
            target=0.6,
            spill=0.7,
            pause=0.8,
            terminate=0.95,
            versions={"dask": "2025.1.0" if number == 900 else "2026.8.0"},
        )
        return Worker(address=f"tcp://{number}", name=f"dask-{number}", reading=reading)

    return Cluster(workers=tuple(map(made, range(1000))), scheduler=Scheduler(address="tcp://s"), here={})


def test_a_machine_that_has_outgrown_its_reserve_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker's limit fits, within the noise of a reading; its machine knows better, and by whom."""
    sizes = {"limit_at_start": AVAILABLE, "limit": AVAILABLE, "reserve": 32 * MIB, "growth": 124 * MIB}
    grown = [{"cgroup": "agent.service", "bytes": 101 * MIB}, {"cgroup": "user.slice", "bytes": 12 * MIB}]
    growth = json.dumps({**sizes, "excess": 92 * MIB, "grown": grown})
    with (
        scheduler(tmp_path) as address,
        worker(
            *(tmp_path, address, "grown", "--memory-limit", str(AVAILABLE)),
            total=TOTAL,
            available=AVAILABLE,
            growth=growth,
        ),
    ):
        said(tmp_path / "grown.log", "Registered to")
        status, answer = examined(capsys, address)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        assert cli.run(["-q", "doctor", address]) == 0
    printed = capsys.readouterr()
    (one,) = answer["workers"]
    assert (status, one["health"]) == (0, "right")
    assert one["worker"]["reading"]["growth"]["by"] == {"agent.service": 101 * MIB, "user.slice": 12 * MIB}
    assert answer["machines"][-1]["growth"]["excess"] == 92 * MIB
    assert (
        "warning: grown: its machine can give 92 MiB less than the limit promises: the system has grown"
        " by 124 MiB since Dask started (agent.service +101 MiB, user.slice +12 MiB)"
    ) in printed.err
    assert "outgrown by 92 MiB" in printed.out


def test_a_scheduler_that_runs_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As those did that had distributed.scheduler.pickle off, which newer ones don't start with."""
    (tmp_path / "refuse.py").write_text(
        "async def refuse(**_):\n"
        "    raise ValueError('no distributed.scheduler.pickle')\n"
        "def dask_setup(scheduler):\n"
        "    scheduler.handlers['run_function'] = refuse\n"
    )
    with scheduler(tmp_path, "tcp", "--preload", str(tmp_path / "refuse.py")) as address:
        assert cli.run(["-q", "doctor", address]) == 5
    said_of_it = "the scheduler's machine and versions can't be read: no distributed.scheduler.pickle"
    assert capsys.readouterr().err.splitlines() == ["the scheduler has no workers", f"warning: {said_of_it}"]


def test_a_worker_that_does_not_answer_is_listed_and_the_others_are_judged(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    _, told = examined(capsys, address)
    took = time.monotonic() - began
    reading = next(e for e in told["workers"] if e["worker"]["name"] == "low")["worker"]["reading"]
    pid = next(int(p.split()[1]) for p in reading["processes"] if p != reading["nanny_process"])
    os.kill(pid, signal.SIGSTOP)
    try:
        status, told = examined(capsys, address, "--timeout", f"{max(6, 4 * took):.0f}s")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert status == 5
    assert {each["worker"]["name"]: each["health"] for each in told["workers"]} == {
        "healthy": "right",
        "unlimited": "missing",
        "low": "no answer",
    }


def test_a_tls_cluster_is_reached_by_dask_s_own_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dask_module = pytest.importorskip("dask")
    from distributed import Security

    temporary: Any = Security.temporary()
    files = {}
    for kind, content in {
        "ca-file": temporary.tls_ca_file,
        "cert": temporary.tls_client_cert,
        "key": temporary.tls_client_key,
    }.items():
        files[kind] = tmp_path / f"{kind}.pem"
        files[kind].write_text(content)
    flags = (f"--tls-{kind}={path}" for kind, path in files.items())
    with scheduler(tmp_path, "tls", *flags) as address:
        assert cli.run(["-q", "doctor", address, "--timeout", "5s"]) in (2, 7)
        capsys.readouterr()
        monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TLS__CA_FILE", str(files["ca-file"]))
        monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT", str(files["cert"]))
        monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY", str(files["key"]))
        with dask_module.config.set():
            dask_module.config.refresh()
            assert cli.run(["-q", "doctor", address]) == 5
        assert capsys.readouterr().err == "the scheduler has no workers\n"
    monkeypatch.undo()
    dask_module.config.refresh()


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A scheduler with TLS, and a folder with certificates of its CA and of others."""
    folder = tmp_path_factory.mktemp("tls")
    own = Authority.create(days=2)
    for name, authority, serves in (
        ("server", own, True),
        ("mine/client", own, False),
        ("other", Authority.create(days=2), False),
    ):
        tls_folder(folder / name, authority.issue(name, days=1, serves=serves))
    other = tls_folder(folder / "half", Authority.create(days=2).issue("a", days=1, serves=False))
    (other / "ca.pem").write_text(own.pem)
    with scheduler(folder, "tls", *tls_flags(folder / "server")) as address:
        yield address, folder


@pytest.mark.parametrize("given", ["mine", "mine/client"])
@pytest.mark.parametrize("scheme", ["tls://", ""])
def test_a_folder_is_enough_for_tls(
    tls: tuple[str, Path], given: str, scheme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    address, folder = tls
    where = scheme + address.removeprefix("tls://")
    assert cli.run(["-q", "doctor", where, "--tls", str(folder / given)]) == 5
    assert capsys.readouterr().err == "the scheduler has no workers\n"


def test_what_is_wrong_with_tls_is_said_at_once(
    tls: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address, folder = tls
    (tmp_path / "empty").mkdir()
    broken = tls_folder(tmp_path / "broken", Authority.create(days=2).issue("a", days=1, serves=False))
    (broken / "key.pem").write_text("not a key")
    plain = f"tcp://{address.removeprefix('tls://')}"
    cases = (
        (
            [address, "--tls", str(folder / "other")],
            "the scheduler's certificate is refused: another CA issued it",
        ),
        ([address, "--tls", str(folder / "half")], "the scheduler refuses this certificate"),
        ([address, "--tls", str(tmp_path / "empty")], "empty has no ca.pem, cert.pem, key.pem"),
        ([address, "--tls", str(broken)], "broken can't be used"),
        ([address], "tls:// needs certificates"),
        ([plain, "--tls", str(folder / "mine")], "tcp:// is without TLS"),
    )
    for arguments, reason in cases:
        assert cli.run(["-q", "doctor", *arguments, "--timeout", "1h"]) == 2, arguments
        assert reason in capsys.readouterr().err
    assert cli.run(["-q", "doctor", plain, "--timeout", "2s"]) == 2
    assert "the scheduler uses TLS" in capsys.readouterr().err


def test_a_connection_that_is_closed_at_once_is_no_answer(
    tls: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """As `ssh -L` does when nothing listens at its other end."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def close_all() -> None:
            with suppress(OSError):
                while True:
                    server.accept()[0].close()

        thread = threading.Thread(target=close_all)
        thread.start()
        where = f"127.0.0.1:{server.getsockname()[1]}"
        status = cli.run(["-q", "doctor", where, "--tls", str(tls[1] / "mine"), "--timeout", "5s"])
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    err = capsys.readouterr().err
    assert status == 7, err
    assert "did not answer within" in err


def test_a_server_that_closes_a_handshake_speaks_no_tls() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def close_one() -> None:
            with server.accept()[0] as connection:
                connection.recv(1 << 16)  # with something unread, the other end would see a reset

        thread = threading.Thread(target=close_one)
        thread.start()
        assert not speaks_tls("127.0.0.1", server.getsockname()[1], 30)
        thread.join()


@pytest.mark.parametrize(
    "answer", [b"SSH-2.0-OpenSSH_9.2p1\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"220 hi\r\n"]
)
@pytest.mark.parametrize("command", ["doctor", "verify"])
def test_another_server_is_no_scheduler(
    command: str, answer: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dask takes the first eight bytes for a number."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer_all() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.sendall(answer)
                    connection.close()

        thread = threading.Thread(target=answer_all)
        thread.start()
        where = f"127.0.0.1:{server.getsockname()[1]}"
        if command == "doctor":
            status = cli.run(["-q", "doctor", where, "--timeout", "5s"])
        else:
            with pytest.raises(UsageError, match="is no Dask scheduler"), open_executor(where, 1):
                pass
            status = 2
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert status == 2
    assert "internal error" not in capsys.readouterr().err


def test_a_scheduler_without_tls(
    address: str, tls: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    where = address.replace("tcp", "tls")
    assert cli.run(["-q", "doctor", where, "--tls", str(tls[1] / "mine"), "--timeout", "1h"]) == 2
    assert "the scheduler does not use TLS" in capsys.readouterr().err


def test_an_address_where_nobody_is(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        assert cli.run(["-q", "doctor", f"tcp://127.0.0.1:{port}", "--timeout", "0.5s"]) == 7
    err = capsys.readouterr().err
    assert f"127.0.0.1:{port} did not answer within" in err
    assert "connection refused" in err


def test_somebody_who_accepts_and_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        assert cli.run(["-q", "doctor", f"127.0.0.1:{port}", "--timeout", "0.5s"]) == 7
    assert "did not answer within" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["http://127.0.0.1:8787"], "http://127.0.0.1:8787: unknown address scheme"),
        (["nowhere"], "nowhere: missing port number"),
        (["tcp://127.0.0.1:99999"], "there is no port 99999"),
        (["127.0.0.1:8786", "--timeout", "5m"], "--timeout 5m: expected a duration"),
    ],
)
def test_wrong_arguments(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["-q", "doctor", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_without_dask_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert cli.run(["-q", "doctor", "127.0.0.1:8786"]) == 3
    assert "its extra 'dask'" in capsys.readouterr().err


def test_other_commands_start_without_dask() -> None:
    code = "import ami_builder.cli.app, sys; print({'dask', 'distributed', 'asyncio'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_what_a_worker_could_not_tell_is_unknown() -> None:
    known = {"name": "w", "host": "h"}
    mac = client._worker("a", known, {"status": "OK", "result": {"error": "runs on Darwin"}})
    assert (mac.problem, mac.silent, mac.reading) == ("runs on Darwin", False, None)
    failed = client._worker("a", known, {"status": "error", "text": "No module named dask"})
    assert "No module named dask" in failed.problem
    assert client._worker("a", known, b"a pickled error").silent


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (OSError("closed"), "closed"),
        (TimeoutError(), "it did not answer in time"),
        ({"status": "error", "text": "not allowed"}, "not allowed"),
        ("nonsense", "unknown reason"),
    ],
)
def test_a_scheduler_that_tells_nothing_of_itself_is_a_scheduler_still(answer: Any, problem: str) -> None:
    class Remote:
        async def run_function(self, **_: Any) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

    told = asyncio.run(client._scheduler(Remote(), "tcp://s", 5.0))
    assert (told.address, told.boot, told.problem) == ("tcp://s", "", problem)
