"""Runs inside the Dask container (Python 3.9 and later): brings the workers to their limits, step by step.

What drives the steps is left behind in the scheduler: a client of its own would take some 100 MB for as long
as it waits, on a machine whose available memory was given to Dask. memory_pressure.sh follows the steps by files.

Arguments: the number of workers, how many times their limit they have to work on, the machine's uptime in
seconds at which all steps have to be gone, the files' common path.
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

SCHEDULER = "tcp://127.0.0.1:8786"
TOPIC = "ami-builder-pressure"
BLOCK = 1 << 16
# One death of a worker fails a task, where Dask's default of 3 takes four: each costs a restart and shows the
# same again.
ALLOWED_FAILURES = 0
GIB = 1 << 30

Result = TypeVar("Result")


def uptime() -> float:
    """Return for how many seconds the machine has been up, as /proc/uptime has it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def about(dask_worker: Any) -> dict[str, Any]:
    """Tell which process this worker is, what its limit is, and how much it can spill."""
    memory, directory = dask_worker.memory_manager, dask_worker.local_directory
    room = shutil.disk_usage(directory).free
    return {
        "pid": os.getpid(),
        "limit": memory.memory_limit or 0,
        "spillable": min(room, memory.max_spill or room),
    }


def spilled(dask_worker: Any) -> int:
    """Tell how many bytes of this worker's results are on its disk now."""
    total = getattr(dask_worker.data, "spilled_total", None)
    return int(total.disk) if total is not None else 0


