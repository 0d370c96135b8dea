"""The functions of the tasks. They run in the container, which has only Python, Dask and its dependencies.

The shipped container has no NumPy, so blocks of bytes replace arrays. This file is copied to the VM, so it
imports nothing from this project. Sizes are bytes, times seconds.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import zlib

SEEN = "/experiment/seen"
_PAGE = os.sysconf("SC_PAGE_SIZE")


def rss() -> int:
    """Return the resident memory of this process, which its nanny watches."""
    with open("/proc/self/statm") as file:  # noqa: PTH123 - no more objects than needed, near the limit
        return int(file.read().split()[1]) * _PAGE


def grow(target: int, step: int, pause: float) -> list[bytes]:
    """Allocate and fill memory until this process holds `target`."""
    held = []
    while rss() < target:
        held.append(b"\x01" * step)
        time.sleep(pause)
    return held


def leak(start: int, target: int, step: int, pause: float) -> int:
    """Grow to `start` at once, then to `target` in steps. Return the size that was reached."""
    held = grow(start, step, 0)
    held += grow(target, step, pause)
    return rss()


def first(name: str) -> bool:
    """Return whether this is the first attempt under this name on this VM."""
    os.makedirs(SEEN, exist_ok=True)  # noqa: PTH103
    try:
        os.close(os.open(f"{SEEN}/{name}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def ordinary(size: int, seconds: float) -> int:
    """Hold a block, and compute for a while."""
    held, checksum = b"\x01" * size, 0
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        checksum = zlib.crc32(held[:65536], checksum)
    return checksum


def spike(name: str, target: int, step: int, size: int, seconds: float) -> int:
    """At the first attempt, grow to `target` for a moment. Then do what `ordinary` does."""
    if first(name):
        held = grow(target, step, 0.02)
        time.sleep(0.5)
        del held
    return ordinary(size, seconds)


def end(name: str, size: int, seconds: float) -> int:
    """At the first attempt, kill this worker, as the kernel would. Otherwise do what `ordinary` does."""
    if first(name):
        os.kill(os.getpid(), signal.SIGKILL)
    return ordinary(size, seconds)


def block(size: int) -> bytes:
    """Return random bytes."""
    piece = os.urandom(min(size, 1 << 20))
    return piece * (size // len(piece))


def digest(data: bytes) -> int:
    """Reduce a block to a number."""
    return zlib.crc32(data)


def combine(*numbers: int) -> int:
    """Reduce numbers to one."""
    return sum(numbers) & 0xFFFFFFFF


def multiply(left: bytes, right: bytes) -> bytes:
    """Combine two blocks into one. Copies both, as a product of matrices does."""
    number = int.from_bytes(left, "little") ^ int.from_bytes(right, "little")
    return number.to_bytes(len(left), "little")


if __name__ == "__main__":  # the agent of W5, outside of the container
    kept = grow(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
    while True:
        time.sleep(60)
