"""What becomes of instances whose machines run on a fake QEMU: seconds instead of minutes."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ami_builder.qemu.hardware import Accelerator
from ami_builder.system import processes
from tests.fake_ec2.hypervisor import VmHypervisor
from tests.fake_ec2.instance_vm import InstanceVm
from tests.fake_ec2.requests import image, instance, launch
from tests.process.test_qemu import FAKE, qcow2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.fake_ec2.server import Cloud


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Put a fake QEMU first on PATH; it ends when its power button is pressed."""
    folder = tmp_path / "fake"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def make(*, first: str = "", each: str = "command == 'system_powerdown' and sys.exit()") -> Path:
        script = FAKE.format(here=str(folder), first=first, each=each, console=b"hello\r\n", state="running")
        (folder / "qemu-system-x86_64").write_text(f"#!{sys.executable}\n{script}")
        (folder / "qemu-system-x86_64").chmod(0o755)
        return folder

    return make


@pytest.fixture
def machines(cloud: Cloud, tmp_path: Path, fake: Callable[..., Path]) -> Iterator[VmHypervisor]:
    fake()
    base = qcow2(tmp_path / "base.qcow2")
    with VmHypervisor(
        base=base, directory=tmp_path / "vms", accelerator=Accelerator.TCG, port=2222
    ) as machines:
        cloud.machines = machines
        yield machines
        cloud.machines = None


def state(ec2: Any, instance_id: str) -> str:
    return str(instance(ec2, instance_id)["State"]["Name"])


def until(ec2: Any, instance_id: str, wanted: str) -> None:
    wait(lambda: state(ec2, instance_id) == wanted)


def wait(condition: Callable[[], bool]) -> None:
    processes.wait_until(condition, what="the cloud", timeout=120, interval=0.05)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How often a machine's thread has looked after it, while it was on."""
    seen: list[str] = []
    look = InstanceVm._look

    def counted(vm: InstanceVm, imds_port: int) -> bool:
        if vm._machine is not None:
            seen.append(vm.name)
        return look(vm, imds_port)

    monkeypatch.setattr(InstanceVm, "_look", counted)
    return seen


def disks(tmp_path: Path) -> int:
    return len(list((tmp_path / "vms").glob("*.qcow2")))


def pids(tmp_path: Path) -> list[int]:
    return [int(line) for line in (tmp_path / "fake/pids").read_text().split()]


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_stopped_captured_and_started_again(cloud: Cloud, machines: VmHypervisor, tmp_path: Path) -> None:
    ec2 = cloud.client()
    first = launch(cloud, ec2, InstanceInitiatedShutdownBehavior="terminate")
    until(ec2, first, "running")
    assert ec2.get_console_output(InstanceId=first)["Output"] == "hello\r\n"
    ec2.stop_instances(InstanceIds=[first])
    until(ec2, first, "stopped")
    assert instance(ec2, first)["StateReason"]["Code"] == "Client.UserInitiatedShutdown"
    made = ec2.create_image(InstanceId=first, Name="image")["ImageId"]
    wait(lambda: image(ec2, made)["State"] == "available")
    ec2.start_instances(InstanceIds=[first])
    until(ec2, first, "running")
    second = launch(cloud, ec2, ImageId=made)
    until(ec2, second, "running")
    assert disks(tmp_path) == 3
    ec2.terminate_instances(InstanceIds=[first, second])
    for each in (first, second):
        until(ec2, each, "terminated")
    assert disks(tmp_path) == 1
    ec2.deregister_image(ImageId=made, DeleteAssociatedSnapshots=True)
    assert disks(tmp_path) == 0
    assert cloud.left() == {}
    assert not any(alive(pid) for pid in pids(tmp_path))


def test_a_disk_follows_its_snapshot(cloud: Cloud, machines: VmHypervisor, tmp_path: Path) -> None:
    ec2 = cloud.client()
    first = launch(cloud, ec2)
    until(ec2, first, "running")
    made = ec2.create_image(InstanceId=first, Name="image")["ImageId"]
    wait(lambda: image(ec2, made)["State"] == "available")
    ec2.terminate_instances(InstanceIds=[first])
    until(ec2, first, "terminated")
    snapshot = image(ec2, made)["BlockDeviceMappings"][0]["Ebs"]["SnapshotId"]
    disk = machines.disk(snapshot)
    again = ec2.register_image(
        Name="again",
        Architecture="x86_64",
        VirtualizationType="hvm",
        RootDeviceName="/dev/sda1",
        BlockDeviceMappings=[{"DeviceName": "/dev/sda1", "Ebs": {"SnapshotId": snapshot}}],
    )["ImageId"]
    ec2.deregister_image(ImageId=made)
    assert machines.disk(snapshot) == disk
    # The root has the size that the launch maps to the AMI's own name of it.
    sized = [{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 40}}]
    second = launch(cloud, ec2, ImageId=again, BlockDeviceMappings=sized)
    until(ec2, second, "running")
    (mapped,) = instance(ec2, second)["BlockDeviceMappings"]
    assert mapped["DeviceName"] == "/dev/sda1"
    ec2.terminate_instances(InstanceIds=[second])
    until(ec2, second, "terminated")
    ec2.deregister_image(ImageId=again)
    ec2.delete_snapshot(SnapshotId=snapshot)
    assert disks(tmp_path) == 0


