"""`ami-builder check`: what would stop a build, found without building."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ami_builder import qemu
from ami_builder.build import packer
from ami_builder.config.schema import Image
from ami_builder.core.errors import AmiBuilderError, MissingTool
from ami_builder.core.options import Listen, Role
from ami_builder.core.records import Finding, State, TargetKind
from ami_builder.state.workspace import Workspace
from ami_builder.system import processes

_GIB = 1 << 30
# A base disk, a container, a bake in progress and its compressed result.
_DISK_NEEDED = 6 * _GIB
_BUILD_TOOLS = ("qemu-system-x86_64", "qemu-img", "socat", "ssh", "ssh-keygen", "setpriv")
_RECIPE_TOOLS = ("mmdebstrap", "mcopy", "mkfs.vfat", "grub-mkimage")


def check(image: Image, workspace: Workspace, target: TargetKind) -> Iterator[Finding]:
    """Look at what the settings leave open, and at all that a build needs.

    That is tools, the accelerator or the account, memory, disk space.
    """
    yield from _open(image)
    if target is TargetKind.AWS:
        yield from _cloud(image, workspace)
        return
    yield _of("packer", lambda: ".".join(str(n) for n in packer.version()))
    recipe = _RECIPE_TOOLS if image.base.source is None or image.container.requirements is not None else ()
    seed = ("xorriso",) if image.base.source is not None else ()
    for tool in (*_BUILD_TOOLS, *recipe, *seed):
        yield _of(tool, lambda tool=tool: str(processes.find(tool)))  # type: ignore[misc]
    yield _of("UEFI firmware", lambda: qemu.firmware()[1])
    yield _accelerator(workspace)
    yield _memory(image)
    yield _disk(workspace)


def _cloud(image: Image, workspace: Workspace) -> Iterator[Finding]:
    from ami_builder.aws import preflight

    tools = ("ssh", "ssh-keygen", "setpriv", *(("mmdebstrap",) if image.container.requirements else ()))
    yield _of("packer", lambda: ".".join(str(n) for n in packer.version()))
    for tool in tools:
        yield _of(tool, lambda tool=tool: str(processes.find(tool)))  # type: ignore[misc]
    yield _disk(workspace)
    yield from preflight.check(image)


def _open(image: Image) -> Iterator[Finding]:
    role, tls = image.dask.role, "use TLS (DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION=true), or a firewall"
    if role in (Role.SCHEDULER, Role.WORKER) or (role is Role.LOCAL and image.dask.listen is Listen.NETWORK):
        yield Finding(
            name="Dask's ports",
            state=State.NOTE,
            found=f"role {role} listens to the network without TLS: who reaches it runs programs there",
            hint=tls,
        )
    if image.container.instance_metadata:
        yield Finding(
            name="metadata",
            state=State.NOTE,
            found="who submits a task to Dask has the rights of the instance's role",
            hint="set container.instance_metadata to false unless tasks need it",
        )


def _of(name: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(name=name, state=State.OK, found=look())
    except AmiBuilderError as bad:
        return Finding(
            name=name,
            state=State.STOPS,
            found=bad.message,
            hint=bad.hint or "",
            exit_code=bad.exit_code,
        )


def _accelerator(workspace: Workspace) -> Finding:
    known = qemu.known_accelerator(workspace.cache / "accelerator.json")
    if known is not None:
        accelerator, reason = known
        state = State.OK if accelerator is qemu.Accelerator.KVM else State.NOTE
        return Finding(name="accelerator", state=state, found=reason)
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        return Finding(
            name="accelerator",
            state=State.NOTE,
            found="/dev/kvm opens; whether it runs a guest is tried by the first build",
        )
    return Finding(
        name="accelerator",
        state=State.NOTE,
        found="no access to /dev/kvm: virtual machines will be emulated, about ten times slower",
        hint="on a machine with KVM, join the group that owns /dev/kvm",
    )


def _memory(image: Image) -> Finding:
    wanted = max(image.bake.memory, *image.verify.memory)
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = f"{available / _GIB:.1f} GiB free, {wanted / _GIB:.1f} GiB for the largest machine"
    if available >= wanted:
        return Finding(name="memory", state=State.OK, found=found)
    return Finding(
        name="memory",
        state=State.NOTE,
        found=found,
        hint="make bake.memory and verify.memory smaller, or stop what uses memory",
    )


def _disk(workspace: Workspace) -> Finding:
    folder = workspace.state
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    found = f"{free / _GIB:.1f} GiB free in {_short(folder)}, {_DISK_NEEDED / _GIB:.0f} GiB needed"
    if free >= _DISK_NEEDED:
        return Finding(name="disk space", state=State.OK, found=found)
    return Finding(
        name="disk space",
        state=State.STOPS,
        found=found,
        hint="make room, or set AMI_BUILDER_HOME to a folder on a larger disk",
        exit_code=MissingTool.exit_code,
    )


def _short(path: Path) -> str:
    try:
        return f"~/{path.relative_to(Path.home())}"
    except ValueError:
        return str(path)
