"""The raw bytes of a disk: what files hold, what was deleted, and the file system's log."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from ami_builder.system import processes

_CHUNK = 16 << 20
_CONVERT_SECONDS = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One of the contents that were searched for, and its byte offset on the disk."""

    content: bytes
    offset: int


def search(disk: Path, contents: Collection[bytes], directory: Path) -> list[Found]:
    """Return where a disk, qcow2 or raw, has any of `contents`, by offset.

    `directory` takes a raw copy while this runs: sparse, but as large as the disk's data.
    """
    # What compression, clusters and backing files hide is in the copy as the guest would see it.
    with tempfile.TemporaryDirectory(dir=directory) as aside:
        raw = Path(aside) / "disk.raw"
        processes.output(
            ["qemu-img", "convert", "-O", "raw", disk, raw], what=f"reading {disk}", timeout=_CONVERT_SECONDS
        )
        with raw.open("rb") as file:
            return sorted(_search(file.fileno(), contents), key=lambda found: found.offset)


def _search(descriptor: int, contents: Collection[bytes]) -> Iterator[Found]:
    # What lies across the border of two pieces is found in the second.
    overlap = max(map(len, contents)) - 1
    for start, end in _data(descriptor):
        for at in range(start, end, _CHUNK):
            begin = max(start, at - overlap)
            piece = os.pread(descriptor, min(at + _CHUNK, end) - begin, begin)
            for content in contents:
                found = piece.find(content, max(0, at - begin - len(content) + 1))
                while found >= 0:
                    yield Found(content=content, offset=begin + found)
                    found = piece.find(content, found + 1)


def _data(descriptor: int) -> Iterator[tuple[int, int]]:
    """Yield where a sparse file has data, from and to."""
    end = 0
    while True:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as failed:
            if failed.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, end
