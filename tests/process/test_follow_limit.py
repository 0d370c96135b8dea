"""The preload that lets a real nanny and a real worker follow the limit of their container."""

from __future__ import annotations

import runpy
from operator import mul
from typing import TYPE_CHECKING, Any

import pytest

from ami_builder.core.errors import TimedOut
from ami_builder.core.units import GIB, MIB
from ami_builder.system import resources
from ami_builder.system.processes import wait_until
from tests import real_dask

if TYPE_CHECKING:
    from pathlib import Path

distributed = pytest.importorskip("distributed")
PRELOAD = resources.packer_dir() / "guest/usr/local/lib/dask/preload/follow_limit.py"
START = 4 * GIB


def _limits(client: Any) -> dict[str, list[int]]:
    """Return the limits that the scheduler, the workers and the nannies have."""

    def of_worker(dask_worker: Any) -> tuple[int, float, float]:
        memory = dask_worker.memory_manager
        return memory.memory_limit, memory.data.fast.n, dask_worker.state.transfer_incoming_bytes_limit

    workers = client.run(of_worker)
    nannies = client.run(lambda dask_worker: dask_worker.memory_manager.memory_limit, nanny=True)

    def listed(dask_scheduler: Any) -> tuple[list[int], int]:
        return [each.memory_limit for each in dask_scheduler.workers.values()], dask_scheduler.total_memory

    limits, total = client.run_on_scheduler(listed)
    return {
        "listed": limits,
        "workers": [limit for limit, _, _ in workers.values()],
        "targets": [target for _, target, _ in workers.values()],
        "incoming": [incoming for _, _, incoming in workers.values()],
        "nannies": list(nannies.values()),
        "total": [total],
    }


def _expected(limit: int, workers: int) -> dict[str, list[Any]]:
    return {
        "listed": [limit] * workers,
        "workers": [limit] * workers,
        "targets": [int(limit * 0.6)] * workers,
        "incoming": [pytest.approx(limit * 0.1, abs=2)] * workers,
        "nannies": [limit] * workers,
        "total": [limit * workers],
    }


def _follows(client: Any, limit: int, workers: int) -> None:
    expected = _expected(limit, workers)
    try:
        wait_until(lambda: _limits(client) == expected, what="the new limit", timeout=20, interval=0.5)
    except TimedOut:
        assert _limits(client) == expected


def test_nannies_workers_and_scheduler_follow_the_container(tmp_path: Path) -> None:
    """Each keeps its part, less than the whole with a headroom; a worker that starts again too."""
    maximum = tmp_path / "memory.max"
    maximum.write_text(f"{START}\n")
    mine = tmp_path / "mine.py"
    mine.write_text("def dask_setup(worker):\n    worker.mine = True\n")
    part = 3 * GIB // 2  # two workers, and 1 GiB for what else runs in the container
    flags = ("--nworkers", "2", "--nthreads", "1", "--memory-limit", str(part), "--no-dashboard")
    environment = {
        "FOLLOW_LIMIT_FILE": str(maximum),
        "FOLLOW_LIMIT_MAXIMUM": str(START),
        "DASK_DISTRIBUTED__WORKER__PRELOAD": f'["{mine}"]',
    }
    # It went down before Dask had started.
    maximum.write_text(f"{START * 3 // 4}\n")
    with (
        real_dask.scheduler(tmp_path) as address,
        real_dask.dask(
            *("worker", address, *flags, "--preload-nanny", str(PRELOAD)),
            *("--local-directory", str(tmp_path / "spill")),
            log=tmp_path / "worker.log",
            **environment,
        ),
        distributed.Client(address, timeout="120s") as client,
    ):
        client.wait_for_workers(2, timeout=120)
        _follows(client, part * 3 // 4, 2)
        maximum.write_text(f"{START}\n")
        _follows(client, part, 2)
        assert list(client.run(lambda dask_worker: dask_worker.mine).values()) == [True, True]
        maximum.write_text(f"{START * 3 // 4}\n")
        _follows(client, part * 3 // 4, 2)
        client.restart()
        client.wait_for_workers(2, timeout=120)
        _follows(client, part * 3 // 4, 2)
        maximum.write_text(f"{START}\n")
        _follows(client, part, 2)
        maximum.write_text("max\n")
        maximum.write_text(f"{START // 2}\n")
        _follows(client, part // 2, 2)


def test_no_nanny_ends_its_worker_because_the_limit_went_down(tmp_path: Path) -> None:
    """The worker gets the time to spill, and then the nanny has the new limit too."""
    maximum = tmp_path / "memory.max"
    maximum.write_text(f"{START}\n")
    with (
        real_dask.scheduler(tmp_path) as address,
        real_dask.dask(
            *("worker", address, "--nthreads", "1", "--memory-limit", str(600 * MIB), "--no-dashboard"),
            *("--preload-nanny", str(PRELOAD), "--local-directory", str(tmp_path / "spill")),
            log=tmp_path / "worker.log",
            FOLLOW_LIMIT_FILE=str(maximum),
            DASK_DISTRIBUTED__WORKER__MEMORY__SPILL="False",
        ) as log,
        distributed.Client(address, timeout="120s") as client,
    ):
        client.wait_for_workers(1, timeout=120)
        held = client.submit(mul, b"x", 300 * MIB, key="held")
        distributed.wait(held)
        maximum.write_text(f"{START // 2}\n")  # of 600 MiB, the worker holds about 400
        limits = wait_until(
            lambda: found if (found := _limits(client))["workers"] == [300 * MIB] else None,
            what="the worker's new limit",
            timeout=60,
        )
        (nanny,) = limits["nannies"]
        assert 300 * MIB < nanny <= 600 * MIB
        assert len(client.who_has(held)["held"]) == 1
        del held
        _follows(client, 300 * MIB, 1)
        assert "exceeded" not in log.read_text()


@pytest.mark.parametrize("content", ["max\n", None])
def test_a_container_without_a_limit_is_not_followed(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "memory.max").write_text(content)
    flags = ("--nthreads", "1", "--memory-limit", str(GIB), "--no-dashboard", "--preload-nanny", str(PRELOAD))
    with (
        real_dask.scheduler(tmp_path) as address,
        real_dask.dask(
            *("worker", address, *flags, "--local-directory", str(tmp_path / "spill")),
            log=tmp_path / "worker.log",
            FOLLOW_LIMIT_FILE=str(tmp_path / "memory.max"),
        ) as log,
    ):
        real_dask.said(log, "Registered to:")
        assert ("does not follow" in log.read_text()) is (content is None)


@pytest.mark.parametrize(
    ("own", "path"),
    [
        ("0::/\n", "/sys/fs/cgroup//memory.max"),
        ("1:name=systemd:/\n0::/system.slice/a.scope\n", "/sys/fs/cgroup/system.slice/a.scope/memory.max"),
    ],
)
def test_the_limit_is_that_of_the_own_cgroup(tmp_path: Path, own: str, path: str) -> None:
    (tmp_path / "cgroup").write_text(own)
    assert runpy.run_path(str(PRELOAD))["memory_max"](str(tmp_path / "cgroup")) == path
