"""How long `doctor` takes for many workers; run as a program, it is their cluster.

The scheduler is real. The workers are servers of Dask's that are registered and answer what one real worker
has read about itself, since a thousand whole ones don't fit on one machine; they share a process and a
processor, and answer one after the other.
"""

from __future__ import annotations

import asyncio
import resource
import subprocess
import sys
import time
from contextlib import suppress

from ami_builder.core.units import GIB
from ami_builder.doctor.rules import CgroupLimit, Reading, Worker, diagnose


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
                levels=(CgroupLimit(id=str(number), path=f"/{number}", limit=4 * GIB),),
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


async def _schedule(count: int) -> None:
    """Run a scheduler and, in another process, its workers; say its address once they are there."""
    from distributed import Scheduler

    async with Scheduler(host="127.0.0.1", port=0, dashboard=False) as scheduler:
        argv = [sys.executable, "-m", "tests.benchmarks.doctoring", str(count), scheduler.address]
        crew = await asyncio.create_subprocess_exec(*argv)
        try:
            while len(scheduler.workers) < count:
                await asyncio.sleep(0.1)
            print(scheduler.address, flush=True)
            await crew.wait()
        finally:
            with suppress(ProcessLookupError):
                crew.kill()


async def _work(count: int, address: str) -> None:
    """Answer as `count` workers do, each with a server and a registration of its own."""
    from distributed import Worker
    from distributed.comm.core import CommClosedError, connect
    from distributed.core import Server
    from distributed.versions import get_versions

    from ami_builder.doctor.probe import read

    async with Worker(address, nthreads=1, memory_limit=GIB, dashboard=False) as real:
        metrics, extra = await real.get_metrics(), await real.get_startup_information()
        answer: dict[str, object] = {"status": "OK", "result": read(real)}

    def run(**_: object) -> dict[str, object]:
        return answer

    servers, comms = [], []
    for number in range(count):
        server = Server({"run": run})
        await server.listen("tcp://127.0.0.1:0")
        comm = await connect(address)
        await comm.write(
            {
                "op": "register-worker",
                "reply": False,
                "address": server.address,
                "status": "running",
                "server_id": server.id,
                "nthreads": 1,
                "name": f"simulated-{number}",
                "now": time.time(),
                "resources": {},
                "memory_limit": GIB,
                "metrics": metrics,
                "services": {},
                "local_directory": "/nowhere",
                "versions": get_versions(),
                "nanny": None,
                "extra": extra,
                "stimulus_id": f"simulated-{number}",
            },
            serializers=["msgpack"],
        )
        await comm.read(deserializers=["msgpack"])
        servers.append(server)
        comms.append(comm)
    # Until the scheduler goes.
    with suppress(CommClosedError):
        while True:
            await comms[0].read(deserializers=["msgpack"])


if __name__ == "__main__":
    # Each worker has three connections.
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    asyncio.run(_work(int(sys.argv[1]), sys.argv[2]) if len(sys.argv) > 2 else _schedule(int(sys.argv[1])))
