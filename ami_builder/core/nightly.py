"""What one night did with one image, and what became of it in each place: pure, for reports and messages."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from ami_builder.core.records import StepRecord, TargetKind


class Ending(StrEnum):
    """How a night ended, in all or in one place."""

    UNCHANGED = "unchanged"
    """What stands in the channel was made of the same inputs: nothing was built."""
    PROMOTED = "promoted"
    HELD = "held"
    """Verified, but it drifted from the image in the channel: a person decides."""
    INCONCLUSIVE = "inconclusive"
    """The host was too busy to judge the image: the channel stays, and the next run verifies it again."""
    FAILED = "failed"
    PARTLY = "partly"
    """Promoted in some places, failed in others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceEnding:
    """What became of the image in one place."""

    place: str
    """`this machine`, or the region."""
    id: str
    """The image's id there: a digest, or an AMI's id; empty when it never got there."""
    ending: Ending
    text: str
    """What happened, or why not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Night:
    """One night of one image on one target."""

    id: str
    image: str
    target: TargetKind
    channel: str
    started: datetime
    ended: datetime | None
    """None while it is going, or when it was killed."""
    ending: Ending
    digest: str
    """Of everything that went in; empty when the inputs could not be resolved."""
    before: str
    """The id of what stood in the channel; empty when nothing did."""
    location: str
    """The new image: a path, or an AMI's id; empty when there is none."""
    places: tuple[PlaceEnding, ...] = ()
    drifts: tuple[str, ...] = ()
    """What held the promotion, one line each."""
    moved: tuple[str, ...] = ()
    """The packages whose versions changed, one line each."""
    not_compared: tuple[str, ...] = ()
    """What the gate could not look at, one line each."""
    retired: tuple[str, ...] = ()
    """What was deprecated or deleted, one line each."""
    error: str = ""
    exit_code: int = 0
    steps: tuple[StepRecord, ...] = ()