def chunk(number: int, size: int) -> bytes:
    """Make `size` bytes that no other chunk has."""
    return os.urandom(BLOCK) * (size // BLOCK)


def length(data: bytes) -> int:
    """Look at each part of a chunk, and return its length; -1 when it isn't what it was."""
    same = all(data[at : at + 64] == data[:64] for at in range(0, len(data), BLOCK))
    return len(data) if same else -1


def leak(limit: int) -> int:
    """Take memory past `limit`: fast up to 85 % of it, then 1 % for each of the nanny's looks (100 ms)."""
    import psutil  # type: ignore[import-untyped,unused-ignore]
    from distributed import get_worker  # type: ignore[import-not-found,unused-ignore]

    get_worker().log_event(TOPIC, {"pid": os.getpid()})
    process, held = psutil.Process(), []
    time.sleep(0.3)  # until that has left
    while (size := process.memory_info().rss) < limit * 1.1:
        held.append(b"\1" * (limit // 100))
        if size > limit * 0.85:
            time.sleep(0.1)
    return int(size)


async def follow(scheduler: Any, workers: int, work: float, end: float, path: str) -> None:
    """Go all steps and write what they showed; what goes wrong on the way is part of that."""
    answer: dict[str, Any] = {"step": "nothing", "error": "", "seconds": {}}
    began, before = time.time(), scheduler.allowed_failures
    scheduler.allowed_failures = ALLOWED_FAILURES
    seconds = max(0.0, end - uptime())
    going = asyncio.ensure_future(steps(scheduler, workers, work, path, answer))
    # Not wait_for: that waits for what is cancelled, and a client on an ill machine takes long to go.
    await asyncio.wait({going}, timeout=seconds)
    if not going.done():
        answer["error"] = f"{answer['step']} had not ended after {seconds:.0f} s in all"
        going.cancel()
    elif (wrong := going.exception()) is not None:  # there is nobody else to tell
        answer["error"] = f"{answer['step']}: {type(wrong).__name__}: {wrong}"
    scheduler.allowed_failures = before

    def events(topic: str) -> list[Any]:
        # Not those of a first try.
        return [(when, message) for when, message in scheduler.get_events(topic) if when >= began]

    answer["leaks"] = [{"time": t, "pid": m["pid"]} for t, m in events(TOPIC)]
    by_nanny = events("worker-restart-memory")
    answer["nanny"] = [{"time": t, "pid": m["pid"], "rss": m["rss"]} for t, m in by_nanny]
    done = Path(f"{path}.json")
    done.with_suffix(".new").write_text(json.dumps(answer))
    done.with_suffix(".new").rename(done)


async def whole(scheduler: Any, work: Awaitable[Result]) -> Optional[Result]:  # noqa: UP045 - Python 3.9
    """Return what comes of the work, or None as soon as one of the workers is gone."""

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
def beside(doing: Coroutine[Any, Any, None]) -> Iterator[None]:
    """Let something go on while the block runs."""
    task = asyncio.ensure_future(doing)
    try:
        yield
    finally:
        task.cancel()


def report(path: str, text: str) -> None:
    """Say what is going on, where memory_pressure.sh looks for it."""
    new = Path(f"{path}.progress.new")
    new.write_text(f"{text}\n")
    new.rename(f"{path}.progress")


async def reported(path: str, what: str, size: int, futures: list[Any]) -> None:
    """Report again and again how much of the work is finished."""
    while True:
        done = sum(future.status == "finished" for future in futures) * size
        report(path, f"{what} {done / GIB:.1f} of {len(futures) * size / GIB:.1f} GiB")
        await asyncio.sleep(2)


async def grown(path: str, scheduler: Any, limit: int) -> None:
    """Report again and again how large the largest worker is."""
    while True:
        memory = max((w.metrics.get("memory", 0) for w in scheduler.workers.values()), default=0)
        report(path, f"leaking: a worker holds {memory * 100 // limit} % of its limit")
        await asyncio.sleep(2)


async def all_up(scheduler: Any, workers: int) -> None:
    """Wait until so many workers are at work."""
    while len(scheduler.running) < max(1, workers):
        await asyncio.sleep(0.5)


async def steps(scheduler: Any, workers: int, work: float, path: str, answer: dict[str, Any]) -> None:
    """Spill `work` times the limit, leak past it, let somebody else grow past it, and be back."""
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
        told = list((await client.run(about)).values())
        answer["workers"], answer["scheduler"] = told, os.getpid()

        step("spilling")
        limit = sum(w["limit"] for w in told)
        size = min(int(work * limit), limit // 2 + sum(w["spillable"] for w in told) * 9 // 10)
        each = max(size // 100, 4 << 20) // BLOCK * BLOCK
        answer["spill"] = spill = {"limit": limit, "size": size // each * each}
        made = client.map(chunk, range(size // each), size=each, pure=False)
        with client.as_current(), beside(reported(path, "spilling", each, made)):
            ready = await whole(scheduler, wait(made))
        if ready:
            spill["spilled"] = sum((await client.run(spilled)).values())
            # What is still in memory first: it makes room for the rest.
            read = client.map(length, made[::-1], pure=False)
            # Each goes once it was read, else it takes the place of one that is written again.
            del made, ready
            with beside(reported(path, "reading back", each, read)):
                lengths = await whole(scheduler, client.gather(read))
            del read
            if lengths:
                spill["read"] = sum(lengths) if min(lengths) >= 0 else -1
        else:
            del made
        await all_up(scheduler, workers)
        spill["pids"] = [w["pid"] for w in (await client.run(about)).values()]

        step("leaking")
        largest = max(w["limit"] for w in told)
        with beside(grown(path, scheduler, max(1, largest))):
            try:
                survived = await client.submit(leak, largest, pure=False)
                answer["leaked"] = f"went on to the end, with {survived} bytes"
            except Exception as wrong:  # whatever it is, is judged
                answer["leaked"] = type(wrong).__name__
        Path(f"{path}.leaked").touch()

        step("what grows beside Dask")
        while not Path(f"{path}.grown").exists():
            await asyncio.sleep(0.5)

        step("coming back")
        await all_up(scheduler, workers)
        answer["served"] = await client.submit(sum, [20, 22], pure=False)
        answer["back"] = list((await client.run(about)).values())
        step("nothing")


def begin(workers: int, work: float, end: float, path: str, dask_scheduler: Any = None) -> None:
    """Start all that in the scheduler, and return."""
    going = asyncio.get_running_loop().create_task(follow(dask_scheduler, workers, work, end, path))
    dask_scheduler.ami_builder_pressure = going  # a task that nobody holds may vanish


def main(workers: int, work: float, end: float, path: str) -> None:
    """Leave the steps with the scheduler."""
    from distributed import Client  # type: ignore[import-not-found,unused-ignore]

    with Client(SCHEDULER, timeout=max(1.0, end - uptime()), set_as_default=False) as client:
        client.run_on_scheduler(begin, workers=workers, work=work, end=end, path=path)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
