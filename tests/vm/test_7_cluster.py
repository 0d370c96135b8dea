"""`doctor` on one cluster of three machines: one worker is right, one has no limit, one has too little."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ami_builder.core.options import Network
from ami_builder.qemu.hardware import HOST_ADDRESS
from ami_builder.qemu.machine import boot_again
from ami_builder.system import processes
from tests.experiment.user_data import UNLIMITED
from tests.real_dask import scheduler
from tests.vm.conftest import GIB, Booted, ami_builder, booted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ami_builder.config.schema import Image

VARIABLE = "${AVAILABLE_MEMORY_FOR_DASK:-0}"
LIMITS = {"healthy": (VARIABLE, "1.0"), "unlimited": ("0", "1.0"), "low": (VARIABLE, "0.5")}
"""Of the container, and how much of that the worker is told."""
WORKER_PORT = 8790


@pytest.mark.whole
def test_each_worker_of_a_cluster_is_judged_by_its_own_machine(
    built: Mapping[str, Any], image: Image, tmp_path: Path
) -> None:
    disk = Path(built["artifact"]["location"])
    with ExitStack() as stack:
        # First in, last out: a machine ends with the thread that started it.
        pool = stack.enter_context(ThreadPoolExecutor(len(LIMITS)))
        address = stack.enter_context(scheduler(tmp_path))

        def start(name: str) -> None:
            folder = tmp_path / name

            def boot(attempt: int) -> Booted:
                where = folder / str(attempt)
                where.mkdir(parents=True)
                return stack.enter_context(booted(image, disk, where, memory=GIB, network=Network.NAT))

            machine = boot_again(boot, lambda: True)
            port = stack.enter_context(machine.forwarded(WORKER_PORT))
            compose = _compose(image, name, address.replace("127.0.0.1", HOST_ADDRESS), port)
            machine.root("systemctl is-system-running --wait", check=False)
            machine.session.run("cat >/etc/dask/compose.yaml", sudo=True, stdin=json.dumps(compose))
            if name == "unlimited":
                machine.root(UNLIMITED)
            machine.root("systemctl restart dask")

        list(pool.map(start, LIMITS))

        def all_there() -> Mapping[str, Any] | None:
            answer = ami_builder("doctor", address, "--timeout", "1min", "--json")
            told: Mapping[str, Any] = answer.json
            sure = [said for said in told["workers"] if said["health"] not in ("unknown", "no answer")]
            whole = len(sure) == len(LIMITS)
            return {**told, "status": answer.status} if whole else None

        told = processes.wait_until(all_there, what="three workers", timeout=600, interval=5)
    assert {said["worker"]["name"]: said["health"] for said in told["workers"]} == {
        "healthy": "right",
        "unlimited": "too high",
        "low": "needlessly low",
    }
    assert told["status"] == 5


def _compose(image: Image, name: str, address: str, port: int) -> dict[str, object]:
    """One worker that the scheduler reaches by a port of the machine that it runs on."""
    listen = ("--listen-address", f"tcp://0.0.0.0:{WORKER_PORT}")
    contact = ("--contact-address", f"tcp://127.0.0.1:{port}")
    limit, part = LIMITS[name]
    share = ("--memory-limit", part, "--local-directory", "/spill", "--no-dashboard")
    service = {
        "image": image.container.reference,
        "command": ["dask", "worker", address, "--name", name, "--nworkers", "1", *share, *listen, *contact],
        "network_mode": "host",
        "init": True,
        "mem_limit": limit,
        "memswap_limit": limit,
        "volumes": ["/var/lib/dask/spill:/spill"],
    }
    return {"services": {"worker": service}}
