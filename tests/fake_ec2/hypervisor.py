"""Instances that are real: each is a QEMU machine that looks like EC2's, at a loopback address of its own.

An AMI is a qcow2 file. A launch puts an overlay on it, which is the instance's root volume; CreateImage
freezes that overlay as the AMI's file and puts a new one on top, so nothing is copied. Further volumes are
empty disks. Files that no AMI and no instance uses are removed. Port 22 of an instance's address leads to its
guest while a security group lets this machine in. With an InstanceNetwork (network.py) it has its own address
there instead, where other instances reach it. Not for use where this process calls `proc.cancel`, which ends
all children, these too.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moto.ec2.models.instance_types import INSTANCE_TYPES

from ami_builder.core.options import Arch, Network
from ami_builder.qemu import imds
from ami_builder.qemu.extra_disks import ExtraDisk
from ami_builder.qemu.hardware import Accelerator
from ami_builder.system import processes
from tests.fake_ec2 import network as instance_network
from tests.fake_ec2.cloud_state import end, set_state
from tests.fake_ec2.fake_image import DEBIAN_ACCOUNT, FakeImage
from tests.fake_ec2.instance_vm import InstanceVm, VmLaunch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from moto.ec2.models.instances import Instance

    from tests.fake_ec2.network import InstanceNetwork

GIB = 1 << 30
MOST_MIB = 2048
"""Memory of a type that the table doesn't have, unless EC2's has less."""


@dataclass(slots=True, kw_only=True)
class _Disk:
    path: Path
    backing: Path | None
    """The file that this one is based on; None for the base disk, which is never removed."""


class VmHypervisor:
    """What runs the instances: give it to `Cloud.machines`; the context ends them and removes their disks.

    `base` is the disk of every image that a region begins with. `memory` says how many MiB an instance type
    has; DescribeInstanceTypes tells the same. `shared` takes the place of `network`.
    """

    def __init__(
        self,
        *,
        base: Path,
        directory: Path,
        accelerator: Accelerator,
        memory: Mapping[str, int] | None = None,
        network: Network = Network.ISOLATED,
        shared: InstanceNetwork | None = None,
        port: int | None = None,
        cpus: int = 2,
    ) -> None:
        self.lock = threading.RLock()
        self.in_vpc, self._shared = shared is not None, shared
        self.port = port if port is not None else (22 if os.geteuid() == 0 else 2222)
        """Where ssh answers, at each instance's address."""
        self._base, self._directory = base.resolve(), directory.resolve()
        self._accelerator, self._network, self._cpus = accelerator, network, cpus
        self._memory = dict(memory or {})
        self._vms: dict[str, InstanceVm] = {}
        self._snapshots: dict[str, Path] = {}
        self._disks: dict[Path, _Disk] = {}
        self._number = 0

    def __enter__(self) -> VmHypervisor:
        self._directory.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()
        shutil.rmtree(self._directory, ignore_errors=True)

    def memory_of(self, kind: str, mib: int) -> int:
        """Return how many MiB a type has here, where EC2's has `mib`."""
        return self._memory.get(kind, min(mib, MOST_MIB))

    def clear(self) -> None:
        """End all instances and forget all disks; the caller must not hold the cloud's lock."""
        with self.lock:
            vms = list(self._vms.values())
        for vm in vms:
            vm.ask("terminate")
        for vm in vms:
            vm.join()
        with self.lock:
            self._vms.clear()
            self._snapshots.clear()
            self._collect()

    def launch(self, backend: Any, instance: Instance, image: FakeImage) -> None:
        """Boot the instance on a new overlay of the image's disk."""
        disk = self._snapshots.get(image.ebs_snapshot.id)
        if disk is None and image.owner_id == DEBIAN_ACCOUNT:
            disk = self._base
        assert disk is not None, f"{image.id} has no disk: it was neither captured nor copied here"
        root, *others = (
            backend.get_volume(block.volume_id) for block in instance.block_device_mapping.values()
        )
        volume = self._overlay(disk, root.size * GIB)
        directory = self._directory / instance.id
        disks = [
            ExtraDisk(
                size=each.size * GIB,
                path=directory / f"{each.id}.raw",
                instance_store=False,
                serial=each.id.replace("-", ""),
            )
            for each in others
        ]
        disks += [
            # Empty again after a stop, as on EC2.
            ExtraDisk(size=store["SizeInGB"] * GIB)
            for store in INSTANCE_TYPES[instance.instance_type]
            .get("InstanceStorageInfo", {})
            .get("Disks", [])
            for _ in range(store["Count"])
        ]
        key = backend.key_pairs.get(instance.key_name)
        mib = int(INSTANCE_TYPES[instance.instance_type]["MemoryInfo"]["SizeInMiB"])
        arch = Arch.named(str(image.architecture)) or Arch.AMD64
        address = str(instance.private_ip_address)
        there = {} if self._shared is None else instance_network.placed(address)
        metadata = imds.MetadataServer(
            imds.InstanceMetadata(
                instance_id=instance.id,
                ami_id=image.id,
                root_device=image.root_device_name,
                instance_type=instance.instance_type,
                arch=arch,
                region=backend.region_name,
                zone=str(instance.availability_zone).removeprefix(backend.region_name),
                public_key=key.public_key.strip() if key is not None else None,
                key_name=instance.key_name or "",
                user_data=base64.b64decode(str(instance.user_data)) if instance.user_data else None,
                **there,
            )
        )
        tap = self._shared.connect(metadata, address) if self._shared is not None else None
        vm = InstanceVm(
            VmLaunch(
                instance_id=instance.id,
                address=address,
                port=self.port,
                memory=self.memory_of(instance.instance_type, mib) << 20,
                cpus=self._cpus,
                accelerator=self._accelerator if arch.is_native else Accelerator.TCG,
                network=self._network,
                tap=tap,
                directory=directory,
                arch=arch,
                disks=tuple(disks),
            ),
            metadata=metadata,
            volume=volume,
            owner=_Owner(self, backend, instance),
        )
        self._vms[instance.id] = vm
        set_state(instance, "pending", 0)
        vm.start()

    def stop(self, instance: Instance) -> None:
        """Press the guest's power button."""
        self._vms[instance.id].ask("stop")

    def start(self, instance: Instance) -> None:
        """Boot a stopped instance again."""
        set_state(instance, "pending", 0)
        self._vms[instance.id].ask("start")

    def reboot(self, instance: Instance) -> None:
        """Reset the guest."""
        self._vms[instance.id].ask("reset")

    def terminate(self, instance: Instance) -> None:
        """Cut the instance's power and remove its disk."""
        self._vms[instance.id].ask("terminate")

    def capture(self, instance: Instance, image: FakeImage) -> None:
        """Freeze the instance's disk as the image's; a running guest is shut down for it and booted again."""

        def freeze() -> None:
            vm = self._vms[instance.id]
            with self.lock:
                frozen = vm.volume
                self._snapshots[image.ebs_snapshot.id] = frozen
                vm.volume = self._overlay(frozen, None)
                image.captured = True

        self._vms[instance.id].ask("capture", freeze)

    def copy(self, source: FakeImage, image: FakeImage) -> None:
        """Let a copy of an image have the same disk."""
        if (disk := self._snapshots.get(source.ebs_snapshot.id)) is not None:
            self._snapshots[image.ebs_snapshot.id] = disk

    def register(self, snapshot_id: str, disk: Path) -> None:
        """Let a snapshot have a qcow2 file as its disk, which is never changed or removed."""
        self._snapshots[snapshot_id] = disk.resolve()

    def disk(self, snapshot_id: str) -> Path:
        """Return the disk of a snapshot that was captured, copied or registered here."""
        return self._snapshots[snapshot_id]

    def drop(self, snapshot_id: str) -> None:
        """Forget the disk of a deleted snapshot."""
        self._snapshots.pop(snapshot_id, None)
        self._collect()

    def console(self, instance_id: str) -> bytes:
        """Return what the guest has written to its serial console."""
        log = self._directory / instance_id / "console.log"
        return log.read_bytes() if log.exists() else b""

    def metadata(self, instance_id: str) -> imds.MetadataServer:
        """Return the metadata service of an instance, as its guest sees it."""
        return self._vms[instance_id].metadata

    def announce(self, instance_id: str, path: str, value: str) -> None:
        """Set a value of the instance's metadata."""
        if instance_id in self._vms:
            self._vms[instance_id].metadata.tree.announce(path, value)

    def forget(self, instance_id: str) -> None:
        """Forget an instance that was terminated."""
        vm = self._vms.pop(instance_id, None)
        if vm is not None and vm.launch.tap is not None:
            assert self._shared is not None
            self._shared.disconnect(vm.launch.tap)
        for disk in vm.launch.disks if vm is not None else ():
            # An instance store's file ends with its VM.
            if disk.path is not None:
                disk.path.unlink(missing_ok=True)
        self._collect()

    def _overlay(self, backing: Path, size: int | None) -> Path:
        self._number += 1
        path = self._directory / f"disk-{self._number}.qcow2"
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(backing), str(path)]
        processes.output([*argv, *([str(size)] if size is not None else [])], what=f"creating {path}")
        self._disks[path] = _Disk(path=path, backing=backing)
        return path

    def _collect(self) -> None:
        """Remove the files that no instance uses."""
        wanted: set[Path] = set()
        for path in [*self._snapshots.values(), *(vm.volume for vm in self._vms.values())]:
            at: Path | None = path
            while at in self._disks and at not in wanted:
                wanted.add(at)
                at = self._disks[at].backing
        for path in set(self._disks) - wanted:
            path.unlink(missing_ok=True)
            del self._disks[path]


