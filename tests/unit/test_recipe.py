"""The scripts that make base disk and container, as far as their caller sees them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ami_builder.build.recipe import Recipe
from ami_builder.core.errors import BuildFailed, MissingTool
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


def test_a_missing_program_is_named_once_however_often_it_is_missing(tmp_path: Path) -> None:
    script = fake(tmp_path, "base-disk", "echo 'base-disk: error: mmdebstrap is missing' >&2; exit 3")
    workspace = Workspace.open({"AMI_BUILDER_HOME": str(tmp_path / "home")})
    recipe = Recipe(kind="base", script=script, flags=(), sources=(script,))
    for _ in range(2):
        with pytest.raises(MissingTool, match="resolving the base's packages") as caught:
            recipe.resolve(workspace, tmp_path / "resolve.log", refresh=False)
        assert caught.value.tail == ("base-disk: error: mmdebstrap is missing",)
        assert "ami-builder check" in str(caught.value.hint)
    fake(tmp_path, "base-disk", "exit 1")
    with pytest.raises(BuildFailed):
        recipe.resolve(workspace, tmp_path / "resolve.log", refresh=False)
