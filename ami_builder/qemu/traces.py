"""What only the baking machine may have: its keys and its machine-id must be nowhere on the raw disk.

They are searched for one by one. Any private key at all would be too much: GnuTLS has some for its
self-tests, Tornado for its tests, and so each image has them.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from pathlib import Path

from ami_builder import qemu
from ami_builder.core.errors import BuildFailed

IDENTITY_FILE = "identity.txt"
"""What 20-container.sh wrote about the baking machine: its machine-id, its host keys, and who may log in."""

_MACHINE_ID = re.compile(r"^[0-9a-f]{32}$", re.MULTILINE)
# Options may come before the type, and a comment after the key.
_PUBLIC_KEY = re.compile(r"(?:^|\s)(?P<type>(?:ssh|ecdsa)-\S+) (?P<key>AAAA\S+)", re.MULTILINE)

# The file of an OpenSSH private key begins with the public one: so it is known without knowing the secret.
_PRIVATE_KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\n"
_PRIVATE_KEY_HEAD = b"openssh-key-v1\0" + b"".join(
    len(text).to_bytes(4, "big") + text for text in (b"none", b"none", b"")
)
_LINE = 70

_SHOWN = 10


def traces(identity: str) -> Mapping[bytes, str]:
    """Return what must not be on the disk, each with what it is; raises BuildFailed for half an identity."""
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
    """Return how the file of the private key to a public one begins, as ssh-keygen writes it."""
    head = _PRIVATE_KEY_HEAD + (1).to_bytes(4, "big") + len(public).to_bytes(4, "big") + public
    text = base64.b64encode(head[: len(head) // 3 * 3]).decode()
    lines = (text[at : at + _LINE] for at in range(0, len(text), _LINE))
    return (_PRIVATE_KEY + "\n".join(lines)).encode()


def require_clean(disk: Path, identity: str, directory: Path) -> int:
    """Search the raw disk and return for how much; raises BuildFailed with what was found, and where."""
    wanted = traces(identity)
    found = qemu.search(disk, wanted, directory)
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
