"""Packer: its version, the staged template of a run, the bake."""

import io
import json
import re
import shutil
import tarfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath

from ami_builder.build.guest import RenderedFile
from ami_builder.core.errors import AmiBuilderError, BuildFailed, MissingTool
from ami_builder.system import processes
from ami_builder.system.resources import packer_dir

# Since this version Packer has its builders in plugins, and reads required_plugins.
_PLUGINS_SINCE = (1, 7, 0)
_OLDEST = (1, 6, 6)
_INSTALL = "install Packer 1.6.6 or later: see developer.hashicorp.com/packer/install"
_VALIDATE_SECONDS = 60.0
_INIT_SECONDS = 300.0

_PROVISIONING = re.compile(r"Provisioning with shell script: .*/(?P<script>[\w.-]+)$")
_STEP = re.compile(r"==> [\w.-]+: (?P<text>.+)$")
# The output of a provisioner, and details of a step.
_OUTPUT = re.compile(r"^ {4}[\w.-]+: +(?P<text>\S.*)$")
# Packer's name for a file with inline commands.
_INLINE = "packer-shell"

CONNECTED = "Connected to SSH!"
"""Packer's message once the baking machine has booted; it is reported as progress."""

VARIABLES_FILE = "run.auto.pkrvars.json"

Variable = str | int | bool | Sequence[str] | Sequence[Sequence[str]] | Mapping[str, str]


@cache
def version() -> tuple[int, ...]:
    """Return Packer's version. Raises MissingTool without Packer, or if it is too old for the template."""
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", processes.output(["packer", "version"], env=_environment()))
    if found is None:
        raise MissingTool("`packer version` prints no version: this is another program", hint=_INSTALL)
    numbers = tuple(int(n) for n in found.groups())
    if numbers < _OLDEST:
        raise MissingTool(f"Packer {found[0]} is too old", hint=_INSTALL)
    return numbers


def stage(
    directory: Path,
    guest: Mapping[PurePosixPath, RenderedFile],
    variables: Mapping[str, Variable],
    *,
    uploads: Sequence[Path] = (),
) -> None:
    """Make the folder that Packer works in: the templates that its version can read, guest files, variables.

    `uploads` are copied to the machine with the guest's files. A bare `packer build .` in that folder does
    what `build` does.
    """
    directory.mkdir(parents=True)
    for template in sorted(packer_dir().glob("*.pkr.hcl")):
        if template.name != "plugins.pkr.hcl" or version() >= _PLUGINS_SINCE:
            shutil.copy(template, directory)
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
    """Run `packer init` if this version has plugins, then `packer validate`. Raises BuildFailed."""
    init = [("init", _INIT_SECONDS)] if version() >= _PLUGINS_SINCE else []
    for command, seconds in (*init, ("validate", _VALIDATE_SECONDS)):
        processes.stream(
            ["packer", command, "."],
            log=log,
            what=f"packer {command}",
            env=_environment(),
            cwd=directory,
            timeout=seconds,
        )


def build(
    directory: Path,
    *,
    only: str,
    log: Path,
    console_log: Path,
    timeout: float,
    on_progress: Callable[[str], None],
    on_line: Callable[[str], None] = lambda _: None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run `packer build` in a staged folder for one source, such as `qemu.image`.

    `env` is added to Packer's own environment; `on_line` gets every line of its output. Raises BuildFailed,
    with the name of the provisioner that failed, or the console if ssh never answered.
    """
    output = _Output(on_progress)

    def read(line: str) -> None:
        output.line(line)
        on_line(line)

    try:
        processes.stream(
            ["packer", "build", "-color=false", "-timestamp-ui", f"-only={only}", "."],
            log=log,
            what="packer build",
            env={**_environment(), **(env or {})},
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
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=processes.TAIL_LINES))

    def line(self, line: str) -> None:
        text = line.split(": ", 1)[1] if line[:4].isdigit() and ": " in line else line
        if found := _PROVISIONING.search(text):
            self.provisioner = found["script"]
            self.lines.clear()
            self.on_progress("prepare" if found["script"].startswith(_INLINE) else found["script"])
        elif found := _STEP.search(text) or _OUTPUT.search(text):
            self.on_progress(found["text"])
        if "Timeout waiting for SSH" in text:
            self.ssh_failed = True
        if text.strip():
            self.lines.append(text)

    def explain(self, failed: AmiBuilderError, console_log: Path) -> AmiBuilderError:
        kind = type(failed)
        if not isinstance(failed, BuildFailed):
            return kind(failed.message, hint=failed.hint, log=failed.log, tail=tuple(self.lines))
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


def _environment() -> dict[str, str]:
    return processes.environment({"CHECKPOINT_DISABLE": "1", "PACKER_NO_COLOR": "1"})
