"""Run in a guest's container: the experiment's tasks; prints one JSON object of what they cost.

The container has no more of this project than this file and the functions of the tasks, which come on stdin.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from distributed import Client, LocalCluster, wait

from tests.experiment import work


def busy_seconds() -> float:
    """Return how long the VM's processors have worked, also for the kernel's own threads."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, _steal = fields
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def main(limit: int, tasks: list[dict[str, Any]]) -> None:
    """Give the tasks to a worker of `limit` bytes with one thread, so that their order is always the same."""
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            memory_limit=limit,
            local_directory="/tmp",
            dashboard_address=None,
            worker_dashboard_address=None,
        ) as cluster,
        Client(cluster) as client,
    ):
        began, busy = time.monotonic(), busy_seconds()
        futures: dict[str, Any] = {}
        for task in tasks:
            arguments = [*(futures[key] for key in task["after"]), *task["arguments"]]
            futures[task["key"]] = client.submit(
                getattr(work, task["function"]), *arguments, key=task["key"], pure=False
            )
        kept = [futures[task["key"]] for task in tasks if task["kept"]]
        futures.clear()
        wait(kept)
        found = {"seconds": time.monotonic() - began, "busy": busy_seconds() - busy}
        (spilled,) = client.run(lambda dask_worker: int(dask_worker.data.spilled_total.disk)).values()
        done = sum(future.status == "finished" for future in kept)
    print(json.dumps(found | {"spilled": spilled, "done": done, "of": len(kept)}))


if __name__ == "__main__":
    main(int(sys.argv[1]), json.load(sys.stdin))
