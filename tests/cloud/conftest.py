"""The emulated EC2, and the calls that a build makes on it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.cloud.faulting import Place, good_run
from tests.cloud.flow import in_haste, without_ssh
from tests.fake_ec2.conftest import cloud, running_cloud

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.fake_ec2.server import Cloud

__all__ = ["cloud", "running_cloud"]


@pytest.fixture(scope="session")
def known_places() -> list[Place]:
    """What `places` has found out once."""
    return []


@pytest.fixture
def places(
    cloud: Cloud, known_places: list[Place], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Sequence[Place]:
    """The calls of a build in order; builds are without ssh from here on, and wait for little."""
    monkeypatch.setenv("AMI_BUILDER_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("AMI_BUILDER_CONFIG", raising=False)
    without_ssh(monkeypatch)
    in_haste(monkeypatch)
    if not known_places:
        known_places += good_run(cloud, tmp_path / "good")
        os.environ["AMI_BUILDER_HOME"] = str(tmp_path / "home")
        cloud.reset()
    return known_places
