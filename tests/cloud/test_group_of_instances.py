"""What an instance of a group does by itself, with no VM: the guest's calls, under its role's policy."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ami_builder.qemu.imds import InstanceMetadata, MetadataServer
from ami_builder.system import resources
from tests.cloud.flow import captured
from tests.cloud.test_launch_template import NAME, current, data, ran, settings
from tests.fake_ec2.cloud_state import role_key
from tests.fake_ec2.server import REGION

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fake_ec2.server import Cloud

SBIN = resources.packer_dir() / "guest/usr/local/sbin"
GROUP, HOOK, ROLE, SECRET = "workers", "retire", "dask-worker", "dask/worker"


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AMI_BUILDER_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("AMI_BUILDER_CONFIG", raising=False)


@contextmanager
def guest(cloud: Cloud, instance: str, root: Path) -> Iterator[MetadataServer]:
    """Serve an instance's metadata, and write the dask.env of its user data below `root`."""
    text = "".join(f"{name}={value}\n" for name, value in settings(data(cloud)).items())
    (root / "etc/dask").mkdir(parents=True)
    (root / "etc/dask/dask.env").write_text(text)
    with MetadataServer(InstanceMetadata(instance_id=instance, region=REGION)) as server:
        for path, value in cloud.metadata(instance).items():
            server.tree.announce(path, value)
        yield server


def called(server: MetadataServer, root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SBIN / arguments[0]), *arguments[1:]],
        env={
            "PATH": os.environ["PATH"],
            "INSTANCE_METADATA_URL": f"http://127.0.0.1:{server.port}",
            "DASK_AWS_ROOT": str(root),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.needs("curl")
def test_an_instance_reads_its_certificates_and_tells_its_group(cloud: Cloud, tmp_path: Path) -> None:
    current(cloud)
    iam = cloud.client("iam")
    iam.create_role(RoleName=ROLE, AssumeRolePolicyDocument='{"Statement": []}')
    iam.create_instance_profile(InstanceProfileName=ROLE)
    iam.add_role_to_instance_profile(InstanceProfileName=ROLE, RoleName=ROLE)
    tls = ("--tls", f"secretsmanager:{SECRET}")
    ran(
        *("launch-template", "stable", "--scheduler", "10.0.0.7", *tls, "--instance-profile", ROLE),
        *("--replace-unhealthy-after", "1min", "--lifecycle-hook", HOOK, "--aws-endpoint", cloud.url),
    )
    cloud.client("secretsmanager").create_secret(Name=SECRET, SecretString="-----BEGIN CERTIFICATE-----")
    printed = captured("iam-policy", "--instance", *tls, "--group", GROUP)
    held = cloud.enforce(json.loads(printed.out), role_key(ROLE))
    scaling = cloud.client("autoscaling")
    scaling.create_auto_scaling_group(
        AutoScalingGroupName=GROUP,
        LaunchTemplate={"LaunchTemplateName": NAME, "Version": "$Default"},
        MinSize=0,
        MaxSize=2,
        DesiredCapacity=1,
        AvailabilityZones=[f"{REGION}a"],
    )
    scaling.put_lifecycle_hook(
        AutoScalingGroupName=GROUP,
        LifecycleHookName=HOOK,
        LifecycleTransition="autoscaling:EC2_INSTANCE_TERMINATING",
    )
    (first,) = members(cloud)
    with guest(cloud, first, tmp_path / "guest") as server:
        root = tmp_path / "guest"
        secret = called(
            server, root, "dask-aws", "secretsmanager", "GetSecretValue", f'{{"SecretId":"{SECRET}"}}'
        )
        assert json.loads(secret.stdout)["SecretString"] == "-----BEGIN CERTIFICATE-----", secret.stderr
        named = called(server, root, "instance-metadata", "tags/instance/aws:autoscaling:groupName")
        assert named.stdout.strip() == GROUP
        unhealthy = f"InstanceId={first}&HealthStatus=Unhealthy&ShouldRespectGracePeriod=false"
        told = called(server, root, "dask-aws", "autoscaling", "SetInstanceHealth", unhealthy)
        assert told.returncode == 0, told.stderr
        assert members(cloud)[first] == "Terminating:Wait"
        action = f"AutoScalingGroupName={GROUP}&LifecycleHookName={HOOK}&InstanceId={first}"
        action += "&LifecycleActionResult=CONTINUE"
        done = called(server, root, "dask-aws", "autoscaling", "CompleteLifecycleAction", action)
        assert done.returncode == 0, done.stderr
        more = f"AutoScalingGroupName={GROUP}&DesiredCapacity=2"
        refused = called(server, root, "dask-aws", "autoscaling", "SetDesiredCapacity", more)
        assert refused.returncode == 1
        assert "AccessDenied" in refused.stderr
    assert first not in members(cloud)
    assert len(members(cloud)) == 1
    assert held.unused == set()


def members(cloud: Cloud) -> dict[str, str]:
    """Return instance -> its lifecycle state in the group."""
    (group,) = cloud.client("autoscaling").describe_auto_scaling_groups()["AutoScalingGroups"]
    return {one["InstanceId"]: one["LifecycleState"] for one in group["Instances"]}
