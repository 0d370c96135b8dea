"""The NoCloud seed, read back from its ISO."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest

from ami_builder.core.errors import AmiBuilderError
from ami_builder.qemu.disks import nocloud_iso

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.needs("xorriso")

KEY = 'ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGNn it\'s "quoted": yes\n'
USER_DATA = "#cloud-config\nruncmd: [echo é]\n"


def content(iso: Path, name: str, to: Path) -> str:
    argv = ["xorriso", "-osirrox", "on", "-indev", str(iso), "-extract", f"/{name}", str(to)]
    subprocess.run(argv, check=True, capture_output=True)
    return to.read_text()


def test_seed_is_what_cloud_init_looks_for(tmp_path: Path) -> None:
    iso = tmp_path / "seed.iso"
    iso.write_text("an older one")
    nocloud_iso(iso, user_data=USER_DATA.encode(), public_key=KEY, instance_id="i-0abc")
    # The volume's name stands in the primary descriptor of ISO 9660.
    assert iso.read_bytes()[16 * 2048 + 40 : 16 * 2048 + 72].rstrip() in (b"cidata", b"CIDATA")
    assert content(iso, "user-data", tmp_path / "user-data") == USER_DATA
    assert json.loads(content(iso, "meta-data", tmp_path / "meta-data")) == {
        "instance-id": "i-0abc",
        "local-hostname": "i-0abc",
        "public-keys": [KEY.strip()],
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["meta-data", "seed.iso", "user-data"]


def test_a_seed_that_cannot_be_written(tmp_path: Path) -> None:
    iso = tmp_path / "seed.iso"
    iso.mkdir()
    with pytest.raises((AmiBuilderError, IsADirectoryError, PermissionError)):
        nocloud_iso(iso, user_data=USER_DATA.encode(), public_key=KEY, instance_id="i-0abc")
