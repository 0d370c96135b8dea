"""A full /run: the guest's programs run where nothing more can be written to it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# A file that is there keeps its room. What the program leaves is copied to the folder.
_SCRIPT = """set -eu
run=$1/run kept=$1/run-kept
shift
cp -a "$run" "$kept"
mount -t tmpfs -o size=256k none "$run"
cp -a "$kept/." "$run"
dd if=/dev/zero of="$run/filler" bs=4096 status=none 2>/dev/null || :
status=0
"$@" || status=$?
rm "$run/filler"
rm -r "$kept"
cp -a "$run" "$kept"
umount "$run"
rm -r "$run"
mv "$kept" "$run"
exit "$status"
"""


def on_full_run(root: Path, argv: Sequence[str]) -> list[str]:
    """Return the command that runs `argv` while the folder `run` of `root` is full."""
    user = ["--map-root-user"] if os.geteuid() else []
    return ["unshare", "--mount", *user, "sh", "-c", _SCRIPT, "full-run", str(root), *argv]
