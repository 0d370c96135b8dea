"""A night in words: the first line tells it all, and nothing in it is taken for markup."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ami_builder.core.records import (
    NightlyRun,
    NightlyStatus,
    RegionResult,
    RunStatus,
    StepRecord,
    TargetKind,
)
from ami_builder.nightly import summary

BEGAN = datetime(2026, 11, 24, 3, 31, 7, tzinfo=UTC)
DIGEST = "3f9a2c1d" * 8
OTHER = "60057ffa" * 8
LOCAL = NightlyRun(
    id="20261124-033107-3f9a2c",
    image="dask",
    target=TargetKind.QEMU,
    channel="testing",
    started=BEGAN,
    ended=BEGAN + timedelta(minutes=9, seconds=20),
    ending=NightlyStatus.PROMOTED,
    digest=DIGEST,
    before=OTHER,
    location=f"/var/lib/ami-builder/state/images/dask/{DIGEST[:16]}/image.qcow2",
    places=(
        RegionResult(
            place="this host", id=DIGEST, ending=NightlyStatus.PROMOTED, text="now current in testing"
        ),
    ),
    moved=("docker.io 26.1.5+dfsg1-9+b9 -> 26.1.5+dfsg1-9+b10",),
    retired=(f"deleted {OTHER}: older than 14 days",),
    steps=(StepRecord(name="build dask", seconds=560.0, status=RunStatus.PASSED, detail="285.5 MiB"),),
)
HELD = replace(
    LOCAL,
    ending=NightlyStatus.HELD,
    places=(),
    retired=(),
    exit_code=9,
    drifts=("available memory at boot (2 GiB): 4.1% less",),
)
FAILED = replace(
    LOCAL,
    ending=NightlyStatus.FAILED,
    places=(),
    moved=(),
    retired=(),
    error="provisioner 20 failed",
    exit_code=4,
)
BUSY = replace(
    FAILED,
    ending=NightlyStatus.INCONCLUSIVE,
    error="the host was too busy to judge this image: 1 of 168 checks is inconclusive",
    exit_code=10,
)
PARTLY = replace(
    LOCAL,
    target=TargetKind.AWS,
    location="ami-1",
    before="ami-0",
    ending=NightlyStatus.PARTLY,
    error="eu-west-1: quota",
    exit_code=6,
    places=(
        RegionResult(
            place="us-east-1", id="ami-1", ending=NightlyStatus.PROMOTED, text="now current in testing"
        ),
        RegionResult(place="eu-west-1", id="", ending=NightlyStatus.FAILED, text="quota"),
    ),
)
PARTLY_HELD = replace(
    PARTLY,
    error="",
    exit_code=9,
    places=(
        *PARTLY.places[:1],
        RegionResult(place="eu-west-1", id="ami-2", ending=NightlyStatus.HELD, text="rolled back"),
    ),
)
UNSHARED = replace(
    PARTLY,
    ending=NightlyStatus.UNSHARED,
    error="eu-west-1: denied",
    places=(
        RegionResult(place="us-east-1", id="ami-1", ending=NightlyStatus.UNCHANGED, text="already current"),
        RegionResult(place="eu-west-1", id="ami-2", ending=NightlyStatus.UNSHARED, text="denied"),
    ),
)
UNCHANGED = replace(LOCAL, ending=NightlyStatus.UNCHANGED, moved=(), retired=(), steps=())


@pytest.mark.parametrize(
    ("night", "line"),
    [
        (LOCAL, "dask (qemu): promoted to testing: 3f9a2c1d3f9a2c1d, previously 60057ffa60057ffa"),
        (
            replace(LOCAL, before=""),
            "dask (qemu): promoted to testing: 3f9a2c1d3f9a2c1d, its first image",
        ),
        (UNCHANGED, "dask (qemu): unchanged, nothing was built for testing"),
        (
            HELD,
            "dask (qemu): ON HOLD, a person decides whether to promote 3f9a2c1d3f9a2c1d; "
            "testing stays at 60057ffa60057ffa",
        ),
        (
            replace(HELD, before=""),
            "dask (qemu): ON HOLD, a person decides whether to promote 3f9a2c1d3f9a2c1d; "
            "testing has no image",
        ),
        (FAILED, "dask (qemu): FAILED, provisioner 20 failed; testing stays at 60057ffa60057ffa"),
        (replace(FAILED, before="", error=""), "dask (qemu): FAILED, for an unknown reason"),
        (
            BUSY,
            "dask (qemu): INCONCLUSIVE, the host was too busy to judge this image: 1 of 168 checks is "
            "inconclusive; testing stays at 60057ffa60057ffa",
        ),
        (
            replace(BUSY, before=""),
            "dask (qemu): INCONCLUSIVE, the host was too busy to judge this image: 1 of 168 checks is "
            "inconclusive; testing has no image",
        ),
        (PARTLY, "dask (aws): PARTLY promoted to testing, in 1 of 2 regions; FAILED in eu-west-1"),
        (PARTLY_HELD, "dask (aws): PARTLY promoted to testing, in 1 of 2 regions; ON HOLD in eu-west-1"),
        (
            replace(PARTLY, places=(*PARTLY.places, *PARTLY_HELD.places[1:])),
            "dask (aws): PARTLY promoted to testing, in 1 of 3 regions; FAILED in eu-west-1; "
            "ON HOLD in eu-west-1",
        ),
        (UNSHARED, "dask (aws): unchanged, nothing was built for testing; sharing FAILED in eu-west-1"),
    ],
)
def test_the_first_line_tells_it_all(night: NightlyRun, line: str) -> None:
    assert summary.headline(night) == line
    assert summary.text(night).split("\n")[0] == f"*{line}*"
    assert summary.markdown(night).split("\n")[0] == f"# {line}"


def test_the_message_of_a_held_night_says_why_and_what_to_do() -> None:
    assert summary.text(HELD).split("\n")[1:] == [
        "On hold because of:",
        "• available memory at boot (2 GiB): 4.1% less",
        "Changed packages:",
        "• docker.io 26.1.5+dfsg1-9+b9 -&gt; 26.1.5+dfsg1-9+b10",
        "`ami-builder diff 60057ffa60057ffa 3f9a2c1d3f9a2c1d` shows what changed; "
        '`ami-builder promote 3f9a2c1d3f9a2c1d testing --reason "…"` promotes it anyway.',
        "nightly run 20261124-033107-3f9a2c, 9:20 min, exit code 9",
    ]


def test_the_message_of_an_inconclusive_run_says_what_comes_next_and_nothing_of_a_defect() -> None:
    assert summary.text(BUSY).split("\n")[1:] == [
        "The image is kept, and the next nightly run verifies it again.",
        "nightly run 20261124-033107-3f9a2c, 9:20 min, exit code 10",
    ]
    assert "fail" not in f"{summary.text(BUSY)}{summary.markdown(BUSY)}".lower().replace(
        "build dask | failed", ""
    )


def test_a_held_ami_is_named_by_its_id() -> None:
    night = replace(PARTLY, ending=NightlyStatus.HELD, places=(), exit_code=9)
    assert "`ami-builder promote ami-1 testing" in summary.text(night)
    assert "`ami-builder diff ami-0 ami-1`" in summary.text(night)


def test_the_message_names_the_places_that_failed_alone() -> None:
    said = summary.text(PARTLY)
    assert "• eu-west-1: failed, quota" in said
    assert "• us-east-1" not in said


def test_a_failed_sharing_is_not_called_a_failed_promotion() -> None:
    said = summary.text(UNSHARED)
    assert "Not shared:\n• eu-west-1: denied" in said
    assert "promoted" not in said.lower()


def test_a_long_list_is_cut_off() -> None:
    night = replace(LOCAL, moved=tuple(f"package-{number}" for number in range(500)))
    assert "• and 490 more" in summary.text(night)
    assert len(summary.text(replace(night, drifts=("x" * 100_000,) * 50))) < 10_000


def test_the_page() -> None:
    assert (
        summary.markdown(LOCAL)
        == f"""\
