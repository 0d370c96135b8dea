"""Sizes, percentages and durations: what is written is read back, and garbage is only ever a ValueError."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ami_builder.core.errors import did_you_mean
from ami_builder.core.units import (
    AUTO_RESERVE,
    DURATION_PATTERN,
    GIB,
    MIB,
    PERCENT_PATTERN,
    SIZE_PATTERN,
    Reserve,
    format_duration,
    format_reserve,
    format_size,
    parse_duration,
    parse_reserve,
    parse_size,
)

WEEK = 7 * 24 * 3600

unhurried = settings(deadline=None)
anything = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.from_regex(r"\A-?[0-9]*\.?[0-9]* ?[KMGTkmgt]?i?[Bb%smh]?\n?\Z")
    | st.lists(st.text())
)


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("2GiB", 2**31),
        ("512MiB", 2**29),
        ("512 MiB", 2**29),
        ("1.5GiB", 3 * 2**29),
        ("24TiB", 24 * 2**40),
        ("4KiB", 4096),
        ("7B", 7),
        ("7", 7),
        (7, 7),
        ("0", 0),
        (0, 0),
    ],
)
def test_sizes(written: object, size: int) -> None:
    assert parse_size(written) == size


@pytest.mark.parametrize(
    ("written", "meant"),
    [("2GB", "2GiB"), ("2G", "2GiB"), ("2gib", "2GiB"), ("512mb", "512MiB"), ("8 t", "8TiB"), ("5k", "5KiB")],
)
def test_a_decimal_or_misspelt_unit_is_refused_with_the_binary_one(written: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"did you mean {meant}\?$"):
        parse_size(written)


@pytest.mark.parametrize(
    "written",
    [
        "",
        " ",
        "GiB",
        "-1",
        -1,
        "1.5",
        "0.3KiB",
        "2GiB\n",
        "２GiB",
        "2  GiB",
        True,
        2.0,
        None,
        [],
        2**60,
        "1048576TiB",
    ],
)
def test_what_is_no_size(written: object) -> None:
    with pytest.raises(ValueError, match=r"^expected a size such as 2GiB"):
        parse_size(written)


@unhurried
@given(st.integers(0, 2**60 - 1))
@example(0)
@example(2**60 - 2**50)
def test_a_size_survives_being_written(size: int) -> None:
    written = format_size(size)
    assert parse_size(written) == size
    assert re.fullmatch(SIZE_PATTERN, written)


@pytest.mark.parametrize(
    ("written", "reserve"),
    [
        ("0", Reserve()),
        (0, Reserve()),
        ("0%", Reserve()),
        ("5%", Reserve(percent=5)),
        ("2.25%", Reserve(percent=2.25)),
        ("99.99%", Reserve(percent=99.99)),
        ("256MiB", Reserve(bytes=2**28)),
        ("auto", AUTO_RESERVE),
        (1000, Reserve(bytes=1000)),
    ],
)
def test_reserves(written: object, reserve: Reserve) -> None:
    assert parse_reserve(written) == reserve


@pytest.mark.parametrize(
    "written", ["100%", "-1%", "5.125%", "5 %", "%", "5%%", "1e1%", "5%\n", "5GB", "Auto", None]
)
def test_what_is_no_reserve(written: object) -> None:
    with pytest.raises(ValueError, match=r"^expected a .*percentage"):
        parse_reserve(written)


@unhurried
@given(
    st.builds(Reserve, bytes=st.integers(0, 2**60 - 1))
    | st.builds(Reserve, percent=st.integers(0, 9999).map(lambda hundredths: hundredths / 100))
    | st.just(AUTO_RESERVE)
)
def test_a_reserve_survives_being_written(reserve: Reserve) -> None:
    written = format_reserve(reserve)
    assert parse_reserve(written) == reserve
    assert re.fullmatch(f"{SIZE_PATTERN}|{PERCENT_PATTERN}|auto", written)


@pytest.mark.parametrize(
    ("reserve", "available", "expected"),
    [
        (Reserve(bytes=7), 1000, 7),
        (Reserve(percent=2), 1001, 21),
        (AUTO_RESERVE, 750 * MIB, 15 * MIB),
        (AUTO_RESERVE, 1800 * MIB, 36 * MIB),
        (AUTO_RESERVE, 2000 * MIB, 34 * MIB),
        (AUTO_RESERVE, 3600 * MIB, 10 * MIB),
        (AUTO_RESERVE, 4400 * MIB, 0),
        (AUTO_RESERVE, 64 * GIB, 0),
    ],
)
def test_what_a_reserve_leaves_of_what_is_available(reserve: Reserve, available: int, expected: int) -> None:
    assert reserve.of(available) == expected


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("10min", 600),
        ("300s", 300),
        ("1h", 3600),
        ("1.5 h", 5400),
        ("90", 90),
        (90, 90),
        (0.5, 0.5),
        ("0.5s", 0.5),
    ],
)
def test_durations(written: object, seconds: float) -> None:
    assert parse_duration(written) == seconds


@pytest.mark.parametrize(("written", "meant"), [("10m", "10min"), ("10mins", "10min"), ("5sec", "5s")])
def test_a_misspelt_unit_of_time_is_refused_with_the_right_one(written: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"did you mean {meant}\?$"):
        parse_duration(written)


@pytest.mark.parametrize(
    "written",
    [
        "",
        "s",
        "-1s",
        0,
        "0s",
        -1,
        True,
        float("nan"),
        float("inf"),
        -float("inf"),
        10**400,
        WEEK + 1,
        "169h",
        "10min\n",
        None,
    ],
)
def test_what_is_no_duration(written: object) -> None:
    with pytest.raises(ValueError, match=r"^expected a duration such as 10min"):
        parse_duration(written)


@unhurried
@given(st.integers(1, WEEK) | st.floats(0, WEEK, exclude_min=True).map(lambda s: round(s, 6)).filter(bool))
def test_a_duration_survives_being_written(seconds: float) -> None:
    written = format_duration(seconds)
    assert parse_duration(written) == seconds
    assert re.fullmatch(DURATION_PATTERN, written)


@unhurried
@given(anything)
@pytest.mark.parametrize("parse", [parse_size, parse_reserve, parse_duration])
def test_garbage_is_a_value_error(parse: Callable[[object], object], written: object) -> None:
    with suppress(ValueError):
        assert parse(written) is not None


def test_the_nearest_word() -> None:
    assert did_you_mean("Memmory", ["memory", "dask"]) == "; did you mean memory?"
    assert did_you_mean("spill-percent", ["spill_percent", "workers"]) == "; did you mean spill_percent?"
    assert did_you_mean("zebra", ["memory", "dask"]) == ""
    assert did_you_mean("anything", []) == ""
