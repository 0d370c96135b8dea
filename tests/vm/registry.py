"""A real registry on loopback (Debian's docker-registry), filled with an image from its archive."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import tarfile
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ami_builder.system import processes
from tests.vm.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAM = ROOT / ".cache" / "tools" / "usr" / "bin" / "docker-registry"
_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
_CONFIG = "application/vnd.docker.container.image.v1+json"
_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"


@contextmanager
def registry(folder: Path) -> Iterator[int]:
    """Run an empty registry and yield its port; skips where the program is missing."""
    program = shutil.which("docker-registry") or str(PROGRAM)
    if not Path(program).exists():
        pytest.skip("docker-registry is not here; scripts/test brings it")
    log, settings = folder / "registry.log", folder / "registry.yaml"
    storage = {"filesystem": {"rootdirectory": str(folder / "registry")}}
    http = {"addr": "127.0.0.1:0"}
    settings.write_text(json.dumps({"version": 0.1, "storage": storage, "http": http}))
    with (
        log.open("w") as out,
        processes.running([program, "serve", settings], stdout=out.fileno()) as process,
    ):

        def port() -> int | None:
            assert process.poll() is None, log.read_text()
            for line in log.read_text().splitlines():
                if "listening on 127.0.0.1:" in line:
                    return int(line.split("listening on 127.0.0.1:")[1].split('"')[0].split()[0])
            return None

        yield processes.wait_until(port, what="the registry", timeout=120, interval=0.1, log=log)


def push(archive: Path, port: int, name: str, tag: str) -> str:
    """Push a `docker save` archive over the registry's HTTP API; return the manifest's digest."""
    with tarfile.open(archive) as tar:
        members = {member.name.removeprefix("./"): member for member in tar}

        def member(path: str) -> bytes:
            file = tar.extractfile(members[path])
            assert file is not None
            return file.read()

        (entry,) = json.loads(member("manifest.json"))
        layers = [gzip.compress(member(layer), compresslevel=1, mtime=0) for layer in entry["Layers"]]
        config = member(entry["Config"])
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": _blob(port, name, config, _CONFIG),
        "layers": [_blob(port, name, layer, _LAYER) for layer in layers],
    }
    url = f"http://127.0.0.1:{port}/v2/{name}/manifests/{tag}"
    return _send("PUT", url, json.dumps(manifest).encode(), _MANIFEST)["Docker-Content-Digest"]


def _blob(port: int, name: str, content: bytes, kind: str) -> dict[str, object]:
    digest = "sha256:" + hashlib.sha256(content).hexdigest()
    place = _send("POST", f"http://127.0.0.1:{port}/v2/{name}/blobs/uploads/", b"", "")["Location"]
    _send("PUT", f"{place}&digest={digest}", content, "application/octet-stream")
    return {"mediaType": kind, "size": len(content), "digest": digest}


def _send(method: str, url: str, content: bytes, kind: str) -> dict[str, str]:
    request = urllib.request.Request(url, data=content, method=method, headers={"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(answer.headers)
