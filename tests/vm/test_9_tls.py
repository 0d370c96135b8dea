"""TLS in real life: each role with what `certificates` makes for it, on one VM that all of these share."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from ami_builder.cli import app as cli
from ami_builder.core.records import PRESSURE
from ami_builder.system import processes
from tests.vm.conftest import Booted, Saved, ami_builder, guest_of, red

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ami_builder.config.schema import Image

pytestmark = pytest.mark.whole

OTHER_PORT = 8799
COMPOSE = "cp /var/lib/ami-builder/compose.image.yaml /etc/dask/compose.yaml"
RESTART = "rm -f /run/dask/health; systemctl restart dask"
HEALTHY = "timeout 600 sh -c 'until dask-health; do sleep 1; done'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `certificates` makes, for workers of a scheduler on the same VM."""
    folder = tmp_path_factory.mktemp("tls") / "certificates"
    # With a scheme, as dask.env of a cluster without TLS has it: the guest takes it off.
    assert cli.run(["-q", "certificates", str(folder), "--scheduler", f"tcp://127.0.0.1:{OTHER_PORT}"]) == 0
    return folder


@pytest.fixture(scope="module")
def guest(saved: Saved, image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    """The VM that these tests share: Dask is stopped, all else is up."""
    with guest_of(saved, image, tmp_path_factory.mktemp("guest")) as machine:
        yield machine


def apply(guest: Booted, folder: Path, role: str) -> None:
    """Write what a role's user data writes, with the image's own Compose file, and start Dask."""
    guest.root(f"systemctl stop dask; rm -rf /etc/dask/tls; mkdir -p /etc/dask/tls; {COMPOSE}")
    for file in yaml.safe_load((folder / role / "user-data.yaml").read_text())["write_files"]:
        path = shlex.quote(file["path"])
        guest.session.run(
            f"cat >{path}; chmod {file.get('permissions', '644')} {path}", sudo=True, stdin=file["content"]
        )
    guest.root(RESTART)


def doctor(port: int, *arguments: str | Path, scheme: str = "tls") -> Any:
    return ami_builder("doctor", f"{scheme}://127.0.0.1:{port}", "--timeout", "2min", *arguments)


def workers(port: int, folder: Path) -> Any:
    """Wait until a worker is there, and return what doctor says."""

    def ask() -> Any:
        result = doctor(port, "--tls", folder, "--json")
        return result if result.status != 7 and result.json["workers"] else None

    return processes.wait_until(ask, what="a worker", timeout=600, interval=2)


def test_a_whole_cluster_passes_all_checks_and_takes_no_other_client(
    guest: Booted, folder: Path, tmp_path: Path
) -> None:
    apply(guest, folder, "local")
    guest.root(HEALTHY)
    checked = replace(guest, context=replace(guest.context, tls=True))
    results = checked.check("tls")
    assert red(results) == {}
    assert results["tls: only clients with a certificate get an answer"].message == ""
    other = tmp_path / "other"
    assert cli.run(["-q", "certificates", str(other)]) == 0
    with guest.forwarded(8786) as port:
        right = workers(port, folder)
        assert right.status == 0, right.stderr
        assert [one["worker"]["address"][:6] for one in right.json["workers"]] == ["tls://"]
        assert "another CA issued it" in doctor(port, "--tls", other).stderr
        plain = doctor(port, scheme="tcp")
        assert (plain.status, "the scheduler uses TLS" in plain.stderr) == (2, True)
    assert guest.root("cat /run/dask/health") == "healthy\n"


def test_memory_pressure_works_with_tls(guest: Booted, folder: Path) -> None:
    checked = replace(guest, context=replace(guest.context, tls=True))
    assert red(checked.check("pressure", phase=PRESSURE)) == {}


def test_a_scheduler_answers_its_own_client(guest: Booted, folder: Path) -> None:
    apply(guest, folder, "scheduler")
    guest.root(HEALTHY)
    with guest.forwarded(8786) as port:
        result = doctor(port, "--tls", folder)
        assert (result.status, result.stderr.splitlines()[-1]) == (5, "the scheduler has no workers")


def test_a_worker_waits_for_its_scheduler_and_joins_it(guest: Booted, folder: Path, image: Image) -> None:
    """First the scheduler has no TLS: then the worker says so, and joins as soon as it has."""
    start = (
        "docker run -d --rm --name other --network host {} " + image.container.reference + " dask scheduler"
        f" --host 127.0.0.1 --port {OTHER_PORT} --no-dashboard --dashboard-address 127.0.0.1:0"
    )
    tls = "--env-file /run/dask/comm.env --volume /run/dask/private/tls:/run/dask/tls:ro"
    guest.root(start.format(""))
    apply(guest, folder, "worker")
    reason = "it does not use TLS, but this machine has certificates"
    guest.root(f"timeout 300 sh -c 'until grep -q {shlex.quote(reason)} /run/dask/health; do sleep 1; done'")
    guest.root(f"docker rm -f other; {start.format(tls)}")
    guest.root(HEALTHY)
    with guest.forwarded(OTHER_PORT) as port:
        result = workers(port, folder)
    (worker,) = result.json["workers"]
    measured = guest.root("sed -n s/^AVAILABLE_MEMORY_FOR_DASK=//p /run/dask/memory.env").strip()
    assert worker["worker"]["reading"]["limit"] == int(measured)
    guest.root("docker rm -f other")


def test_any_user_of_a_container_can_read_the_key_but_nobody_else_here(guest: Booted, image: Image) -> None:
    mounted = f"--volume /run/dask/private/tls:/run/dask/tls:ro {image.container.reference}"
    inside = f"docker run --rm --user 4711:4711 {mounted} cat /run/dask/tls/key.pem"
    assert "PRIVATE KEY" in guest.root(inside)
    assert guest.session.run("cat /run/dask/private/tls/key.pem", check=False, timeout=60).stdout == ""