class _Owner:
    """How a machine's thread writes down what becomes of its instance."""

    def __init__(self, machines: VmHypervisor, backend: Any, instance: Instance) -> None:
        self._machines, self._backend, self._instance = machines, backend, instance

    def running(self) -> None:
        """The guest boots."""
        with self._machines.lock:
            if self._instance.state == "pending":
                set_state(self._instance, "running", 16)

    def off(self, reason: str) -> bool:
        """The guest is off; returns whether the instance is to go with it."""
        with self._machines.lock:
            code = reason.partition(":")[0]
            end(self._instance, code=code, message=reason)
            if self._instance.state != "terminated":
                return False
            # As on EC2, until its disk is deleted too: after "terminated" nothing is left.
            set_state(self._instance, "shutting-down", 32)
            return True

    def ended(self) -> None:
        """Record that the instance has ended."""
        with self._machines.lock:
            set_state(self._instance, "terminated", 48)
            self._machines.forget(self._instance.id)

    def admits(self, port: int) -> bool:
        """Tell whether a security group of the instance lets this machine in."""
        with self._machines.lock:
            groups = [*self._instance.security_groups]
            for nic in self._instance.nics.values():
                groups += nic.group_set
            return any(_covers(rule, port) for group in groups for rule in group.ingress_rules)


def _covers(rule: Any, port: int) -> bool:
    if str(rule.ip_protocol) not in ("tcp", "6", "-1"):
        return False
    if str(rule.ip_protocol) != "-1" and not int(rule.from_port) <= port <= int(rule.to_port):
        return False
    cidr = str((rule.ip_range or {}).get("CidrIp") or "::1/128")
    return ipaddress.ip_address("127.0.0.1") in ipaddress.ip_network(cidr, strict=False)
