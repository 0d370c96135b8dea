"""Clients other than boto3 against the loopback EC2, where installed: Packer, the AWS CLI, Terraform."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ami_builder.aws.bake import SOURCE
from tests.fake_ec2.requests import launch, tagged
from tests.fake_ec2.server import ACCESS_KEY, Cloud
from tests.packer_plugins import needs_plugin
from tests.terraform import Terraform

TEMPLATE = """
source "amazon-ebs" "image" {
  ami_name            = "image"
  region              = "us-east-1"
  custom_endpoint_ec2 = "%(url)s"
  source_ami          = "%(ami)s"
  communicator        = "none"
  tags                = { "ami-builder:run" = "r1" }
  snapshot_tags       = { "ami-builder:run" = "r1" }
  run_tags            = { "ami-builder:run" = "r1" }
  run_volume_tags     = { "ami-builder:run" = "r1" }
  temporary_security_group_source_cidrs = ["127.0.0.1/32"]
  %(more)s
}
build {
  sources = ["source.amazon-ebs.image"]
  post-processor "manifest" { output = "manifest.json" }
}
"""

ON_DEMAND = 'instance_type = "t3.small"'
SPOT = 'spot_instance_types = ["m6i.large", "t3.small"]\nspot_price = "auto"'
DENIED = {"Effect": "Deny", "Action": "ec2:CreateImage"}


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def build(cloud: Cloud, folder: Path, more: str = "") -> subprocess.CompletedProcess[str]:
    needs_plugin(SOURCE)
    (folder / "image.pkr.hcl").write_text(
        TEMPLATE % {"url": cloud.url, "ami": cloud.base_ami(), "more": more}
    )
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


@needs("packer")
@pytest.mark.parametrize("kind", [ON_DEMAND, SPOT])
def test_packer_completes(cloud: Cloud, tmp_path: Path, kind: str) -> None:
    cloud.options.image_describes = 2
    cloud.options.no_capacity = {("m6i.large", "*")}
    done = build(cloud, tmp_path, kind)
    assert done.returncode == 0, done.stdout + done.stderr
    left = cloud.left()
    assert sorted(left) == ["image", "snapshot"]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["builds"][0]["artifact_id"] == f"us-east-1:{left['image'][0]}"
    ec2 = cloud.client()
    tags = [{"Key": "ami-builder:run", "Value": "r1"}]
    assert ec2.describe_images(Owners=["self"])["Images"][0]["Tags"] == tags
    assert ec2.describe_snapshots(OwnerIds=["self"])["Snapshots"][0]["Tags"] == tags


@needs("packer")
def test_packer_leaves_nothing_when_it_is_refused(cloud: Cloud, tmp_path: Path) -> None:
    everything = {"Effect": "Allow", "Action": "ec2:*", "Resource": "*"}
    enforced = cloud.enforce({"Statement": [everything, everything | DENIED]}, ACCESS_KEY)
    done = build(cloud, tmp_path, ON_DEMAND)
    assert done.returncode == 1
    assert "UnauthorizedOperation" in done.stdout + done.stderr
    assert [action for action, _ in enforced.refused] == ["ec2:CreateImage"]
    assert cloud.left() == {}


@needs("aws")
def test_the_aws_cli_reads_it(cloud: Cloud) -> None:
    ec2 = cloud.client()
    made = ec2.create_image(
        InstanceId=launch(cloud, ec2), Name="image", TagSpecifications=tagged("image", "snapshot")
    )["ImageId"]
    ec2.modify_image_attribute(ImageId=made, ImdsSupport={"Value": "v2.0"})
    argv = [
        "aws",
        "ec2",
        "describe-images",
        "--owners",
        "self",
        "--filters",
        "Name=tag-key,Values=ami-builder:run",
    ]
    done = subprocess.run(
        [*argv, "--query", "Images[].[ImageId,ImdsSupport,State]", "--output", "json"],
        env=dict(os.environ) | cloud.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[made, "v2.0", "available"]]


TERRAFORM = """
terraform {
  required_providers {
    aws = { source = "hashicorp/aws" }
  }
}
data "aws_ami" "ours" {
  owners      = ["self"]
  most_recent = true
  filter {
    name   = "tag:ami-builder:image"
    values = ["dask"]
  }
}
output "ami" { value = [data.aws_ami.ours.id, data.aws_ami.ours.imds_support] }
"""


@needs("terraform")
def test_terraform_finds_it(cloud: Cloud, tmp_path: Path) -> None:
    ec2 = cloud.client()
    made = ec2.create_image(
        InstanceId=launch(cloud, ec2),
        Name="image",
        TagSpecifications=tagged("image", tags={"ami-builder:image": "dask"}),
    )["ImageId"]
    ec2.modify_image_attribute(ImageId=made, ImdsSupport={"Value": "v2.0"})
    (tmp_path / "main.tf").write_text(TERRAFORM)
    terraform = Terraform(tmp_path, cloud.url, cloud.environment())
    terraform.init()
    terraform.run("apply", "-auto-approve", "-input=false")
    assert json.loads(terraform.run("output", "-json", "ami")) == [made, "v2.0"]
