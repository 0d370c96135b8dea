"""`ami-builder verify`: the checks alone, on a disk that was built before or comes from elsewhere."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ami_builder.console import Progress
from ami_builder.model import Image, Verdict
from ami_builder.pipeline.verify import require_passed, verify
from ami_builder.workspace import StoredImage, Workspace


def verify_disk(
    image: Image, disk: Path, stored: StoredImage | None, workspace: Workspace, progress: Progress
) -> Verdict:
    """Prove a disk as `image` is configured; the verdict on a finished image of ours is kept beside it.

    Raises ChecksFailed that names what failed.
    """
    workspace.ensure()
    workspace.sweep()
    digest = stored.artifact.digest if stored is not None else _digest(disk)
    with workspace.run("verify", image.name, digest) as run:
        try:
            with progress.step(f"verify {disk.name}") as step:
                verdict = verify(image, disk, digest, workspace, run, step)
        finally:
            run.update(steps=progress.steps)
        if stored is not None:
            workspace.judge(stored, verdict)
        require_passed(verdict, run.directory / "machines")
    return verdict


def _digest(disk: Path) -> str:
    with disk.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
