"""The write-ahead ledger of a run: each resource is on disk before the call that creates it.

One JSON object a line: `intended` before the call, `made` with the id after it, `gone` once it is deleted.
Every entry that is not deleted may be an orphaned resource of a killed run; `find` says how to look for a
resource whose id is missing.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from ami_builder.core.orphans import Resource
from ami_builder.state import jsonl

FILE = "ledger.jsonl"
"""The name of a ledger in its run's directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerEntry:
    """One resource that a run made, or was about to make."""

    number: int
    kind: Resource
    region: str
    find: Mapping[str, str] = field(default_factory=dict)
    """How to find it without an id: `run`, `name`, `token` …"""
    id: str = ""
    """Empty until the call that creates it has returned."""
    deleted: bool = False


class Ledger:
    """An append-only file of entries. Each call returns once its line is on disk. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._next = max((entry.number for entry in read(path)), default=0) + 1

    def intend(self, kind: Resource, region: str, **find: str) -> LedgerEntry:
        """Record a resource before the call that creates it, and how it can be found."""
        with self._lock:
            entry = LedgerEntry(number=self._next, kind=kind, region=region, find=dict(find))
            self._next += 1
            jsonl.append(
                self.path,
                {
                    "event": "intended",
                    "number": entry.number,
                    "kind": str(kind),
                    "region": region,
                    "at": datetime.now(UTC).isoformat(),
                    "find": dict(find),
                },
            )
        return entry

    def made(self, entry: LedgerEntry, id: str) -> LedgerEntry:
        """Record the id of a resource."""
        with self._lock:
            jsonl.append(self.path, {"event": "made", "number": entry.number, "id": id})
        return replace(entry, id=id)

    def deleted(self, entry: LedgerEntry) -> LedgerEntry:
        """Record that a resource was deleted, or was never made."""
        with self._lock:
            jsonl.append(self.path, {"event": "gone", "number": entry.number})
        return replace(entry, deleted=True)


def read(path: Path) -> tuple[LedgerEntry, ...]:
    """Return the current entries of a ledger; incomplete lines are skipped."""
    entries: dict[int, LedgerEntry] = {}
    for line in jsonl.read(path):
        try:
            number = line["number"]
            match line["event"]:
                case "intended":
                    entries[number] = LedgerEntry(
                        number=number,
                        kind=Resource(line["kind"]),
                        region=line["region"],
                        find=dict(line["find"]),
                    )
                case "made":
                    entries[number] = replace(entries[number], id=line["id"])
                case "gone":
                    entries[number] = replace(entries[number], deleted=True)
                case _:  # of a later version
                    continue
        except (ValueError, KeyError, TypeError):
            continue
    return tuple(entries.values())
