"""retire.py and retire_workers.py with real schedulers and workers; a machine is an address of loopback."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import dask.config
import pytest
from distributed import Client
from distributed.security import Security

from ami_builder.system import processes, resources
from tests import real_dask

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PROGRAMS = resources.packer_dir() / "guest/usr/local/lib/dask"
SCHEDULER, HERE, OTHER = "127.0.0.5", "127.0.0.3", "127.0.0.4"


def load(name: str) -> ModuleType:
    """Import a program of the guest."""
    specification = importlib.util.spec_from_file_location(f"guest_{name}", PROGRAMS / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


retire_workers = load("retire_workers")
retire_program = load("retire")


# Which processes are Dask's


@pytest.mark.parametrize(
    ("executable", "command", "kind", "words"),
    [
        (
            "/usr/local/bin/python3.13",
            ["/usr/local/bin/python3", "/usr/local/bin/dask", "worker", "10.0.0.1:8786", "--nworkers", "1"],
            "worker",
            ["10.0.0.1:8786", "--nworkers", "1"],
        ),
        (
            "/opt/conda/bin/python3.12",
            ["python", "-m", "distributed.cli.dask_spec", "tls://10.0.0.1:8786", "--spec", '{"cls": 1}'],
            "spec",
            ["tls://10.0.0.1:8786", "--spec", '{"cls": 1}'],
        ),
        ("/usr/bin/python3", ["python3", "-m", "dask", "worker"], "worker", []),
        ("/usr/bin/python3", ["python3", "/opt/bin/dask-worker", "a:1", ""], "worker", ["a:1", ""]),
        ("/usr/bin/python3", ["python3", "/opt/bin/dask", "cuda", "worker", "a:1"], "worker", ["a:1"]),
        ("/usr/bin/python3", ["python3", "-m", "distributed.cli.dask_worker", "a:1"], "worker", ["a:1"]),
        ("/usr/bin/python3 (deleted)", ["python", "/x/dask-scheduler"], "scheduler", []),
        ("/usr/bin/python3.14t", ["python", "-m", "dask", "worker"], "worker", []),
        ("/usr/bin/python3", ["python", "-m", "distributed.cli.dask_scheduler"], "scheduler", []),
    ],
)
def test_a_process_of_dask_is_recognized(
    executable: str, command: list[str], kind: str, words: list[str]
) -> None:
    found = retire_workers.recognized(7, executable, "".join(f"{word}\0" for word in command).encode())
    assert found is not None
    assert (found.pid, found.kind, found.words) == (7, kind, words)
    assert found.interpreter == command[0]


def test_a_scheduler_that_names_itself_is_recognized() -> None:
    """With setproctitle, nothing is left of its command line."""
    title = b"dask scheduler [tcp://10.0.0.1:8786]\0\0\0"
    found = retire_workers.recognized(7, "/usr/bin/python3.13", title)
    assert (found.kind, found.words) == ("scheduler", [])


@pytest.mark.parametrize(
    ("executable", "command"),
    [
        ("/usr/bin/dash", ["sh", "-c", "dask worker a:1"]),
        ("/sbin/docker-init", ["/sbin/docker-init", "--", "dask", "worker", "a:1"]),
        ("/usr/bin/docker", ["docker", "run", "image", "dask", "worker", "a:1"]),
        ("/usr/bin/python3", ["python", "-c", "from multiprocessing.spawn import spawn_main"]),
        ("/usr/bin/python3", ["python", "my-dask", "worker"]),
        ("/usr/bin/python3", ["python", "/opt/bin/dask", "config", "list"]),
        ("/usr/bin/python3", []),
    ],
)
def test_another_process_is_not(executable: str, command: list[str]) -> None:
    assert retire_workers.recognized(7, executable, "".join(f"{word}\0" for word in command).encode()) is None


def test_addresses_are_those_of_the_network(tmp_path: Path) -> None:
    found = retire_workers.addresses(os.getpid())
    assert not [each for each in found if each.startswith("127.") or each == "::1"]
    listed = json.loads(subprocess.check_output(["ip", "-json", "address"], text=True))
    expected = {
        address["local"]
        for interface in listed
        for address in interface["addr_info"]
        if address["scope"] == "global"
    }
    assert set(found) == expected


# Retiring


@contextmanager
def cluster(
    folder: Path, protocol: str = "tcp", others: int = 1, settings: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Run a scheduler, a worker of this machine and others, and yield the scheduler's address."""
    where = ("--host", f"{protocol}://{SCHEDULER}", "--port", "0", "--no-dashboard")
    with real_dask.dask("scheduler", *where, log=folder / "scheduler.log", **settings or {}) as log:
        address = real_dask.said(log, "Scheduler at:").split("Scheduler at:")[1].split()[0]
        with workers(folder, address, HERE, *[OTHER] * others, **settings or {}):
            yield address


