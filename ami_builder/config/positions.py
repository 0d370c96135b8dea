"""Where the keys of a TOML file are, which tomllib does not report."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import TypeAlias

KeyPath: TypeAlias = tuple[str | int, ...]
"""Keys, and the numbers of items in lists."""


def key_lines(text: str) -> dict[KeyPath, int]:
    """Return the line, from 1, at which each table and key of valid TOML begins.

    Each statement is parsed by itself: lines are added to it until they are valid.
    """
    lines: dict[KeyPath, int] = {}
    table: KeyPath = ()
    statement, first = "", 1
    for number, line in enumerate(text.split("\n"), 1):
        statement += line + "\n"
        try:
            found = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue
        paths = list(_paths(found))
        if statement.lstrip().startswith("["):
            table = max(paths, key=len)
        else:
            paths = [(*table, *path) for path in paths]
        for path in paths:
            lines.setdefault(path, first)
        statement, first = "", number + 1
    return lines


def line_of(lines: Mapping[KeyPath, int], path: KeyPath) -> int:
    """Return the line of `path`, or of the innermost key or table around it that the file has; else 1."""
    return next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), 1)


def dotted(path: KeyPath) -> str:
    """Return a path as TOML writes it, with the number of a list's item from 0."""
    text = ""
    for part in path:
        bare = isinstance(part, str) and re.fullmatch(r"[A-Za-z0-9_-]+", part)
        text += f"[{part}]" if isinstance(part, int) else f".{part if bare else json.dumps(part)}"
    return text.removeprefix(".")


def _paths(value: object) -> Iterator[KeyPath]:
    if value == [{}]:  # of [[a table]]
        value = {}
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (key,)
            yield from ((key, *path) for path in _paths(inner))
