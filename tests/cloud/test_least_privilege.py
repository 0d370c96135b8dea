"""The commands under exactly the policies that `iam-policy` prints: nothing refused, nothing unused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import pytest

from ami_builder.console import Step
from ami_builder.errors import BuildFailed
from ami_builder.model import Image
from ami_builder.pipeline import cells
from ami_builder.pipeline.target import Machine
from ami_builder.workspace import Run

from .faulting import BUILD, Place, only_the_ami
from .flow import captured
from .policy import Enforced
from .server import Cloud
from .stopping import POWER_LOSS, stopped

KEY = "AKIALEASTPRIVILEGE00"


def allowed(cloud: Cloud, monkeypatch: pytest.MonkeyPatch, *sections: str) -> Enforced:
    """Allow these credentials what `iam-policy` prints for some parts of the work, and no more."""
    statements: list[Any] = []
    for section in sections:
        printed = captured("iam-policy", section)
        assert printed.status == 0, printed.err
        statements += json.loads(printed.out)["Statement"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    return cloud.enforce({"Version": "2012-10-17", "Statement": statements}, KEY)


def _lost(image: Image, machine: Machine, run: Run, step: Step) -> NoReturn:
    with ExitStack() as stack:
        machine.start(stack, run.work / "lost", "#cloud-config\n", "ssh-ed25519 AAAA x")
        raise BuildFailed("it never answered")


def test_build_and_verify(
    cloud: Cloud, places: Sequence[Place], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cloud.reset()
    monkeypatch.setenv("AMI_BUILDER_HOME", str(tmp_path / "home"))
    held = allowed(cloud, monkeypatch, "build", "verify")
    built = captured(*BUILD)
    assert built.status == 0, built.err
    ami = built.out.splitlines()[-1]
    made = cloud.count("RunInstances")
    assert captured(*BUILD).out.splitlines()[-1] == ami
    assert cloud.count("RunInstances") == made, "unchanged"
    proved = captured("verify", ami)
    assert proved.status == 0, proved.err
    monkeypatch.setattr(cells, "prove", _lost)
    assert captured("verify", ami).status == BuildFailed.exit_code
    assert held.refused == []
    assert held.unused == set()
    only_the_ami(cloud)


def test_collecting(
    cloud: Cloud, places: Sequence[Place], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = next(number for number, place in enumerate(places) if place.action == "CreateImage")
    stopped(cloud, places[made + 1], POWER_LOSS, tmp_path / "killed")
    assert cloud.left().keys() == {"instance", "volume", "image", "snapshot", "security-group"}
    held = allowed(cloud, monkeypatch, "lifecycle")
    collected = captured("gc", "--apply")
    assert collected.status == 0, collected.err
    assert cloud.left() == {}
    assert held.refused == []
    assert held.unused == set()


def test_checking(cloud: Cloud, places: Sequence[Place], monkeypatch: pytest.MonkeyPatch) -> None:
    held = allowed(cloud, monkeypatch, "all")
    before = cloud.left()
    told = json.loads(captured("check", "--target", "aws", "--json").out)
    found = {one["name"]: one["state"] for one in told["findings"]}
    assert found["permissions"] == "ok", told
    assert held.refused == []
    assert cloud.left() == before
