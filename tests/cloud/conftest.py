"""The loopback EC2, started once and emptied before every test."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.cloud.faulting import Place, good_run
from tests.cloud.flow import in_haste, without_ssh
from tests.fake_ec2.server import Cloud


@pytest.fixture(scope="session")
def running_cloud() -> Iterator[Cloud]:
    """The server of all tests here."""
    with Cloud() as cloud:
        yield cloud


@pytest.fixture
def cloud(running_cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    """An empty account, which the environment points boto3 at."""
    running_cloud.reset()
    for name, value in running_cloud.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    yield running_cloud
    running_cloud.machines = None


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
