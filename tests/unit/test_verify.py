"""Verdicts: what is raised when one did not pass, and which one is kept with an image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ami_builder.core.errors import ChecksFailed, Inconclusive
from ami_builder.core.records import CheckResult, Outcome, Verdict
from ami_builder.state.workspace import Workspace
from ami_builder.verify.verdict import is_verified, replaces, require_passed
from tests.sample_image import image
from tests.stored_images import stored

EVIDENCE = Path("/runs/1/machines")
AGAIN = "ami-builder verify dask"


def verdict(*outcomes: Outcome, checks_digest: str = "c") -> Verdict:
    results = tuple(
        CheckResult(
            name=f"memory pressure: check {number}",
            phase="pressure",
            machine="2 GiB",
            outcome=outcome,
            seconds=0,
            message=f"reason {number}",
        )
        for number, outcome in enumerate(outcomes)
    )
    return Verdict(digest="a" * 64, checks_digest=checks_digest, results=results, measured=())


PASSED = verdict(Outcome.PASSED)
FAILED = verdict(Outcome.FAILED)
BUSY = verdict(Outcome.PASSED, Outcome.INCONCLUSIVE)


def test_a_busy_host_is_named_with_each_check_and_what_to_do() -> None:
    require_passed(PASSED, EVIDENCE, AGAIN)
    with pytest.raises(Inconclusive) as caught:
        require_passed(BUSY, EVIDENCE, AGAIN)
    busy = caught.value
    assert busy.exit_code == 10
    assert "too busy to judge this image: 1 of 2 checks is inconclusive" in busy.message
    assert busy.tail == ("memory pressure: check 1 (pressure, 2 GiB): reason 1",)
    assert (busy.log, f"`{AGAIN}`" in str(busy.hint)) == (EVIDENCE, True)
    with pytest.raises(Inconclusive, match="2 of 2 checks are inconclusive"):
        require_passed(verdict(Outcome.INCONCLUSIVE, Outcome.INCONCLUSIVE), EVIDENCE, AGAIN)


@pytest.mark.parametrize("outcomes", [(), (Outcome.SKIPPED,), (Outcome.INCONCLUSIVE, Outcome.FAILED)])
def test_what_failed_fails_whatever_else_is_inconclusive(outcomes: tuple[Outcome, ...]) -> None:
    with pytest.raises(ChecksFailed) as caught:
        require_passed(verdict(*outcomes), EVIDENCE, AGAIN)
    assert len(caught.value.tail) == outcomes.count(Outcome.FAILED)


@pytest.mark.parametrize(
    ("known", "new", "kept"),
    [
        (None, BUSY, True),
        (BUSY, BUSY, True),
        (BUSY, PASSED, True),
        (PASSED, FAILED, True),
        (FAILED, PASSED, True),
        (PASSED, BUSY, False),
        (FAILED, BUSY, False),
        # Of other checks, or of another image, the one before says nothing.
        (replace(PASSED, checks_digest="before"), BUSY, True),
        (replace(PASSED, digest="b" * 64), BUSY, True),
    ],
)
def test_what_says_nothing_does_not_replace_what_is_known(
    known: Verdict | None, new: Verdict, kept: bool
) -> None:
    assert replaces(new, known) is kept


def test_an_inconclusive_image_is_not_a_verified_one(workspace: Workspace) -> None:
    one = stored(workspace, "a", outcome=Outcome.INCONCLUSIVE)
    assert not is_verified(one, image())
