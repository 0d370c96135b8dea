"""Secrets in the raw bytes of a disk: real keys, and real disks by qemu-img."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from ami_builder.core.errors import BuildFailed
from ami_builder.qemu import traces
from ami_builder.qemu.traces import search
from ami_builder.system import processes

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.needs("qemu-img", "qemu-io")

MIB = 1 << 20
MACHINE_ID = "0123456789abcdef0123456789abcdef"
KINDS = ("ed25519", "rsa", "ecdsa")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("keys")
    for kind in KINDS:
        processes.output(
            ["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", f"root@{kind}", "-f", folder / kind]
        )
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture
def identity(keys: dict[str, Path]) -> str:
    public = [key.with_suffix(".pub").read_text() for key in keys.values()]
    # As cloud-init writes it for root.
    return "\n".join([MACHINE_ID, f'no-pty,command="sleep 1" {public[0]}', *public[1:]])


def _disk(path: Path, content: bytes, offset: int = 5 * MIB + 4096, kind: str = "qcow2") -> Path:
    """Write a disk of 64 MiB with some content, as Packer does."""
    raw = path.with_suffix(".written")
    with raw.open("wb") as file:
        file.truncate(64 * MIB)
        file.write(b"something else" * 5000)
        file.seek(offset)
        file.write(content)
    options = ["-c", "-o", "compression_type=zstd"] if kind == "qcow2" else []
    processes.output(["qemu-img", "convert", "-f", "raw", "-O", kind, *options, str(raw), str(path)])
    raw.unlink()
    return path


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_a_clean_disk_passes(tmp_path: Path, identity: str, kind: str) -> None:
    # What programs and their documentation have of keys, and other machines' ids.
    begin, end = (f"-----{word} OPENSSH PRIVATE KEY-----\n" for word in ("BEGIN", "END"))
    other = f"{begin}{end}{begin}b3BlbnNzaC1rZXktdjEAAAAABG5vbmU{MACHINE_ID[::-1]}"
    disk = _disk(tmp_path / "disk", other.encode(), kind=kind)
    assert traces.require_clean(disk, identity, tmp_path) == 2 + 2 * len(KINDS)
    assert list(tmp_path.iterdir()) == [disk]


@pytest.mark.parametrize("kind", KINDS)
def test_keys_are_found(tmp_path: Path, identity: str, keys: dict[str, Path], kind: str) -> None:
    for name, text in ((kind, "private key of"), (f"{kind}.pub", "public key")):
        content = (keys[kind].parent / name).read_bytes()
        with pytest.raises(BuildFailed, match="still holds") as failed:
            traces.require_clean(_disk(tmp_path / "disk", content), identity, tmp_path)
        (line,) = failed.value.tail
        assert text in line
        assert kind in line
        assert int(line.split()[1].rstrip(":")) in range(5 * MIB + 4096, 5 * MIB + 4096 + 40)
        assert failed.value.hint is not None
        assert "90-clean.sh" in failed.value.hint


@pytest.mark.parametrize("content", [f"/var/log/journal/{MACHINE_ID}".encode(), bytes.fromhex(MACHINE_ID)])
def test_the_machine_id_is_found(tmp_path: Path, identity: str, content: bytes) -> None:
    with pytest.raises(BuildFailed) as failed:
        traces.require_clean(_disk(tmp_path / "disk", content), identity, tmp_path)
    (line,) = failed.value.tail
    assert "machine-id" in line


def test_an_error_with_many_finds_stays_short(tmp_path: Path, identity: str) -> None:
    with pytest.raises(BuildFailed) as failed:
        traces.require_clean(_disk(tmp_path / "disk", f"{MACHINE_ID}&".encode() * 50), identity, tmp_path)
    assert len(failed.value.tail) == 11
    assert failed.value.tail[-1] == "and 40 more"


@pytest.mark.parametrize(
    ("identity", "lacks"),
    [("", "no machine-id"), (f"{MACHINE_ID}\n", "no ssh keys"), ("ssh-ed25519 AAAA x\n", "no machine-id")],
)
def test_half_an_identity_is_no_proof(tmp_path: Path, identity: str, lacks: str) -> None:
    with pytest.raises(BuildFailed, match=lacks):
        traces.require_clean(tmp_path / "disk", identity, tmp_path)


@pytest.mark.parametrize("where", [-8, 0, 1, 16 * MIB - 40, 16 * MIB])
def test_a_find_on_a_border_is_found_once(tmp_path: Path, where: int) -> None:
    """Across the 16 MiB that are read at once, within data."""
    raw = tmp_path / "disk.raw"
    at = 16 * MIB + where
    with raw.open("wb") as file:
        file.write(b"\xff" * 48 * MIB)
        file.seek(at)
        file.write(b"needle, and a longer needle")
    found = search(raw, [b"needle, and a longer", b"needle, and"], tmp_path)
    assert [one.offset for one in found] == [at, at]


def test_what_an_overlay_hides_is_not_searched(tmp_path: Path) -> None:
    """The disk is what a guest sees of it, with its backing files."""
    below = _disk(tmp_path / "below.qcow2", b"needle")
    above = tmp_path / "above.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", below, above], check=True)
    assert [one.offset for one in search(above, [b"needle"], tmp_path)] == [5 * MIB + 4096]
    subprocess.run(["qemu-io", "-c", f"write -z {5 * MIB} 64k", above], check=True, capture_output=True)
    assert search(above, [b"needle"], tmp_path) == []
