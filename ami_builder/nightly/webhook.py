"""Posts a message to a webhook that takes Slack's JSON. Errors are returned, never raised.

The URL is a secret: it comes from the environment or a file only, and error messages have no more of it than
its host.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import urllib.error
import urllib.request
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tenacity.wait import wait_base

VARIABLE = "AMI_BUILDER_WEBHOOK"
FILE_VARIABLE = "AMI_BUILDER_WEBHOOK_FILE"
SECONDS = 10.0
ATTEMPTS = 3
PAUSE = wait_exponential(multiplier=0.5, max=2)

_TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


def notify_if_set(environ: Mapping[str, str], text: str) -> str:
    """Send a text to the webhook of the environment; return an error message, empty for success.

    Without AMI_BUILDER_WEBHOOK the URL is the first line of the file that AMI_BUILDER_WEBHOOK_FILE names.
    Without any URL nothing is sent.
    """
    url = environ.get(VARIABLE, "").strip()
    if not url and (file := environ.get(FILE_VARIABLE)):
        try:
            url = "".join(Path(file).read_text(encoding="utf-8").split("\n")[:1]).strip()
        except (OSError, ValueError) as unreadable:
            return f"webhook: {FILE_VARIABLE} names {file}: {_reason(unreadable)}"
    return notify(url, text) if url else ""


def notify(url: str, text: str, *, seconds: float = SECONDS, pause: wait_base = PAUSE) -> str:
    """Post `{"text": text}`, up to three times; return an error message, empty for success.

    It takes at most `seconds` in all, whatever the server or the name service do.
    """
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return f"webhook: {VARIABLE} is not a URL"
    local = _is_loopback(parts.hostname or "")
    secure = parts.scheme == "https" or (parts.scheme == "http" and local)
    if not parts.hostname or not secure or "@" in parts.netloc:
        return f"webhook: {VARIABLE} must be an https:// URL, without a user"
    errors = [f"no answer within {seconds:g} s"]
    # In a thread: a socket's timeout covers neither name resolution nor an answer that arrives in drops.
    thread = Thread(target=_post, args=(url, text, local, seconds, pause, errors), daemon=True)
    thread.start()
    thread.join(seconds)
    return f"webhook {parts.scheme}://{parts.hostname}{port}/…: {errors[-1]}" if errors[-1] else ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would send the message to a host that the user did not name."""

    def redirect_request(self, *_: object, **__: object) -> None:
        return None


def _post(url: str, text: str, local: bool, seconds: float, pause: wait_base, errors: list[str]) -> None:
    """Append an error message to `errors`, empty for success."""
    handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
    if local:
        # Without TLS a proxy would read the URL.
        handlers.append(urllib.request.ProxyHandler({}))
    opener = urllib.request.build_opener(*handlers)
    body = json.dumps({"text": text}).encode()

    def once() -> None:
        request = urllib.request.Request(  # noqa: S310 - https, or loopback
            url, body, {"Content-Type": "application/json", "User-Agent": "ami-builder"}
        )
        try:
            with opener.open(request, timeout=seconds / ATTEMPTS):
                pass
        except urllib.error.HTTPError as refused:
            refused.close()
            raise

    retrying = Retrying(
        retry=retry_if_exception(_passes), stop=stop_after_attempt(ATTEMPTS), wait=pause, reraise=True
    )
    try:
        retrying(once)
        errors.append("")
    except Exception as failed:  # a nightly run never fails because of its message
        errors.append(_reason(failed))


def _passes(failed: BaseException) -> bool:
    if isinstance(failed, urllib.error.HTTPError):
        return failed.code in _TRY_AGAIN
    return isinstance(failed, OSError | http.client.HTTPException) and not isinstance(
        failed, http.client.InvalidURL
    )


def _reason(failed: BaseException) -> str:
    """Return what went wrong in words that can't hold the URL, as those of an exception or a server can."""
    if isinstance(failed, urllib.error.HTTPError):
        if 300 <= failed.code < 400:
            return f"it answered {failed.code}, a redirect, which is not followed"
        return f"it answered {failed.code} {http.client.responses.get(failed.code, '')}".rstrip()
    cause = failed.reason if isinstance(failed, urllib.error.URLError) else failed
    if isinstance(cause, TimeoutError):
        return "no answer in time"
    return (isinstance(cause, OSError) and cause.strerror) or type(cause).__name__


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
