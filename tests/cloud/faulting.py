"""A fault at one call of a build, and what comes of it: nothing may be left in the account.

A build here bakes and verifies. Packer's calls count like ours; retries are left to do what they do.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import TYPE_CHECKING

from ami_builder.aws.tags import FINISHED
from tests.cloud.flow import READ_SECONDS, Ran, captured
from tests.fake_ec2.faults import Fault

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.fake_ec2.api_call import ApiCall
    from tests.fake_ec2.server import Cloud

BUILD = ("--set", "bake.timeout=100s", "build", "--target", "aws")
LASTING = "lasting"
"""Not one fault, but HTTP 500 to this call and to all of its action after it, until the command has ended."""
FAULTS = (*(fault.value for fault in Fault), LASTING)
BOUND = 400.0
"""Seconds after which a command under a fault is not waited for: it takes some ten, the waiting cut down."""

_SLOW_SECONDS = READ_SECONDS + 0.3
_ERRORS = (4, 6, 7)
"""The build failed, the cloud API failed, timed out."""
_PACKER = "Packer"
_good_seconds: list[float] = []


class Verdict(StrEnum):
    """What a fault came to."""

    OK = "ok"
    """The command succeeded, and left the AMI alone."""
    ERROR = "error"
    """A clear error, and nothing was left."""
    GC = "gc"
    """A clear error, and what was left went with `gc --apply`."""
    KEPT = "kept"
    """A clear error, and the finished AMI was left, alone: the next build takes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One call of the flow: the nth of its action by Packer, or by us."""

    step: str
    action: str
    nth: int

    @property
    def packer(self) -> bool:
        """Whether Packer makes it."""
        return self.step == _PACKER

    def __str__(self) -> str:
        return f"{self.step}: {self.action} {self.nth}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What one fault, or one signal, at one call came to."""

    place: Place
    column: str
    verdict: Verdict
    status: int
    said: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Calls of one kind that follow each other."""

    places: tuple[Place, ...]

    @property
    def name(self) -> str:
        """Step and action, as the table shows them."""
        return f"{self.places[0].step} | `{self.places[0].action}`"


class Leak(AssertionError):
    """Something that must not happen under a fault."""


class Missed(Leak):
    """A build ended before the call that was to fail: on a busy machine Packer may run out of time."""


def places(calls: Sequence[ApiCall]) -> list[Place]:
    """Return all calls of a good run in order, each with the step that makes it."""
    counted: Counter[tuple[str, bool]] = Counter()
    found: list[Place] = []
    groups = 0
    step = "look"
    for call in calls:
        counted[call.action, call.packer] += 1
        if call.action == "DescribeVpcs" and not call.packer:
            step = "verify" if groups else "bake"
        nth = counted[call.action, call.packer]
        found.append(Place(step=_PACKER if call.packer else step, action=call.action, nth=nth))
        if call.action == "DeleteSecurityGroup":
            groups += 1
            step = "finish" if groups == 1 else "judge"
    return found


def rows(places: Sequence[Place]) -> list[Row]:
    """Return the calls of the flow in order, those of one kind that follow each other as one.

    Packer and we call at the same time: which of the two comes first says nothing, and parts no row.
    """
    found: list[Row] = []
    for packer in (False, True):
        own = [place for place in places if place.packer is packer]
        kinds = groupby(own, key=lambda place: (place.step, place.action))
        found += [Row(places=tuple(group)) for _, group in kinds]
    return sorted(found, key=lambda row: places.index(row.places[0]))


def good_run(cloud: Cloud, home: Path) -> list[Place]:
    """Build without any fault and return the calls that every such build makes."""

    def built() -> list[Place]:
        fresh(cloud, home)
        start = time.monotonic()
        ran = captured(*BUILD)
        _good_seconds.append(time.monotonic() - start)
        shutil.rmtree(home)
        if ran.status != 0:
            raise Leak(ran.err)
        return places(cloud.calls)

    # On a busy machine Packer polls once more.
    return min((built() for _ in range(2)), key=len)


def in_short() -> tuple[str, ...]:
    """Return a build in which Packer may ask for ever: it gets a few times what a whole one takes here."""
    seconds = max(10.0, 4 * max(_good_seconds, default=0.0))
    return ("--set", f"bake.timeout={seconds:.0f}s", *BUILD[2:])


def fresh(cloud: Cloud, home: Path) -> None:
    """Begin with an empty account and an empty workspace."""
    cloud.reset()
    os.environ["AMI_BUILDER_HOME"] = str(home)


def try_fault(cloud: Cloud, place: Place, fault: str, home: Path) -> Cell:
    """Build with one fault, and then see to it that nothing stays; raises Leak when something does.

    After an error that left something it is done twice: `gc --apply` comes next, then the next build.
    """

    def failing() -> Ran:
        fresh(cloud, home / f"{place.action}-{place.nth}-{fault}-{time.monotonic_ns()}")
        lasting = fault == LASTING
        cloud.faults.add(
            place.action,
            Fault.HTTP500 if lasting else Fault(fault),
            nth=place.nth,
            times=None if lasting else 1,
            seconds=_SLOW_SECONDS,
            packer=place.packer,
        )
        ran = captured(*(in_short() if lasting else BUILD))
        if cloud.count(place.action, packer=place.packer) < place.nth:
            raise Missed(f"there was no {place}: {ran.err}")
        cloud.faults.clear()
        return ran

    start = time.monotonic()
    ran = failing()
    seconds = time.monotonic() - start
    check_ended(ran, seconds, (0, *_ERRORS))
    verdict = judged(cloud, ran.status)
    if verdict in (Verdict.GC, Verdict.KEPT):
        # Once more, with the next build before any `gc`.
        failing()
    if verdict is not Verdict.OK:
        rebuilt(cloud)
    return Cell(
        place=place, column=fault, verdict=verdict, status=ran.status, said=_said(ran), seconds=seconds
    )


def check_ended(ran: Ran, seconds: float, allowed: Sequence[int]) -> None:
    """Raise Leak unless a command ended as documented, in time, and with words for people."""
    if ran.status not in allowed:
        raise Leak(f"exit status {ran.status}: {ran.err}")
    if "Traceback" in ran.err or "this is an internal error" in ran.err:
        raise Leak(ran.err)
    if seconds > BOUND:
        raise Leak(f"it took {seconds:.0f} s: {ran.err}")


def judged(cloud: Cloud, status: int) -> Verdict:
    """Return what a command that has ended came to; raises Leak when anything is left after `gc --apply`."""
    left = cloud.left()
    if status == 0:
        only_the_ami(cloud)
        return Verdict.OK
    collect()
    now = cloud.left()
    if now and not (_has_finished(cloud) and now.keys() == {"image", "snapshot"}):
        raise Leak(f"left after `gc --apply`: {now}; before it: {left}")
    if left != now:
        return Verdict.GC
    return Verdict.KEPT if now else Verdict.ERROR


def _has_finished(cloud: Cloud) -> bool:
    """Tell whether the account's one AMI was finished."""
    owned = cloud.client().describe_images(Owners=["self"])["Images"]
    return [FINISHED in {tag["Key"] for tag in image.get("Tags", [])} for image in owned] == [True]


def collect() -> None:
    """Run `gc --apply`."""
    ran = captured("gc", "--apply")
    if ran.status != 0:
        raise Leak(f"gc --apply ended with {ran.status}: {ran.err}")


def rebuilt(cloud: Cloud) -> None:
    """Build without a fault, whatever was left, and collect: only its AMI may remain."""
    ran = captured(*BUILD)
    if ran.status != 0:
        raise Leak(f"the next build ended with {ran.status}: {ran.err}")
    collect()
    only_the_ami(cloud)


def only_the_ami(cloud: Cloud) -> None:
    """Raise Leak unless the account has one AMI and its snapshot."""
    left = cloud.left()
    if {kind: len(ids) for kind, ids in left.items()} != {"image": 1, "snapshot": 1}:
        raise Leak(f"left beside the AMI: {left}")


def _said(ran: Ran) -> str:
    lines = ran.err.strip().splitlines()
    return next((line for line in lines if "error" in line.lower()), "")
