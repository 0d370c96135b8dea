"""An Auto Scaling group of workers by `ami-builder launch-template`, on real machines."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.fake_ec2.cloud_state import role_key
from tests.vm import clusters
from tests.vm.namespace import scenario
from tests.vm.scenarios.scaling_group import ROLE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@pytest.mark.whole
def test_a_group_replaces_what_is_unhealthy_and_scales_in_without_losing_work(
    built: Mapping[str, Any], tmp_path: Path
) -> None:
    found = scenario(
        "scaling_group", timeout=7200, disk=built["artifact"]["location"], directory=tmp_path / "x"
    )
    sys.stderr.write(f"{found}\n")
    assert len(found["limits"]) == 3
    assert clusters.same_limits(found["limits"])
    assert found["new_image"], "the replacement has the image that was promoted meanwhile"
    assert found["template_versions"] == 1
    assert found["waiting"] == "Terminating:Wait"
    assert found["completed_by"] == [role_key(ROLE)]
    assert found["results"]
    assert found["computed_again"] == []
    assert found["deleted"] == ["ami-builder-dask-stable"]
    assert found["left"] == {}
