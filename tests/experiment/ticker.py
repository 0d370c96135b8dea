"""Runs on the VM, outside the container: writes a line with the memory in use ten times a second.

It writes to the serial console, which QEMU records: a VM that is unresponsive allows no login to read a file.
Each line has the word `tick`, the uptime in seconds, the anonymous memory of the container, MemAvailable, and
the microseconds that some and all tasks were stalled waiting for memory (PSI). Sizes are bytes.
"""

from __future__ import annotations

import glob
import os
import sys
import time

_CONTAINER = "/sys/fs/cgroup/system.slice/docker-*.scope/memory.stat"


def text(path: str) -> str:
    """Return a file's content, or an empty string."""
    try:
        with open(path) as file:  # noqa: PTH123 - as plain as can be
            return file.read()
    except OSError:
        return ""


def word_after(content: str, name: str) -> int:
    """Return the number that follows a word, or 0."""
    words = content.split()
    return int(words[words.index(name) + 1]) if name in words else 0


def stalled(content: str) -> str:
    """Return the totals of /proc/pressure/memory: some, and full."""
    totals = [word.split("=")[1] for word in content.split() if word.startswith("total=")]
    return " ".join(totals) if len(totals) == 2 else "0 0"


def main() -> None:
    """Write to the file named by the first argument, without end."""
    path = ""
    with open(sys.argv[1], "w") as out:  # noqa: PTH123
        while True:
            if not path or not os.path.exists(path):  # noqa: PTH110
                path = next(iter(glob.glob(_CONTAINER)), "")  # noqa: PTH207
            held = word_after(text(path)[:200], "anon") if path else 0
            available = word_after(text("/proc/meminfo")[:300], "MemAvailable:") * 1024
            now = time.clock_gettime(time.CLOCK_BOOTTIME)
            stalls = stalled(text("/proc/pressure/memory"))
            # The kernel may have written half a line.
            out.write(f"\ntick {now:.3f} {held} {available} {stalls} .\n")
            out.flush()
            time.sleep(0.1)


if __name__ == "__main__":
    main()
