"""What progress and results share: when to draw, marks and colours, and the format of numbers."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from enum import StrEnum
from typing import IO, TYPE_CHECKING, Literal

from ami_builder.core.diff import Quantity, multiple

if TYPE_CHECKING:
    from rich.console import Console

MARKS = {
    "running": "…",
    "passed": "✓",
    "failed": "✗",
    "inconclusive": "?",
    "interrupted": "■",
    "skipped": "–",
    "none": "·",
}
ASCII_MARKS = dict(zip(MARKS, ("..", "ok", "XX", "??", "--", "-", "."), strict=True))
STYLES = dict(zip(MARKS, ("cyan", "green", "bold red", "yellow", "yellow", "dim", "dim"), strict=True))

# The log of a serial console has escape sequences, which would move the terminal's cursor.
_SEQUENCE = r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)"
_UNPRINTABLE = re.compile(_SEQUENCE + r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# A line of a log that begins so would be one, for a runner of GitHub Actions.
_COMMAND = re.compile(r"^(\s*)::")


class Mode(StrEnum):
    """How progress is shown."""

    LIVE = "live"
    PLAIN = "plain"
    GITHUB = "github"
    QUIET = "quiet"


def choose_mode(
    *, quiet: bool = False, environ: Mapping[str, str] = os.environ, stream: IO[str] | None = None
) -> Mode:
    """Return how to show progress on `stream` (stderr): live on a terminal that can move its cursor."""
    if quiet:
        return Mode.QUIET
    if environ.get("GITHUB_ACTIONS") == "true":
        return Mode.GITHUB
    able = environ.get("TERM", "") not in ("", "dumb", "unknown")
    return Mode.LIVE if able and (stream or sys.stderr).isatty() else Mode.PLAIN


def clean(text: str) -> str:
    """Return `text` as one line without control sequences."""
    return " ".join(_UNPRINTABLE.sub("", text).split())


def clean_lines(text: str) -> str:
    """Return lines without control sequences, and none that is a command for GitHub Actions."""
    return "\n".join(_COMMAND.sub(r"\1: :", _UNPRINTABLE.sub("", line)) for line in text.split("\n"))


def write_line(stream: IO[str], text: str) -> None:
    """Write progress or an error; if nobody can read it, work goes on, and the exit code is what is left."""
    try:
        stream.write(f"{text}\n")
        stream.flush()
    except OSError:
        silence(stream)


def silence(stream: IO[str]) -> None:
    """Send the rest to /dev/null: Python flushes once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def rich_console(out: IO[str]) -> Console:
    """Return a console that does not interpret markup; it honours NO_COLOR and detects the width."""
    from rich.console import Console

    return Console(file=out, highlight=False, markup=False, emoji=False)


def marks(console: Console) -> Mapping[str, str]:
    """Return the marks that the terminal's encoding can show."""
    return MARKS if console.encoding.startswith("utf") else ASCII_MARKS


def overflow(console: Console) -> Literal["ellipsis", "crop"]:
    """Return how a long text is cut off: rich's ellipsis is not ASCII."""
    return "ellipsis" if console.encoding.startswith("utf") else "crop"


def duration(seconds: float) -> str:
    """Return a duration for people: `3.1 s`, `42 s`, `2:19 min`, `1:02:19 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02} min"
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02} h"


def amount(quantity: Quantity, value: float) -> str:
    """Return a measured value with its unit."""
    match quantity:
        case Quantity.SIZE | Quantity.AVAILABLE:
            return size(int(value))
        case Quantity.BOOT:
            return multiple(value)
        case Quantity.SSH | Quantity.DASK | Quantity.TIME:
            return duration(value)


def size(number: int) -> str:
    """Return a short size: `512 MiB`, `1.5 GiB`."""
    amount = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.4g} {unit}"
        amount /= 1024
    return f"{amount:.4g} TiB"
