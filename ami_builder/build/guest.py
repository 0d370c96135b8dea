"""Renders the files that land in the image."""

from dataclasses import dataclass
from pathlib import PurePosixPath

from ami_builder.config.schema import Image
from ami_builder.core import oom
from ami_builder.system import resources, templates

SUFFIX = ".j2"


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedFile:
    """A file of the guest: its content, and its mode (0o755 for programs, else 0o644)."""

    content: bytes
    mode: int


def guest(image: Image) -> dict[PurePosixPath, RenderedFile]:
    """Return the guest's files by absolute path, sorted. A template that renders to nothing makes no file.

    Raises UsageError with the template's name and line.
    """
    folder = resources.packer_dir() / "guest"
    environment = templates.environment(folder)
    files: dict[PurePosixPath, RenderedFile] = {}
    for source in sorted(path for path in folder.rglob("*") if path.is_file()):
        if source.parent.name == "__pycache__":  # of a program of the guest that ran on this host
            continue
        name = source.relative_to(folder).as_posix()
        if name.endswith(SUFFIX):
            content = templates.render(
                environment, name, image=image, beside=oom.BESIDE, small=oom.SMALL
            ).encode()
            if not content.strip():
                continue
        else:
            content = source.read_bytes()
        mode = 0o755 if source.stat().st_mode & 0o100 else 0o644
        files[PurePosixPath("/", name.removesuffix(SUFFIX))] = RenderedFile(content=content, mode=mode)
    return dict(sorted(files.items()))
