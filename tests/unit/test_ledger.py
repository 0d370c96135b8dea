"""The ledger: what was meant to be made is on disk before it is made, whatever happens to the process."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from ami_builder.core.orphans import Resource
from ami_builder.state.ledger import Ledger, LedgerEntry, read

if TYPE_CHECKING:
    import pytest


def test_an_entry_goes_through_its_life(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert read(ledger.path) == ()
    group = ledger.intend(Resource.SECURITY_GROUP, "eu-central-1", run="r1", name="ours")
    assert read(ledger.path) == (group,)
    assert (group.kind, group.region, dict(group.find)) == (
        Resource.SECURITY_GROUP, "eu-central-1", {"run": "r1", "name": "ours"},
    )  # fmt: skip
    instance = ledger.intend(Resource.INSTANCE, "eu-central-1", token="t")
    made = ledger.made(group, "sg-1")
    assert made.id == "sg-1"
    assert read(ledger.path) == (made, instance)
    deleted = ledger.deleted(made)
    assert read(ledger.path) == (deleted, instance)
    assert deleted.deleted
    assert ledger.path.stat().st_mode & 0o777 == 0o600


def test_each_line_is_on_disk_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []

    def fsync(handle: int) -> None:
        synced.append(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    entry = ledger.intend(Resource.IMAGE, "eu-central-1")
    assert len(synced) == 2, "the file, and the folder that it is new in"
    ledger.made(entry, "ami-1")
    assert len(synced) == 3


def test_a_ledger_goes_on_where_it_ended(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "ledger.jsonl").intend(Resource.IMAGE, "eu-central-1")
    again = Ledger(tmp_path / "ledger.jsonl")
    second = again.intend(Resource.IMAGE, "eu-central-1")
    assert second.number > first.number
    assert again.deleted(first) == read(again.path)[0]


def test_what_is_no_line_of_a_ledger_is_passed_over(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    entry = ledger.intend(Resource.INSTANCE, "eu-central-1")
    with ledger.path.open("ab") as file:
        file.write(
            b'\n[]\n7\n"x"\n{}\n\xff\n{"event": "made", "number": 99, "id": "i-1"}\n'
            b'{"event": "intended", "number": 3, "kind": "castle"}\n'
            b'{"event": "made", "number": [], "id": "x"}\n'
        )
    assert read(ledger.path) == (entry,)


@given(st.data())
def test_wherever_the_last_line_is_torn_the_rest_is_read_and_the_next_is_whole(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.jsonl"
        ledger = Ledger(path)
        ledger.made(ledger.intend(Resource.SECURITY_GROUP, "eu-central-1", run="r1"), "sg-1")
        before, length = read(path), path.stat().st_size
        ledger.intend(Resource.INSTANCE, "eu-central-1", run="r1")
        whole = path.stat().st_size
        cut = data.draw(st.integers(length, whole))
        os.truncate(path, cut)
        assert read(path)[:1] == before
        after = Ledger(path).intend(Resource.IMAGE, "eu-central-1", name="x")
        entries = read(path)
        assert entries[0] == before[0]
        assert entries[-1] == after
        assert len(entries) == (3 if cut >= whole - 1 else 2)


def test_threads_share_a_ledger(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    entries: list[LedgerEntry] = []

    def work() -> None:
        entries.extend(ledger.made(ledger.intend(Resource.INSTANCE, "eu"), "i-1") for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({entry.number for entry in entries}) == 80
    assert sorted(read(ledger.path), key=lambda e: e.number) == sorted(entries, key=lambda e: e.number)
