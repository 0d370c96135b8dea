"""A scheduler and an Auto Scaling group of workers, from templates that `ami-builder launch-template` makes.

The group replaces a worker whose Dask is unhealthy for good, by an image that was promoted since, and then
scales in without losing work.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed import Client

from ami_builder.system import processes
from tests.fake_ec2.cloud_state import role_key
from tests.fake_ec2.network import GATEWAY
from tests.vm import clusters
from tests.vm.conftest import ROOT
from tests.vm.instances import KEY_NAME, Instances, instances, register
from tests.vm.scenarios import answer

if TYPE_CHECKING:
    from collections.abc import Mapping

SCHEDULER, WORKER = "t3.small", "m6i.large"
GROUP, HOOK, ROLE = "dask-workers", "retire", "dask-worker"
PARAMETER = "/ami-builder/dask/x86_64/stable"
PORT = 5080
SECONDS = 2400.0
# A role that there is none of, for good: dask.service is refused, and stays so.
BREAK = "sed -i s/DASK_ROLE=worker/DASK_ROLE=broken/ /etc/dask/dask.env && systemctl restart --no-block dask"


def main(disk: str, directory: str) -> dict[str, Any]:
    """Return what came of it; see test_9_scaling_group.py."""
    folder, image = Path(directory), Path(disk)
    with (
        instances(image, folder, memory={SCHEDULER: 1024, WORKER: 1280}) as there,
        processes.running(_relay(there)),
    ):
        cloud = there.cloud
        _promote(there, there.ami)
        _role(there)
        _command(there, "--role", "scheduler", "--instance-type", SCHEDULER)
        launched = cloud.client().run_instances(
            MinCount=1, MaxCount=1, LaunchTemplate={"LaunchTemplateName": "ami-builder-dask-stable-scheduler"}
        )
        scheduler = launched["Instances"][0]["InstanceId"]
        address = f"{there.running()[scheduler]['PrivateIpAddress']}:8786"
        (template,) = _command(
            there,
            *("--scheduler", address, "--instance-type", WORKER, "--instance-profile", ROLE),
            *("--replace-unhealthy-after", "45s", "--lifecycle-hook", HOOK),
            *("--aws-endpoint", f"http://{GATEWAY}:{PORT}"),
        )
        scaling = cloud.client("autoscaling")
        scaling.create_auto_scaling_group(
            AutoScalingGroupName=GROUP,
            LaunchTemplate={"LaunchTemplateName": template["name"], "Version": "$Default"},
            MinSize=0,
            MaxSize=2,
            DesiredCapacity=2,
            AvailabilityZones=["us-east-1a"],
        )
        try:
            with Client(f"tcp://{address}", timeout=f"{SECONDS:.0f}s", set_as_default=False) as client:
                found = _look(there, client, image)
        finally:
            scaling.delete_auto_scaling_group(AutoScalingGroupName=GROUP, ForceDelete=True)
            cloud.client().terminate_instances(InstanceIds=[scheduler])
        again = _command(there, "--scheduler", address, "--delete", "--apply", key="plan")
        processes.wait_until(lambda: not there.running(), what="the end of all", timeout=120, interval=1)
        left = cloud.left()
        return {
            **found,
            "deleted": [one["name"] for one in again],
            "left": {kind: left[kind] for kind in ("instance", "volume") if kind in left},
        }


def _look(there: Instances, client: Client, image: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    first = _members(there)
    found["limits"] = [_limits(there, client, one) for one in _workers(there, client)]
    # Only what is launched from now on has it; nothing else changes.
    other = register(there.cloud, there.machines, image, root_device="/dev/sda1", name="b")
    _promote(there, other)
    broken, kept = first
    began = time.monotonic()
    with there.session(broken) as session:
        session.run(BREAK, sudo=True)

    def replaced() -> list[str] | None:
        now = _members(there)
        return now if broken not in now and len(now) == 2 else None

    now = processes.wait_until(replaced, what="the replacement", timeout=900, interval=2)
    found["replaced_after"] = round(time.monotonic() - began, 1)
    (new,) = set(now) - {kept}
    workers = _workers(there, client)
    found["new_image"] = (
        there.cloud.client().describe_instances(InstanceIds=[new])["Reservations"][0]["Instances"][0][
            "ImageId"
        ]
        == other
    )
    found["limits"].append(_limits(there, client, new))
    found["template_versions"] = len(
        there.cloud.client().describe_launch_template_versions(LaunchTemplateName="ami-builder-dask-stable")[
            "LaunchTemplateVersions"
        ]
    )
    return {**found, **_scale_in(there, client, kept, workers)}


def _scale_in(there: Instances, client: Client, leaving: str, of: Mapping[str, str]) -> dict[str, Any]:
    """Let the group have one instance less, which holds results, and count what is computed again."""
    scaling = there.cloud.client("autoscaling")
    scaling.put_lifecycle_hook(
        AutoScalingGroupName=GROUP,
        LifecycleHookName=HOOK,
        LifecycleTransition="autoscaling:EC2_INSTANCE_TERMINATING",
        HeartbeatTimeout=3600,
    )
    module = clusters.load_work(client)
    held = [client.submit(module.combine, n, key=f"held-{n}", workers=[of[leaving]]) for n in range(20)]
    client.gather(held)
    client.get_task_stream()  # the scheduler records tasks from now on
    began = time.monotonic()
    scaling.set_desired_capacity(AutoScalingGroupName=GROUP, DesiredCapacity=1)
    waiting = _states(there).get(leaving)
    processes.wait_until(
        lambda: leaving not in _states(there), what="the end of the hook", timeout=SECONDS, interval=2
    )
    seconds = round(time.monotonic() - began, 1)
    results = client.gather(held) == [n & 0xFFFFFFFF for n in range(20)]
    again = [one["key"] for one in client.get_task_stream() if str(one["key"]).startswith("held-")]
    completed = [one for one in there.cloud.calls if one.action == "CompleteLifecycleAction"]
    return {
        "waiting": waiting,
        "hook_seconds": seconds,
        "completed_by": sorted({one.access_key for one in completed if one.outcome == "ok"}),
        "results": results,
        "computed_again": again,
    }


def _workers(there: Instances, client: Client) -> dict[str, str]:
    """Return instance -> the address of its worker, once each instance of the group has one."""

    def found() -> dict[str, str] | None:
        running, states = there.running(), _states(there)
        addresses = list(client.scheduler_info(n_workers=-1)["workers"])
        of = {
            key: next((a for a in addresses if f"//{running[key]['PrivateIpAddress']}:" in a), "")
            for key in states
            if key in running
        }
        return of if len(of) == 2 and all(of.values()) else None

    return processes.wait_until(found, what="a worker on each instance", timeout=SECONDS, interval=2)


def _limits(there: Instances, client: Client, instance: str) -> dict[str, int]:
    address = there.running()[instance]["PrivateIpAddress"]
    workers = client.scheduler_info(n_workers=-1)["workers"]
    limit = next(one["memory_limit"] for key, one in workers.items() if f"//{address}:" in key)
    with there.session(instance) as session:
        return {**clusters.limits(session), "worker": int(limit)}


def _states(there: Instances) -> dict[str, str]:
    scaling = there.cloud.client("autoscaling")
    (group,) = scaling.describe_auto_scaling_groups(AutoScalingGroupNames=[GROUP])["AutoScalingGroups"]
    return {one["InstanceId"]: one["LifecycleState"] for one in group["Instances"]}


def _members(there: Instances) -> list[str]:
    return list(_states(there))


def _promote(there: Instances, ami: str) -> None:
    there.cloud.client("ssm").put_parameter(
        Name=PARAMETER, Value=ami, Type="String", DataType="aws:ec2:image", Overwrite=True
    )


def _role(there: Instances) -> None:
    """Give instances a role that may do what `iam-policy --instance` prints, and no more."""
    iam = there.cloud.client("iam")
    iam.create_role(RoleName=ROLE, AssumeRolePolicyDocument='{"Statement": []}')
    iam.create_instance_profile(InstanceProfileName=ROLE)
    iam.add_role_to_instance_profile(InstanceProfileName=ROLE, RoleName=ROLE)
    printed = _ami_builder(there, "iam-policy", "--instance", "--group", GROUP)
    there.cloud.enforce(json.loads(printed), role_key(ROLE))


def _command(there: Instances, *flags: str, key: str = "templates") -> list[dict[str, Any]]:
    common = () if "--delete" in flags else ("--key-name", KEY_NAME)
    words = [one for one in flags if "--delete" not in flags or one in ("--delete", "--apply")]
    printed = _ami_builder(there, "launch-template", "stable", *words, *common, "--json")
    return list(json.loads(printed)[key])


def _ami_builder(there: Instances, *arguments: str) -> str:
    home = {"AMI_BUILDER_HOME": str(there.directory / "home"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "ami_builder", *arguments],
        cwd=ROOT,
        env=dict(os.environ) | there.cloud.environment() | home,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}: status {done.returncode}"
    return done.stdout


def _relay(there: Instances) -> list[str]:
    """Let instances reach the cloud, which listens on this host's loopback."""
    port = there.cloud.url.rpartition(":")[2]
    return ["socat", f"TCP4-LISTEN:{PORT},bind={GATEWAY},fork,reuseaddr", f"TCP4:127.0.0.1:{port}"]


if __name__ == "__main__":
    answer(main)
