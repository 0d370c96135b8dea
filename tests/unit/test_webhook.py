"""The webhook, over real HTTP on loopback: people are told, nothing leaks, nothing fails for it."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tenacity import wait_none

from ami_builder.nightly import webhook
from ami_builder.system import processes

SECRET = "T000/B000/very-secret"


class Server:
    """What a webhook's server heard, and what it answers: the statuses in turn, the last one for ever."""

    def __init__(self, statuses: list[int]) -> None:
        self.statuses = statuses
        self.heard: list[tuple[str, dict[str, object]]] = []
        self.url = ""
        self.release = threading.Event()

    def status(self) -> int:
        return self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]


@contextmanager
def _server(*statuses: int, location: str = "", silent: bool = False) -> Iterator[Server]:
    state = Server(list(statuses or (200,)))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            state.heard.append((self.path, json.loads(body)))
            assert self.headers["Content-Type"] == "application/json"
            if silent:
                state.release.wait()
                return
            # A server may well repeat what it was asked for.
            self.send_response(state.status(), f"said of {self.path}")
            if location:
                self.send_header("Location", location)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self) -> None:
            state.heard.append((self.path, {}))
            self.send_error(405)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        state.url = f"http://127.0.0.1:{server.server_address[1]}/services/{SECRET}"
        try:
            yield state
        finally:
            state.release.set()
            server.shutdown()
            thread.join()


def _notify(url: str, seconds: float = webhook.SECONDS) -> str:
    said = webhook.notify(url, "dask: promoted", seconds=seconds, pause=wait_none())
    assert SECRET not in said
    return said


def test_the_text_arrives_as_slack_takes_it() -> None:
    with _server() as server:
        assert _notify(server.url) == ""
    assert server.heard == [(f"/services/{SECRET}", {"text": "dask: promoted"})]


def test_a_server_that_fails_for_a_moment_is_asked_again() -> None:
    with _server(500, 503, 200) as server:
        assert _notify(server.url) == ""
    assert len(server.heard) == 3


def test_it_gives_up_after_three_attempts() -> None:
    with _server(500) as server:
        said = _notify(server.url)
    assert len(server.heard) == 3
    assert said.endswith("/…: it answered 500 Internal Server Error")
    assert said.startswith("webhook http://127.0.0.1:")


@pytest.mark.parametrize("status", [400, 403, 404, 410])
def test_what_the_server_refuses_is_not_asked_again(status: int) -> None:
    with _server(status) as server:
        assert f"it answered {status} " in _notify(server.url)
    assert len(server.heard) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status: int) -> None:
    with _server() as other, _server(status, location=other.url) as server:
        assert f"it answered {status}, a redirect" in _notify(server.url)
    assert len(server.heard) == 1
    assert other.heard == []


def test_a_silent_server_holds_nobody_up() -> None:
    with _server(silent=True) as server:
        # Of the last attempt or of all together, whichever is heard first.
        assert "/…: no answer " in _notify(server.url, seconds=0.3)


def test_a_server_that_answers_in_drops_holds_nobody_up() -> None:
    """Each drop comes in time for the socket; only the whole takes too long."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
                while not done.wait(0.02):
                    connection.sendall(b"x")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/{SECRET}"
            assert "no answer within" in _notify(url, seconds=0.3)
        finally:
            done.set()
            thread.join()


def test_nobody_listening_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said = _notify(f"http://127.0.0.1:{port}/{SECRET}")
    assert said == f"webhook http://127.0.0.1:{port}/…: Connection refused"


@pytest.mark.parametrize(
    "url",
    [
        f"http://hooks.example.com/{SECRET}",
        f"http://127.0.0.1.example.com/{SECRET}",
        f"ftp://127.0.0.1/{SECRET}",
        f"file:///{SECRET}",
        f"https:///{SECRET}",
        f"hooks.example.com/{SECRET}",
        f"https://very-secret@example.com/{SECRET}",
        f"https://[{SECRET}",
        f"https://example.com:port/{SECRET}",
    ],
)
def test_a_url_that_would_leak_or_is_none_is_refused(url: str) -> None:
    assert webhook.VARIABLE in _notify(url)


def test_a_url_that_http_refuses_is_not_shown() -> None:
    with _server() as server:
        assert _notify(server.url + " x").endswith("/…: InvalidURL")
    assert server.heard == []


def test_a_plain_message_to_loopback_goes_past_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with _server() as proxy, _server() as server:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        assert _notify(server.url) == ""
    assert proxy.heard == []


def test_the_environment_names_it(tmp_path: Path) -> None:
    with _server() as server:
        file = tmp_path / "webhook"
        file.write_text(server.url + "\n")
        assert webhook.notify_if_set({}, "none") == ""
        assert webhook.notify_if_set({webhook.VARIABLE: server.url}, "first") == ""
        assert webhook.notify_if_set({webhook.FILE_VARIABLE: str(file)}, "second") == ""
        file.write_text("\n")
        assert webhook.notify_if_set({webhook.FILE_VARIABLE: str(file)}, "none") == ""
    assert [body["text"] for _, body in server.heard] == ["first", "second"]


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    said = webhook.notify_if_set({webhook.FILE_VARIABLE: str(tmp_path / "none")}, "text")
    assert said == f"webhook: AMI_BUILDER_WEBHOOK_FILE names {tmp_path / 'none'}: No such file or directory"


def test_no_child_process_gets_to_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(webhook.VARIABLE, f"https://example.com/{SECRET}")
    monkeypatch.setenv("AMI_BUILDER_HOME", os.devnull)
    environ = processes.environment()
    assert webhook.VARIABLE not in environ
    assert environ["AMI_BUILDER_HOME"] == os.devnull
