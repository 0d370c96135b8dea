"""Disk images, as qemu-img sees them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ami_builder.core.errors import UsageError
from ami_builder.system import processes


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """What qemu-img knows about a disk image; sizes in bytes."""

    format: str
    virtual_size: int
    actual_size: int


def image_info(path: Path) -> ImageInfo:
    """Look at a disk image; raises UsageError when it is missing, damaged, or not a qcow2 or raw disk."""
    if not path.is_file():
        raise UsageError(f"{path} is not a file", hint="give the path of a qcow2 or raw disk image")
    # -U: a running machine may hold the image's lock; the header is readable all the same.
    argv: list[str | Path] = ["qemu-img", "info", "-U", "--output=json", path]
    told = json.loads(processes.output(argv, what=f"reading {path}", error=UsageError))
    kind = str(told["format"])
    if kind not in ("qcow2", "raw"):
        raise UsageError(
            f"{path} is a {kind} image",
            hint=f"convert it: qemu-img convert -O qcow2 {path} {path.stem}.qcow2",
        )
    if kind == "raw" and not _has_partition_table(path):
        raise UsageError(
            f"{path} is not a disk image", hint="it is neither qcow2 nor has it a partition table"
        )
    if "backing-filename" in told or "data-file" in told.get("format-specific", {}).get("data", {}):
        raise UsageError(
            f"{path} is not a whole image: it refers to another file",
            hint=f"make it one: qemu-img convert -O qcow2 {path} {path.stem}-whole.qcow2",
        )
    return ImageInfo(
        format=kind, virtual_size=int(told["virtual-size"]), actual_size=int(told["actual-size"])
    )


def _has_partition_table(path: Path) -> bool:
    # qemu-img calls any file raw. A bootable disk has the MBR's signature, GPT disks too.
    with path.open("rb") as file:
        return file.read(512)[510:] == b"\x55\xaa"


def check_image(path: Path) -> ImageInfo:
    """Look at a disk image and check that its structure is sound; raises UsageError when it is not."""
    info = image_info(path)
    if info.format == "qcow2":
        done = processes.capture(["qemu-img", "check", "-U", path], what=f"checking {path}", timeout=600)
        # 3: clusters are leaked, which costs space only.
        if done.status not in (0, 3):
            tail = tuple((done.stdout + done.stderr).strip().splitlines()[-processes.TAIL_LINES :])
            raise UsageError(f"{path} is damaged", hint="fetch or build it again", tail=tail)
    return info


def create_overlay(backing: Path, path: Path, size: int | None = None) -> None:
    """Make a qcow2 file at `path` that takes all writes to `backing`, grown to `size` bytes if given."""
    info = image_info(backing)
    if size is not None and size < info.virtual_size:
        raise UsageError(
            f"a disk of {size} bytes is smaller than the image, which has {info.virtual_size}",
            hint="ask for a larger disk (disk_size)",
        )
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", info.format, "-b", str(backing.resolve())]
    argv += [str(path), *([str(size)] if size is not None else [])]
    processes.output(argv, what=f"creating {path}")
