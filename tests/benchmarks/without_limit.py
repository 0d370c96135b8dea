"""Make an image without the memory limit out of a finished one, offline: no VM, no mount, no loop device.

Three files in its root file system are changed with debugfs. start-dask no longer exports the variable, and
containers that ask for no limit get none, so that the first boot has no limit though user data brings a
correct Compose file. The image's own Compose file, which is used after the first boot, asks for limit 0.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ami_builder.core.errors import UsageError
from ami_builder.system import processes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

COMPOSE_FILE = "/etc/dask/compose.yaml"
START_DASK = "/usr/local/sbin/start-dask"
DEFAULT = "/etc/systemd/system/docker-.scope.d/20-metadata.conf"
"""The last of the drop-ins for each container's scope, whose word counts."""

_LIMIT = "${AVAILABLE_MEMORY_FOR_DASK:-0}"
_EXPORT = re.compile(r"^(\s*)export (AVAILABLE_MEMORY_FOR_DASK=)", re.MULTILINE)
_MODE = re.compile(r"^Inode:.*\sMode:\s+(?P<mode>[0-7]{4})", re.MULTILINE)
_CONVERT_SECONDS = 900.0
_REPAIRED = (0, 1)
"""e2fsck's exit statuses for a clean file system, and one that it has corrected."""


def no_limit(compose: str) -> str:
    """Return a Compose file that asks for limit 0 in place of the variable; raises UsageError without one."""
    if _LIMIT not in compose:
        raise UsageError(f"the image's {COMPOSE_FILE} does not use {_LIMIT}")
    return compose.replace(_LIMIT, "0")


def no_export(script: str) -> str:
    """Return start-dask without the export of the variable; raises UsageError when it has none."""
    changed, count = _EXPORT.subn(r"\1\2", script)
    if not count:
        raise UsageError(f"the image's {START_DASK} does not export AVAILABLE_MEMORY_FOR_DASK")
    return changed


def no_default(drop_in: str) -> str:
    """Return a drop-in of containers' scopes with no limit; raises UsageError when it is another file."""
    if not drop_in.rstrip().rpartition("\n[")[2].startswith("Scope]"):
        raise UsageError(f"the image's {DEFAULT} does not end in [Scope]")
    return f"{drop_in.rstrip()}\nMemoryMax=infinity\n"


CHANGES: Mapping[str, Callable[[str], str]] = {
    COMPOSE_FILE: no_limit,
    START_DASK: no_export,
    DEFAULT: no_default,
}


def make(image: Path, to: Path) -> None:
    """Write a copy of `image` without the limit to `to`, a qcow2 file; whole or not at all.

    Needs twice the space that the image takes uncompressed. Raises UsageError for an image without the files
    to change, or when what is read back is not what was written.
    """
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=".without-limit-") as folder:
        raw, done = Path(folder) / "disk.raw", Path(folder) / "disk.qcow2"
        _convert(image, raw, "raw")
        files = RootFiles(raw)
        files.check(repair=True)
        for path, change in CHANGES.items():
            wanted, mode = change(files.read(path)), files.mode(path)
            files.write(path, wanted, mode)
            if (files.read(path), files.mode(path)) != (wanted, mode):
                raise UsageError(f"{path} could not be changed in a copy of {image}")
        files.check(repair=False)
        _convert(raw, done, "qcow2")
        done.rename(to)


class RootFiles:
    """The files of the largest partition of a raw disk, an ext2, ext3 or ext4 file system."""

    def __init__(self, disk: Path) -> None:
        table = json.loads(
            processes.output(["sfdisk", "--json", disk], what=f"reading the partitions of {disk}")
        )
        root = max(table["partitiontable"]["partitions"], key=lambda partition: int(partition["size"]))
        offset = int(root["start"]) * int(table["partitiontable"].get("sectorsize", 512))
        self._disk = f"{disk}?offset={offset}"

    def check(self, *, repair: bool) -> None:
        """Replay the journal and check the file system; raises UsageError when it is damaged."""
        argv = ["e2fsck", "-f", "-p" if repair else "-n", self._disk]
        done = processes.capture(argv, what="e2fsck", timeout=_CONVERT_SECONDS)
        if done.status not in (_REPAIRED if repair else _REPAIRED[:1]):
            tail = tuple((done.stdout + done.stderr).splitlines()[-processes.TAIL_LINES :])
            raise UsageError("the image's root file system is damaged", tail=tail)

    def read(self, path: str) -> str:
        """Return a file's text; raises UsageError when there is none."""
        return self._debugfs(f"cat {path}")

    def mode(self, path: str) -> str:
        """Return a file's permissions in octal digits."""
        found = _MODE.search(self._debugfs(f"stat {path}"))
        if found is None:
            raise UsageError(f"the image has no {path}")
        return found["mode"]

    def write(self, path: str, text: str, mode: str) -> None:
        """Replace a file by a new one, which belongs to root."""
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", prefix="ami-builder-") as source:
            source.write(text)
            source.flush()
            self._debugfs(
                f"rm {path}",
                f"write {source.name} {path}",
                f"set_inode_field {path} mode 010{mode}",
                f"set_inode_field {path} uid 0",
                f"set_inode_field {path} gid 0",
                writable=True,
            )

    def _debugfs(self, *requests: str, writable: bool = False) -> str:
        # Its exit status is 0 even when a request fails, and each request is repeated on stdout with -f.
        argv = ["debugfs", *(["-w", "-f", "-"] if writable else ["-R", *requests]), self._disk]
        done = processes.capture(argv, what="debugfs", stdin="\n".join(requests) + "\n" if writable else None)
        errors = [line for line in done.stderr.splitlines() if not line.startswith("debugfs 1.")]
        if done.status or errors:
            raise UsageError(f"`{requests[0]}` failed in the image's file system", tail=tuple(errors))
        return done.stdout


def _convert(source: Path, to: Path, kind: str) -> None:
    processes.output(
        ["qemu-img", "convert", "-O", kind, source, to], what=f"converting {source}", timeout=_CONVERT_SECONDS
    )
