"""The part of `ami-builder check` that all targets share: open settings, tools, disk space."""

import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ami_builder.build import plugins
from ami_builder.build.plugins import Plugin
from ami_builder.config.schema import Image
from ami_builder.core.errors import AmiBuilderError, BuildFailed, MissingTool, UsageError
from ami_builder.core.options import Arch, Listen, Role
from ami_builder.core.records import Finding, State
from ami_builder.core.units import GIB
from ami_builder.state.workspace import Workspace
from ami_builder.system import processes

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_BINFMT = Path("/proc/sys/fs/binfmt_misc")
# A base disk, a container, a bake in progress and its compressed result.
_DISK_NEEDED = 6 * GIB


def open_settings(image: Image) -> Iterator[Finding]:
    """Yield a note for every setting that gives others more rights than by default."""
    role = image.dask.role
    if role in (Role.SCHEDULER, Role.WORKER) or (role is Role.LOCAL and image.dask.listen is Listen.NETWORK):
        yield Finding(
            name="Dask's ports",
            state=State.NOTE,
            found=f"role {role} listens to the network without TLS: anyone who reaches it can run programs",
            hint="use TLS (DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION=true), or a firewall",
        )
    if image.container.instance_metadata:
        yield Finding(
            name="metadata",
            state=State.NOTE,
            found="anyone who submits a task to Dask has the rights of the instance's role",
            hint="set container.instance_metadata to false unless tasks need it",
        )


def tools(plugin: Plugin, names: Sequence[str]) -> Iterator[Finding]:
    """Yield where Packer, its plugin and these tools are; a missing one stops a build."""
    try:
        yield from plugins.findings(plugin)
    except AmiBuilderError as failed:
        yield stops("packer", failed)
    for name in names:
        yield found(name, lambda name=name: str(processes.find(name)))  # type: ignore[misc]


def debian_keys(mirror: str, keyring: Path = KEYRING) -> Iterator[Finding]:
    """Yield where the keys are that Debian's packages are signed with; a mirror may have its own."""
    name = "Debian's keys"
    if keyring.is_file():
        yield Finding(name=name, state=State.OK, found=str(keyring))
        return
    hint = processes.how_to_install("debian-archive-keyring")
    missing = MissingTool(f"{keyring} is missing", hint=hint)
    if mirror:
        yield Finding(name=name, state=State.NOTE, found=missing.message, hint=hint)
    else:
        yield stops(name, missing)


def programs(arch: Arch, binfmt: Path = _BINFMT) -> Iterator[Finding]:
    """Yield whether programs of another architecture than this host's run here, as making an image needs."""
    if arch.is_native:
        return
    name, handler = f"{arch} programs", binfmt / f"qemu-{arch.kernel}"
    try:
        lines = handler.read_text().splitlines()
    except OSError:
        lines = []
    # F: the kernel has the emulator open, so a chroot does not need it.
    if "enabled" in lines and any(line.startswith("flags:") and "F" in line for line in lines):
        yield Finding(name=name, state=State.NOTE, found="emulated by QEMU (slow)")
        return
    yield Finding(
        name=name,
        state=State.STOPS,
        found=f"programs for {arch} do not run on this {platform.machine()} host",
        hint="apt-get install qemu-user-static; without systemd register it too, see docs/how-to/arm64.md",
        exit_code=MissingTool.exit_code,
    )


def found(name: str, look: Callable[[], str | Finding]) -> Finding:
    """Return what `look` returns, or the error that it raises, which stops a build."""
    try:
        result = look()
    except AmiBuilderError as failed:
        return stops(name, failed)
    return result if isinstance(result, Finding) else Finding(name=name, state=State.OK, found=result)


def stops(name: str, failed: AmiBuilderError) -> Finding:
    """Return an error that stops a build."""
    hint, exit_code = failed.hint or "", failed.exit_code
    return Finding(name=name, state=State.STOPS, found=failed.message, hint=hint, exit_code=exit_code)


def disk_space(workspace: Workspace) -> Finding:
    """Return whether there is enough disk space for a build."""
    folder = workspace.state
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        return Finding(
            name="disk space",
            state=State.STOPS,
            found=f"{_short(folder)} can't be written to",
            hint="set AMI_BUILDER_HOME to a folder with write permission",
            exit_code=UsageError.exit_code,
        )
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:.1f} GiB free in {_short(folder)}, {_DISK_NEEDED / GIB:.0f} GiB needed"
    if free >= _DISK_NEEDED:
        return Finding(name="disk space", state=State.OK, found=text)
    return Finding(
        name="disk space",
        state=State.STOPS,
        found=text,
        hint="free some space, or set AMI_BUILDER_HOME to a folder on a larger disk",
        exit_code=BuildFailed.exit_code,
    )


def _short(path: Path) -> str:
    try:
        return str(Path("~", path.relative_to(Path.home())))
    except (ValueError, RuntimeError):  # elsewhere, or the user has no home
        return str(path)
