"""VMs that have booted once and were saved with their memory, just before Dask starts.

On an emulated VM, a run that goes on from there takes a minute less than one that boots. Its disk is virtio,
not NVMe, and user data takes effect by ssh.
"""

from __future__ import annotations

import base64
import json
import shlex
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ami_builder.qemu import imds
from ami_builder.qemu.disks import create_overlay
from ami_builder.system import ssh
from tests.saved_vm import SavedVm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ami_builder.config.schema import Image
    from ami_builder.qemu.hardware import Accelerator

_GO = "/run/ami-builder-go"
_UNITS = ("dask-memory.service", "dask.service")
_WAIT = f"""
for unit in {" ".join(_UNITS)}; do
    mkdir -p /run/systemd/system/$unit.d
    printf '[Unit]\\nConditionPathExists={_GO}\\n' >/run/systemd/system/$unit.d/99-experiment.conf
done
systemctl daemon-reload
"""
_START = f"touch {_GO}; systemctl reset-failed; systemctl start --no-block {' '.join(_UNITS)}"
_SETTLED = "systemctl is-system-running --wait || :; sync"


def as_script(user_data: bytes) -> str:
    """Return a shell script that does what a cloud-config with files and `bootcmd` does, and starts Dask."""
    config = json.loads(user_data.decode().partition("\n")[2])
    lines = ["set -eu"]
    for file in config["write_files"]:
        path, content = Path(file["path"]), base64.b64encode(file["content"].encode()).decode()
        lines.append(f"mkdir -p {path.parent}; echo {content} | base64 -d >{path}")
    # cloud-init runs these first, but then units that need the files start later.
    lines += [shlex.join(command) for command in config["bootcmd"]]
    return "\n".join([*lines, _START, ""])


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedMachine:
    """A saved VM in a folder of its own."""

    image: Image
    source: Path
    """The image's disk."""
    folder: Path
    memory: int
    cpus: int
    accelerator: Accelerator

    def ensure(self) -> None:
        """Boot and save the VM if that was not done yet."""
        if (self.folder / "memory").exists():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        ssh.generate_key(self.folder)
        (self.folder / "instance-id").write_text(imds.new_instance_id())
        create_overlay(self.source, self._disk, self.image.verify.disk_size)
        with ExitStack() as stack:
            vm, session = self._start(stack, self.folder / "boot", self._disk)
            session.wait(self.image.verify.timeout, vm.check_alive)
            session.run(_SETTLED, sudo=True, timeout=self.image.verify.timeout)
            # A login would be missing its other end.
            session.drop()
            part = self.folder / "memory.part"
            vm.save(part)
            part.rename(self.folder / "memory")

    def go_on(self, stack: ExitStack, directory: Path) -> tuple[SavedVm, ssh.Session]:
        """Let a copy of the saved VM go on, until the stack closes; wait for a login."""
        disk = directory / "disk.qcow2"
        shutil.copy(self._disk, disk)
        stack.callback(disk.unlink)
        vm, session = self._start(stack, directory, disk, saved=self.folder / "memory")
        session.wait(self.image.verify.timeout, vm.check_alive)
        return vm, session

    @property
    def _disk(self) -> Path:
        return self.folder / "disk.qcow2"

    def _start(
        self, stack: ExitStack, directory: Path, disk: Path, **more: Any
    ) -> tuple[SavedVm, ssh.Session]:
        key = self.folder / "id_ed25519"
        instance_id = (self.folder / "instance-id").read_text()
        metadata = imds.InstanceMetadata(
            instance_id=instance_id,
            user_data=f"#cloud-config\n{json.dumps(self._user_data())}".encode(),
            public_key=key.with_suffix(".pub").read_text().strip(),
        )
        server = stack.enter_context(imds.MetadataServer(metadata))
        vm = SavedVm(
            disk=disk,
            directory=directory,
            memory=self.memory,
            cpus=self.cpus,
            accelerator=self.accelerator,
            user=self.image.base.ssh_user,
            imds_port=server.port,
            network=self.image.verify.network,
            instance_id=instance_id,
            writable=True,
            **more,
        )
        endpoint = stack.enter_context(vm)
        return vm, stack.enter_context(ssh.Session(endpoint, key=key, directory=directory / "ssh"))

    @staticmethod
    def _user_data() -> Mapping[str, object]:
        return {"bootcmd": [["sh", "-c", _WAIT]]}
