"""Finished images of a few bytes: whole in the workspace, and never baked."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ami_builder.core.records import Artifact, CheckResult, Outcome, TargetKind, Verdict

if TYPE_CHECKING:
    from ami_builder.state.workspace import StoredImage, Workspace


def stored(
    workspace: Workspace,
    letter: str,
    *,
    passed: bool | None = True,
    outcome: Outcome | None = None,
    target: TargetKind = TargetKind.QEMU,
    name: str = "dask",
    created: datetime = datetime(2026, 1, 2, tzinfo=UTC),
    size: int = 1024,
) -> StoredImage:
    """Return a finished image whose digest is one letter over and over; `passed` None: never verified.

    `outcome` is that of its one check, in place of `passed`.
    """
    disk = workspace.state / "out.qcow2"
    with disk.open("wb") as file:
        file.truncate(size)
    digest = letter * 64
    artifact = Artifact(
        image=name, target=target, location="", digest=digest, created=created, run_id="r", size=0
    )
    made = workspace.store(artifact, disk, None)
    if passed is None:
        return made
    outcome = outcome or (Outcome.PASSED if passed else Outcome.FAILED)
    result = CheckResult(
        name="memory limit chain: x", phase="boot", machine="2 GiB", outcome=outcome, seconds=1, message=""
    )
    return workspace.store_verdict(
        made, Verdict(digest=digest, checks_digest="c", results=(result,), measured=())
    )