def test_a_running_instance_is_captured(cloud: Cloud, machines: VmHypervisor, tmp_path: Path) -> None:
    ec2 = cloud.client()
    launched = launch(cloud, ec2)
    until(ec2, launched, "running")
    made = ec2.create_image(InstanceId=launched, Name="image")["ImageId"]
    wait(lambda: image(ec2, made)["State"] == "available")
    wait(lambda: len(pids(tmp_path)) == 2)
    assert state(ec2, launched) == "running"


@pytest.mark.parametrize(("behaviour", "becomes"), [("terminate", "terminated"), ("stop", "stopped")])
def test_a_guest_that_powers_itself_off(
    cloud: Cloud, machines: VmHypervisor, fake: Callable[..., Path], behaviour: str, becomes: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: list[str],
) -> None:  # fmt: skip
    fake(each="if os.path.exists(here + '/off'): sys.exit()")
    cut = InstanceVm._cut

    def cut_slowly(vm: InstanceVm) -> None:
        # So that whoever says "terminated" while there still is a disk is seen to.
        time.sleep(0.2)
        cut(vm)

    monkeypatch.setattr(InstanceVm, "_cut", cut_slowly)
    ec2 = cloud.client()
    launched = launch(cloud, ec2, InstanceInitiatedShutdownBehavior=behaviour)
    until(ec2, launched, "running")
    (tmp_path / "fake/off").touch()
    before = len(looks)
    until(ec2, launched, becomes)
    assert len(looks) - before <= 1, "the first look that can see it does"
    assert disks(tmp_path) == (behaviour == "stop")
    assert instance(ec2, launched)["StateReason"]["Code"] == "Client.InstanceInitiatedShutdown"


def test_the_port_is_open_while_a_rule_says_so(
    cloud: Cloud, machines: VmHypervisor, looks: list[str]
) -> None:
    ec2 = cloud.client()
    group = ec2.create_security_group(GroupName="group", Description="test")["GroupId"]
    launched = launch(cloud, ec2, SecurityGroupIds=[group])
    until(ec2, launched, "running")
    address = (instance(ec2, launched)["PublicIpAddress"], 2222)

    def reachable() -> bool:
        try:
            with socket.create_connection(address, timeout=2):
                return True
        except OSError:
            return False

    rule = {"GroupId": group, "IpProtocol": "tcp", "FromPort": 2000, "ToPort": 3000}
    ec2.authorize_security_group_ingress(**rule, CidrIp="10.0.0.0/8")
    ec2.authorize_security_group_ingress(**rule | {"FromPort": 22, "ToPort": 22}, CidrIp="0.0.0.0/0")
    before = len(looks)
    wait(lambda: len(looks) > before + 1)
    assert not reachable()
    ec2.authorize_security_group_ingress(**rule, CidrIp="127.0.0.0/8")
    wait(reachable)
    ec2.revoke_security_group_ingress(**rule, CidrIp="127.0.0.0/8")
    wait(lambda: not reachable())


def test_a_machine_that_cannot_start(
    cloud: Cloud,
    machines: VmHypervisor,
    fake: Callable[..., Path],
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    fake(first="sys.exit(1)")
    ec2 = cloud.client()
    launched = launch(cloud, ec2)
    until(ec2, launched, "terminated")
    assert "MachineDied" in capfd.readouterr().err
    wait(lambda: disks(tmp_path) == 0)


def test_a_killed_machine_and_an_emptied_account(
    cloud: Cloud, machines: VmHypervisor, tmp_path: Path
) -> None:
    ec2 = cloud.client()
    killed, other = launch(cloud, ec2), launch(cloud, ec2)
    for each in (killed, other):
        until(ec2, each, "running")
    os.kill(pids(tmp_path)[0], signal.SIGKILL)
    wait(lambda: sorted([state(ec2, killed), state(ec2, other)]) == ["running", "stopped"])
    cloud.reset()
    assert cloud.left() == {}
    assert not any(alive(pid) for pid in pids(tmp_path))
    assert disks(tmp_path) == 0


def test_what_a_type_has_is_what_is_told(cloud: Cloud, machines: VmHypervisor) -> None:
    ec2 = cloud.client()
    types = ["t3.micro", "t3.small", "m6i.large"]
    told = ec2.describe_instance_types(InstanceTypes=types)["InstanceTypes"]
    memory = {each["InstanceType"]: each["MemoryInfo"]["SizeInMiB"] for each in told}
    assert memory == {"t3.micro": 1024, "t3.small": 2048, "m6i.large": 2048}


def test_a_second_volume_is_an_empty_disk_while_its_instance_is(
    cloud: Cloud, machines: VmHypervisor, tmp_path: Path
) -> None:
    ec2 = cloud.client()
    ebs = {"VolumeSize": 40, "DeleteOnTermination": True}
    launched = launch(cloud, ec2, BlockDeviceMappings=[{"DeviceName": "/dev/sdf", "Ebs": ebs}])
    until(ec2, launched, "running")
    wait((tmp_path / "fake/argv.json").exists)
    (disk,) = (tmp_path / "vms").rglob("*.raw")
    assert disk.stat().st_size == 40 << 30
    assert disk.stat().st_blocks == 0
    assert f"serial={disk.stem.replace('-', '')}" in (tmp_path / "fake/argv.json").read_text()
    ec2.terminate_instances(InstanceIds=[launched])
    until(ec2, launched, "terminated")
    assert not disk.exists()