@contextmanager
def workers(folder: Path, scheduler: str, *hosts: str, **environment: str) -> Iterator[None]:
    if not hosts:
        yield
        return
    log = folder / f"worker-{len(hosts)}.log"
    options = ("--host", hosts[0], "--nthreads", "1", "--no-dashboard", "--local-directory", str(folder))
    with real_dask.dask("worker", scheduler, *options, log=log, **environment):
        real_dask.said(log, "Registered to:")
        with workers(folder, scheduler, *hosts[1:], **environment):
            yield


def retire(
    scheduler: str,
    *,
    seconds: float = 120,
    spec: bool = False,
    here: str = HERE,
    settings: Mapping[str, str] | None = None,
    words: list[str] | None = None,
    boot: str = "",
) -> subprocess.CompletedProcess[str]:
    words = words or [
        scheduler,
        *(("--spec", "{}") if spec else ("--host", here, "--nworkers", "1", "--no-dashboard")),
    ]
    argument = {
        "seconds": seconds, "addresses": [here, "10.9.9.9"], "spec": spec, "words": words, "boot": boot,
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", (PROGRAMS / "retire.py").read_text(), json.dumps(argument)],
        env={**os.environ, **(settings or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def compute(path: str) -> str:
    """A task that notes each of its runs."""
    with Path(path).open("a") as file:
        file.write("run\n")
    return "x" * 100_000


def runs(path: Path) -> int:
    return len(path.read_text().splitlines())


def store(client: Any, path: Path, on: str = HERE) -> Any:
    """Compute something on the worker of one machine alone."""
    (worker,) = (each for each in client.nthreads() if on in each)
    future = client.submit(compute, str(path), workers=[worker], allow_other_workers=True, pure=False)
    assert future.result(timeout=120)
    assert client.who_has(future)[future.key] == (worker,)
    return future


@pytest.mark.parametrize("spec", [False, True])
def test_other_workers_take_the_data_and_nothing_is_computed_again(tmp_path: Path, spec: bool) -> None:
    with cluster(tmp_path) as scheduler, Client(scheduler) as client:
        future = store(client, tmp_path / "runs")
        done = retire(scheduler, spec=spec)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"tcp://{HERE}:" in done.stdout
        assert OTHER not in done.stdout
        assert [each for each in client.nthreads() if HERE in each] == []
        assert all(OTHER in each for each in client.who_has(future)[future.key])
        assert len(future.result(timeout=120)) == 100_000
        assert runs(tmp_path / "runs") == 1
        # its nanny does not start it again
        real_dask.said(tmp_path / "worker-2.log", "End worker")
        assert retire(scheduler).returncode == 0, "there is nothing more to retire"


def test_without_a_retirement_the_work_is_done_again(tmp_path: Path) -> None:
    """What the retirement is for: the same cluster, and a machine that just goes."""
    (tmp_path / "here").mkdir()
    with cluster(tmp_path, others=0) as scheduler, Client(scheduler) as client:
        with workers(tmp_path / "here", scheduler, OTHER):
            future = store(client, tmp_path / "runs", on=OTHER)
        assert len(client.gather(future)) == 100_000
        assert runs(tmp_path / "runs") == 2


def test_a_retirement_that_nobody_takes_ends_with_its_time_and_the_worker_goes_on(tmp_path: Path) -> None:
    with cluster(tmp_path, others=0) as scheduler, Client(scheduler) as client:
        future = store(client, tmp_path / "runs")
        done = retire(scheduler, seconds=8)
        assert done.returncode == 1
        assert "<3>retire-workers: not retired within 8 s: no other worker takes the data" in done.stdout
        assert client.submit(len, future).result(timeout=120) == 100_000
        # as soon as there is another worker, it takes the data
        (tmp_path / "later").mkdir()
        with workers(tmp_path / "later", scheduler, OTHER):
            assert retire(scheduler).returncode == 0
            assert runs(tmp_path / "runs") == 1


def test_a_worker_that_advertises_another_address_is_known_by_the_boot_of_its_machine(tmp_path: Path) -> None:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with cluster(tmp_path, others=0) as scheduler, Client(scheduler) as client:
        done = retire(scheduler, here="127.0.0.9", boot="another-boot")
        assert done.returncode == 0
        assert len(client.nthreads()) == 1
        done = retire(scheduler, here="127.0.0.9", boot=boot)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"tcp://{HERE}:" in done.stdout
        assert client.nthreads() == {}


@pytest.mark.parametrize(
    "words",
    [
        ["--rmm-pool-size", "24GB", "ADDRESS"],
        ["--enable-tcp-over-ucx", "ADDRESS", "--rmm-pool-size", "24GB"],
        ["--net-devices", "mlx5_0:1", "tcp://ADDRESS"],
    ],
)
def test_the_address_is_found_among_options_of_another_command(words: list[str]) -> None:
    """`dask cuda worker` has more options than `dask worker`."""
    found = retire_program.client_arguments(
        [word.replace("ADDRESS", "10.0.0.1:8786") for word in words], spec=False
    )
    assert found["address"].removeprefix("tcp://") == "10.0.0.1:8786"


def test_a_scheduler_that_is_gone_is_reported(tmp_path: Path) -> None:
    done = retire("tcp://127.0.0.5:9", seconds=8)
    assert done.returncode == 1
    assert "<3>retire-workers: not retired within 8 s: the scheduler does not answer" in done.stdout


def test_a_scheduler_on_this_machine_cannot_be_moved(tmp_path: Path) -> None:
    with cluster(tmp_path, others=0) as scheduler:
        done = retire(scheduler, here=SCHEDULER)
        assert done.returncode == 3
        assert "it can't be moved" in done.stdout


def test_a_command_line_without_a_scheduler_starts_no_cluster_of_its_own() -> None:
    done = retire("", seconds=30)
    assert done.returncode == 1
    assert "names no scheduler" in done.stderr


def tls(folder: Path, security: Security, *, inherited: bool) -> dict[str, str]:
    """Return the settings of a scheduler and its workers that talk TLS alone; a client has no certificate.

    They are names of files, or the configuration that EC2Cluster sends along, with the texts in it.
    """
    names = ("ca-file", "scheduler.cert", "scheduler.key", "worker.cert", "worker.key")
    texts = {name: getattr(security, f"tls_{name.replace('-', '_').replace('.', '_')}") for name in names}
    if inherited:
        settings: dict[str, Any] = {f"distributed.comm.tls.{name}": text for name, text in texts.items()}
        with dask.config.set(settings | {"distributed.comm.require-encryption": True}):
            return {"DASK_INTERNAL_INHERIT_CONFIG": dask.config.serialize(dask.config.global_config)}
    found = {"DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "true"}
    for name, text in texts.items():
        file = folder / f"{name}.pem"
        file.write_text(text)
        variable = name.upper().replace("-", "_").replace(".", "__")
        found[f"DASK_DISTRIBUTED__COMM__TLS__{variable}"] = str(file)
    return found


@pytest.mark.parametrize("inherited", [False, True])
def test_with_tls_too(tmp_path: Path, inherited: bool) -> None:
    security = Security.temporary()
    settings = tls(tmp_path, security, inherited=inherited)
    with cluster(tmp_path, "tls", settings=settings) as scheduler:
        assert scheduler.startswith("tls://")
        with Client(scheduler, security=security) as client:
            future = store(client, tmp_path / "runs")
            done = retire(scheduler, settings=settings)
            assert done.returncode == 0, done.stdout + done.stderr
            assert f"tls://{HERE}:" in done.stdout
            assert len(future.result(timeout=120)) == 100_000
            assert runs(tmp_path / "runs") == 1


# What remains


class Processes:
    """Dask processes of a machine, and what asking the scheduler to retire them returns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *words: list[str]) -> None:
        self.running = [
            retire_workers.DaskProcess(pid=n, interpreter="python", kind="worker", words=each)
            for n, each in enumerate(words, 10)
        ]
        self.ends, self.status = True, 0
        self.asked: list[list[int]] = []
        self.now = 0.0
        monkeypatch.setattr(retire_workers, "dask_processes", lambda: list(self.running))
        monkeypatch.setattr(retire_workers, "attempt", self.attempt)
        monkeypatch.setattr(retire_workers, "time", self)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def attempt(self, processes: list[Any], seconds: float) -> list[int]:
        self.asked.append([each.pid for each in processes])
        self.now += 1
        if self.ends:
            self.running = [each for each in self.running if each not in processes]
        return [self.status] * len(processes)


def test_a_worker_that_still_runs_has_not_retired(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The scheduler may know it by another address."""
    machine = Processes(monkeypatch, ["a:1"])
    machine.ends = False
    assert retire_workers.main(120) == 1
    assert len(machine.asked) > 1
    assert "<3>retire-workers: still running here: Dask's process 10" in capsys.readouterr().out
    assert machine.now <= 130


def test_many_processes_retire_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Processes(monkeypatch, *([f"{n}:1"] for n in range(6)))
    assert retire_workers.main(120) == 0
    assert machine.asked == [[10, 11, 12, 13], [14, 15]]


def test_without_a_process_of_dask_nothing_has_retired(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dask may run in a program that is not recognized."""
    assert Processes(monkeypatch).running == []
    assert retire_workers.main(120) == 4


def test_workers_of_a_scheduler_on_this_machine_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Processes(monkeypatch, ["a:1"])
    machine.ends, machine.status = False, 3
    assert retire_workers.main(120) == 3
    assert machine.asked == [[10]]


@pytest.mark.parametrize(
    ("line", "logged"),
    [
        ("<5>retire-workers: done", "<5>retire-workers: done"),
        ("<0>panic", "<4>panic"),
        ("<3><0>panic", "<4>panic"),
        ("<0><3>panic", "<4>panic"),
        ("plain\x1b[2J", "<4>plain?[2J"),
    ],
)
def test_a_container_cannot_choose_a_priority(line: str, logged: str) -> None:
    assert retire_workers.harmless(line) == logged


def test_workers_of_two_clusters_on_one_machine_are_both_found(tmp_path: Path) -> None:
    """Both wait for schedulers that do not exist."""
    options = ("--no-nanny", "--no-dashboard", "--local-directory", str(tmp_path))
    with (
        real_dask.dask("worker", "127.0.0.5:9", *options, log=tmp_path / "a.log"),
        real_dask.dask("worker", "127.0.0.6:9", *options, log=tmp_path / "b.log"),
    ):

        def seen() -> bool:
            found = [each.words for each in retire_workers.dask_processes()]
            return all(any(words[:1] == [each] for words in found) for each in ("127.0.0.5:9", "127.0.0.6:9"))

        processes.wait_until(seen, what="both workers", timeout=60, interval=0.2)


# In a container's namespaces

MACHINE = """
set -eu
python=$1
mount -t proc proc /proc
mount -t tmpfs tmpfs /mnt
chmod 1777 /mnt
programs=$PWD
cd /mnt
ip link set lo up
ip link add to-other type veth peer name other
unshare --net sleep 600 & holder=$!
there() { nsenter --target "$holder" --net "$@"; }
wait_for() {
    tries=300
    until grep -q "$1" "$2"; do
        sleep 0.2
        [ "$((tries -= 1))" -gt 0 ] || { cat here.log; exit 9; }
    done
}
until [ "$(readlink "/proc/$holder/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
ip link set other netns "$holder"
ip address add 10.99.0.1/24 dev to-other
ip link set to-other up
there ip address add 10.99.0.2/24 dev other
there ip link set other up
there ip link set lo up
mkdir -m 1777 here other
set -- "$2" --no-dashboard --local-directory "$3"
there "$python" -m dask scheduler --host 10.99.0.2 --port 8786 --no-dashboard >scheduler.log 2>&1 &
there "$python" -m dask worker 10.99.0.2:8786 --host 10.99.0.2 "$2" "$3" other >other.log 2>&1 &
env SECRET=1 TMPDIR=/mnt/here HOME=/mnt/here \\
    unshare --mount --ipc --uts setpriv --regid 7 --groups 7,65534 \\
    "$python" -m dask worker 10.99.0.2:8786 --host 10.99.0.1 "$2" "$3" here >here.log 2>&1 &
wait_for 'Registered to' here.log
wait_for 'Registered to' other.log
status=0
confined="setpriv --bounding-set $4 --inh-caps -all --no-new-privs" # as the unit does
$confined "$1" -I "$programs/retire_workers.py" 120 || status=$?
cat status
wait_for 'End worker' here.log
exit $status
"""

SEEN = """
import os
if "SECRET" in os.environ:
    with open("/proc/self/status") as seen, open("status", "w") as file:
        file.writelines(line for line in seen if line.startswith(("Gid", "Groups", "Cap", "NoNewPrivs")))
        file.write(f"secret {os.environ['SECRET']}\\n")
"""


@pytest.mark.needs("unshare", "nsenter", "setpriv", "ip")
@pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces")
def test_a_containers_worker_retires_from_outside_and_without_privileges(tmp_path: Path) -> None:
    """The machine is a pid namespace: no other Dask of this host is seen."""
    (tmp_path / "retire_workers.py").write_bytes((PROGRAMS / "retire_workers.py").read_bytes())
    body = (PROGRAMS / "retire.py").read_text()
    (tmp_path / "retire.py").write_text(
        body.replace("from __future__ import annotations\n", "", 1).replace(
            '"""\n\n', f'"""\nfrom __future__ import annotations\n{SEEN}\n', 1
        )
    )
    unit = resources.packer_dir() / "guest/etc/systemd/system/retire-workers@.service"
    allowed = re.search(r"^CapabilityBoundingSet=(.*)$", unit.read_text(), re.MULTILINE)
    assert allowed is not None
    bounds = ",".join(["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in allowed[1].split())])
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--net"]
    done = subprocess.run(
        [*unshare, "sh", "-c", MACHINE, "machine", sys.executable, "/usr/bin/python3", bounds],
        cwd=tmp_path,
        env={**os.environ, "DASK_DISTRIBUTED__LOGGING__DISTRIBUTED": "info"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tcp://10.99.0.1:" in done.stdout
    assert "the scheduler of process" in done.stdout, "the other machine's, which this host's /proc has too"
    lines = dict(line.split(None, 1) for line in done.stdout.splitlines() if line[:1] != "<")
    assert lines["Gid:"].split() == ["7"] * 4
    assert lines["Groups:"].split() == ["7", "65534"]
    assert {int(lines[f"Cap{name}:"], 16) for name in ("Prm", "Eff", "Bnd", "Amb")} == {0}
    assert lines["NoNewPrivs:"] == "1"
    assert lines["secret"] == "1"
