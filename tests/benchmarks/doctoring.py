"""How long `doctor` takes for many workers; run as a program, it is their cluster.

The scheduler is real and so are the workers (without nannies), but all live in one process, where one after
the other answers: on machines of their own they would answer side by side.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from contextlib import AsyncExitStack

from ami_builder.diagnosis import Level, Reading, Worker, diagnose
from ami_builder.spelling import GIB

AT_A_TIME = 50


def judging_seconds(count: int) -> float:
    """Return the seconds of CPU for judging `count` workers, four a machine, each in a container."""
    workers = [
        Worker(
            address=f"tcp://10.0.0.1:{number}",
            reading=Reading(
                boot=str(number // 4),
                limit=number % 5 * GIB,
                nthreads=1,
                total=16 * GIB,
                available=15 * GIB,
                processes={str(number): GIB // 8},
                levels=(Level(id=str(number), path=f"/{number}", limit=4 * GIB),),
            ),
        )
        for number in range(count)
    ]
    started = time.process_time()
    told = diagnose(workers)
    seconds = time.process_time() - started
    assert len({each.health for each in told}) > 2
    return seconds


def doctor_seconds(count: int) -> float:
    """Return the least seconds of three `ami-builder doctor` for `count` workers."""
    cluster = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.doctoring", str(count)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        times = []
        for _ in range(3):
            started = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", "ami_builder", "-q", "doctor", address],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                check=False,
            )
            times.append(time.perf_counter() - started)
            assert len(done.stdout.splitlines()) == count
            assert "no answer" not in done.stdout
        return min(times)
    finally:
        cluster.terminate()
        cluster.wait()


async def _serve(count: int) -> None:
    import dask
    from distributed import Scheduler, Worker

    dask.config.set({"distributed.admin.system-monitor.interval": "1h"})
    dask.config.set({"distributed.worker.profile.enabled": False})
    async with AsyncExitStack() as stack:
        scheduler = await stack.enter_async_context(Scheduler(host="127.0.0.1", port=0, dashboard=False))
        for first in range(0, count, AT_A_TIME):
            workers = [
                Worker(
                    scheduler.address, nthreads=1, memory_limit=GIB, dashboard=False, heartbeat_interval="1h"
                )
                for _ in range(first, min(count, first + AT_A_TIME))
            ]
            await asyncio.gather(*map(stack.enter_async_context, workers))
        print(scheduler.address, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
