"""Disk images, as qemu-img sees them, and the NoCloud seed."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ami_builder.core.errors import UsageError
from ami_builder.system import processes


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """The format of a disk image, and the size of the disk in bytes."""

    format: str
    virtual_size: int


def image_info(path: Path) -> ImageInfo:
    """Return what qemu-img knows. Raises UsageError for a missing or damaged file, or any other format."""
    if not path.is_file():
        raise UsageError(f"{path} is not a file", hint="give the path of a qcow2 or raw disk image")
    # -U: a running VM may have locked the image; its header can be read all the same.
    argv: list[str | Path] = ["qemu-img", "info", "-U", "--output=json", path]
    info = json.loads(processes.output(argv, what=f"reading {path}", error=UsageError))
    kind = str(info["format"])
    if kind not in ("qcow2", "raw"):
        raise UsageError(
            f"{path} is a {kind} image",
            hint=f"convert it: qemu-img convert -O qcow2 {path} {path.stem}.qcow2",
        )
    if kind == "raw" and not _has_partition_table(path):
        raise UsageError(
            f"{path} is not a disk image: it is not qcow2, and has no partition table",
            hint="give the path of a qcow2 or raw disk image",
        )
    if "backing-filename" in info or "data-file" in info.get("format-specific", {}).get("data", {}):
        raise UsageError(
            f"{path} is not a complete image: it refers to another file",
            hint=f"make it complete: qemu-img convert -O qcow2 {path} {path.stem}-whole.qcow2",
        )
    return ImageInfo(format=kind, virtual_size=int(info["virtual-size"]))


def _has_partition_table(path: Path) -> bool:
    # qemu-img calls any file raw. A bootable disk has the MBR's signature, GPT disks too.
    with path.open("rb") as file:
        return file.read(512)[510:] == b"\x55\xaa"


def create_overlay(backing: Path, path: Path, size: int | None = None) -> None:
    """Create a qcow2 file at `path` that takes all writes to `backing`, with a disk of `size` bytes."""
    info = image_info(backing)
    if size is not None and size < info.virtual_size:
        raise UsageError(
            f"a disk of {size} bytes is smaller than the image, which has {info.virtual_size}",
            hint="ask for a larger disk (disk_size)",
        )
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", info.format, "-b", str(backing.resolve())]
    argv += [str(path), *([str(size)] if size is not None else [])]
    processes.output(argv, what=f"creating {path}")


def nocloud_iso(path: Path, *, user_data: bytes, public_key: str, instance_id: str) -> None:
    """Write user data and key as an ISO labelled `cidata` to `path`; replace a file that is there.

    It is for images whose cloud-init has no Ec2 datasource. `public_key` is one line of an authorized_keys
    file. Raises BuildFailed.
    """
    # JSON is YAML, and quotes whatever a key's comment holds.
    meta_data = json.dumps(
        {"instance-id": instance_id, "local-hostname": instance_id, "public-keys": [public_key.strip()]}
    )
    path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".seed-") as name:
        folder = Path(name)
        (folder / "user-data").write_bytes(user_data)
        (folder / "meta-data").write_text(meta_data + "\n")
        argv: list[str | Path] = ["xorriso", "-as", "genisoimage", "-quiet", "-o", path, "-volid", "cidata"]
        argv += ["-joliet", "-rock", folder / "user-data", folder / "meta-data"]
        processes.output(argv, what="writing the NoCloud seed")
