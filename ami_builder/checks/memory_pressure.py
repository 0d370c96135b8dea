"""Runs inside the Dask container (Python 3.9 and later) and brings the workers to their limits, step by step.

The code that runs the steps stays in the scheduler: a client that waits would use about 100 MB, on a machine
whose available memory belongs to Dask. memory_pressure.sh follows the steps by files.

Arguments: the number of workers, the data to store as a multiple of their limit, the machine's uptime in
seconds at which all steps must have ended, the common part of the files' paths.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Awaitable, Coroutine, Iterator, Optional, TypeVar  # noqa: UP035 - Python 3.9

SCHEDULER = "127.0.0.1:8786"  # without a scheme: the container's variables decide about TLS
TOPIC = "ami-builder-pressure"
BLOCK = 1 << 16
# A task fails with its first lost worker. With Dask's default of 3 it takes four, and each costs a restart.
ALLOWED_FAILURES = 0
GIB = 1 << 30

Result = TypeVar("Result")


def uptime() -> float:
    """Return for how many seconds the machine has been up, as in /proc/uptime."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def about(dask_worker: Any) -> dict[str, Any]:
    """Return this worker's pid, its limit, and how many bytes it can spill."""
    memory, directory = dask_worker.memory_manager, dask_worker.local_directory
    room = shutil.disk_usage(directory).free
    return {
        "pid": os.getpid(),
        "limit": memory.memory_limit or 0,
        "spillable": min(room, memory.max_spill or room),
    }


def spilled(dask_worker: Any) -> int:
    """Return how many bytes of this worker's results are on its disk now."""
    total = getattr(dask_worker.data, "spilled_total", None)
    return int(total.disk) if total is not None else 0