# dask (qemu): promoted to testing: 3f9a2c1d3f9a2c1d, previously 60057ffa60057ffa

|  |  |
| --- | --- |
| nightly run | 20261124-033107-3f9a2c |
| started | 2026-11-24 03:31:07 UTC |
| took | 9:20 min |
| image | {LOCAL.location} |
| digest | {DIGEST} |
| previous image of testing | {OTHER} |
| exit code | 0 |

## Regions

| where | result | image | reason |
| --- | --- | --- | --- |
| this host | promoted | 3f9a2c1d3f9a2c1d | now current in testing |

## Changed packages

- docker.io 26.1.5+dfsg1-9+b9 -&gt; 26.1.5+dfsg1-9+b10

## Deprecated or deleted

- deleted {OTHER}: older than 14 days

## Steps

| step | result | took |  |
| --- | --- | --- | --- |
| build dask | passed | 9:20 min | 285.5 MiB |
"""
    )


def test_a_night_that_never_ended_and_a_clock_that_went_back() -> None:
    assert "| took | not finished |" in summary.markdown(replace(LOCAL, ended=None))
    assert "| took | 0.0 s |" in summary.markdown(replace(LOCAL, ended=BEGAN - timedelta(hours=1)))


WORDS = st.text(max_size=80)
NIGHTS = st.builds(
    replace,
    st.sampled_from([LOCAL, HELD, FAILED, BUSY, PARTLY, UNCHANGED]),
    error=WORDS,
    drifts=st.tuples(WORDS),
    moved=st.tuples(WORDS, WORDS),
    steps=st.tuples(
        st.builds(
            StepRecord, name=WORDS, seconds=st.just(1.0), status=st.just(RunStatus.FAILED), detail=WORDS
        )
    ),
)


@given(NIGHTS)
def test_whatever_went_wrong_stays_text(night: NightlyRun) -> None:
    """No mention (<!channel>), no tag, no row that a line's end or a bar breaks."""
    page, said = summary.markdown(night), summary.text(night)
    assert "<" not in page
    assert "<" not in said
    rows = [line for line in page.split("## Steps")[1].splitlines() if line] if night.steps else []
    assert all(line.count("|") == 5 for line in rows)
    assert len(summary.headline(night).splitlines()) == 1
