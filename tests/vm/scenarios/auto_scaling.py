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

from distributed import Client, Security

from ami_builder.build import certificates
from ami_builder.system import processes
from tests.cloud.aws import call_here
from tests.fake_ec2.cloud_state import role_key
from tests.fake_ec2.network import GATEWAY
from tests.vm import clusters
from tests.vm.conftest import ROOT
from tests.vm.instances import KEY_NAME, Instances, instances, register
from tests.vm.scenarios import answer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SCHEDULER, WORKER = "t3.small", "m5d.large"
GROUP, HOOK = "dask-workers", "retire"
PARAMETER = "/ami-builder/dask/x86_64/stable"
PORT = 5080
SECONDS = 1800.0
# A Compose file that Compose can't read: each start fails.
BREAK = "echo broken >>/etc/dask/compose.yaml && systemctl restart --no-block dask"


def main(disk: str, directory: str) -> dict[str, Any]:
    """Return what was found of limits, TLS, spilling, a replacement and scale-in; see test_9_launchers.py."""
    folder, image = Path(directory), Path(disk)
    with (
        instances(image, folder, memory={SCHEDULER: 1024, WORKER: 1280}) as there,
        processes.running(_relay(there)),
    ):
        ec2, scaling = there.cloud.client(), there.cloud.client("autoscaling")
        before = there.cloud.left()
        made = certificates.make(folder / "certificates", days=30)
        _promote(there, there.ami)
        _template(there, made, "scheduler", "--instance-type", SCHEDULER)
        launched = ec2.run_instances(
            MinCount=1, MaxCount=1, LaunchTemplate={"LaunchTemplateName": "ami-builder-dask-stable-scheduler"}
        )
        scheduler = launched["Instances"][0]["InstanceId"]
        address = f"{there.running()[scheduler]['PrivateIpAddress']}:8786"
        health = ("--replace-unhealthy-after", "60s", "--lifecycle-hook", HOOK)
        _template(there, made, "worker", "--instance-type", WORKER, "--scheduler", address, *health)
        scaling.create_auto_scaling_group(
            AutoScalingGroupName=GROUP,
            LaunchTemplate={"LaunchTemplateName": "ami-builder-dask-stable", "Version": "$Default"},
            MinSize=0,
            MaxSize=2,
            DesiredCapacity=2,
            AvailabilityZones=["us-east-1a"],
        )
        scaling.put_lifecycle_hook(
            AutoScalingGroupName=GROUP,
            LifecycleHookName=HOOK,
            LifecycleTransition="autoscaling:EC2_INSTANCE_TERMINATING",
            HeartbeatTimeout=3600,
        )
        own = made.folder / "client"
        security = Security(
            tls_ca_file=str(own / "ca.pem"),
            tls_client_cert=str(own / "cert.pem"),
            tls_client_key=str(own / "key.pem"),
            require_encryption=True,
        )
        with Client(f"tls://{address}", security=security, timeout="1800s", set_as_default=False) as client:
            found = _look(there, client, image, lambda: _from_outside(address, made))
        scaling.delete_auto_scaling_group(AutoScalingGroupName=GROUP, ForceDelete=True)
        ec2.terminate_instances(InstanceIds=[scheduler])
        ec2.deregister_image(ImageId=found.pop("other"), DeleteAssociatedSnapshots=True)
        for role in ("worker", "scheduler"):
            _ami_builder(there, "launch-template", "stable", "--role", role, "--delete", "--apply")
        return {**found, "left": clusters.left(there, before)}


def _from_outside(address: str, made: certificates.Folder) -> dict[str, Any]:
    return {
        "doctor": clusters.doctor(address, "--tls", str(made.folder)),
        "refused": clusters.is_refused(address),
    }


