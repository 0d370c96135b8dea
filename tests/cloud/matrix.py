"""The whole matrix, calls × faults and signals, and the table of it in docs/explanation/reliability.md.

    python -m tests.cloud.matrix [TEXT ...]

runs all of it, on every processor, and writes the table between the markers of that page, if nothing leaks.
With TEXTs it only tries the cells that have one of them in their name, such as "CreateImage 1, SIGINT".
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from datetime import datetime
from functools import cache
from multiprocessing import get_context
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tenacity

from tests.cloud.faulting import FAULTS, Cell, Leak, Missed, Place, Row, Verdict, good_run, rows, try_fault
from tests.cloud.flow import in_haste, without_ssh
from tests.cloud.stopping import SIGNALS, try_signal
from tests.fake_ec2.server import Cloud

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "reliability.md"
BEGIN, END = "<!-- matrix -->", "<!-- /matrix -->"
COLUMNS = (*FAULTS, *SIGNALS)

_ATTEMPTS = 3
# A row's cell shows the one that left the most to do.
_WORST = (Verdict.OK, Verdict.ERROR, Verdict.KEPT, Verdict.GC)


def whole(places: Sequence[Place]) -> Iterator[tuple[Place, str]]:
    """Yield every cell: each call with each fault, each row once with each signal."""
    for row in rows(places):
        for place in row.places:
            yield from ((place, fault) for fault in FAULTS)
        yield from ((row.places[0], signal) for signal in SIGNALS)


def share(places: Sequence[Place]) -> Iterator[tuple[Place, str]]:
    """Yield some of it: each row with a fault, each third with a signal, in rotation, so that all occur."""
    for number, row in enumerate(rows(places)):
        yield row.places[-1], FAULTS[number % len(FAULTS)]
        if number % 3 == 0:
            yield row.places[0], SIGNALS[number // 3 % len(SIGNALS)]


def cells(places: Sequence[Place]) -> list[tuple[Place, str]]:
    """Return what the tests try: a share, or with AMI_BUILDER_TEST_WHOLE_MATRIX=1 everything."""
    return list(whole(places) if os.environ.get("AMI_BUILDER_TEST_WHOLE_MATRIX") == "1" else share(places))


def tried(cloud: Cloud, place: Place, column: str, home: Path) -> Cell:
    """Try one cell; raises Leak."""
    attempt = try_signal if column in SIGNALS else try_fault
    again = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(Missed),
        stop=tenacity.stop_after_attempt(_ATTEMPTS),
        reraise=True,
    )

    def once() -> Cell:
        try:
            return attempt(cloud, place, column, home)
        finally:
            cloud.faults.clear()
            shutil.rmtree(home, ignore_errors=True)

    return again(once)


def table(wanted: Sequence[Row], cells: Sequence[Cell]) -> str:
    """Return the matrix as a Markdown table."""
    lines = [f"| step | call | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for row in wanted:
        found: Mapping[str, list[Verdict]] = {
            column: [cell.verdict for cell in cells if cell.place in row.places and cell.column == column]
            for column in COLUMNS
        }
        worst = [max(verdicts, key=_WORST.index) for verdicts in found.values()]
        lines.append(f"| {row.name} | {' | '.join(worst)} |")
    return "\n".join(lines)


def shown(page: str) -> tuple[list[str], dict[str, list[str]]]:
    """Return the columns that a page shows, and its rows by name with the verdicts of all of that name."""
    lines = [line for line in page.split(BEGIN)[1].split(END)[0].splitlines() if line.startswith("| ")]
    parts = [[part.strip() for part in line.strip("|").split("|")] for line in lines]
    found: dict[str, list[str]] = {}
    for step, call, *verdicts in parts[1:]:
        found.setdefault(f"{step} | {call}", []).extend(verdicts)
    return parts[0][2:], found


def write(wanted: Sequence[Row], cells: Sequence[Cell]) -> None:
    """Write the table, and the number of its jobs, into the page."""
    today = f"{datetime.now().astimezone():%-d %B %Y}"
    told = f"{len(cells)} jobs, all in one run on {today}, none of which leaked anything:"
    told += f"\n\n{table(wanted, cells)}"
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{told}\n{END}{after}", encoding="utf-8")


class _Bench:
    """What one process tries cells on: an EC2 of its own, and a folder."""

    def __init__(self) -> None:
        self.owned = ExitStack()
        # A pool's processes end without running what waits for their end.
        Finalize(self, self.owned.close, exitpriority=1)
        self.cloud = self.owned.enter_context(Cloud())
        monkeypatch = self.owned.enter_context(pytest.MonkeyPatch.context())
        self.folder = Path(self.owned.enter_context(tempfile.TemporaryDirectory(prefix="matrix-")))
        monkeypatch.delenv("AWS_PROFILE", raising=False)
        for name, value in self.cloud.environment().items():
            monkeypatch.setenv(name, value)
        without_ssh(monkeypatch)
        in_haste(monkeypatch)


@cache
def _bench() -> _Bench:
    return _Bench()


def _places() -> list[Place]:
    bench = _bench()
    return good_run(bench.cloud, bench.folder)


def _try(place: Place, column: str) -> Cell | str:
    """Return what a cell came to, or what leaked."""
    bench = _bench()
    try:
        return tried(bench.cloud, place, column, bench.folder / "cell")
    except Leak as leak:
        return str(leak)


def main(only: Sequence[str]) -> None:
    """Run the matrix, a process for each processor, and write its table when it was the whole."""
    done: list[Cell] = []
    leaks = 0
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        places = pool.submit(_places).result()
        wanted = [
            (place, column)
            for place, column in whole(places)
            if not only or any(text in f"{place}, {column}" for text in only)
        ]
        print(f"{len(wanted)} cells", flush=True)
        futures = [pool.submit(_try, place, column) for place, column in wanted]
        for (place, column), future in zip(wanted, futures, strict=True):
            came = future.result()
            if isinstance(came, str):
                leaks += 1
                print(f"{place}, {column}: LEAK, {came}", flush=True)
                continue
            done.append(came)
            print(f"{place}, {column}: {came.verdict} ({came.status})", came.said, flush=True)
    if leaks:
        raise SystemExit(f"{leaks} of {leaks + len(done)} cells leak; the page stays as it is")
    if not only:
        write(rows(places), done)
    print(f"{len(done)} cells, no leak" + ("" if only else f"; {PAGE} has the table"))


if __name__ == "__main__":
    main(sys.argv[1:])
