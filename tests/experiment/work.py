"""What the tasks do; runs in the container, where there is only Python, Dask and what comes with it.

There is no NumPy in the shipped container: blocks of bytes do the same to memory as its arrays. This file
travels to the machine as it is, so it imports nothing of ours. Sizes are bytes, times seconds.
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
    """Return what this process holds of memory, as its nanny sees it."""
    with open("/proc/self/statm") as file:  # noqa: PTH123 - no more objects than needed, near the limit
        return int(file.read().split()[1]) * _PAGE


def grow(target: int, step: int, pause: float) -> list[bytes]:
    """Take memory, and fill it, until this process holds `target`."""
    held = []
    while rss() < target:
        held.append(b"\x01" * step)
        time.sleep(pause)
    return held


def leak(start: int, target: int, step: int, pause: float) -> int:
    """Take `start` at once and go on to `target` in steps; return what was reached."""
    held = grow(start, step, 0)
    held += grow(target, step, pause)
    return rss()


def first(name: str) -> bool:
    """Tell whether nobody has asked for this name on this machine before, however they ended."""
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
    """At the first attempt reach `target` and stay there a moment; and always do as the others do."""
    if first(name):
        held = grow(target, step, 0.02)
        time.sleep(0.5)
        del held
    return ordinary(size, seconds)


def end(name: str, size: int, seconds: float) -> int:
    """At the first attempt end this worker at once, as the kernel would; and then do as the others do."""
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
    """Return a block of two: with the copies of both that a product of matrices needs."""
    number = int.from_bytes(left, "little") ^ int.from_bytes(right, "little")
    return number.to_bytes(len(left), "little")


if __name__ == "__main__":  # the agent of W5, on the machine itself
    kept = grow(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
    while True:
        time.sleep(60)
