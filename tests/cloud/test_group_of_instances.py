"""What an instance of a group does by itself, with no VM: the guest's calls, under its role's policy."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pytest

from ami_builder.build import guest as render
from ami_builder.qemu.imds import InstanceMetadata, MetadataServer
from tests.cloud.aws import call_here
from tests.cloud.flow import captured
from tests.cloud.test_launch_template import NAME, current, data, ran, settings
from tests.fake_ec2.cloud_state import role_key
from tests.fake_ec2.server import REGION
from tests.fake_programs import fake
from tests.sample_image import image

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fake_ec2.guard import Enforced
    from tests.fake_ec2.server import Cloud

GROUP, HOOK, ROLE, SECRET = "workers", "retire", "dask-worker", "dask/worker"
TLS = ("--tls", f"secretsmanager:{SECRET}")
PEM = "-----BEGIN CERTIFICATE-----"
SYSTEMCTL = """
case $* in
    "start retire-workers@"*) exit "${FAKE_STATUS:-0}" ;;
    show*) echo "${FAKE_STATUS:-0}" ;;
esac
"""
"""Ends as retire-workers does."""


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AMI_BUILDER_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("AMI_BUILDER_CONFIG", raising=False)


class Guest:
    """A folder that the guest's programs take for /, with the dask.env of the template's user data."""

    def __init__(self, cloud: Cloud, instance: str, root: Path, server: MetadataServer) -> None:
        self._instance, self._root, self._server = instance, root, server
        self._programs, self._state = root / "programs", root / "run/dask"
        self._state.mkdir(parents=True)
        (root / "etc/dask").mkdir(parents=True)
        text = "".join(f"{name}={value}\n" for name, value in settings(data(cloud)).items())
        (root / "etc/dask/dask.env").write_text(text)
        fake(self._programs, "systemctl", SYSTEMCTL)
        files = render.guest(image())
        for name in ("dask-aws", "dask-health", "instance-metadata", "watch-notices"):
            program = self._programs / name
            program.write_bytes(files[PurePosixPath("/usr/local/sbin") / name].content)
            program.chmod(0o755)
        self.learn(cloud)

    def learn(self, cloud: Cloud) -> None:
        """Let the metadata say what the cloud says by now."""
        for path, value in cloud.metadata(self._instance).items():
            self._server.tree.announce(path, value)

    def write(self, name: str, text: str) -> None:
        (self._state / name).write_text(text)

    def run(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the guest; watch-notices looks once."""
        environment = {
            "PATH": f"{self._programs}:{os.environ['PATH']}",
            "INSTANCE_METADATA_URL": f"http://127.0.0.1:{self._server.port}",
            "DASK_AWS_ROOT": str(self._root),
            "DASK_HEALTH_STATE": str(self._state / "health"),
            "DASK_HEALTH_SETTINGS": str(self._root / "etc/dask/dask.env"),
            "DASK_HEALTH_PORT": "1",
            "WATCH_NOTICES_ROOT": str(self._root),
            "WATCH_NOTICES_POLLS": "1",
        }
        return subprocess.run(
            [str(self._programs / arguments[0]), *arguments[1:]],
            env=environment | more,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )


@contextmanager
def guest(cloud: Cloud, instance: str, root: Path) -> Iterator[Guest]:
    """Yield the guest of an instance, with its metadata service."""
    with MetadataServer(InstanceMetadata(instance_id=instance, region=REGION)) as server:
        yield Guest(cloud, instance, root, server)


@pytest.fixture
def group(cloud: Cloud) -> str:
    """A group of one worker with a hook, by the command's template, and the role that the policy limits."""
    current(cloud)
    iam = cloud.client("iam")
    iam.create_role(RoleName=ROLE, AssumeRolePolicyDocument='{"Statement": []}')
    iam.create_instance_profile(InstanceProfileName=ROLE)
    iam.add_role_to_instance_profile(InstanceProfileName=ROLE, RoleName=ROLE)
    ran(
        *("launch-template", "stable", "--scheduler", "10.0.0.7", *TLS, "--instance-profile", ROLE),
        *("--replace-unhealthy-after", "1min", "--lifecycle-hook", HOOK),
    )
    call_here(cloud, NAME, cloud.url)
    cloud.client("secretsmanager").create_secret(Name=SECRET, SecretString=PEM)
    scaling = cloud.client("autoscaling")
    scaling.create_auto_scaling_group(
        AutoScalingGroupName=GROUP,
        LaunchTemplate={"LaunchTemplateName": NAME, "Version": "$Default"},
        MinSize=0,
        MaxSize=2,
        DesiredCapacity=1,
        AvailabilityZones=[f"{REGION}a"],
        HealthCheckGracePeriod=300,
    )
    scaling.put_lifecycle_hook(
        AutoScalingGroupName=GROUP,
        LifecycleHookName=HOOK,
        LifecycleTransition="autoscaling:EC2_INSTANCE_TERMINATING",
    )
    return GROUP


