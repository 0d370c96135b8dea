"""`ami-builder run`: boot an image on a throw-away overlay for a person, until Ctrl-C."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from ami_builder import qemu
from ami_builder.config.schema import Image
from ami_builder.console import Progress
from ami_builder.core.options import Datasource, Network
from ami_builder.qemu.target import LocalMachine
from ami_builder.state.workspace import Workspace
from ami_builder.system import ssh
from ami_builder.verify.boot_progress import WAITING, reporting

_LOOK_SECONDS = 2.0
_SCHEDULER, _DASHBOARD = 8786, 8787


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """How a person reaches the machine."""

    ssh: str
    tunnel: str
    """What brings dashboard and scheduler to the same ports of this host: Dask listens for its VM alone."""
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
    # A person wants the network, and EC2's way of handing over what a control plane sends.
    verify = replace(image.verify, network=Network.NAT, datasource=Datasource.EC2)
    settings = replace(image, verify=verify)
    with workspace.run("run", image.name) as run, ExitStack() as stack:
        with progress.step("choose the accelerator") as step:
            accelerator, reason = qemu.choose_accelerator(
                disk, cache=workspace.cache / "accelerator.json", directory=run.work
            )
            step.done(reason)
        with progress.step("boot", detail=WAITING) as step:
            key = ssh.generate_key(run.work)
            machine = LocalMachine(image=settings, disk=disk, accelerator=accelerator, memory=memory)
            told = user_data.read_bytes() if user_data is not None else None
            endpoint = machine.boot(stack, run.work, told, key.with_suffix(".pub").read_text().strip())
            session = stack.enter_context(ssh.Session(endpoint, key=key, directory=run.work / "ssh"))
            alive = reporting(machine.check_alive, step, endpoint.console_log)
            session.wait(image.verify.timeout, alive)
            step.done("ssh answers")
        login = f"ssh -F {session.config}"
        forward = " ".join(f"-L {port}:127.0.0.1:{port}" for port in (_DASHBOARD, _SCHEDULER))
        on_ready(
            Launched(
                ssh=f"{login} {ssh.HOST}",
                tunnel=f"{login} -N {forward} {ssh.HOST}",
                console_log=endpoint.console_log,
            )
        )
        while not threading.Event().wait(_LOOK_SECONDS):
            machine.check_alive()
