"""Print results to stdout, errors and verdicts to stderr; with tables on a terminal, plain elsewhere."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from typing import IO, TYPE_CHECKING, Any

from ami_builder.console.progress import NOTE
from ami_builder.console.style import (
    STYLES,
    Mode,
    choose_mode,
    clean,
    clean_lines,
    marks,
    overflow,
    rich_console,
    silence,
    write_line,
)
from ami_builder.core.errors import AmiBuilderError, Inconclusive, Interrupted, UsageError
from ami_builder.core.records import Outcome, Verdict

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA_VERSION = 1
_LABEL_STYLES = {"|": "red", "next": "bold cyan"}
_HEADINGS = {Interrupted: ("interrupted", "bold yellow"), Inconclusive: ("inconclusive", "bold yellow")}
_SUMMARY_STYLES = {
    Outcome.PASSED: "bold green",
    Outcome.FAILED: "bold red",
    Outcome.INCONCLUSIVE: "bold yellow",
}


def result(lines: str | Iterable[str]) -> None:
    """Print results for a person or a pipe, one a line."""
    _out("\n".join([lines] if isinstance(lines, str) else lines))


def result_json(value: Mapping[str, Any]) -> None:
    """Print the one JSON object of a `--json` command, with its `schema_version`."""
    _out(json.dumps({"schema_version": SCHEMA_VERSION, **value}, default=_plain_value, ensure_ascii=False))


def is_terminal() -> bool:
    """Return whether results go to a person and not to a program."""
    return sys.stdout.isatty()


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows as a table on a terminal, and tab-separated without a heading for other programs.

    A cell may have several lines on a terminal.
    """
    if not is_terminal():
        if lines := ["\t".join(clean(str(cell)) for cell in row) for row in rows]:
            _out("\n".join(lines))
        return
    texts = [["\n".join(map(clean, str(cell).split("\n"))) for cell in row] for row in rows]
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False)
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in texts:
        drawn.add_row(*(Text(cell) for cell in row))
    rich_console(sys.stdout).print(drawn)


def note(text: str) -> None:
    """Print one line for people to stderr."""
    _err(clean(text))


def error(exc: AmiBuilderError | Interrupted) -> None:
    """Print an error: what failed, the step, the last lines and the path of its log, and what to do next."""
    if os.environ.get("GITHUB_ACTIONS") == "true":
        text = clean(exc.message).replace("%", "%25")
        level = "warning" if isinstance(exc, Inconclusive) else "error"
        _err(f"::{level} title=ami-builder::{text}")
    if not _drawable(sys.stderr):
        heading = "inconclusive" if isinstance(exc, Inconclusive) else "error"
        _err(clean_lines(f"{heading}: {exc.message}"))
        for label, text in _details(exc):
            _err(clean_lines(f"{label:>7} {text}"))
        return
    from rich.table import Table
    from rich.text import Text

    console = rich_console(sys.stderr)
    style = _HEADINGS.get(type(exc), ("error", "bold red"))
    console.print(Text.assemble("\n", style, ": ", clean_lines(exc.message)))
    for label, text in _details(exc):
        line = clean_lines(text)
        if label == "log":
            # A path is never wrapped, so that it can be copied.
            console.print(Text.assemble((f"{label:>7} ", "dim"), line), soft_wrap=True)
            continue
        row = Table.grid(padding=(0, 1, 0, 0))
        row.add_column(width=7, justify="right", style=_LABEL_STYLES.get(label, "dim"))
        row.add_column(overflow="fold")
        row.add_row(label, Text(line, "dim" if label == "|" else ""))
        console.print(row)


def _details(exc: AmiBuilderError | Interrupted) -> Iterator[tuple[str, str]]:
    for note in getattr(exc, "__notes__", ()):
        yield ("step", note.removeprefix(NOTE)) if note.startswith(NOTE) else ("note", note)
    for line in exc.tail:
        yield ("|", clean(line))
    if exc.log is not None:
        yield ("log", str(exc.log))
    if exc.hint:
        yield ("next", exc.hint)


