"""The guest in real life: what goes wrong on machines, each once, most on one VM that all of these share.

A container that only sleeps stands in for Dask where it is not Dask that is looked at: it starts in a moment.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ami_builder.build import guest as render
from ami_builder.config.schema import Image, ImageSettings
from ami_builder.system.certificates import Authority
from tests import tls_errors_probe
from tests.real_dask import tls_folder
from tests.vm.conftest import Booted, Saved, guest_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SLEEPS = ["sh", "-c", "sleep 3600 # dask worker"]
UP = "docker ps -q | grep -q ."
SECONDS = 120


@pytest.fixture(scope="module")
def shared(saved: Saved, image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    """The VM that these tests share: Dask is stopped, all else is up."""
    with guest_of(saved, image, tmp_path_factory.mktemp("guest")) as machine:
        machine.root("mkdir /run/kept; cp -a /etc/dask /run/kept")
        yield machine


@pytest.fixture
def guest(shared: Booted) -> Iterator[Booted]:
    """The same VM, with its own files again when a test is over."""
    yield shared
    shared.root(
        "systemctl stop dask; docker ps -aq | xargs -r docker rm -f >/dev/null; cp -a /run/kept/dask /etc;"
        " rm -f /run/dask/failures; systemctl reset-failed dask; true"
    )


def compose(image: Image, **services: Mapping[str, object]) -> str:
    """Return a script that writes a Compose file of services on the machine's network."""
    common = {"image": image.container.reference, "network_mode": "host", "init": True}
    text = json.dumps({"services": {name: common | dict(service) for name, service in services.items()}})
    return f"cat >/etc/dask/compose.yaml <<'EOF'\n{text}\nEOF\n"


def until(guest: Booted, condition: str) -> None:
    """Wait until a shell's condition holds on the VM."""
    guest.root(f"timeout {SECONDS} sh -c {shlex.quote(f'until {condition}; do sleep 0.5; done')}")


def since(guest: Booted) -> int:
    return int(guest.root("date +%s"))


def said(guest: Booted, begun: int, text: str) -> None:
    """Wait until dask.service has said something."""
    until(guest, f"journalctl -q -o cat -b -u dask --since @{begun} | grep -qF {shlex.quote(text)}")


def properties(guest: Booted, *names: str) -> list[str]:
    return [guest.root(f"systemctl show dask.service --value -p {name}").strip() for name in names]


def runs(guest: Booted, *options: str, image: Image, command: str) -> str:
    """Return what a command prints in a container that is started as anybody would."""
    return guest.root(f"docker run --rm {' '.join(options)} {image.container.reference} {command} 2>&1")


MAXIMUM = "cat /sys/fs/cgroup/memory.max"


def limit(guest: Booted) -> str:
    return guest.root("sed -n s/^AVAILABLE_MEMORY_FOR_DASK=//p /run/dask/memory.env").strip()


