"""Sizes, percentages and durations, as text and as numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40

# Only binary units: GB means 10^9 bytes to Dask and 2^30 to Docker.
_SIZES: Mapping[str, int] = {"TiB": TIB, "GiB": GIB, "MiB": MIB, "KiB": KIB, "B": 1}
_DURATIONS: Mapping[str, int] = {"h": 3600, "min": 60, "s": 1}
_SIZE_LIMIT = 2**60
_DURATION_LIMIT = 7 * 24 * 3600.0

SIZE_PATTERN = r"^[0-9]{1,20}((\.[0-9]{1,9})? ?(TiB|GiB|MiB|KiB|B))?$"
PERCENT_PATTERN = r"^[0-9]{1,2}(\.[0-9]{1,2})?%$"
DURATION_PATTERN = r"^[0-9]{1,9}(\.[0-9]{1,17})? ?(h|min|s)?$"

_NUMBER_AND_WORD = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,17})?) ?([A-Za-z%]*)")

_SIZE = "a size such as 2GiB or 512MiB, or a whole number of bytes"
_RESERVE = "a size such as 256MiB, a percentage of what is available such as 5%, or auto"
_DURATION = "a duration such as 10min, 300s or 1h, or a number of seconds"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve:
    """Memory that is left to the system: an amount in bytes, or a percentage of what is available."""

    bytes: int = 0
    percent: float = 0.0
    capped: bool = False
    """Whether it is at most 64 MiB minus 1.5 % of what is available, but not less than 0."""

    def of(self, available: int) -> int:
        """Return the reserve when so much is available, as measure-memory computes it; bytes."""
        reserve = self.bytes - -available * round(self.percent * 1000) // 100_000
        return min(reserve, max(0, 64 * MIB - available * 3 // 200)) if self.capped else reserve


AUTO_RESERVE = Reserve(percent=2.0, capped=True)
"""`auto`: fitted to runs on 1 to 8 GiB; see docs/explanation/memory.md."""


def parse_size(value: object) -> int:
    """Return bytes from `2GiB`, `512MiB` or a whole number; raises ValueError with what is expected."""
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and re.fullmatch(SIZE_PATTERN, value) and "\n" not in value:
        number, unit = _split(value)
        exact = Fraction(number) * _SIZES[unit or "B"]
        if exact.denominator != 1:
            raise ValueError(f"expected {_SIZE}; this is not a whole number of bytes")
        size = exact.numerator
    else:
        raise ValueError(f"expected {_SIZE}{_meant_size(value)}")
    if not 0 <= size < _SIZE_LIMIT:
        raise ValueError(f"expected {_SIZE}, from 0 to less than {_SIZE_LIMIT // TIB}TiB")
    return size


def format_size(size: int) -> str:
    """Return bytes as `2GiB`, in the largest unit that keeps the number whole."""
    unit = next(unit for unit, one in _SIZES.items() if size % one == 0)
    return f"{size // _SIZES[unit]}{unit}" if size else "0"


def parse_reserve(value: object) -> Reserve:
    """Return a reserve from `5%`, `256MiB`, bytes or `auto`; raises ValueError with what is expected."""
    if value == "auto":
        return AUTO_RESERVE
    if isinstance(value, str) and value.endswith("%"):
        if not re.fullmatch(PERCENT_PATTERN, value):
            raise ValueError("expected a percentage from 0% to less than 100%, with at most two decimals")
        return Reserve(percent=float(value[:-1]))
    try:
        return Reserve(bytes=parse_size(value))
    except ValueError as wrong:
        suggestion = str(wrong).partition(";")[2]
        raise ValueError(f"expected {_RESERVE}" + (f";{suggestion}" if suggestion else "")) from wrong


def format_reserve(reserve: Reserve) -> str:
    """Return a reserve as `5%`, `256MiB` or `auto`."""
    if reserve == AUTO_RESERVE:
        return "auto"
    if reserve.percent:
        return f"{reserve.percent:.2f}".rstrip("0").rstrip(".") + "%"
    return format_size(reserve.bytes)


def parse_duration(value: object) -> float:
    """Return seconds from `10min`, `300s`, `1h` or a number; raises ValueError with what is expected."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value) if abs(value) <= _DURATION_LIMIT else math.inf
    elif isinstance(value, str) and re.fullmatch(DURATION_PATTERN, value) and "\n" not in value:
        number, unit = _split(value)
        seconds = float(Fraction(number) * _DURATIONS[unit or "s"])
    else:
        word = _split(value)[1] if isinstance(value, str) else ""
        meant = {"m": "min", "mins": "min", "minutes": "min", "sec": "s", "secs": "s", "hours": "h"}.get(word)
        raise ValueError(
            f"expected {_DURATION}" + (f"; did you mean {_split(value)[0]}{meant}?" if meant else "")
        )
    if not 0 < seconds <= _DURATION_LIMIT:
        raise ValueError(f"expected {_DURATION}, more than 0 and at most a week")
    return seconds


def format_duration(seconds: float) -> str:
    """Return seconds as `10min` or `90s`, in the largest unit that keeps the number whole."""
    if seconds != int(seconds):
        return f"{seconds:.17f}".rstrip("0") + "s"
    unit = next(unit for unit, one in _DURATIONS.items() if seconds % one == 0)
    return f"{int(seconds) // _DURATIONS[unit]}{unit}"


def _split(value: object) -> tuple[str, str]:
    found = _NUMBER_AND_WORD.fullmatch(str(value))
    return (found[1], found[2]) if found else ("", "")


def _meant_size(value: object) -> str:
    number, unit = _split(value) if isinstance(value, str) else ("", "")
    known = {short: u for u in _SIZES for short in (u.lower(), u[0].lower(), f"{u[0].lower()}b")}
    return f"; did you mean {number}{known[unit.lower()]}?" if unit.lower() in known else ""
