"""The emulated EC2 with real machines that reach each other, and an AMI of a built image in it.

For scenarios only (tests.vm.namespace): it needs a network namespace.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moto.core.utils import utcnow
from moto.ec2.utils import random_ami_id

from ami_builder.core.records import Endpoint
from ami_builder.qemu.accelerator import choose_accelerator
from ami_builder.system import ssh
from tests.fake_ec2.api_call import ACCOUNT
from tests.fake_ec2.fake_image import BASE_GIB, FakeImage
from tests.fake_ec2.hypervisor import VmHypervisor
from tests.fake_ec2.network import InstanceNetwork
from tests.fake_ec2.server import REGION, Cloud
from tests.vm.conftest import HOME

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ami_builder.qemu.imds import MetadataServer

KEY_NAME = "tests"
SSH_SECONDS = 900.0
CONSOLE_LINES = 25


@dataclass(frozen=True, slots=True, kw_only=True)
class Instances:
    """An account whose instances are real machines on one network."""

    cloud: Cloud
    machines: VmHypervisor
    ami: str
    """The built image, registered."""
    key: Path
    """What logs in to instances that were launched with the key pair KEY_NAME."""
    directory: Path

    def running(self) -> dict[str, dict[str, Any]]:
        """Return instance id -> what DescribeInstances says, without those that have ended."""
        pages = self.cloud.client().describe_instances()["Reservations"]
        found = {each["InstanceId"]: each for page in pages for each in page["Instances"]}
        return {key: one for key, one in found.items() if one["State"]["Name"] in ("pending", "running")}

    def metadata(self, instance_id: str) -> MetadataServer:
        """Return the metadata service of an instance."""
        return self.machines.metadata(instance_id)

    def console(self, instance_id: str) -> str:
        """Return what an instance has written to its console."""
        return self.machines.console(instance_id).decode(errors="replace")

    @contextmanager
    def session(
        self, instance_id: str, *, user: str = "admin", wait: float = SSH_SECONDS
    ) -> Iterator[ssh.Session]:
        """Log in to an instance by ssh, within `wait` seconds."""
        folder = self.directory / "ssh" / instance_id
        folder.mkdir(parents=True, exist_ok=True)
        address = self.running()[instance_id]["PrivateIpAddress"]
        log = folder / "console.log"
        log.write_text(self.console(instance_id))
        endpoint = Endpoint(address=address, port=22, user=user, console_log=log)
        with ssh.Session(endpoint, key=self.key, directory=folder) as session:
            session.wait(wait)
            yield session


@contextmanager
def instances(
    disk: Path,
    directory: Path,
    *,
    memory: Mapping[str, int] | None = None,
    root_device: str = "/dev/sda1",
    cpus: int = 2,
) -> Iterator[Instances]:
    """Run an emulated EC2 whose one AMI of this account is the qcow2 file `disk`.

    `memory` is MiB by instance type. Sets the environment that points boto3 at it; see Cloud.environment.
    """
    with ExitStack() as stack:
        network = stack.enter_context(InstanceNetwork(directory / "network"))
        cloud = stack.enter_context(Cloud())
        cache = HOME / "cache" / "accelerator.json"
        accelerator, _ = choose_accelerator(disk, cache=cache, directory=directory)
        machines = stack.enter_context(
            VmHypervisor(
                base=disk,
                directory=directory / "machines",
                accelerator=accelerator,
                memory=memory,
                shared=network,
                cpus=cpus,
            )
        )
        cloud.machines = machines
        stack.callback(setattr, cloud, "machines", None)
        key = ssh.generate_key(directory)
        public = key.with_suffix(".pub").read_bytes()
        cloud.client().import_key_pair(KeyName=KEY_NAME, PublicKeyMaterial=public)
        try:
            yield Instances(
                cloud=cloud,
                machines=machines,
                ami=register(cloud, machines, disk, root_device=root_device),
                key=key,
                directory=directory,
            )
        except BaseException:
            _show_consoles(directory / "machines")
            raise


def _show_consoles(directory: Path) -> None:
    """Write the end of what each machine printed to stderr; it says why a cluster never came up."""
    for log in sorted(directory.glob("*/console.log")):
        lines = log.read_text(errors="replace").splitlines()[-CONSOLE_LINES:]
        sys.stderr.write("\n".join([f"--- {log.parent.name}", *lines, ""]))


def register(
    cloud: Cloud,
    machines: VmHypervisor,
    disk: Path,
    *,
    root_device: str,
    name: str = "dask",
    region: str = REGION,
) -> str:
    """Let this account own an AMI whose disk is a qcow2 file, and return its id."""
    backend = cloud.backend(region)
    ebs = {"VolumeSize": BASE_GIB, "VolumeType": "gp3", "Encrypted": False, "DeleteOnTermination": True}
    image = FakeImage(
        backend,
        random_ami_id(),
        name=name,
        description="made by a test",
        owner_id=ACCOUNT,
        virtualization_type="hvm",
        hypervisor="xen",
        architecture="x86_64",
        image_location=f"{ACCOUNT}/{name}",
        creation_date=utcnow(),
        region_name=f"{region}a",
        mapping=[{"DeviceName": root_device, "Ebs": ebs}],
        root_device=root_device,
    )
    backend.amis[image.id] = image
    machines.register(image.ebs_snapshot.id, disk)
    return str(image.id)
