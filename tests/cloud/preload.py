"""What the tests' Dask workers load first (`dask worker --preload`): a worker has no fixtures.

Verification there does without a VM as it does in tests of one process, and each machine runs until there is
the file that `GO` names.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ami_builder.system.processes import wait_until
from tests.cloud.flow import in_haste, without_ssh

GO = "AMI_BUILDER_TEST_GO"
_BOUND = 120.0


def dask_setup(worker: Any) -> None:
    """Replace in this process what the fixtures replace in theirs."""
    monkeypatch = pytest.MonkeyPatch()
    go = Path(os.environ[GO])
    without_ssh(
        monkeypatch, lambda: wait_until(go.exists, what="the file to go on", timeout=_BOUND, interval=0.05)
    )
    in_haste(monkeypatch)
