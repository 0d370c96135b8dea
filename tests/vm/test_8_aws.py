"""The whole way on real machines: Packer bakes an AMI on one, verification boots the AMI on another."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from ami_builder.build import base_image
from ami_builder.config import loading
from ami_builder.qemu import traces
from ami_builder.qemu.accelerator import choose_accelerator
from ami_builder.state.workspace import Workspace
from tests.conftest import WHOLE
from tests.fake_ec2.hypervisor import VmHypervisor
from tests.fake_ec2.server import Cloud
from tests.vm.conftest import HOME, ROOT, ami_builder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TYPE = "t3.small"
MIB = 2048


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    with Cloud() as cloud:
        yield cloud


@pytest.fixture
def machines(cloud: Cloud, tmp_path: Path) -> Iterator[VmHypervisor]:
    workspace = Workspace.open({"AMI_BUILDER_HOME": str(HOME)})
    workspace.ensure()
    image = loading.load(ROOT / "ami-builder.toml", environ={}, overrides={}).select()
    base = base_image.recipe(image)
    log = tmp_path / "base.log"
    digest = base.resolve(workspace, log, refresh=False)
    disk = base.make(workspace, digest, "", log, lambda line: None) / "disk.qcow2"
    accelerator, _ = choose_accelerator(disk, cache=workspace.cache / "accelerator.json", directory=tmp_path)
    with VmHypervisor(
        base=disk, directory=tmp_path / "cloud", accelerator=accelerator, memory={TYPE: MIB}
    ) as machines:
        cloud.machines = machines
        yield machines
        cloud.machines = None


def test_an_ami_keeps_the_promise_on_an_instance(
    cloud: Cloud, machines: VmHypervisor, tmp_path: Path
) -> None:
    settings = {
        "aws.source_cidrs": "127.0.0.1/32",
        "aws.ssh_port": str(machines.port),
        # The instance reaches nothing outside.
        "container.source": "archive",
        "aws.instance_types": TYPE,
        "verify.instance_types": TYPE,
        # In CI tried on a local machine alone (tests/vm): it takes two minutes.
        "verify.pressure": str(WHOLE in os.environ).lower(),
    }
    flags = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    answer = ami_builder(*flags, "build", "--target", "aws", "--json", env=cloud.environment())
    assert answer.status == 0, answer.stderr
    artifact, verdict = answer.json["artifact"], answer.json["verdict"]
    assert artifact["location"].startswith("ami-")
    assert {r["outcome"] for r in verdict["results"]} <= {"passed", "skipped"}
    assert ("pressure" in {r["phase"] for r in verdict["results"]}) == (WHOLE in os.environ)
    chain = {r["name"] for r in verdict["results"] if r["name"].startswith("memory limit chain: ")}
    assert {
        "memory limit chain: docker has the variable",
        "memory limit chain: workers share the variable",
    } <= chain
    assert [(m["machine"], m["phase"]) for m in verdict["measured"]] == [
        (TYPE, "boot"),
        (TYPE, "restart"),
        (TYPE, "reboot"),
    ]
    # The snapshot is a copy of the disk: what was deleted must be gone from that too.
    run = Workspace.open({"AMI_BUILDER_HOME": str(HOME)}).runs_dir / artifact["run_id"]
    identity = run / traces.IDENTITY_FILE
    (image,) = cloud.client().describe_images(ImageIds=[artifact["location"]])["Images"]
    assert image["RootDeviceName"] == "/dev/sda1"
    snapshot = image["BlockDeviceMappings"][0]["Ebs"]["SnapshotId"]
    traces.require_clean(machines.disk(snapshot), identity.read_text(), tmp_path)
    assert {kind: len(ids) for kind, ids in cloud.left().items()} == {"image": 1, "snapshot": 1}
