"""The whole way on real machines: Packer bakes an AMI on one, verification boots the AMI on another."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vm.conftest import ami_builder

from .machines import Machines
from .server import Cloud
from .test_machines import machines  # noqa: F401 - a fixture

pytestmark = pytest.mark.vm

TYPE = "t3.small"


def test_an_ami_keeps_the_promise_on_an_instance(
    cloud: Cloud,
    machines: Machines,  # noqa: F811
    tmp_path: Path,
) -> None:
    settings = {
        "aws.source_cidrs": "127.0.0.1/32",
        "aws.ssh_port": str(machines.port),
        "aws.instance_types": TYPE,
        "verify.instance_types": TYPE,
    }
    flags = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    answer = ami_builder(*flags, "build", "--target", "aws", "--json", env=cloud.environment())
    assert answer.status == 0, answer.stderr
    artifact, verdict = answer.json["artifact"], answer.json["verdict"]
    assert artifact["location"].startswith("ami-")
    assert {r["outcome"] for r in verdict["results"]} <= {"passed", "skipped"}
    chain = {r["name"] for r in verdict["results"] if r["name"].startswith("chain: ")}
    assert {"chain: docker has the variable", "chain: workers share the variable"} <= chain
    assert [(m["machine"], m["phase"]) for m in verdict["measured"]] == [
        (TYPE, "boot"),
        (TYPE, "restart"),
        (TYPE, "reboot"),
    ]
    assert {kind: len(ids) for kind, ids in cloud.left().items()} == {"image": 1, "snapshot": 1}
