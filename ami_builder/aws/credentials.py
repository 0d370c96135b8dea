"""Credentials for a child process, on loopback: its AWS SDK asks again before they expire.

The SDKs call this the container credentials provider:
https://docs.aws.amazon.com/sdkref/latest/guide/feature-container-credentials.html
"""

from __future__ import annotations

import hmac
import json
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ami_builder.core.errors import AmiBuilderError

# The SDKs take credentials for expired 5 minutes before that, so they ask again for each request. botocore
# refreshes what it hands out, but only when its end is near.
_VALID = timedelta(minutes=5)


@dataclass(slots=True, kw_only=True)
class ServedCredentials:
    """What a child process gets."""

    variables: Mapping[str, str]
    """For its environment alone: with them everybody gets the credentials."""
    failure: AmiBuilderError | None = field(default=None)
    """Why they could not be refreshed at last."""


@contextmanager
def served(current: Callable[[], Any]) -> Iterator[ServedCredentials]:
    """Serve what `current` returns, botocore's frozen credentials, until the context ends."""
    token = secrets.token_urlsafe(32)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given = self.headers.get("Authorization", "")
            if not hmac.compare_digest(given.encode(), token.encode()):
                self._answer(HTTPStatus.FORBIDDEN, {"code": "Forbidden", "message": "the token is wrong"})
                return
            try:
                keys = current()
            except AmiBuilderError as failed:
                result.failure = failed
                answer = {"code": "NoCredentials", "message": failed.message}
                self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, answer)
                return
            result.failure = None
            end = datetime.now(UTC) + _VALID
            self._answer(
                HTTPStatus.OK,
                {
                    "AccessKeyId": keys.access_key,
                    "SecretAccessKey": keys.secret_key,
                    "Token": keys.token or "",
                    "Expiration": end.strftime("%Y-%m-%dT%H:%M:%SZ"),
                },
            )

        def _answer(self, status: HTTPStatus, answer: Mapping[str, str]) -> None:
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        result = ServedCredentials(
            variables={
                "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"http://127.0.0.1:{server.server_address[1]}/",
                "AWS_CONTAINER_AUTHORIZATION_TOKEN": token,
            }
        )
        serving = threading.Thread(target=server.serve_forever, daemon=True)
        serving.start()
        try:
            yield result
        finally:
            server.shutdown()
            serving.join()
