"""The emulated EC2, in which a new AMI takes a moment; builds are without ssh, and wait for little."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.fake_ec2.conftest import running_cloud
from tests.selftest.record import prepare

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.fake_ec2.server import Cloud

__all__ = ["running_cloud"]


@pytest.fixture
def cloud(running_cloud: Cloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Cloud]:
    """An empty account, and an empty workspace."""
    monkeypatch.setenv("AMI_BUILDER_HOME", str(tmp_path / "home"))
    prepare(running_cloud, monkeypatch)
    yield running_cloud
    running_cloud.reset()
