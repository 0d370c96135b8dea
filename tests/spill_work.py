"""Run in a guest's container: a worker that has to spill; prints one JSON object of what it measured."""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time

from distributed import Client, LocalCluster, wait

BLOCK = 16 << 20
LIMIT = 512 << 20


def block(number: int) -> bytes:
    """Return a block that is not like the others."""
    return bytes([number % 256]) * BLOCK


def main(folder: str, count: int) -> None:
    """Make `count` blocks, most of which spill to `folder`; then read them all."""
    free = shutil.disk_usage(folder).free
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            memory_limit=LIMIT,
            local_directory=folder,
            dashboard_address=None,
            worker_dashboard_address=None,
        ) as cluster,
        Client(cluster) as client,
    ):
        began = time.monotonic()
        blocks = client.map(block, range(count), pure=False)
        wait(blocks)
        written = time.monotonic()
        (spilled,) = client.run(lambda dask_worker: int(dask_worker.data.spilled_total.disk)).values()
        used = free - shutil.disk_usage(folder).free
        # Each block is read alone: a worker unspills what a task needs.
        whole = sum(client.gather(client.map(len, blocks))) == count * BLOCK
        read = time.monotonic()
        (seconds,) = client.run(lambda: sum(resource.getrusage(resource.RUSAGE_SELF)[:2])).values()
    found = {"spilled": spilled, "used": used, "whole": whole, "cpu": seconds}
    print(json.dumps(found | {"write": written - began, "read": read - written}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
