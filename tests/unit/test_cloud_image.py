"""A base by URL, over real HTTP on loopback: checked before anything boots, kept only when right."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, TCPServer
from threading import Thread

import pytest

from ami_builder.build import base_image
from ami_builder.config.schema import BaseSettings
from ami_builder.core.errors import BuildFailed
from ami_builder.state.workspace import Workspace

CONTENT = b"a disk image" * 1000
SHA256 = "sha256:" + hashlib.sha256(CONTENT).hexdigest()


@contextmanager
def _server(*, promised: int = len(CONTENT)) -> Iterator[tuple[str, list[str]]]:
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            if self.path != "/disk.qcow2":
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(promised))
            self.end_headers()
            self.wfile.write(CONTENT)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", seen
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open({"AMI_BUILDER_HOME": str(tmp_path / "home")})


def _base(source: str, checksum: str | None) -> BaseSettings:
    return BaseSettings(
        source=source,
        checksum=checksum,
        ssh_user="debian",
        suite="trixie",
        mirror="",
        packages=(),
        disk_size=1 << 33,
        security_updates=False,
    )


def test_a_url_is_downloaded_once(workspace: Workspace) -> None:
    with _server() as (url, seen):
        base = _base(f"{url}/disk.qcow2", SHA256)
        shown: list[str] = []
        for _ in range(2):
            path = base_image.fetch(base, workspace, shown.append)
        assert path.read_bytes() == CONTENT
        assert seen == ["/disk.qcow2"]
        assert shown
        assert base_image.source_digest(base, workspace) == SHA256.partition(":")[2]


def test_a_wrong_checksum_keeps_nothing(workspace: Workspace) -> None:
    wrong = "sha256:" + "0" * 64
    with _server() as (url, _), pytest.raises(BuildFailed, match="wrong checksum") as error:
        base_image.fetch(_base(f"{url}/disk.qcow2", wrong), workspace, lambda _: None)
    assert error.value.tail == (f"expected {wrong}", f"found    {SHA256}")
    assert not [p for p in (workspace.cache / "base").iterdir() if p.is_dir()]


def test_a_short_answer_is_no_image(workspace: Workspace) -> None:
    with _server(promised=len(CONTENT) + 1) as (url, _), pytest.raises(BuildFailed, match="ended after"):
        base_image.fetch(_base(f"{url}/disk.qcow2", SHA256), workspace, lambda _: None)


def test_a_missing_page_and_a_dead_server_are_told_apart(workspace: Workspace) -> None:
    with _server() as (url, _), pytest.raises(BuildFailed, match="404"):
        base_image.fetch(_base(f"{url}/other.qcow2", SHA256), workspace, lambda _: None)
    with pytest.raises(BuildFailed, match="refused"):
        base_image.fetch(_base(f"{url}/disk.qcow2", SHA256), workspace, lambda _: None)


@pytest.mark.parametrize(
    "answer",
    [b"SSH-2.0-OpenSSH_10.0\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40\r\nhalf"],
)
def test_what_speaks_another_protocol_or_breaks_off_is_named(workspace: Workspace, answer: bytes) -> None:
    class Handler(BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(4096)
            self.request.sendall(answer)

    with TCPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.handle_request).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/disk.qcow2"
        with pytest.raises(BuildFailed, match=re.escape(url)) as caught:
            base_image.fetch(_base(url, SHA256), workspace, lambda _: None)
    assert "check base.source" in str(caught.value.hint)


def test_a_path_is_used_where_it_is(workspace: Workspace, tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    disk.write_bytes(CONTENT)
    assert base_image.fetch(_base(str(disk), SHA256), workspace, lambda _: None) == disk
    assert base_image.source_digest(_base(str(disk), None), workspace) == SHA256.partition(":")[2]
    disk.write_bytes(CONTENT + b"changed")
    with pytest.raises(BuildFailed, match="wrong checksum"):
        base_image.fetch(_base(str(disk), SHA256), workspace, lambda _: None)
