"""The image's own Compose file: three roles, one limit, and shares that stay within it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from ami_builder.build import guest
from ami_builder.system.processes import wait_until
from ami_builder.verify import journey
from tests.fake_programs import calls, fake
from tests.sample_image import image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ami_builder.config.schema import Image

ROLES = ("local", "worker", "scheduler")


def _services(of: Image) -> dict[str, dict[str, Any]]:
    content = guest.guest(of)[PurePosixPath("/etc/dask/compose.yaml")].content
    services: dict[str, dict[str, Any]] = yaml.safe_load(content)["services"]
    return services


def _command(of: Image, role: str) -> str:
    command = _services(of)[role]["command"]
    return command if isinstance(command, str) else str(command[2])


def _share(of: Image, role: str) -> str:
    found = re.search(r"--memory-limit (\S+)", _command(of, role))
    assert found is not None
    return found[1]


def _distributed(text: str, limit: int) -> int:
    """What distributed 2026.8 makes of --memory-limit (worker_memory.parse_memory_limit)."""
    number = float(text)
    return int(number * limit) if number <= 1 else int(number)


@pytest.mark.parametrize("role", ROLES)
def test_each_role_is_limited_by_what_was_measured(role: str) -> None:
    service = _services(image())[role]
    assert service["profiles"] == [role]
    assert service["mem_limit"] == "${AVAILABLE_MEMORY_FOR_DASK:-0}"
    assert service["memswap_limit"] == "${AVAILABLE_MEMORY_FOR_DASK:-0}"
    bends = {"mem_reservation", "deploy", "cgroup", "cgroup_parent", "oom_kill_disable", "user"}
    assert not bends & set(service)


@pytest.mark.parametrize("role", ROLES)
def test_each_role_has_what_the_field_taught(role: str) -> None:
    service = _services(image())[role]
    assert service["network_mode"] == "host"
    assert service["init"] is True
    assert service["restart"] == "no", "Docker must never bring back a container with a stored limit"
    assert service["healthcheck"] == {"disable": True}
    assert service["volumes"] == [
        "/var/lib/dask/spill/service:/spill",
        "/run/dask/private/tls:/run/dask/tls:ro",
        "/usr/local/lib/dask/preload:/run/dask/preload:ro",
        "/run/dask/reports:/run/dask/reports",
        "/run/dask/public:/run/dask/public:ro",
    ]
    assert service["ulimits"] == {"nofile": 65536}
    assert service["logging"]["driver"] == "json-file"
    assert set(service["logging"]["options"]) == {"max-size", "max-file"}
    assert service["environment"]["DASK_DISTRIBUTED__WORKER__MEMORY__MAX_SPILL"] == "${DASK_MAX_SPILL:-false}"


@pytest.mark.parametrize("role", ROLES)
def test_each_role_takes_tls_from_start_dask(role: str) -> None:
    """An address with a scheme would decide for itself, against the variables of that file."""
    assert _services(image())[role]["env_file"] == "/run/dask/comm.env"
    assert "://" not in _command(image(), role)


def test_there_is_one_service_a_role() -> None:
    assert tuple(_services(image())) == ROLES


@pytest.mark.parametrize("reference", ["ami-builder/dask:1", "10.0.2.2:5000/team/dask@sha256:" + "0" * 64])
def test_the_container_is_the_configured_one(reference: str) -> None:
    assert {service["image"] for service in _services(image(reference=reference)).values()} == {reference}


@pytest.mark.parametrize("role", ["local", "worker"])
def test_workers_spill_to_the_disk_and_threads_are_dasks_own_choice(role: str) -> None:
    assert "--local-directory /spill" in _command(image(), role)
    assert "--nthreads ${DASK_THREADS:-0} " in _command(image(), role)
    assert "--nthreads 4 " in _command(image(threads=4), role)
    assert "--nworkers 3 " in _command(image(workers=3), role)


def test_http_is_on_one_port_in_every_role() -> None:
    for role in ROLES:
        address = "${DASK_LISTEN:-127.0.0.1}" if role == "local" else ""
        assert _command(image(), role).count(f"--dashboard-address {address}:8787") == 1
    # The rest of a worker's HTTP server is there without a dashboard, by default for the network.
    assert "--no-dashboard --dashboard-address 127.0.0.1:0 " in _command(image(), "local")
    assert "--no-dashboard --dashboard-address 127.0.0.1:0 " in journey.user_data(image(), nonce="n")


@pytest.mark.parametrize("role", ["local", "worker"])
@given(limit=st.integers(min_value=6 << 20, max_value=24 << 40))
def test_one_worker_has_the_whole_limit_to_the_byte(role: str, limit: int) -> None:
    assert _distributed(_ONE[role], limit) == limit


_ONE = {role: _share(image(), role) for role in ("local", "worker")}
_SHARES = {
    workers: _share(image(workers=workers), "worker") for workers in (2, 3, 4, 6, 7, 10, 13, 49, 96, 192)
}


@given(workers=st.sampled_from(sorted(_SHARES)), pages=st.integers(min_value=1536, max_value=6 << 30))
@example(workers=49, pages=297607331)
def test_the_shares_of_several_workers_stay_within_the_limit(workers: int, pages: int) -> None:
    limit = pages * 4096
    total = workers * _distributed(_SHARES[workers], limit)
    # Each share is rounded down to a byte.
    assert limit - workers <= total <= limit


@pytest.mark.parametrize("role", ["local", "worker"])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_headroom_leaves_the_share_to_start_dask(role: str, workers: int) -> None:
    """Without a measurement a fraction remains, as it is without a headroom."""
    fraction = _share(image(workers=workers), role)
    with_headroom = image(workers=workers, headroom=64 << 20)
    assert _share(with_headroom, role) == "${DASK_WORKER_MEMORY:-%s}" % fraction  # noqa: UP031
    plain, sent = (journey.user_data(of, nonce="n") for of in (image(workers=workers), with_headroom))
    assert f"--memory-limit {fraction} " in plain
    assert f"--memory-limit ${{DASK_WORKER_MEMORY:-{fraction}}} " in sent


@contextmanager
def _local(tmp_path: Path, scenario: str, service: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a whole cluster's shell with a `dask` that behaves as `scenario` says; what is left ends too."""
    fake(tmp_path, "dask", scenario)
    *shell, script = service["command"]
    for compose, shells in (
        ("$$", "$"),
        ("${DASK_THREADS:-0}", "0"),
        ("${DASK_WORKER_MEMORY:-1.0}", "1.0"),
        ("${DASK_LISTEN:-127.0.0.1}", "127.0.0.1"),
    ):
        script = script.replace(compose, shells)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    process = subprocess.Popen([*shell, script], env=env, start_new_session=True)
    try:
        yield process
    finally:
        # As the end of a container's first process does.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _own() -> dict[str, Any]:
    return _services(image())["local"]


