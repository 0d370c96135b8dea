"""Preloaded into a real Dask worker, so that several workers on one machine tell of machines of their own.

Only the boot id, /proc/meminfo, the DMI's files and compare-memory's record are imitated, from the folder
that the environment names.
"""

from __future__ import annotations

import builtins
import os
from _io import open as really_open
from typing import Any

_FOLDER = os.environ["TEST_MACHINE"]
_IMITATED = {
    "/proc/sys/kernel/random/boot_id": "boot_id",
    "/proc/meminfo": "meminfo",
    "/sys/class/dmi/id/sys_vendor": "sys_vendor",
    "/sys/class/dmi/id/board_asset_tag": "board_asset_tag",
    "/run/dask/public/memory.json": "memory.json",
}


def _opened(file: Any, *arguments: Any, **keywords: Any) -> Any:
    name = _IMITATED.get(file) if isinstance(file, str) else None
    # Not what `builtins.open` was: a nanny preloads this twice.
    return really_open(f"{_FOLDER}/{name}" if name else file, *arguments, **keywords)


builtins.open = _opened
