"""The address of a scheduler, as flags take it."""

from __future__ import annotations

import re

_PORT = 8786
_ADDRESS = re.compile(r"(?:(tcp|tls)://)?(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9][A-Za-z0-9.-]*)(?::([0-9]{1,5}))?/?")


def parse_scheduler(text: str) -> tuple[str, str]:
    """Return the scheme, empty if there is none, and HOST:PORT of an address. Raises ValueError."""
    found = _ADDRESS.fullmatch(text)
    if found is None or not 0 < int(found[3] or _PORT) < 65536:
        raise ValueError("expected HOST or HOST:PORT, such as 10.0.0.7:8786 or scheduler.internal:8786")
    return found[1] or "", f"{found[2]}:{found[3] or _PORT}"
