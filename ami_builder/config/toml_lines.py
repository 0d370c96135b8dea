"""The line of every key in a TOML file, which tomllib does not tell."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

KeyPath: TypeAlias = tuple[str | int, ...]

_TOKEN = re.compile(
    r"""
    (?P<skip>[ \t\r]+|\#[^\n]*)
    |(?P<string>\"{3}(?:\\.|[^\\])*?\"{3}(?!\")|'{3}.*?'{3}(?!')|"(?:\\.|[^"\\\n])*"|'[^'\n]*')
    |(?P<mark>[\n\[\]{},=.])
    |(?P<bare>[^\s"'\[\]{},=.\#]+)
    """,
    re.VERBOSE | re.DOTALL,
)


class _Token(NamedTuple):
    kind: str
    text: str
    line: int


def key_lines(text: str) -> Mapping[KeyPath, int]:
    """Return the line, from 1, of every table, key and array item; `text` must be what tomllib accepts.

    Items of arrays are numbered; those of `[[arrays of tables]]` are not told apart.
    """
    return _Reader(text).lines


def line_of(lines: Mapping[KeyPath, int], path: KeyPath) -> int:
    """Return the line of `path`, or of the innermost table around it that the file has; 1 without any."""
    return next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), 1)


def dotted(path: KeyPath) -> str:
    """Return a path as TOML writes it, items of lists by their number from 0."""
    text = ""
    for part in path:
        bare = isinstance(part, str) and re.fullmatch(r"[A-Za-z0-9_-]+", part)
        text += f"[{part}]" if isinstance(part, int) else f".{part if bare else json.dumps(part)}"
    return text.removeprefix(".")


class _Reader:
    def __init__(self, text: str) -> None:
        self.lines: dict[KeyPath, int] = {}
        self._tokens: list[_Token] = []
        line = 1
        for found in _TOKEN.finditer(text):
            if found.lastgroup != "skip":
                self._tokens.append(_Token(found.lastgroup or "", found[0], line))
            line += found[0].count("\n")
        self._tokens.append(_Token("end", "", line))
        self._at = 0
        self._document()

    def _next(self) -> str:
        """Return the coming token's text if it is a mark; a string that looks like one is none."""
        kind, text, _ = self._tokens[self._at]
        return text if kind == "mark" else kind

    def _accept(self, *marks: str) -> bool:
        taken = self._next() in marks
        self._at += taken
        return taken

    def _document(self) -> None:
        table: KeyPath = ()
        while self._next() != "end":
            if self._accept("["):
                self._accept("[")
                table = self._key(())
            elif self._next() in ("string", "bare"):
                self._setting(table)
            else:  # line ends, and the brackets that close a header
                self._at += 1

    def _setting(self, table: KeyPath) -> None:
        path = self._key(table)
        self._accept("=")
        self._value(path)

    def _key(self, path: KeyPath) -> KeyPath:
        while True:
            kind, text, line = self._tokens[self._at]
            path = (*path, tomllib.loads(f"key = {text}")["key"] if kind == "string" else text)
            self.lines.setdefault(path, line)
            self._at += 1
            if not self._accept("."):
                return path

    def _value(self, path: KeyPath) -> None:
        if self._accept("["):
            count = 0
            while not self._accept("]"):
                if not self._accept("\n", ","):
                    self.lines[(*path, count)] = self._tokens[self._at].line
                    self._value((*path, count))
                    count += 1
        elif self._accept("{"):
            while not self._accept("}"):
                if not self._accept("\n", ","):
                    self._setting(path)
        else:
            while self._next() not in ("\n", ",", "]", "}", "end"):
                self._at += 1