def test_a_container_has_the_limit_of_the_machine_unless_it_asks_for_another(
    guest: Booted, image: Image
) -> None:
    asked = {"": limit(guest), "--memory 268435456": "268435456"}
    assert {given: runs(guest, given, image=image, command=MAXIMUM).split()[-1] for given in asked} == asked
    guest.root("rm /run/systemd/system/docker-.scope.d/10-dask.conf")
    unmeasured = int(runs(guest, image=image, command=MAXIMUM).split()[-1])
    total = int(guest.root("sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo")) * 1024
    assert abs(unmeasured - total * 3 // 4) < 1 << 20
    guest.root("/usr/local/sbin/measure-memory")


def test_a_container_that_runs_keeps_its_limit(guest: Booted, image: Image) -> None:
    """A new measurement is for those that come later, whatever makes systemd read its files again."""
    before = limit(guest)
    guest.root(f"docker run -d --name kept {image.container.reference} sleep 3600")
    read = "cat /sys/fs/cgroup/system.slice/docker-$(docker inspect -f '{{.Id}}' kept).scope/memory.max"
    assert guest.root(read).strip() == before
    guest.root("head -c 200M /dev/zero >/dev/shm/agent; /usr/local/sbin/measure-memory")
    after = limit(guest)
    guest.root("rm /dev/shm/agent; systemctl daemon-reload")
    assert guest.root(read).strip() == before
    assert int(before) - int(after) > 150 << 20
    assert runs(guest, image=image, command=MAXIMUM).split()[-1] == after


def test_a_container_can_be_exempt_by_its_name(guest: Booted, image: Image) -> None:
    settings = ImageSettings().overlaid({"container.unlimited": ("agent-*",)})
    files = render.guest(settings.image("agents"))
    for path in set(files) - set(render.guest(image)):
        guest.session.run(f"cat >{path}", sudo=True, stdin=files[path].content.decode())
        guest.root(f"chmod {files[path].mode:o} {path}")
    guest.root("systemctl daemon-reload")
    seen = {}
    for name in ("agent-x", "other"):
        guest.root(f"docker run -d --name {name} {image.container.reference} sleep 3600")
        seen[name] = (
            f"/sys/fs/cgroup/system.slice/docker-$(docker inspect -f '{{{{.Id}}}}' {name}).scope/memory.max"
        )
    until(guest, f"grep -q max {seen['agent-x']}")
    assert guest.root(f"cat {seen['other']}").strip() == limit(guest)
    guest.root("rm /etc/systemd/system/docker-.scope.d/30-unlimited.conf")


def test_what_a_container_asks_nothing_for_is_bounded(guest: Booted, image: Image) -> None:
    """Core dumps, open files and processes; and its log."""
    script = "sh -c 'ulimit -c; ulimit -n; cat /sys/fs/cgroup/pids.max'"
    core, files, processes = runs(guest, image=image, command=script).split()[-3:]
    assert (core, files) == ("0", "65536")
    assert 0 < int(processes) < 100_000
    dump = "sh -c 'cd /tmp; sleep 60 & kill -SEGV $!; wait $!; ls'"
    assert "core" not in runs(guest, image=image, command=dump).split()
    guest.root(f"docker run -d --name logs {image.container.reference} sleep 3600")
    log = json.loads(guest.root("docker inspect -f '{{json .HostConfig.LogConfig}}' logs"))
    assert log == {"Type": "json-file", "Config": {"max-file": "3", "max-size": "10m"}}


def test_the_metadata_is_out_of_reach_for_containers_alone(guest: Booted, image: Image) -> None:
    """A task of Dask would have what the instance's role may do."""
    probe = "import socket; socket.create_connection(('169.254.169.254', 80), 10); print('reached')"
    ask = f'python -c "{probe}"'
    assert "reached" in guest.root(f'python3 -c "{probe}"')
    assert "reached" not in runs(guest, "--network host", image=image, command=f"{ask} || true")
    guest.root("mv /etc/systemd/system/docker-.scope.d/20-metadata.conf /run/")
    assert "reached" in runs(guest, "--network host", image=image, command=ask)
    guest.root("mv /run/20-metadata.conf /etc/systemd/system/docker-.scope.d/")


def test_docker_hides_no_network(guest: Booted) -> None:
    assert "docker0" not in guest.root("ip route get 172.17.5.10 2>&1; ip link", check=False)


@pytest.mark.parametrize(
    "after", [{}, {"depends_on": {"init": {"condition": "service_completed_successfully"}}}]
)
def test_what_has_done_its_work_beside_dask_does_not_end_it(
    guest: Booted, image: Image, after: dict[str, Any]
) -> None:
    begun = since(guest)
    worker: dict[str, object] = {"command": SLEEPS, **after}
    guest.root(compose(image, worker=worker, init={"command": "true"}) + "systemctl restart dask")
    said(guest, begun, "dask-init-1 has completed")
    assert properties(guest, "ActiveState", "NRestarts") == ["active", "0"]
    assert guest.root("docker ps --format '{{.Names}}'").split() == ["dask-worker-1"]


def test_a_dask_that_ends_well_is_started_again(guest: Booted, image: Image) -> None:
    """As a worker does whose scheduler has ended."""
    begun = since(guest)
    worker = {"command": ["sh", "-c", "sleep 2 # dask worker"]}
    guest.root(compose(image, worker=worker, logs={"command": "sleep 3600"}) + "systemctl restart dask")
    said(guest, begun, "dask-worker-1 has ended")
    until(guest, "[ $(systemctl show dask -P NRestarts) -ge 1 ]")


def test_user_data_may_restart_dask(guest: Booted, image: Image) -> None:
    """cloud-final.service waits for the command, so nothing that the command waits for may wait for it."""
    command = "[Service]\\nExecStart=\\nExecStart=systemctl restart dask\\n"
    guest.root(
        compose(image, worker={"command": SLEEPS}) + "cd /run/systemd/system; mkdir cloud-final.service.d\n"
        f"printf '{command}' >cloud-final.service.d/x.conf; systemctl daemon-reload\n"
        f"timeout {SECONDS} systemctl restart cloud-final"
    )
    until(guest, UP)
    assert properties(guest, "ActiveState") == ["active"]
    guest.root("rm -r /run/systemd/system/cloud-final.service.d; systemctl daemon-reload")


def test_a_worker_waits_for_its_scheduler(guest: Booted, image: Image) -> None:
    """It says so once a minute, starts nothing meanwhile, and goes on by itself."""
    begun = since(guest)
    settings = "DASK_ROLE=worker\\nDASK_SCHEDULER_ADDRESS=tcp://127.0.0.1:9999\\n"
    guest.root(
        compose(image, worker={"command": SLEEPS}) + f"printf '{settings}' >/etc/dask/dask.env\n"
        "systemctl restart dask"
    )
    said(guest, begun, "waiting for the scheduler at tcp://127.0.0.1:9999")
    assert guest.root("cat /run/dask/health").splitlines()[0] == "waiting"
    assert guest.root("docker ps -aq").split() == []
    guest.root("systemd-run --unit late -q python3 -m http.server --bind 127.0.0.1 9999")
    said(guest, begun, "AVAILABLE_MEMORY_FOR_DASK=")
    until(guest, UP)
    guest.root("systemctl stop late")
    assert properties(guest, "ActiveState", "NRestarts") == ["active", "0"]


def test_dask_comes_back_with_docker(guest: Booted, image: Image) -> None:
    """When an administrator stops and starts it, and when it is killed."""
    guest.root(compose(image, worker={"command": SLEEPS}) + "systemctl restart dask")
    until(guest, UP)
    guest.root("systemctl stop docker.socket docker; systemctl start docker")
    until(guest, UP)
    assert properties(guest, "ActiveState") == ["active"]
    begun = since(guest)
    guest.root("systemctl kill -s KILL docker")
    said(guest, begun, "AVAILABLE_MEMORY_FOR_DASK=")
    until(guest, UP)
    assert properties(guest, "ActiveState") == ["active"]


def test_a_docker_that_hangs_does_not_keep_dask_from_stopping(guest: Booted, image: Image) -> None:
    bounds = "[Service]\\nEnvironment=STOP_DASK_SECONDS=3 REMOVE_DASK_SECONDS=3\\n"
    guest.root(
        "cd /etc/systemd/system; mkdir dask.service.d; "
        f"printf '{bounds}' >dask.service.d/bounds.conf\n"
        + compose(image, worker={"command": SLEEPS})
        + "systemctl daemon-reload; systemctl restart dask\n"
    )
    until(guest, UP)
    try:
        guest.root("systemctl kill -s STOP docker; timeout 60 systemctl stop dask")
    finally:
        guest.root("systemctl kill -s CONT docker")
    assert properties(guest, "ActiveState") == ["inactive"]
    guest.root("rm -r /etc/systemd/system/dask.service.d; systemctl daemon-reload")


def test_a_full_disk_is_said_and_heals(guest: Booted, image: Image) -> None:
    begun = since(guest)
    guest.root(compose(image, worker={"command": SLEEPS}))
    free = "$(df --output=avail -B1 / | tail -n 1)"
    guest.root(f"fallocate -l {free} /filled; cat /dev/zero >/filled2", check=False)
    guest.root("systemctl start dask", check=False)
    said(guest, begun, "Compose could not start Dask")
    assert guest.root("cat /run/dask/health").splitlines()[0] in ("unhealthy", "starting")
    guest.root("rm /filled /filled2")
    until(guest, UP)
    assert properties(guest, "ActiveState") == ["active"]


@pytest.mark.parametrize(
    ("settings", "state", "health"),
    [
        ("DASK_ROLE=none\\n", "inactive", "off"),
        ("DASK_ROLE=local\\nmine and yours\\n", "failed", "refused"),
    ],
)
def test_what_is_not_started_is_said_once(guest: Booted, settings: str, state: str, health: str) -> None:
    guest.root(f"printf '{settings}' >/etc/dask/dask.env; systemctl start dask", check=False)
    until(guest, f"systemctl show dask -P ActiveState | grep -q {state}")
    assert guest.root("cat /run/dask/health").splitlines()[0] == health
    assert guest.root("dask-health; head -n 1 /run/dask/health", check=False).split()[-1] == health


def test_a_kill_is_in_the_log_of_any_container(guest: Booted, image: Image) -> None:
    """Its stderr is a pipe that belongs to the container's user."""
    grow = """sleep 5; python -c 'x = bytes(range(256)) * (1 << 20)'; sleep 60"""
    run = f"docker run --detach --name other --memory 50m --network host {image.container.reference}"
    guest.root(f"{run} sh -c {shlex.quote(grow)}")
    killed = "the kernel killed python (pid [0-9]*, which held .* of container other at its limit of 50 MiB"
    until(guest, f"docker logs other 2>&1 | grep -q '^{killed}'")
    until(guest, f"journalctl -b -t dask -o cat | grep -q '^watch-kills: {killed}'")
    guest.root("docker rm --force other")


def test_a_broken_tls_connection_breaks_no_other(guest: Booted, image: Image, tmp_path: Path) -> None:
    """Without the preload it does. When a newer Python in the container mends that, the preload can go."""
    issued = Authority.create(days=2).issue("worker", days=1, serves=True)
    files = {path.name: path.read_text() for path in tls_folder(tmp_path / "tls", issued).iterdir()}
    files["probe.py"] = Path(tls_errors_probe.__file__).read_text()
    for name, text in files.items():
        guest.session.run(f"install -D /dev/stdin /run/probe/{name}", sudo=True, stdin=text)
    preload = "/usr/local/lib/dask/tls_errors.py"
    run = (
        "docker run --rm --network host --volume /run/probe:/probe:ro"
        f" --volume {preload}:/tls_errors.py:ro {image.container.reference} python /probe/probe.py /probe"
    )
    assert guest.root(run) == "broken\n"
    assert guest.root(f"{run} /tls_errors.py") == "whole\n"


def test_the_units_are_confined(guest: Booted) -> None:
    units = ("dask", "dask-memory", "dask-health", "dask-notices", "dask-reports", "watch-kills")
    for unit in (f"{name}.service" for name in units):
        score = guest.root(f"systemd-analyze security --no-pager {unit} | tail -n 1")
        assert float(score.split(":")[1].split()[0]) <= 5, score