def _look(
    there: Instances, client: Client, image: Path, outside: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    of = _workers(there, client)
    broken, kept = list(_states(there))
    found: dict[str, Any] = {"workers": list(of.values()), **outside()}
    found["limits"] = [_limits(there, client, one) for one in of]
    module = clusters.load_work(client)
    found["spill"] = clusters.spill(there, client, kept, of[kept], module)
    # Only what is launched from now on has it; nothing else changes.
    found["other"] = other = register(there.cloud, there.machines, image, root_device="/dev/sda1", name="b")
    _promote(there, other)
    began = time.monotonic()
    with there.session(broken) as session:
        session.run(BREAK, sudo=True)
    processes.wait_until(
        lambda: broken not in (now := _states(there)) and len(now) == 2,
        what="the replacement", timeout=900, interval=2,
    )  # fmt: skip
    seconds = time.monotonic() - began
    (new,) = set(_states(there)) - {kept}
    of = _workers(there, client)
    launched = there.cloud.client().describe_instances(InstanceIds=[new])["Reservations"][0]["Instances"][0]
    assert launched["ImageId"] == other, "the replacement has the image that was promoted since"
    found["replaced"] = f"by its group, after {seconds:.0f} s (asked for 60 s)"
    found["limits"].append(_limits(there, client, new))
    # The new worker has it too; functions of the former module would be pickled with this Python's byte code.
    module = clusters.load_work(client)
    return {**found, "spot": _scale_in(there, client, kept, of, module)}


def _scale_in(
    there: Instances, client: Client, leaving: str, of: Mapping[str, str], module: Any
) -> dict[str, Any]:
    """Let the group have one instance less, which holds results, and count what is computed again."""
    held = [client.submit(module.combine, n, key=f"held-{n}", workers=[of[leaving]]) for n in range(20)]
    client.gather(held)
    client.get_task_stream()  # the scheduler records tasks from now on
    began = time.monotonic()
    there.cloud.client("autoscaling").set_desired_capacity(AutoScalingGroupName=GROUP, DesiredCapacity=1)
    assert _states(there)[leaving] == "Terminating:Wait"
    processes.wait_until(
        lambda: leaving not in _states(there), what="the end of the hook", timeout=900, interval=2
    )
    seconds = time.monotonic() - began
    results = client.gather(held) == [n & 0xFFFFFFFF for n in range(20)]
    again = [one["key"] for one in client.get_task_stream() if str(one["key"]).startswith("held-")]
    completed = [one for one in there.cloud.calls if one.action == "CompleteLifecycleAction"]
    assert {one.access_key for one in completed} == {role_key("dask-worker")}, "the hook's time did not pass"
    return {"seconds": round(seconds, 1), "of": len(held), "results": results, "computed_again": again}


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


def _promote(there: Instances, ami: str) -> None:
    there.cloud.client("ssm").put_parameter(
        Name=PARAMETER, Value=ami, Type="String", DataType="aws:ec2:image", Overwrite=True
    )


def _template(there: Instances, made: certificates.Folder, role: str, *flags: str) -> None:
    """Keep a role's template; its instances may do what `iam-policy --instance` prints, and no more."""
    profile, secret, iam = f"dask-{role}", f"dask/{role}", there.cloud.client("iam")
    tls = ("--tls", f"secretsmanager:{secret}")
    bundle = (made.folder / role / "bundle.pem").read_text()
    there.cloud.client("secretsmanager").create_secret(Name=secret, SecretString=bundle)
    iam.create_role(RoleName=profile, AssumeRolePolicyDocument='{"Statement": []}')
    iam.create_instance_profile(InstanceProfileName=profile)
    iam.add_role_to_instance_profile(InstanceProfileName=profile, RoleName=profile)
    group = ("--group", GROUP) if role == "worker" else ()
    printed = _ami_builder(there, "iam-policy", "--instance", *tls, *group)
    there.cloud.enforce(json.loads(printed), role_key(profile))
    common = ("--key-name", KEY_NAME, *tls, "--instance-profile", profile)
    _ami_builder(there, "launch-template", "stable", "--role", role, *flags, *common)
    suffix = "-scheduler" if role == "scheduler" else ""
    call_here(there.cloud, f"ami-builder-dask-stable{suffix}", f"http://{GATEWAY}:{PORT}")


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
