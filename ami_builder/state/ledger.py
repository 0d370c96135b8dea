"""The write-ahead ledger of a run: what it makes in an account stands on disk before it is asked for.

One JSON object a line: `intended` before the call, `made` with the id after it, `gone` once it is deleted.
What a killed run left is every entry that is not gone; where even the id is missing, `find` tells how to look
for it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ami_builder.core.orphans import Resource
from ami_builder.state import jsonl

FILE = "ledger.jsonl"
"""What a run's ledger is called in its directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One thing that a run made, or was about to make."""

    number: int
    kind: Resource
    region: str
    intended: datetime
    find: Mapping[str, str] = field(default_factory=dict)
    """How to look for it without an id: `run`, `name`, `token` …"""
    id: str = ""
    """Empty as long as nobody has heard that it was made."""
    gone: bool = False


class Ledger:
    """An append-only file of entries; every call returns once its line is on disk. Threads may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._next = max((entry.number for entry in read(path)), default=0) + 1

    def intend(self, kind: Resource, region: str, **find: str) -> Entry:
        """Note what is about to be made, and how it can be found; call it before the call that makes it."""
        with self._lock:
            entry = Entry(
                number=self._next, kind=kind, region=region, intended=datetime.now(UTC), find=dict(find)
            )
            self._next += 1
            jsonl.append(
                self.path,
                {
                    "event": "intended",
                    "number": entry.number,
                    "kind": str(kind),
                    "region": region,
                    "at": entry.intended.isoformat(),
                    "find": dict(find),
                },
            )
        return entry

    def made(self, entry: Entry, id: str) -> Entry:
        """Note the id that the entry's thing got."""
        with self._lock:
            jsonl.append(self.path, {"event": "made", "number": entry.number, "id": id})
        return replace(entry, id=id)

    def gone(self, entry: Entry) -> Entry:
        """Note that the entry's thing was deleted, or was never made."""
        with self._lock:
            jsonl.append(self.path, {"event": "gone", "number": entry.number})
        return replace(entry, gone=True)


def read(path: Path) -> tuple[Entry, ...]:
    """Return a ledger's entries as they stand now; lines that were written only in part are passed over."""
    entries: dict[int, Entry] = {}
    for line in jsonl.read(path):
        try:
            _apply(line, entries)
        except (ValueError, KeyError, TypeError):
            continue
    return tuple(entries.values())


def _apply(line: dict[str, Any], entries: dict[int, Entry]) -> None:
    number = line["number"]
    match line["event"]:
        case "intended":
            entries[number] = Entry(
                number=number,
                kind=Resource(line["kind"]),
                region=line["region"],
                intended=datetime.fromisoformat(line["at"]),
                find=dict(line["find"]),
            )
        case "made":
            entries[number] = replace(entries[number], id=line["id"])
        case "gone":
            entries[number] = replace(entries[number], gone=True)
