"""`ami-builder diff`: what the workspace has recorded about two images."""

from __future__ import annotations

from ami_builder.core.diff import Difference, Side, compare, read_packages
from ami_builder.core.records import FIRST_BOOT, RunRecord
from ami_builder.state.workspace import StoredImage, Workspace, load


def compare_images(before: StoredImage, after: StoredImage, workspace: Workspace) -> Difference:
    """Return how one finished image differs from another."""
    return compare(_side(before, workspace), _side(after, workspace))


def _side(stored: StoredImage, workspace: Workspace) -> Side:
    packages = None
    if stored.directory is not None and (stored.directory / "packages.txt").is_file():
        packages = read_packages((stored.directory / "packages.txt").read_text(encoding="utf-8").splitlines())
    measured = stored.verdict.measured if stored.verdict is not None else ()
    first = [one for one in measured if one.phase == FIRST_BOOT]
    run = load(RunRecord, workspace.runs_dir / stored.artifact.run_id / "record.json")
    # The image's name is in each step of its run; without it those of differing names compare too.
    mine = f"build {stored.artifact.image}"
    steps = run.steps if run is not None else ()
    return Side(
        packages=packages,
        size=stored.artifact.size,
        available={one.machine: one.available for one in first},
        boot={one.machine: ratio for one in first if (ratio := one.boot_ratio) is not None},
        ssh={one.machine: one.ssh_seconds for one in first if one.ssh_seconds is not None},
        dask={one.machine: one.dask_seconds for one in first if one.dask_seconds is not None},
        seconds={
            "build" + one.name.removeprefix(mine): one.seconds for one in steps if one.name.startswith(mine)
        },
    )
