"""A base and a container that somebody else made: a cloud image by URL, a container from a registry.

Two workers on a smaller machine than the other tests', since the promise holds for every number and size.

The base disk of our own recipe stands in for a cloud image (no other can be had offline); it goes the whole
foreign way: HTTP, checksum, UEFI, a NoCloud seed for baking, and NoCloud again for verification.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from ami_builder.workspace import Workspace
from tests.vm.conftest import ami_builder
from tests.vm.registry import push, registry


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def _config(folder: Path, url: str, checksum: str, port: int) -> Path:
    path = folder / "ami-builder.toml"
    path.write_text(
        f"""
[images.foreign.base]
source = "{url}/disk.qcow2"
checksum = "{checksum}"
ssh_user = "admin"

[images.foreign.container]
source = "registry"
reference = "10.0.2.2:{port}/team/dask:test"
insecure_registry = "10.0.2.2:{port}"

[images.foreign.dask]
workers = 2

[images.foreign.verify]
datasource = "nocloud"
memory = ["1536MiB"]
"""
    )
    return path


def test_a_cloud_image_and_a_registry(built: Mapping[str, Any], workspace: Workspace, tmp_path: Path) -> None:
    base = next(p for p in sorted((workspace.cache / "base").glob("*/disk.qcow2")))
    archive = next(p for p in sorted((workspace.cache / "container").glob("*/container.tar")))
    with base.open("rb") as file:
        checksum = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    with _served(base.parent) as url, registry(tmp_path) as port:
        push(archive, port, "team/dask", "test")
        wrong = ami_builder("--config", _config(tmp_path, url, "sha256:" + "0" * 64, port), "build")
        assert wrong.status == 4
        assert "wrong checksum" in wrong.stderr
        assert "bake" not in wrong.stderr
        answer = ami_builder("--config", _config(tmp_path, url, checksum, port), "build", "--json")
    assert answer.status == 0, answer.stderr
    verdict = answer.json["verdict"]
    assert {r["phase"] for r in verdict["results"]} == {"boot", "restart", "reboot"}
    assert all(m["available"] > 0 for m in verdict["measured"])
