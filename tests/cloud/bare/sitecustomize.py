"""Makes each Python process that starts with this folder on PYTHONPATH take its host for a Mac.

Nothing that only Linux has can be used: /proc and /sys, functions of `os` and others that macOS lacks, and
this package's modules for VMs. The system's own calls stay Linux's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import sys
import sysconfig
import time
import types

LINUX_ONLY = {
    os: (
        *("eventfd", "memfd_create", "pidfd_open", "pipe2", "posix_fallocate", "posix_fadvise", "getrandom"),
        *("sched_getaffinity", "sched_setaffinity", "setns", "unshare", "splice", "copy_file_range"),
        *("getxattr", "setxattr", "O_TMPFILE", "O_PATH", "O_DIRECT", "getresuid", "setresuid", "fdatasync"),
    ),
    time: ("CLOCK_BOOTTIME", "CLOCK_TAI"),
    signal: ("SIGRTMIN", "SIGRTMAX", "SIGSTKFLT", "SIGPWR", "SIGPOLL", "sigtimedwait", "sigwaitinfo"),
    select: ("epoll",),
    socket: ("AF_NETLINK", "AF_VSOCK", "AF_PACKET", "SO_BINDTODEVICE", "SO_PEERCRED", "SOCK_CLOEXEC"),
}
_NO_FOLDERS = ("/proc", "/sys", "/run", "/dev/kvm", "/dev/shm")
_OPENING = ("open", "os.listdir", "os.scandir")
_NO_MODULES = ("ami_builder.qemu", "qemu", "mmdebstrap")


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    if event == "import":
        name = str(arguments[0])
        if any(name == one or name.startswith(f"{one}.") for one in _NO_MODULES):
            raise AssertionError(f"{name} was imported, which is for VMs on Linux")
    elif event in _OPENING and isinstance(arguments[0], str | bytes | os.PathLike):
        path = os.path.normpath(os.fsdecode(arguments[0]))
        if any(path == one or path.startswith(f"{one}/") for one in _NO_FOLDERS):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


for _module, _names in LINUX_ONLY.items():
    for _name in _names:
        with contextlib.suppress(AttributeError):
            delattr(_module, _name)
# Read once, for the system that it is.
sysconfig.get_config_vars()
# What urllib asks a Mac for.
_proxies = types.ModuleType("_scproxy")
_proxies._get_proxy_settings = _proxies._get_proxies = dict  # type: ignore[attr-defined]
sys.modules["_scproxy"] = _proxies
sys.platform = "darwin"
sys.addaudithook(_refuse)
