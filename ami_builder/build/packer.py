"""Packer: the staged template of a run, and the bake."""

import io
import json
import re
import shutil
import tarfile
import textwrap
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ami_builder.build import plugins
from ami_builder.build.guest import RenderedFile
from ami_builder.core.errors import AmiBuilderError, BuildFailed
from ami_builder.system import processes
from ami_builder.system.resources import packer_dir

_VALIDATE_SECONDS = 60.0

_PROVISIONING = re.compile(r"Provisioning with shell script: .*/(?P<script>[\w.-]+)$")
# A step, or a line about one: 1.13 and later begin both with an arrow.
_LINE = re.compile(r"^(?:==>|   ) [\w.-]+: +(?P<text>\S.*)$")
# The log of a plugin that crashed, which goes on for a hundred lines.
_CRASH = re.compile(r"^panic: |PACKER CRASH")
# Packer's name for a file with inline commands.
_INLINE = "packer-shell"

CONNECTED = "Connected to SSH!"
"""Packer's message once the baking machine has booted; it is reported as progress."""

BUILD = "build.pkr.hcl"
SHARED_VARIABLES = "variables.pkr.hcl"
# In BUILD; a build block of one target has that target's source alone, for Packer refuses a file with a type
# whose plugin is missing.
_SOURCE_GOES_HERE = "sources = []"
VARIABLES_FILE = "run.auto.pkrvars.json"

Variable = str | int | bool | Sequence[str] | Sequence[Sequence[str]] | Mapping[str, str]


class PluginCrashed(BuildFailed):
    """A plugin ended in the middle of a bake, by a mistake of its own; it cleaned up nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A target's part of the template: the builder of Packer that makes its machine."""

    type: str
    """As Packer names it, such as `qemu`."""
    template: str
    """The file in packer/ that configures it."""
    plugin: plugins.Plugin
    """What has the builder in it, except in Packer 1.6.6."""
    more: str = ""
    """Attributes beside those of the template, as HCL."""
    newer: str = ""
    """Attributes that 1.6.6 does not know, as HCL."""

    @property
    def name(self) -> str:
        """Its name in Packer's templates and messages."""
        return f"{self.type}.image"

    def in_build(self) -> str:
        """Return the block that makes a build use it."""
        attributes = self.more + (self.newer if plugins.has_plugins() else "")
        body = f"\n{textwrap.indent(attributes, ' ' * 4)}  " if attributes else ""
        return f'source "source.{self.name}" {{{body}}}'


def stage(
    directory: Path,
    source: Source,
    guest: Mapping[PurePosixPath, RenderedFile],
    variables: Mapping[str, Variable],
    *,
    uploads: Sequence[Path] = (),
) -> None:
    """Make the folder that Packer works in: a target's template for this Packer, guest files, variables.

    `uploads` are copied to the machine with the guest's files. A bare `packer build .` in that folder does
    what `build` does.
    """
    directory.mkdir(parents=True)
    for template in (SHARED_VARIABLES, source.template):
        shutil.copy(packer_dir() / template, directory)
    before, place, after = (packer_dir() / BUILD).read_text().partition(_SOURCE_GOES_HERE)
    assert place
    (directory / BUILD).write_text(before + source.in_build() + after)
    if plugins.has_plugins():
        (directory / "plugin.pkr.hcl").write_text(source.plugin.block)
    shutil.copytree(packer_dir() / "provisioners", directory / "provisioners")
    archive = directory / "guest.tar"
    archive.write_bytes(guest_archive(guest))
    # Absolute, so that the file provisioner finds it wherever Packer is started.
    set_variables(directory, {"uploads": [str(archive), *map(str, uploads)], **variables})


def set_variables(directory: Path, variables: Mapping[str, Variable]) -> None:
    """Set variables of a staged folder; the others keep their values."""
    file = directory / VARIABLES_FILE
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**before, **variables}, indent=2) + "\n")


def guest_archive(guest: Mapping[PurePosixPath, RenderedFile]) -> bytes:
    """Return a tar archive of the rendered files: the same bytes for the same files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for path, file in sorted(guest.items()):
            member = tarfile.TarInfo(str(path).lstrip("/"))
            member.size = len(file.content)
            member.mode = file.mode
            tar.addfile(member, io.BytesIO(file.content))
    return buffer.getvalue()


def validate(directory: Path, log: Path) -> None:
    """Let Packer validate a staged folder, once its plugin is there. Raises BuildFailed."""
    processes.stream(
        ["packer", "validate", "."],
        log=log,
        what="packer validate",
        env=_environment(directory),
        cwd=directory,
        timeout=_VALIDATE_SECONDS,
    )


def build(
    directory: Path,
    *,
    log: Path,
    console_log: Path,
    timeout: float | Callable[[], float],
    on_progress: Callable[[str], None],
    on_line: Callable[[str], None] = lambda _: None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run `packer build` in a staged folder.

    `env` is added to Packer's own environment; `on_line` gets every line of its output; `timeout` in seconds
    may grow. Raises BuildFailed, with the name of the provisioner that failed, or the console if ssh never
    answered; PluginCrashed.
    """
    output = _Output(on_progress)

    def read(line: str) -> None:
        output.line(line)
        on_line(line)

    try:
        processes.stream(
            ["packer", "build", "-color=false", "-timestamp-ui", "."],
            log=log,
            what="packer build",
            env={**_environment(directory), **(env or {})},
            cwd=directory,
            timeout=timeout,
            on_line=read,
        )
    except AmiBuilderError as failed:
        raise output.explain(failed, console_log) from failed


@dataclass(slots=True)
class _Output:
    """Reads the progress of a bake from Packer's output."""

    on_progress: Callable[[str], None]
    provisioner: str | None = None
    ssh_failed: bool = False
    crashed: bool = False
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=processes.TAIL_LINES))

    def line(self, line: str) -> None:
        text = line.split(": ", 1)[1] if line[:4].isdigit() and ": " in line else line
        if found := _PROVISIONING.search(text):
            self.provisioner = found["script"]
            self.lines.clear()
            self.on_progress("prepare" if found["script"].startswith(_INLINE) else found["script"])
        elif found := _LINE.search(text):
            self.on_progress(found["text"])
        self.crashed = self.crashed or _CRASH.search(text) is not None
        if "Timeout waiting for SSH" in text:
            self.ssh_failed = True
        if text.strip() and not self.crashed:
            self.lines.append(text)

    def explain(self, failed: AmiBuilderError, console_log: Path) -> AmiBuilderError:
        kind = type(failed)
        if not isinstance(failed, BuildFailed):
            return kind(failed.message, hint=failed.hint, log=failed.log, tail=tuple(self.lines))
        if self.crashed:
            return PluginCrashed(
                "a plugin of Packer crashed",
                hint="the log has its last calls; try again, or install another version of the plugin",
                log=failed.log,
                tail=tuple(self.lines),
            )
        if self.ssh_failed:
            return kind(
                "the baking machine never answered by ssh",
                hint="above are the last lines of its console: does the base boot with UEFI, bring up DHCP "
                "and run sshd? base.ssh_user must be its login user",
                log=console_log,
                tail=processes.last_lines(console_log),
            )
        where = f"provisioner {self.provisioner} failed" if self.provisioner else "packer build failed"
        return kind(where, hint=failed.hint, log=failed.log, tail=tuple(self.lines))


def _environment(directory: Path) -> dict[str, str]:
    # As 1.6.6 has it by itself. It holds a link to the base disk, and goes with the run.
    return plugins.environment() | {"PACKER_CACHE_DIR": str(directory.absolute() / "packer_cache")}
