"""`ami-builder check` on this host: what would stop a build, found without building."""

import os
from collections.abc import Iterator

from ami_builder.build import preflight
from ami_builder.config.schema import Image
from ami_builder.core.options import Arch, ContainerSource
from ami_builder.core.records import Finding, State
from ami_builder.core.units import GIB
from ami_builder.qemu.accelerator import known_accelerator
from ami_builder.qemu.bake import SOURCE
from ami_builder.qemu.hardware import HARDWARE, Accelerator, firmware
from ami_builder.state.workspace import Workspace

_BUILD_TOOLS = ("qemu-img", "socat", "ssh", "ssh-keygen", "setpriv")
_RECIPE_TOOLS = ("mmdebstrap", "mcopy", "mkfs.vfat", "mke2fs", "sfdisk")


def check(image: Image, workspace: Workspace) -> Iterator[Finding]:
    """Yield what a build on this host needs: tools, firmware, accelerator, memory, disk space."""
    yield from preflight.open_settings(image)
    built_here = image.container.source is ContainerSource.ARCHIVE
    makes = image.base.source is None or built_here
    recipe = [*_RECIPE_TOOLS] if makes else []
    if makes and image.arch is Arch.AMD64 and image.arch.is_native:
        recipe.append("grub-mkimage")
    if makes and os.geteuid() != 0:
        recipe.append("newuidmap")
    seed = ("xorriso",) if image.base.source is not None else ()
    yield from preflight.tools(SOURCE.plugin, (HARDWARE[image.arch].qemu, *_BUILD_TOOLS, *recipe, *seed))
    yield preflight.found("UEFI firmware", lambda: firmware(image.arch)[1])
    if makes:
        yield from preflight.debian_keys(image.base.mirror)
        yield from preflight.programs(image.arch)
    yield preflight.found("accelerator", lambda: _accelerator(workspace, image.arch))
    yield _memory(image)
    yield preflight.disk_space(workspace)


def _accelerator(workspace: Workspace, arch: Arch) -> Finding:
    known = known_accelerator(workspace.accelerator, arch)
    if known is not None:
        accelerator, reason = known
        state = State.OK if accelerator is Accelerator.KVM else State.NOTE
        return Finding(name="accelerator", state=state, found=reason)
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        return Finding(
            name="accelerator",
            state=State.NOTE,
            found="/dev/kvm can be opened; the first build tests whether a VM runs with it",
        )
    return Finding(
        name="accelerator",
        state=State.NOTE,
        found="no access to /dev/kvm: VMs are emulated, which is about ten times slower",
        hint="on a host with KVM, join the group that owns /dev/kvm",
    )


def _memory(image: Image) -> Finding:
    wanted = max(image.bake.memory, *image.verify.memory)
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = f"{available / GIB:.1f} GiB free, {wanted / GIB:.1f} GiB for the largest VM"
    if available >= wanted:
        return Finding(name="memory", state=State.OK, found=text)
    return Finding(
        name="memory",
        state=State.NOTE,
        found=text,
        hint="make bake.memory and verify.memory smaller, or stop what uses memory",
    )
