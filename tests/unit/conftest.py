"""An empty workspace, and finished images in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from ami_builder.state.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]

# What is proved does not depend on how busy the machine is.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """An empty workspace, which commands in this process use too, with the committed configuration."""
    monkeypatch.setenv("AMI_BUILDER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AMI_BUILDER_CONFIG", str(ROOT / "ami-builder.toml"))
    made = Workspace.open({"AMI_BUILDER_HOME": str(tmp_path / "home")})
    made.ensure()
    return made
