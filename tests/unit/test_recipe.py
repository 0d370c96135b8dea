"""The scripts that make base disk and container, as far as their caller sees them."""

from __future__ import annotations

from pathlib import Path

from ami_builder.build.recipe import Recipe
from ami_builder.state.workspace import Workspace
from tests.fake_programs import fake


def test_progress_is_what_the_script_does_without_who_says_it(tmp_path: Path) -> None:
    lines = ("I: downloading packages with apt...", "base-disk: making the file system", "", "plain: stays")
    script = fake(tmp_path, "base-disk", "\n".join(f"echo '{line}'" for line in lines))
    workspace = Workspace.open({"AMI_BUILDER_HOME": str(tmp_path / "home")})
    workspace.ensure()
    log = tmp_path / "base.log"
    reported: list[str] = []
    Recipe(kind="base", script=script, flags=(), sources=()).make(workspace, "d", "", log, reported.append)
    assert reported == ["downloading packages with apt...", "making the file system", "plain: stays"]
    assert log.read_text().splitlines() == list(lines), "the log has all of it"
