"""Renders what lands in the image, and the user data that a finished image is proved with."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import jinja2

from ami_builder.config.schema import Image
from ami_builder.core.errors import UsageError
from ami_builder.system import resources

SUFFIX = ".j2"
USER_DATA = "user-data.yaml.j2"


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedFile:
    """A file of the guest: its content, and its mode (0o755 for programs, else 0o644)."""

    content: bytes
    mode: int


def guest(image: Image) -> dict[PurePosixPath, RenderedFile]:
    """Return the guest's files by absolute path, sorted; a template that renders to nothing is no file.

    Raises UsageError with the template's name and line.
    """
    folder = resources.packer_dir() / "guest"
    environment = _environment(folder)
    files: dict[PurePosixPath, RenderedFile] = {}
    for source in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = source.relative_to(folder).as_posix()
        content = _render(environment, name, image=image) if name.endswith(SUFFIX) else source.read_bytes()
        if name.endswith(SUFFIX) and not content.strip():
            continue
        mode = 0o755 if source.stat().st_mode & 0o100 else 0o644
        files[PurePosixPath("/", name.removesuffix(SUFFIX))] = RenderedFile(content=content, mode=mode)
    return dict(sorted(files.items()))


def user_data(image: Image, *, nonce: str) -> str:
    """Return a cloud-config as a control plane sends it, with its own Compose file; `nonce` tells who got it.

    Raises UsageError with the template's name and line.
    """
    environment = _environment(resources.checks_dir())
    return _render(environment, USER_DATA, image=image, nonce=nonce).decode()


def _environment(folder: Path) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - shell, YAML and units, not HTML
    )


def _render(environment: jinja2.Environment, name: str, **values: object) -> bytes:
    try:
        return environment.get_template(name).render(values).encode()
    except jinja2.TemplateSyntaxError as wrong:
        raise UsageError(f"{wrong.name or name}, line {wrong.lineno}: {wrong.message}") from wrong
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, AttributeError) as wrong:
        raise UsageError(f"{name}, line {_line(wrong, name)}: {wrong}") from wrong


def _line(wrong: BaseException, name: str) -> int | str:
    """Return the line of template `name` that raised: jinja's tracebacks have the template's own lines."""
    frames = [f for f in traceback.extract_tb(wrong.__traceback__) if f.filename.endswith(f"/{name}")]
    return (frames[-1].lineno if frames else None) or "?"
