"""QEMU's monitor (QMP), with synchronous calls."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType

from qemu.qmp import QMPClient, QMPError

# Without a handler, Python would print the library's messages about a dying QEMU to stderr.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())

FAILURES = (QMPError, OSError)
"""What any use of the monitor may raise: QEMU refused, has ended, or does not answer (TimeoutError)."""

_ANSWER_SECONDS = 30.0
_CLOSE_SECONDS = 5.0


class Monitor:
    """QEMU's monitor over one end of a socket pair, which has no path to clean up, or to be too long."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._runner = asyncio.Runner()
        self._client = QMPClient()

    def __enter__(self) -> Monitor:
        try:
            self._runner.run(asyncio.wait_for(self._client.connect(self._socket), _ANSWER_SECONDS))
        except BaseException:
            self._runner.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(*FAILURES, EOFError):
            self._runner.run(asyncio.wait_for(self._client.disconnect(), _CLOSE_SECONDS))
        self._runner.close()

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        seconds: float = _ANSWER_SECONDS,
    ) -> object:
        """Run one monitor command. Raises QMPError when QEMU refuses or has ended, and TimeoutError."""
        return self._runner.run(asyncio.wait_for(self._client.execute(command, arguments), seconds))
