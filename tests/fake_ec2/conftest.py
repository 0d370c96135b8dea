"""The emulated EC2, started once and emptied before every test; tests/cloud uses these fixtures too."""

from __future__ import annotations

import threading
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
    before = threading.enumerate()
    yield running_cloud
    running_cloud.machines = None
    # A command that fails leaves threads that still ask other regions: the next test would see their calls.
    running_cloud.faults.clear()
    for thread in threading.enumerate():
        if thread.name == "asking" and thread not in before:
            thread.join()
