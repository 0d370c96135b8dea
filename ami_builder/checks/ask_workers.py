"""Runs inside the Dask container (Python 3.9 and later): asks every worker of this machine for its limits.

Arguments: the role, the number of workers to wait for (0: at least one), seconds. Prints one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

BOOT_ID = "/proc/sys/kernel/random/boot_id"
LOCAL = "127.0.0.1:8786"  # without a scheme: the container's variables decide about TLS


def ask_worker(dask_worker: Any) -> dict[str, Any]:
    """Return this worker's memory limit and thresholds, and the boot id of its machine."""
    memory = dask_worker.memory_manager
    return {
        "boot": Path(BOOT_ID).read_text(),
        "memory_limit": memory.memory_limit,
        "target": memory.memory_target_fraction,
        "spill": memory.memory_spill_fraction,
        "pause": memory.memory_pause_fraction,
    }


def ask_nanny(dask_worker: Any) -> dict[str, Any]:
    """Return the part of the limit at which this nanny restarts its worker."""
    return {"terminate": dask_worker.memory_manager.memory_terminate_fraction}


def main(role: str, expected: int, seconds: float) -> dict[str, Any]:
    """Wait for the scheduler and the workers, then ask them."""
    import dask  # type: ignore[import-not-found,unused-ignore]
    from distributed import Client  # type: ignore[import-not-found,unused-ignore]

    end = time.monotonic() + seconds
    dask.config.set({"distributed.comm.timeouts.connect": f"{seconds:.0f}s"})
    address = (os.environ.get("DASK_SCHEDULER_ADDRESS") if role == "worker" else None) or LOCAL
    with Client(address, timeout=seconds, set_as_default=False) as client:
        if role == "scheduler":
            return {"workers": []}
        # The checks judge whether there are fewer than expected.
        with suppress(TimeoutError, asyncio.TimeoutError):
            client.wait_for_workers(max(1, expected), timeout=max(1.0, end - time.monotonic()))
        # A cluster may have workers on other machines: only those of this boot count.
        boot = Path(BOOT_ID).read_text()
        workers = {a: w for a, w in client.run(ask_worker).items() if w["boot"] == boot}
        nannies = client.run(ask_nanny, nanny=True, workers=list(workers), on_error="ignore")
    return {"workers": [{"address": a, **w, "nanny": nannies.get(a)} for a, w in sorted(workers.items())]}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))))  # noqa: T201