def _sent() -> dict[str, Any]:
    """What a control plane sends, as the checks have it."""
    files = yaml.safe_load(journey.user_data(image(), nonce="x"))["write_files"]
    service: dict[str, Any] = yaml.safe_load(files[1]["content"])["services"]["cluster"]
    return service


STAYS = 'trap "exit 0" TERM; : >"$0.$1.ready"; sleep 60 & wait'


@pytest.mark.parametrize("service", [_own, _sent])
@pytest.mark.parametrize("status", [0, 1, 137])
@pytest.mark.parametrize(("ends", "other"), [("worker", "scheduler"), ("scheduler", "worker")])
def test_local_fails_at_once_when_one_side_ends_by_itself(
    tmp_path: Path, ends: str, other: str, status: int, service: Callable[[], dict[str, Any]]
) -> None:
    """A worker waits for minutes for a scheduler that the kernel has killed, and the cluster hangs."""
    # A shell that has only just forked may lose the signal that ends it; no real worker ends that early.
    early = f'until [ -e "$0.{other}.ready" ]; do sleep 0.01; done; exit {status}'
    with _local(tmp_path, f"case $1 in {ends}) {early} ;; esac\n{STAYS}", service()) as process:
        assert process.wait(120) == 1
    # The other may be stopped before it has said that it was called.
    assert any(call.startswith(f"{ends} ") for call in calls(tmp_path, "dask"))


@pytest.mark.parametrize("service", [_own, _sent])
def test_local_ends_well_when_it_is_asked_to(tmp_path: Path, service: Callable[[], dict[str, Any]]) -> None:
    with _local(tmp_path, STAYS, service()) as process:
        _wait_for(tmp_path / "dask.worker.ready")
        _wait_for(tmp_path / "dask.scheduler.ready")
        process.terminate()
        assert process.wait(120) == 0


def test_local_stays_where_the_containers_tail_cannot_watch(tmp_path: Path) -> None:
    """BusyBox's has no --pid: that must not end a cluster that is well."""
    fake(tmp_path, "tail", 'echo "unrecognized option" >&2; : >"$0.failed"; exit 1')
    with _local(tmp_path, STAYS, _own()) as process:
        _wait_for(tmp_path / "tail.failed")
        _wait_for(tmp_path / "dask.worker.ready")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)


def _wait_for(path: Path) -> None:
    assert wait_until(path.exists, what=path.name, timeout=120, interval=0.02)