@pytest.fixture
def held(cloud: Cloud, group: str) -> Enforced:
    """What the role of the instances may do: what `iam-policy` prints."""
    printed = captured("iam-policy", "--instance", *TLS, "--group", group)
    return cloud.enforce(json.loads(printed.out), role_key(ROLE))


@pytest.mark.needs("curl")
def test_a_role_may_read_its_certificates_and_nothing_else(
    cloud: Cloud, group: str, held: Enforced, tmp_path: Path
) -> None:
    (only,) = members(cloud)
    with guest(cloud, only, tmp_path) as machine:
        secret = machine.run("dask-aws", "secretsmanager", "GetSecretValue", f'{{"SecretId":"{SECRET}"}}')
        assert json.loads(secret.stdout)["SecretString"] == PEM, secret.stderr
        named = machine.run("instance-metadata", "tags/instance/aws:autoscaling:groupName")
        assert named.stdout.strip() == group
        more = f"AutoScalingGroupName={group}&DesiredCapacity=2"
        refused = machine.run("dask-aws", "autoscaling", "SetDesiredCapacity", more)
    assert refused.returncode == 1
    assert "AccessDenied" in refused.stderr
    assert [action for action, _ in held.refused] == ["autoscaling:SetDesiredCapacity"]


@pytest.mark.needs("curl")
def test_an_instance_that_is_unhealthy_for_good_is_replaced_by_its_own_word(
    cloud: Cloud, group: str, held: Enforced, tmp_path: Path
) -> None:
    (first,) = members(cloud)
    with guest(cloud, first, tmp_path) as machine:
        machine.write("health", "unhealthy\nCompose could not start Dask\n")
        assert machine.run("dask-health").returncode == 1
        assert members(cloud) == {first: "InService"}, "not for long yet"
        machine.write("unhealthy-since", "-100\n")
        reported = machine.run("dask-health")
        assert "reported to its Auto Scaling group" in reported.stdout, reported
        (_, second) = members(cloud)
        assert members(cloud) == {first: "Terminating:Wait", second: "InService"}
        machine.learn(cloud)
        retired = machine.run("watch-notices")
        assert f"lifecycle hook {HOOK} of group {group}: completed" in retired.stdout, retired
    assert members(cloud) == {second: "InService"}
    assert held.refused == []


@pytest.mark.needs("curl")
def test_scale_in_waits_for_the_worker_and_no_longer(
    cloud: Cloud, group: str, held: Enforced, tmp_path: Path
) -> None:
    (only,) = members(cloud)
    with guest(cloud, only, tmp_path) as machine:
        machine.run("watch-notices")
        cloud.client("autoscaling").set_desired_capacity(AutoScalingGroupName=group, DesiredCapacity=0)
        assert members(cloud) == {only: "Terminating:Wait"}
        machine.learn(cloud)
        # The worker could not hand over its data: the hook holds the instance.
        machine.run("watch-notices", FAKE_STATUS="1")
        assert members(cloud) == {only: "Terminating:Wait"}
        machine.run("watch-notices")
    assert members(cloud) == {}
    assert held.used == {"autoscaling:CompleteLifecycleAction"}
    assert "instance" not in cloud.left()


def members(cloud: Cloud) -> dict[str, str]:
    """Return instance -> its lifecycle state in the group."""
    (group,) = cloud.client("autoscaling").describe_auto_scaling_groups()["AutoScalingGroups"]
    return {one["InstanceId"]: one["LifecycleState"] for one in group["Instances"]}
