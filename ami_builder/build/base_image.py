"""The disk that baking starts from: our own Debian, or a cloud image by path or URL with its checksum."""

from __future__ import annotations

import hashlib
import http.client
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ami_builder.build.recipe import Recipe, debian_recipe
from ami_builder.core.errors import BuildFailed, UsageError
from ami_builder.state.workspace import write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable

    from ami_builder.config.schema import BaseSettings, Image
    from ami_builder.console import Step
    from ami_builder.state.workspace import Run, Workspace

KIND = "base"
_CHUNK = 1 << 20
_CONNECT_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseDisk:
    """The disk that baking starts from. The kernel of our own Debian is booted directly, without firmware."""

    disk: Path
    kernel: Path | None = None
    initrd: Path | None = None


def is_url(source: str) -> bool:
    """Return whether a source is a URL, and not a path."""
    return urlsplit(source).scheme in {"http", "https"}


def digest(image: Image, workspace: Workspace, *, refresh: bool) -> str:
    """Return what identifies the disk's content: a checksum, or the digest of what would be built now."""
    base = image.base
    if base.source is None:
        log = workspace.log_dir() / "resolve-base.log"
        return recipe(image).resolve(workspace, log, refresh=refresh)
    return source_digest(base, workspace)


def source_digest(base: BaseSettings, workspace: Workspace) -> str:
    """Return the checksum of a cloud image, or the sha256 of a file without one."""
    assert base.source is not None
    if base.checksum is not None:
        return base.checksum.partition(":")[2]
    return _file_digest(Path(base.source), "sha256", workspace)


def base_disk(image: Image, digest: str, workspace: Workspace, run: Run, step: Step) -> BaseDisk:
    """Return the base disk from the cache, built or downloaded if it isn't there. Raises BuildFailed."""
    if (workspace.cache / KIND / digest).is_dir():
        step.done("cached")
    if image.base.source is not None:
        return BaseDisk(disk=fetch(image.base, workspace, step.update))
    folder = recipe(image).make(workspace, digest, "", run.log("base"), step.update)
    return BaseDisk(disk=folder / "disk.qcow2", kernel=folder / "vmlinuz", initrd=folder / "initrd.img")


def fetch(base: BaseSettings, workspace: Workspace, on_progress: Callable[[str], None]) -> Path:
    """Return the path of a cloud image. A URL is downloaded once, and cached by its checksum.

    Raises BuildFailed, and keeps nothing, when the download fails or the checksum does not match.
    """
    assert base.source is not None
    if not is_url(base.source):
        path = Path(base.source)
        if base.checksum is not None:
            algorithm, _, wanted = base.checksum.partition(":")
            _compare(str(path), wanted, _file_digest(path, algorithm, workspace), algorithm)
        return path
    assert base.checksum is not None
    url, checksum = base.source, base.checksum
    folder = workspace.cached(
        KIND, checksum.partition(":")[2], lambda half: _download(url, checksum, half / "disk", on_progress)
    )
    return folder / "disk"


def recipe(image: Image) -> Recipe:
    """Return the recipe of our own Debian base disk."""
    base = image.base
    return debian_recipe(
        KIND,
        "base-disk",
        ["--size", str(base.disk_size), "--suite", base.suite],
        arch=image.arch,
        mirror=base.mirror,
        packages=base.packages,
        sources=("base",),
    )


def _download(url: str, checksum: str, path: Path, on_progress: Callable[[str], None]) -> None:
    algorithm, _, wanted = checksum.partition(":")
    found = hashlib.new(algorithm)
    try:
        # The scheme is http(s): is_url() decided that this is a URL.
        with urllib.request.urlopen(url, timeout=_CONNECT_SECONDS) as answer, path.open("wb") as file:  # noqa: S310
            total = int(answer.headers.get("Content-Length") or 0)
            got = 0
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                found.update(chunk)
                got += len(chunk)
                on_progress(f"{got >> 20} of {total >> 20} MiB" if total else f"{got >> 20} MiB")
    except urllib.error.HTTPError as refused:
        raise BuildFailed(
            f"{url}: the server answered {refused.code} {refused.reason}", hint="check base.source"
        ) from refused
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as lost:
        reason = getattr(lost, "reason", lost) or type(lost).__name__
        raise BuildFailed(
            f"{url}: {reason}", hint="check base.source and the network, then build again"
        ) from lost
    if total and got != total:
        raise BuildFailed(f"{url}: the connection ended after {got} of {total} bytes", hint="build again")
    _compare(url, wanted, found.hexdigest(), algorithm)


def _compare(source: str, wanted: str, found: str, algorithm: str) -> None:
    if wanted.lower() != found:
        raise BuildFailed(
            f"{source} has the wrong checksum",
            tail=(f"expected {algorithm}:{wanted}", f"found    {algorithm}:{found}"),
            hint="nothing was booted; set base.checksum to the checksum that the publisher gives",
        )


def _file_digest(path: Path, algorithm: str, workspace: Workspace) -> str:
    """Return a file's digest. A file whose size and time of change are the same is not read again."""
    try:
        stat = path.stat()
    except OSError as bad:
        raise UsageError(
            f"base.source {path}: {bad.strerror}", hint="name a qcow2 or raw disk image"
        ) from bad
    key = hashlib.sha256(f"{path.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{algorithm}".encode())
    record = workspace.cache / "resolved" / f"file-{key.hexdigest()}.json"
    try:
        return str(json.loads(record.read_text())["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    with path.open("rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    write_atomically(record, json.dumps({"digest": found}))
    return found
