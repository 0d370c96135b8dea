"""Runs in the workers and the scheduler of any Dask cluster: their memory, machines and versions.

Needs Python 3.8 and Dask only. The source is sent there, so they need neither this package nor the same
version of Python.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from typing import Any

NO_LIMIT = 1 << 60
"""In cgroup v1, no limit is a number near 2^63."""
GROWTH = "/run/dask/public/memory.json"
"""What compare-memory writes every 30 seconds. The image's own Compose file mounts it."""
STALE = 300
"""Seconds after which it is out of date."""
PACKAGES = (
    *("python", "dask", "distributed", "cloudpickle", "msgpack", "tornado", "toolz"),
    *("numpy", "pandas", "lz4"),
)
"""What distributed compares when a client connects (distributed.versions)."""
NOT_OF_SCHEDULERS = frozenset({"numpy", "pandas"})
"""Of these, what a scheduler need not have in the same version (the same source)."""


def read(dask_worker: Any) -> dict[str, Any]:
    """Return what limits this worker, in bytes. Reads a few files and changes nothing."""
    found = managed(dask_worker)
    if not sys.platform.startswith("linux"):
        return dict(found, error=f"runs on {platform.system()}; memory can be read on Linux only")
    try:
        found.update(machine(), **processes(dask_worker))
        found["levels"] = levels()
        found["growth"] = growth()
        found["spill_system"] = file_system(str(found["directory"]))
        found["spill_size"], found["spill_free"] = space(str(found["directory"]))
    except (OSError, ValueError, KeyError, IndexError) as unreadable:
        found["error"] = f"its memory can't be read: {type(unreadable).__name__}: {unreadable}"
    return found


def scheduler() -> dict[str, Any]:
    """Return the machine and the versions of the scheduler that this runs in."""
    found = {"versions": versions(), "host": platform.node(), "instance": instance(), "boot": ""}
    if sys.platform.startswith("linux"):
        found["boot"] = text("/proc/sys/kernel/random/boot_id").strip()
    return found


def versions() -> dict[str, str]:
    """Return the versions of what has to be the same all over a cluster."""
    import dask
    import distributed

    found = {
        "dask": getattr(dask, "__version__", "unknown"),
        "distributed": getattr(distributed, "__version__", "unknown"),
        "python": platform.python_version(),
    }
    for name in PACKAGES:
        if name not in found:
            with suppress(Exception):
                found[name] = version(name) or "unknown"
    return found


def instance() -> str:
    """Return the id of the EC2 instance that this runs on, in a container too; empty elsewhere.

    Source: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/identify_ec2_instances.html
    """
    try:
        vendor = text("/sys/class/dmi/id/sys_vendor").strip()
        tag = text("/sys/class/dmi/id/board_asset_tag").strip()
    except OSError:
        return ""
    return tag if vendor == "Amazon EC2" and re.match(r"i-[0-9a-f]{8,17}$", tag) else ""


def managed(worker: Any) -> dict[str, Any]:
    """Return the limit and the thresholds that Dask uses; None for 0 and False."""
    import dask

    manager = getattr(worker, "memory_manager", worker)
    found = {
        key: getattr(manager, f"memory_{key}_fraction", None) or None for key in ("target", "spill", "pause")
    }
    found["terminate"] = dask.config.get("distributed.worker.memory.terminate", None) or None
    return dict(
        found,
        limit=getattr(manager, "memory_limit", None) or None,
        nthreads=getattr(worker.state, "nthreads", 0) if hasattr(worker, "state") else worker.nthreads,
        nanny=bool(getattr(worker, "nanny", None)),
        directory=getattr(worker, "local_directory", ""),
        max_spill=getattr(manager, "max_spill", None) or None,
        versions=versions(),
    )


def text(path: str) -> str:
    """Return a file's content; raises OSError."""
    with open(path) as file:  # noqa: PTH123
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
        "host": platform.node(),
        "instance": instance(),
        "total": memory["MemTotal"],
        "available": memory["MemAvailable"],
        "swap": memory.get("SwapTotal", 0),
        "page": os.sysconf("SC_PAGE_SIZE"),
    }


def growth(path: str = GROWTH) -> dict[str, Any] | None:
    """Return what a machine of ami-builder says of the growth of its system; None elsewhere.

    `excess` is by how much its reserve is exceeded now; a limit that followed down is no excess.
    """
    try:
        with open(path) as file:  # noqa: PTH123
            if time.time() - os.fstat(file.fileno()).st_mtime > STALE:
                return None
            found = json.load(file)
        return {
            "reserve": int(found["reserve"]),
            "growth": int(found["growth"]),
            "excess": int(found["excess"]) - int(found["limit_at_start"]) + int(found["limit"]),
            "by": {str(one["cgroup"]): int(one["bytes"]) for one in found["grown"]},
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None


def held(pid: int) -> int:
    """Return the memory of a process that the kernel can't reclaim, so without pages of files."""
    memory = sizes(f"/proc/{pid}/status")
    if "RssAnon" in memory:
        return memory["RssAnon"] + memory.get("RssShmem", 0)
    return memory["VmRSS"]


def processes(worker: Any) -> dict[str, Any]:
    """Return the memory of the worker and its nanny, under names that are unique on the machine."""
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
    """Return the number in a cgroup's file; None for no limit and for a missing file."""
    try:
        content = text(path).strip()
    except OSError:
        return None
    return int(content) if content.isdigit() and int(content) < NO_LIMIT else None


def least(*numbers: int | None) -> int | None:
    """Return the least number that is not None."""
    return min((each for each in numbers if each is not None), default=None)


def cgroup_folders() -> tuple[bool, list[str]]:
    """Return whether this is cgroup v2, and the worker's folder followed by its visible parents."""
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
        # A container without its own cgroup namespace has the host's path, but its own folder is mounted.
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
    """Return the limits of the worker's cgroup and its parents, without those that have none."""
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
                # This includes the limits of parents, even of those that are not visible.
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
    """Return the memory of a cgroup and its children that the kernel can't reclaim; 0 if unknown.

    Kernel, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst, memory.stat; `kernel`
    includes all slab memory. Version 1 counts kernel memory elsewhere; it is left out.
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


def space(directory: str) -> tuple[int, int]:
    """Return the size of the file system that a folder is on, and what a worker can still write there."""
    status = os.statvfs(directory)
    return status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
