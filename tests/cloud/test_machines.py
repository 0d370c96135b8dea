"""An instance that is real, from launch to AMI to an instance of that AMI."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ami_builder import config, proc
from ami_builder.adapters import qemu, recipe, ssh
from ami_builder.model import Endpoint
from ami_builder.workspace import Workspace
from tests.vm.conftest import HOME, ROOT

from .machine import SHUTDOWN_SECONDS
from .machines import Machines
from .server import Cloud
from .using import instance, launch

pytestmark = pytest.mark.vm

SSH_SECONDS = 600.0
MIB = 2048


@pytest.fixture
def machines(cloud: Cloud, tmp_path: Path) -> Iterator[Machines]:
    workspace = Workspace.open({"AMI_BUILDER_HOME": str(HOME)})
    workspace.ensure()
    image = config.load(ROOT / "ami-builder.toml", environ={}, overrides={}).select()
    base = recipe.base_recipe(image)
    log = tmp_path / "base.log"
    digest = base.resolve(workspace, log, refresh=False)
    disk = base.make(workspace, digest, "disk.qcow2", log, lambda line: None) / "disk.qcow2"
    accelerator, _ = qemu.choose_accelerator(
        disk, cache=workspace.cache / "accelerator.json", directory=tmp_path
    )
    with Machines(
        base=disk, directory=tmp_path / "cloud", accelerator=accelerator, memory={"t3.small": MIB}
    ) as machines:
        cloud.machines = machines
        yield machines
        cloud.machines = None


def until(ec2: Any, instance_id: str, state: str, timeout: float) -> float:
    start = time.monotonic()
    proc.wait_until(
        lambda: instance(ec2, instance_id)["State"]["Name"] == state,
        what=state,
        timeout=timeout,
        interval=0.1,
    )
    return time.monotonic() - start


def reachable(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=2):
            return True
    except OSError:
        return False


def test_launch_bake_and_launch_again(cloud: Cloud, machines: Machines, tmp_path: Path) -> None:
    ec2 = cloud.client()
    key = ssh.generate_key(tmp_path / "key")
    user_data = f"#cloud-config\nssh_authorized_keys: [{key.with_suffix('.pub').read_text().strip()}]\n"
    group = ec2.create_security_group(GroupName="group", Description="test")["GroupId"]
    rule = {
        "GroupId": group, "IpProtocol": "tcp", "FromPort": machines.port, "ToPort": machines.port,
        "CidrIp": "127.0.0.1/32",
    }  # fmt: skip
    settings = {"SecurityGroupIds": [group], "UserData": user_data}

    def session(instance_id: str) -> ssh.Session:
        endpoint = Endpoint(
            address=instance(ec2, instance_id)["PublicIpAddress"],
            port=machines.port,
            user="admin",
            console_log=tmp_path / "cloud" / instance_id / "console.log",
            ports={},
        )
        return ssh.Session(endpoint, key=key, directory=tmp_path / instance_id)

    first = launch(cloud, ec2, **settings)
    until(ec2, first, "running", 20)
    assert not reachable(instance(ec2, first)["PublicIpAddress"], machines.port), (
        "no rule lets anybody in yet"
    )
    ec2.authorize_security_group_ingress(**rule)
    with session(first) as login:
        login.wait(SSH_SECONDS)
        assert user_data.strip() in login.run("cloud-init query userdata", sudo=True).stdout
        login.run("echo baked > marker && sync")
        kib = int(login.run("sed -n 's/^MemTotal: *\\([0-9]*\\).*/\\1/p' /proc/meminfo").stdout)
    described = ec2.describe_instance_types(InstanceTypes=["t3.small"])["InstanceTypes"][0]["MemoryInfo"]
    assert described["SizeInMiB"] == MIB
    assert MIB * 0.9 < kib / 1024 <= MIB
    console = ec2.get_console_output(InstanceId=first, Latest=True)["Output"]
    assert "Debian GNU/Linux 13" in console

    ec2.stop_instances(InstanceIds=[first])
    assert instance(ec2, first)["State"]["Name"] == "stopping"
    # Sooner than its power would be cut: the guest heard the power button.
    print("stopped after", until(ec2, first, "stopped", SHUTDOWN_SECONDS - 5))
    made = ec2.create_image(InstanceId=first, Name="baked")["ImageId"]
    wait(lambda: ec2.describe_images(ImageIds=[made])["Images"][0]["State"] == "available", "image")
    ec2.terminate_instances(InstanceIds=[first])
    until(ec2, first, "terminated", 20)

    second = launch(cloud, ec2, ImageId=made, InstanceInitiatedShutdownBehavior="terminate", **settings)
    with session(second) as login:
        login.wait(SSH_SECONDS)
        assert login.run("cat marker").stdout == "baked\n"
        assert login.run("cloud-init query instance_id", sudo=True).stdout.strip() == second
        ec2.revoke_security_group_ingress(**rule)
        address = instance(ec2, second)["PublicIpAddress"]
        wait(lambda: not reachable(address, machines.port), "the port to close")
        ec2.authorize_security_group_ingress(**rule)
        wait(lambda: reachable(address, machines.port), "the port to open")
        login.drop()
        login.run("systemd-run --on-active=3 systemctl poweroff", sudo=True)
    print("off after", until(ec2, second, "terminated", 120))
    assert "instance" not in cloud.left()
    assert len(list((tmp_path / "cloud").glob("*.qcow2"))) == 1, "the AMI's disk"
    ec2.deregister_image(ImageId=made, DeleteAssociatedSnapshots=True)
    ec2.delete_security_group(GroupId=group)
    assert cloud.left() == {}
    assert list((tmp_path / "cloud").glob("*.qcow2")) == []


def wait(condition: Callable[[], bool], what: str) -> None:
    proc.wait_until(condition, what=what, timeout=20, interval=0.1)