def verdict(verdict: Verdict) -> None:
    """Print the results of all checks, the messages of those that did not pass, and the equal numbers."""
    starts = list(dict.fromkeys(r.phase for r in verdict.results))
    machines = list(dict.fromkeys(r.machine for r in verdict.results))
    wrong = [r for r in verdict.results if r.outcome is Outcome.FAILED]
    unsure = [r for r in verdict.results if r.outcome is Outcome.INCONCLUSIVE]
    counts = ", ".join(
        f"{n} {outcome}" for outcome in Outcome if (n := sum(r.outcome is outcome for r in verdict.results))
    )
    summary = f"checks: {counts or 'none ran'}"
    if verdict.results:
        summary += f" ({', '.join(machines)}; {', '.join(starts)})"
    if not _drawable(sys.stderr):
        for r in wrong:
            _err(f"FAILED {r.name} ({r.machine}, {r.phase}): {_first(r.message)}")
        for r in unsure:
            _err(f"inconclusive {r.name} ({r.machine}, {r.phase}): {_first(r.message)}")
        _err(summary)
        for label, number, share in _measured(verdict):
            _err(f"{label}: AVAILABLE_MEMORY_FOR_DASK={number} ({share})")
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = rich_console(sys.stderr)
    signs = marks(console)
    found = {(r.name, r.machine, r.phase): r.outcome for r in verdict.results}
    drawn = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False)
    drawn.add_column("check", no_wrap=True, overflow=overflow(console))
    for machine in machines:
        drawn.add_column(machine, justify="center", no_wrap=True)
    for name in dict.fromkeys(r.name for r in verdict.results):
        cells = []
        for machine in machines:
            outcomes = [str(found.get((name, machine, start), "none")) for start in starts]
            cells.append(Text(" ").join(Text(signs[o], STYLES[o]) for o in outcomes))
        drawn.add_row(Text(name), *cells)
    console.print()
    console.print(drawn)
    console.print(Text(f"each column: {', '.join(starts)}", "dim"))
    for r in [*wrong, *unsure]:
        heading = (f"{signs[r.outcome]} {r.name}", STYLES[r.outcome])
        console.print(Text.assemble(heading, f"  {r.machine}, {r.phase}"))
        console.print(Text(f"  {_first(r.message)}"))
    console.print()
    console.print(Text(summary, _SUMMARY_STYLES[verdict.outcome]))
    if verdict.measured:
        _numbers(console, verdict)


def _numbers(console: Console, verdict: Verdict) -> None:
    """Draw the memory for Dask after each start, and the four values that are equal to it."""
    from rich.table import Table
    from rich.text import Text

    chain = "AVAILABLE_MEMORY_FOR_DASK"
    if verdict.passed:
        chain += " = HostConfig.Memory = memory.max = memory_limit"
    console.print(Text(chain, "bold"))
    drawn = Table.grid(padding=(0, 2))
    drawn.add_column()
    drawn.add_column(justify="right", style="bold")
    drawn.add_column(style="dim")
    for label, number, share in _measured(verdict):
        drawn.add_row(f"  {label}", f"{number:,}", share)
    console.print(drawn)


def _measured(verdict: Verdict) -> Iterator[tuple[str, int, str]]:
    for one in verdict.measured:
        share = f"{one.available / one.total:.1%} of the machine"
        yield f"{one.machine} {one.phase}", one.available, share


def _out(text: str) -> None:
    """Write to stdout; a reader that has ended, such as `head`, is not an error."""
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        silence(sys.stdout)
    except OSError as failed:
        silence(sys.stdout)
        raise UsageError(f"can't write to standard output: {failed.strerror}") from failed


def _err(text: str) -> None:
    write_line(sys.stderr, text)


def _first(message: str) -> str:
    return clean(message.strip().partition("\n")[0])


def _drawable(stream: IO[str]) -> bool:
    return choose_mode(stream=stream) is Mode.LIVE


def _plain_value(value: object) -> object:
    """Return a value that JSON can hold for a dataclass, a path, a time or a set."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: getattr(value, name) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, date):
        return value.isoformat()
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
