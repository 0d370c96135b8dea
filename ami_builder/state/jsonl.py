"""Append-only files with one JSON object a line; a written line survives a killed process."""

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any


def append(path: Path, line: dict[str, Any]) -> None:
    """Append a line and return once it is on disk. Only this user can read the file."""
    new = not path.exists()
    with open(path, "a+b", opener=partial(os.open, mode=0o600)) as file:
        # An incomplete line of a killed process stays a line of its own.
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    if new:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file, none if it is missing; incomplete lines are skipped."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return
    for raw in lines:
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            yield line
