"""The emulated EC2, started once and emptied before every test; tests/cloud uses these fixtures too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.fake_ec2.server import Cloud

if TYPE_CHECKING:
    from collections.abc import Iterator


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
