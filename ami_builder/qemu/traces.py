"""Searches the raw bytes of a disk for what only the baking machine may have: its keys and its machine-id.

They are searched for one by one, because every image has some private keys: GnuTLS and Tornado ship them for
their tests. The raw bytes also have deleted files and the file system's journal.
"""

import base64
import errno
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ami_builder.core.errors import BuildFailed
from ami_builder.system import processes

IDENTITY_FILE = "identity.txt"
"""Written by 20-container.sh on the baking machine: its machine-id, its host keys, and who may log in."""

_MACHINE_ID = re.compile(r"^[0-9a-f]{32}$", re.MULTILINE)
# Options may come before the type, and a comment after the key.
_PUBLIC_KEY = re.compile(r"(?:^|\s)(?P<type>(?:ssh|ecdsa)-\S+) (?P<key>AAAA\S+)", re.MULTILINE)

# The file of an OpenSSH private key begins with the public key, so the secret need not be known.
_PRIVATE_KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\n"
_PRIVATE_KEY_HEAD = b"openssh-key-v1\0" + b"".join(
    len(text).to_bytes(4, "big") + text for text in (b"none", b"none", b"")
)
_LINE = 70

_SHOWN = 10
_CHUNK = 16 << 20
_CONVERT_SECONDS = 600.0


def traces(identity: str) -> Mapping[bytes, str]:
    """Return the bytes that must not be on the disk, each with a description. Raises BuildFailed."""
    found: dict[bytes, str] = {}
    for machine_id in _MACHINE_ID.findall(identity):
        found[machine_id.encode()] = "its machine-id"
        found[bytes.fromhex(machine_id)] = "its machine-id, in binary"
    keys = [(match["type"], match["key"]) for match in _PUBLIC_KEY.finditer(identity)]
    if not found or not keys:
        raise BuildFailed(
            f"the baking machine reported {'no machine-id' if not found else 'no ssh keys'}",
            hint="it needs a file /etc/machine-id, and host keys in /etc/ssh: is the base's sshd OpenSSH?",
        )
    for kind, key in keys:
        found[key.encode()] = f"the {kind} public key {key[-12:]}"
        found[_private(base64.b64decode(key))] = f"the private key of {kind} {key[-12:]}"
    return found


def _private(public: bytes) -> bytes:
    """Return the first bytes of the private key file for a public key, as ssh-keygen writes it."""
    head = _PRIVATE_KEY_HEAD + (1).to_bytes(4, "big") + len(public).to_bytes(4, "big") + public
    text = base64.b64encode(head[: len(head) // 3 * 3]).decode()
    lines = (text[at : at + _LINE] for at in range(0, len(text), _LINE))
    return (_PRIVATE_KEY + "\n".join(lines)).encode()


def require_clean(disk: Path, identity: str, directory: Path) -> int:
    """Search the raw disk, and return how many traces were searched for. Raises BuildFailed for a match."""
    wanted = traces(identity)
    found = search(disk, wanted, directory)
    if found:
        more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        raise BuildFailed(
            "the disk still holds what only the baking machine may have",
            hint="no image was kept. If a program of the base wrote this to a file, "
            "packer/provisioners/90-clean.sh has to remove the file. What was deleted is overwritten for "
            "certain on ext4 only: use a base with that.",
            tail=(*(f"byte {one.offset}: {wanted[one.content]}" for one in found[:_SHOWN]), *more),
        )
    return len(wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """One of the contents that were searched for, and its byte offset on the disk."""

    content: bytes
    offset: int


def search(disk: Path, contents: Collection[bytes], directory: Path) -> list[Match]:
    """Return where a qcow2 or raw disk has any of `contents`, ordered by offset.

    `directory` needs room for a raw copy while this runs: sparse, but as large as the disk's data.
    """
    # Converted, the disk is as the guest sees it: without compression, clusters and backing files.
    with tempfile.TemporaryDirectory(dir=directory) as aside:
        raw = Path(aside) / "disk.raw"
        processes.output(
            ["qemu-img", "convert", "-O", "raw", disk, raw], what=f"reading {disk}", timeout=_CONVERT_SECONDS
        )
        with raw.open("rb") as file:
            return sorted(_search(file.fileno(), contents), key=lambda found: found.offset)


def _search(descriptor: int, contents: Collection[bytes]) -> Iterator[Match]:
    # A match across the border of two pieces is found in the second.
    overlap = max(map(len, contents)) - 1
    for start, end in _data(descriptor):
        for at in range(start, end, _CHUNK):
            begin = max(start, at - overlap)
            piece = os.pread(descriptor, min(at + _CHUNK, end) - begin, begin)
            for content in contents:
                found = piece.find(content, max(0, at - begin - len(content) + 1))
                while found >= 0:
                    yield Match(content=content, offset=begin + found)
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
