"""Real nights: build, verify on two machines, promote; change one input; roll back; prune."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ami_builder.journal import unfinished
from ami_builder.workspace import Workspace
from tests.vm.conftest import GIB, ami_builder

# One machine of each size in one verification; and a boot that is slow beside other work is no news here.
CHANGED = (
    *("--set", "memory.reserve=1%"),
    *("--set", "verify.memory=1536MiB,2GiB"),
    *("--set", "nightly.time_drift_percent=1000"),
)
# Caches and images are as old as these tests.
YOUNG_GO = ("--set", "lifecycle.keep_days=0")


def night(*flags: str, status: int = 0) -> dict[str, Any]:
    """Run a night of the default image, and return what it tells."""
    answer = ami_builder(*flags, "nightly", "--no-prune", "--json")
    assert answer.status == status, answer.stderr
    (found,) = answer.json["nights"]
    return dict(found)


def standing() -> str | None:
    """Return the digest that stands in the channel."""
    found: str | None = ami_builder("history", "testing", "--json").json["standing"]
    return found


def test_nights_from_the_first_promotion_to_pruning(built: Mapping[str, Any], workspace: Workspace) -> None:
    first = night()
    assert first["ending"] == "promoted"
    assert standing() == built["artifact"]["digest"] == first["digest"]
    assert night()["ending"] == "unchanged"

    second = night(*CHANGED)
    assert second["ending"] == "promoted", second
    assert standing() == second["digest"] != first["digest"]
    image = workspace.image("dask", second["digest"])
    assert image is not None
    assert image.verdict is not None
    measured = {(m.machine, m.phase): m for m in image.verdict.measured}
    assert {machine for machine, _ in measured} == {"1.5 GiB", "2 GiB"}
    assert all(m.available % 4096 == 0 and 0 < m.available < m.total for m in measured.values())
    small, large = (measured[machine, "boot"].available for machine in ("1.5 GiB", "2 GiB"))
    assert 0.4 * GIB < large - small < 0.6 * GIB
    assert night(*CHANGED)["ending"] == "unchanged"

    assert ami_builder("rollback", "testing", "--reason", "to see it held").status == 0
    assert standing() == first["digest"]
    held = night(*CHANGED, status=9)
    assert "to see it held" in held["places"][0]["text"]
    assert standing() == first["digest"]

    assert ami_builder("revoke", second["digest"], "--reason", "a test is over").status == 0
    pruned = ami_builder(*YOUNG_GO, "prune", "--apply", "--json")
    assert pruned.status == 0, pruned.stderr
    assert not Path(second["location"]).exists()
    assert Path(built["artifact"]["location"]).exists()
    assert not list(unfinished(workspace))
    assert ami_builder("build", "--json").json["unchanged"] is True
