"""The NoCloud seed: user data and key on a small ISO, for images whose cloud-init has no Ec2 datasource."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from ami_builder.system import processes


def nocloud_iso(path: Path, *, user_data: bytes, public_key: str, instance_id: str) -> None:
    """Write an ISO labelled `cidata` to `path`, replacing one that is there; raises BuildFailed.

    `public_key` is one line of an authorized_keys file. cloud-init's NoCloud reads it.
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
