"""Runs inside every worker of any Dask cluster (Python 3.8 and later, standard library): tells its memory.

It travels as this text, so that neither our package nor our version of Python needs to be there.
"""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

NO_LIMIT = 1 << 60
"""cgroup v1 says "no limit" as a number near 2^63."""


def read(dask_worker: Any) -> dict[str, Any]:
    """Return what this worker is limited by, all sizes in bytes; only reads files, and only a few."""
    told = managed(dask_worker)
    if not sys.platform.startswith("linux"):
        return dict(told, error=f"runs on {platform.system()}: its memory is only read on Linux")
    try:
        told.update(machine(), **processes(dask_worker))
        told["levels"] = levels()
        told["spill_system"] = file_system(str(told["directory"]))
    except (OSError, ValueError, KeyError, IndexError) as unreadable:
        told["error"] = f"can't be read there: {type(unreadable).__name__}: {unreadable}"
    return told


def managed(worker: Any) -> dict[str, Any]:
    """Return the limit and the thresholds as Dask goes by them; 0 and False are "none"."""
    import dask
    import distributed

    manager = getattr(worker, "memory_manager", worker)
    told = {
        key: getattr(manager, f"memory_{key}_fraction", None) or None for key in ("target", "spill", "pause")
    }
    told["terminate"] = dask.config.get("distributed.worker.memory.terminate", None) or None
    return dict(
        told,
        limit=getattr(manager, "memory_limit", None) or None,
        nthreads=getattr(worker.state, "nthreads", 0) if hasattr(worker, "state") else worker.nthreads,
        nanny=bool(getattr(worker, "nanny", None)),
        directory=getattr(worker, "local_directory", ""),
        versions={
            "distributed": getattr(distributed, "__version__", "unknown"),
            "python": platform.python_version(),
        },
    )


def text(path: str) -> str:
    """Return a file's content; raises OSError."""
    with open(path) as file:  # noqa: PTH123 - as plain as can be, wherever it runs
        return file.read()


def sizes(path: str) -> dict[str, int]:
    """Read lines of `Name: number kB` into bytes."""
    found = {}
    for line in text(path).splitlines():
        words = line.replace(":", " ").split()
        if len(words) == 3 and words[2] == "kB" and words[1].isdigit():
            found[words[0]] = int(words[1]) * 1024
    return found


def machine() -> dict[str, Any]:
    """Return which machine this is, and its memory now."""
    memory = sizes("/proc/meminfo")
    return {
        "boot": text("/proc/sys/kernel/random/boot_id").strip(),
        "total": memory["MemTotal"],
        "available": memory["MemAvailable"],
        "swap": memory.get("SwapTotal", 0),
        "page": os.sysconf("SC_PAGE_SIZE"),
    }


def held(pid: int) -> int:
    """Return what a process holds that the kernel can't drop: what its files map is available memory."""
    memory = sizes(f"/proc/{pid}/status")
    if "RssAnon" in memory:
        return memory["RssAnon"] + memory.get("RssShmem", 0)
    return memory["VmRSS"]


def processes(worker: Any) -> dict[str, Any]:
    """Return what the worker's process and its nanny's hold, each under a name that is one on the machine."""
    space, own = os.readlink("/proc/self/ns/pid"), os.getpid()  # noqa: PTH115 - Python 3.8
    found = {f"{space} {own}": held(own)}
    nanny = None
    if getattr(worker, "nanny", None):
        try:
            nanny = f"{space} {os.getppid()}"
            found[nanny] = held(os.getppid())
        except (OSError, KeyError):
            nanny = None
    return {"processes": found, "nanny_process": nanny, "rss": sizes("/proc/self/status")["VmRSS"]}


def number(path: str) -> int | None:
    """Return the number in a cgroup's file; None for `max`, v1's nearly 2^63, and a file that isn't there."""
    try:
        content = text(path).strip()
    except OSError:
        return None
    return int(content) if content.isdigit() and int(content) < NO_LIMIT else None


def least(*numbers: int | None) -> int | None:
    """Return the least of the numbers that there are."""
    return min((each for each in numbers if each is not None), default=None)


def cgroup_folders() -> tuple[bool, list[str]]:
    """Return whether it is cgroup v2, and the worker's folder with those above it that are seen."""
    own = {}
    for line in text("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            own[controller] = path
    second = "memory" not in own
    path = own.get("" if second else "memory", "/")
    for line in text("/proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind != ("cgroup2" if second else "cgroup"):
            continue
        if not second and "memory" not in options.split(" ")[-1].split(","):
            continue
        root, mount = before.split(" ")[3:5]
        # Without a namespace of its own a container is told the host's path, and has its own folder mounted.
        inside = path[len(root) :] if root != "/" and (path + "/").startswith(root + "/") else path
        folder = os.path.normpath(mount + "/" + inside)
        if ".." in inside or not os.path.isdir(folder):  # noqa: PTH112
            folder = mount
        folders = [folder]
        while folders[-1] != mount:
            folders.append(os.path.dirname(folders[-1]))  # noqa: PTH120
        return second, folders
    return second, []


def levels() -> list[dict[str, Any]]:
    """Return those of the worker's cgroup and the ones above it that have a limit: the least of its files."""
    second, folders = cgroup_folders()
    found = []
    for folder in folders:
        if second:
            limit = least(number(folder + "/memory.max"), number(folder + "/memory.high"))
            swap = number(folder + "/memory.swap.max")
        else:
            limit = number(folder + "/memory.limit_in_bytes")
            both = number(folder + "/memory.memsw.limit_in_bytes")
            swap = None if both is None or limit is None else max(0, both - limit)
            if folder == folders[0]:
                # What the cgroups above allow is in here, those included that can't be seen.
                for line in text(folder + "/memory.stat").splitlines():
                    if line.startswith("hierarchical_memory_limit "):
                        above = int(line.split()[1])
                        limit = least(limit, above if above < NO_LIMIT else None)
        if limit is not None:
            status = os.stat(folder)  # noqa: PTH116
            found.append(
                {
                    "id": f"{status.st_dev}:{status.st_ino}",
                    "path": folder,
                    "limit": limit,
                    "swap": swap,
                    "held": taken(folder, second),
                }
            )
    return found


def taken(folder: str, second: bool) -> int:
    """Return what a cgroup and those in it hold that the kernel can't drop; 0 where it doesn't tell.

    Kernel, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst, memory.stat; `kernel` has all
    slab in it. Version 1 counts the kernel's memory elsewhere, and it is left out.
    """
    stat = {}
    try:
        for line in text(folder + "/memory.stat").splitlines():
            name, _, size = line.partition(" ")
            stat[name] = int(size)
    except (OSError, ValueError):
        return 0
    if not second:
        return stat.get("total_rss", 0) + stat.get("total_shmem", 0)
    kernel = stat.get("kernel", 0) - stat.get("slab_reclaimable", 0)
    return stat.get("anon", 0) + stat.get("shmem", 0) + stat.get("sock", 0) + max(0, kernel)


def file_system(directory: str) -> str:
    """Return the type of the file system that a folder is on."""
    folder, best, kind = os.path.realpath(directory), "", ""
    for line in text("/proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        mount = before.split(" ")[4].replace("\\040", " ")
        # A later mount hides an earlier one.
        if (folder + "/").startswith(mount.rstrip("/") + "/") and len(mount) >= len(best):
            best, kind = mount, after.split(" ")[0]
    return kind