def chunk(_number: int, size: int) -> bytes:
    """Return `size` random bytes."""
    return os.urandom(BLOCK) * (size // BLOCK)


def length(data: bytes) -> int:
    """Compare the parts of a chunk and return its length; -1 if the chunk has changed."""
    same = all(data[at : at + 64] == data[:64] for at in range(0, len(data), BLOCK))
    return len(data) if same else -1


def leak(limit: int) -> int:
    """Allocate memory past `limit`: fast up to 85 % of it, then 1 % for each check of the nanny (100 ms)."""
    import psutil  # type: ignore[import-untyped,unused-ignore]
    from distributed import get_worker  # type: ignore[import-not-found,unused-ignore]

    get_worker().log_event(TOPIC, {"pid": os.getpid()})
    process, held = psutil.Process(), []
    time.sleep(0.3)  # until the event has been sent
    while (size := process.memory_info().rss) < limit * 1.1:
        held.append(b"\1" * (limit // 100))
        if size > limit * 0.85:
            time.sleep(0.1)
    return int(size)


async def follow(scheduler: Any, workers: int, work: float, end: float, path: str) -> None:
    """Run all steps and write their results; an error of a step is part of the results."""
    answer: dict[str, Any] = {"step": "nothing", "error": "", "seconds": {}}
    began, before = time.time(), scheduler.allowed_failures
    scheduler.allowed_failures = ALLOWED_FAILURES
    seconds = max(0.0, end - uptime())
    going = asyncio.ensure_future(steps(scheduler, workers, work, path, answer))
    # Not wait_for: it waits for the cancelled task, and a client on a machine without memory ends slowly.
    await asyncio.wait({going}, timeout=seconds)
    if not going.done():
        answer["error"] = f"{answer['step']}: not finished after {seconds:.0f} s in all"
        going.cancel()
    elif (wrong := going.exception()) is not None:  # this file is the only place to report it
        answer["error"] = f"{answer['step']}: {type(wrong).__name__}: {wrong}"
    scheduler.allowed_failures = before

    def events(topic: str) -> list[Any]:
        # Not those of a first attempt.
        return [(when, message) for when, message in scheduler.get_events(topic) if when >= began]

    answer["leaks"] = [{"time": t, "pid": m["pid"]} for t, m in events(TOPIC)]
    by_nanny = events("worker-restart-memory")
    answer["nanny"] = [{"time": t, "pid": m["pid"], "rss": m["rss"]} for t, m in by_nanny]
    ends = events("worker-deaths")
    answer["deaths"] = [{"time": t, "pid": m.get("pid"), "by": m.get("by")} for t, m in ends]
    done = Path(f"{path}.json")
    done.with_suffix(".new").write_text(json.dumps(answer))
    done.with_suffix(".new").rename(done)


async def unless_lost(scheduler: Any, work: Awaitable[Result]) -> Optional[Result]:  # noqa: UP045 - Python 3.9
    """Return the result of the work, or None as soon as a worker is lost."""

    def there() -> set[str]:
        return {worker.server_id for worker in scheduler.workers.values()}

    doing, had = asyncio.ensure_future(work), there()
    while not doing.done() and had <= there():
        await asyncio.wait({doing}, timeout=0.5)
    if doing.done():
        return doing.result()
    doing.cancel()
    return None


@contextmanager
def in_background(doing: Coroutine[Any, Any, None]) -> Iterator[None]:
    """Run a task while the block runs."""
    task = asyncio.ensure_future(doing)
    try:
        yield
    finally:
        task.cancel()


def report(path: str, text: str) -> None:
    """Write the progress to the file that memory_pressure.sh reads."""
    new = Path(f"{path}.progress.new")
    new.write_text(f"{text}\n")
    new.rename(f"{path}.progress")


async def report_finished(path: str, what: str, size: int, futures: list[Any]) -> None:
    """Report every two seconds how much of the work is finished."""
    while True:
        done = sum(future.status == "finished" for future in futures) * size
        report(path, f"{what} {done / GIB:.1f} of {len(futures) * size / GIB:.1f} GiB")
        await asyncio.sleep(2)


async def report_largest(path: str, scheduler: Any, limit: int) -> None:
    """Report every two seconds how large the largest worker is."""
    while True:
        memory = max((w.metrics.get("memory", 0) for w in scheduler.workers.values()), default=0)
        report(path, f"leaking: a worker uses {memory * 100 // limit} % of its limit")
        await asyncio.sleep(2)


async def all_up(scheduler: Any, workers: int) -> None:
    """Wait until so many workers run."""
    while len(scheduler.running) < max(1, workers):
        await asyncio.sleep(0.5)


async def steps(scheduler: Any, workers: int, work: float, path: str, answer: dict[str, Any]) -> None:
    """Spill `work` times the limit, leak past it, let another process grow past it, and recover."""
    from distributed import Client, wait  # type: ignore[import-not-found,unused-ignore]

    began = time.monotonic()

    def step(name: str) -> None:
        nonlocal began
        now = time.monotonic()
        answer["seconds"][answer["step"]], answer["step"] = round(now - began, 1), name
        began = now

    async with Client(scheduler.address, asynchronous=True, set_as_default=False) as client:
        step("asking")
        await all_up(scheduler, workers)
        before = list((await client.run(about)).values())
        answer["workers"], answer["scheduler"] = before, os.getpid()

        step("spilling")
        limit = sum(w["limit"] for w in before)
        size = min(int(work * limit), limit // 2 + sum(w["spillable"] for w in before) * 9 // 10)
        each = max(size // 100, 4 << 20) // BLOCK * BLOCK
        answer["spill"] = spill = {"limit": limit, "size": size // each * each}
        made = client.map(chunk, range(size // each), size=each, pure=False)
        with client.as_current(), in_background(report_finished(path, "spilling", each, made)):
            ready = await unless_lost(scheduler, wait(made))
        if ready:
            spill["spilled"] = sum((await client.run(spilled)).values())
            # Results that are still in memory come first: this makes room for the rest.
            read = client.map(length, made[::-1], pure=False)
            # Dask drops each result once it was read; else a result that is read back pushes another to disk.
            del made, ready
            with in_background(report_finished(path, "reading back", each, read)):
                lengths = await unless_lost(scheduler, client.gather(read))
            del read
            if lengths:
                spill["read"] = sum(lengths) if min(lengths) >= 0 else -1
        else:
            del made
        await all_up(scheduler, workers)
        spill["pids"] = [w["pid"] for w in (await client.run(about)).values()]

        step("leaking")
        largest = max(w["limit"] for w in before)
        with in_background(report_largest(path, scheduler, max(1, largest))):
            try:
                survived = await client.submit(leak, largest, pure=False)
                answer["leaked"] = f"completed, with {survived} bytes"
            except Exception as wrong:  # the check judges the type
                answer["leaked"] = type(wrong).__name__
        Path(f"{path}.leaked").touch()

        step("another process takes the limit")
        while not Path(f"{path}.grown").exists():
            await asyncio.sleep(0.5)

        step("recovering")
        await all_up(scheduler, workers)
        answer["served"] = await client.submit(sum, [20, 22], pure=False)
        answer["back"] = list((await client.run(about)).values())
        step("nothing")


def begin(workers: int, work: float, end: float, path: str, dask_scheduler: Any = None) -> None:
    """Start the steps in the scheduler, and return."""
    going = asyncio.get_running_loop().create_task(follow(dask_scheduler, workers, work, end, path))
    dask_scheduler.ami_builder_pressure = going  # a task without a reference may be collected


def main(workers: int, work: float, end: float, path: str) -> None:
    """Start the steps through a client, which then ends."""
    from distributed import Client  # type: ignore[import-not-found,unused-ignore]

    with Client(SCHEDULER, timeout=max(1.0, end - uptime()), set_as_default=False) as client:
        client.run_on_scheduler(begin, workers=workers, work=work, end=end, path=path)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
