"""A base disk that somebody else made: a cloud image by path or URL, checked before anything boots."""

from __future__ import annotations

import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from ami_builder.config.schema import BaseSettings
from ami_builder.core.errors import BuildFailed, UsageError
from ami_builder.state.workspace import Workspace, write_atomically

_CHUNK = 1 << 20
_CONNECT_SECONDS = 30.0


def is_url(source: str) -> bool:
    """Tell a URL from a path."""
    return urlsplit(source).scheme in {"http", "https"}


def digest(base: BaseSettings, workspace: Workspace) -> str:
    """Return what identifies the disk's content: its checksum, or the sha256 of a file without one."""
    assert base.source is not None
    if base.checksum is not None:
        return base.checksum.partition(":")[2]
    return _file_digest(Path(base.source), "sha256", workspace)


def fetch(base: BaseSettings, workspace: Workspace, on_progress: Callable[[str], None]) -> Path:
    """Return the path of the disk; a URL is downloaded once and kept by its checksum.

    Raises BuildFailed when the download fails or the checksum does not fit; then nothing is kept.
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
        "base", checksum.partition(":")[2], lambda half: _download(url, checksum, half / "disk", on_progress)
    )
    return folder / "disk"


def _download(url: str, checksum: str, path: Path, on_progress: Callable[[str], None]) -> None:
    algorithm, _, wanted = checksum.partition(":")
    seen = hashlib.new(algorithm)
    try:
        # The scheme is http(s): is_url() decided that this is a URL.
        with urllib.request.urlopen(url, timeout=_CONNECT_SECONDS) as answer, path.open("wb") as file:  # noqa: S310
            total = int(answer.headers.get("Content-Length") or 0)
            got = 0
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                seen.update(chunk)
                got += len(chunk)
                on_progress(f"{got >> 20} of {total >> 20} MiB" if total else f"{got >> 20} MiB")
    except urllib.error.HTTPError as refused:
        raise BuildFailed(
            f"{url}: the server answered {refused.code} {refused.reason}", hint="check base.source"
        ) from refused
    except (urllib.error.URLError, TimeoutError, ConnectionError) as lost:
        reason = getattr(lost, "reason", lost)
        raise BuildFailed(
            f"{url}: {reason}", hint="check base.source and the network, then build again"
        ) from lost
    if total and got != total:
        raise BuildFailed(f"{url}: the connection ended after {got} of {total} bytes", hint="build again")
    _compare(url, wanted, seen.hexdigest(), algorithm)


def _compare(source: str, wanted: str, seen: str, algorithm: str) -> None:
    if wanted.lower() != seen:
        raise BuildFailed(
            f"{source} has the wrong checksum",
            tail=(f"expected {algorithm}:{wanted}", f"found    {algorithm}:{seen}"),
            hint="nothing was booted; get the checksum from who publishes the image and set base.checksum",
        )


def _file_digest(path: Path, algorithm: str, workspace: Workspace) -> str:
    """Return a file's digest; an unchanged file (size, time of change) is read once."""
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
        seen = hashlib.file_digest(file, algorithm).hexdigest()
    write_atomically(record, json.dumps({"digest": seen}))
    return seen
