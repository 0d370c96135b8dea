"""`ami-builder run`: boot an image on a throw-away overlay for a person, until Ctrl-C."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ami_builder.adapters import imds, qemu, ssh
from ami_builder.console import Progress
from ami_builder.model import Image, Network
from ami_builder.workspace import Workspace

_LOOK_SECONDS = 2.0
_DASHBOARD = 8787
_SCHEDULER = 8786


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """How a person reaches the machine."""

    ssh: str
    dashboard: str
    scheduler: str
    console_log: Path


def launch(
    image: Image,
    disk: Path,
    *,
    memory: int,
    user_data: Path | None,
    workspace: Workspace,
    progress: Progress,
    on_ready: Callable[[Launched], None],
) -> None:
    """Boot the image as EC2 would, call `on_ready` once ssh answers, and wait until it is stopped.

    Raises Interrupted by Ctrl-C, which is the normal end; BuildFailed when the machine dies.
    """
    qemu.image_info(disk)
    with workspace.run("run", image.name) as run, ExitStack() as stack:
        with progress.step("choose the accelerator") as step:
            accelerator, reason = qemu.choose_accelerator(
                disk, cache=workspace.cache / "accelerator.json", directory=run.work
            )
            step.done(reason)
        with progress.step("boot", detail="waiting for ssh") as step:
            key = ssh.generate_key(run.work)
            instance_id = imds.new_instance_id()
            metadata = stack.enter_context(
                imds.MetadataServer(
                    imds.InstanceMetadata(
                        instance_id=instance_id,
                        user_data=user_data.read_bytes() if user_data is not None else None,
                        public_key=key.with_suffix(".pub").read_text().strip(),
                    )
                )
            )
            machine = qemu.Machine(
                disk=disk,
                directory=run.work,
                memory=memory,
                cpus=image.verify.cpus,
                disk_size=image.verify.disk_size,
                accelerator=accelerator,
                user=image.base.ssh_user,
                imds_port=metadata.port,
                network=Network.NAT,
                instance_id=instance_id,
            )
            endpoint = stack.enter_context(machine)
            session = stack.enter_context(ssh.Session(endpoint, key=key, directory=run.work / "ssh"))
            session.wait(image.verify.timeout, machine.check_alive)
            step.done("ssh answers")
        on_ready(
            Launched(
                ssh=f"ssh -F {session.config} {ssh.HOST}",
                dashboard=f"http://{endpoint.address}:{endpoint.ports[_DASHBOARD]}/status",
                scheduler=f"tcp://{endpoint.address}:{endpoint.ports[_SCHEDULER]}",
                console_log=endpoint.console_log,
            )
        )
        while not threading.Event().wait(_LOOK_SECONDS):
            machine.check_alive()
