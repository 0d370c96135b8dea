"""Debian's real Packer against the loopback EC2, without a machine: an AMI, its tags, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from .server import ACCESS_KEY, Cloud

TEMPLATE = """
source "amazon-ebs" "image" {
  ami_name            = "image"
  region              = "us-east-1"
  custom_endpoint_ec2 = "%(url)s"
  source_ami          = "%(ami)s"
  instance_type       = "t3.small"
  communicator        = "none"
  tags                = { "ami-builder:run" = "r1" }
  snapshot_tags       = { "ami-builder:run" = "r1" }
  run_tags            = { "ami-builder:run" = "r1" }
  run_volume_tags     = { "ami-builder:run" = "r1" }
  temporary_security_group_source_cidrs = ["127.0.0.1/32"]
}
build {
  sources = ["source.amazon-ebs.image"]
  post-processor "manifest" { output = "manifest.json" }
}
"""

DENIED = {"Effect": "Deny", "Action": "ec2:CreateImage"}


def build(cloud: Cloud, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "image.pkr.hcl").write_text(TEMPLATE % {"url": cloud.url, "ami": cloud.base_ami()})
    return subprocess.run(
        ["packer", "build", "-color=false", "."],
        cwd=folder,
        env=dict(os.environ) | cloud.environment() | {"CHECKPOINT_DISABLE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.skipif(shutil.which("packer") is None, reason="Packer is not installed")
def test_a_build_completes(cloud: Cloud, tmp_path: Path) -> None:
    cloud.options.image_describes = 2
    done = build(cloud, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    left = cloud.left()
    assert sorted(left) == ["image", "snapshot"]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["builds"][0]["artifact_id"] == f"us-east-1:{left['image'][0]}"
    ec2 = cloud.client()
    tags = [{"Key": "ami-builder:run", "Value": "r1"}]
    assert ec2.describe_images(Owners=["self"])["Images"][0]["Tags"] == tags
    assert ec2.describe_snapshots(OwnerIds=["self"])["Snapshots"][0]["Tags"] == tags


@pytest.mark.skipif(shutil.which("packer") is None, reason="Packer is not installed")
def test_a_refused_build_leaves_nothing(cloud: Cloud, tmp_path: Path) -> None:
    everything = {"Effect": "Allow", "Action": "ec2:*", "Resource": "*"}
    enforced = cloud.enforce({"Statement": [everything, everything | DENIED]}, ACCESS_KEY)
    done = build(cloud, tmp_path)
    assert done.returncode == 1
    assert "UnauthorizedOperation" in done.stdout + done.stderr
    assert [action for action, _ in enforced.refused] == ["ec2:CreateImage"]
    assert cloud.left() == {}
