"""What a selftest is going to do: its image, its steps, where, on what, and what each can cost at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from ami_builder.aws import source_ami, tags
from ami_builder.aws.session import Account
from ami_builder.config.schema import Image, LifecycleSettings
from ami_builder.config.types import Destination, Tag
from ami_builder.core.errors import UsageError
from ami_builder.core.units import GIB
from ami_builder.selftest import budget
from ami_builder.selftest.budget import FREE, Cost

PREFIX = "selftest-"
"""How the image names of selftests begin."""
CHANNEL = "testing"
_MARGIN_SECONDS = 15 * 60.0


class Part(StrEnum):
    """The steps of a selftest, in order."""

    CHECK = "check"
    PROBES = "probes"
    BAKE = "bake"
    VERIFY = "verify"
    SECOND = "second AMI"
    PROBES_OF_AMI = "probes of an AMI"
    COPY = "copy"
    PROMOTE = "promote"
    ROLLBACK = "rollback"
    DEPRECATE = "deprecate"
    PRUNE = "prune"
    COLLECT = "gc"
    REVOKE = "revoke"
    CLEAN_UP = "clean up"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStep:
    """One step."""

    part: Part
    text: str
    regions: tuple[str, ...]
    instance_types: tuple[str, ...] = ()
    """The types that it may run on: one instance of the first with capacity."""
    cost: Cost = FREE

    @property
    def most(self) -> float:
        """The most that it can cost, in US dollars."""
        return self.cost.most


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A selftest as it would run."""

    image: Image
    regions: tuple[str, ...]
    """Where it bakes, and where it copies to."""
    base: str
    """The id of the base AMI."""
    steps: tuple[PlannedStep, ...]

    @property
    def most(self) -> float:
        """The most that all of it can cost."""
        return sum(one.most for one in self.steps)


def selftest_image(image: Image, name: str, destination: Destination | None) -> Image:
    """Return the image of a selftest: as configured, but short-lived, on demand, shared with nobody."""
    lifetime = max(image.bake.timeout, image.verify.timeout) + _MARGIN_SECONDS
    return replace(
        image,
        name=name,
        verify=replace(
            image.verify, instance_types=image.verify.instance_types[:1], checks=(), pressure=False
        ),
        aws=replace(
            image.aws,
            spot=False,
            lifetime=lifetime,
            tags=(*image.aws.tags, Tag(key=tags.SELFTEST, value=name)),
            copy_to=(destination,) if destination else (),
            share_with=(),
        ),
        lifecycle=LifecycleSettings(channels=(CHANNEL,), keep=0, keep_days=0, grace_days=1),
        nightly=replace(image.nightly, channel=CHANNEL),
    )


def plan(account: Account, image: Image, assumed: float | None) -> Plan:
    """Look up prices and the base AMI, and return the plan for a selftest's image. Raises UsageError."""
    aws = image.aws
    home, elsewhere = account.region, tuple(one.region for one in aws.copy_to)
    bake_on, verify_on = aws.instance_types, image.verify.instance_types
    if home in elsewhere:
        raise UsageError(
            f"{home} is where the AMI is baked, so it can't be copied there",
            hint="name another region with --copy-region",
        )
    known = budget.prices(account, [*bake_on, *verify_on], assumed)
    base = source_ami.resolve(account, aws.source, image.arch)
    disk = max(image.base.disk_size, base.size) / GIB
    dearest = max(known[kind] for kind in bake_on)
    kept = budget.snapshot(disk)
    baking = budget.instance(dearest, aws.lifetime, disk)
    verifying = budget.instance(known[verify_on[0]], aws.lifetime, max(disk, image.verify.disk_size / GIB))

    def step(
        part: Part, text: str, cost: Cost = FREE, *, on: Sequence[str] = (), where: tuple[str, ...] = (home,)
    ) -> PlannedStep:
        return PlannedStep(part=part, text=text, regions=where, instance_types=tuple(on), cost=cost)

    everywhere = (home, *elsewhere)
    steps = [
        step(Part.CHECK, "what `check` asks the account; nothing is made"),
        step(Part.PROBES, "calls about what does not exist, a security group, three SSM parameters"),
        step(Part.BAKE, "bake an AMI", replace(baking, fixed=kept.fixed), on=bake_on),
        step(Part.VERIFY, "launch it, and run the checks", verifying, on=verify_on),
        step(Part.SECOND, "copy it within the region, so that there are two", kept),
        step(
            Part.PROBES_OF_AMI,
            "calls about another such copy, which is deregistered",
            Cost(fixed=2 * kept.fixed),
        ),
        step(Part.COPY, "copy it to another region", budget.snapshot(disk, sent_from=home), where=elsewhere),
        step(Part.PROMOTE, "make the AMI, then the second one current", where=everywhere),
        step(Part.ROLLBACK, "make the first one current again", where=everywhere),
        step(Part.DEPRECATE, "`prune` with a grace period: the second AMI is deprecated", where=everywhere),
        step(Part.PRUNE, "`prune` without one: the second AMI is deregistered", where=everywhere),
        step(Part.COLLECT, "leave a security group and an unfinished AMI, and find them", kept),
        step(Part.REVOKE, "remove the AMI and its copy from the channel", where=everywhere),
        step(Part.CLEAN_UP, "remove all that is left, and look for anything else", where=everywhere),
    ]
    if not elsewhere:
        steps = [one for one in steps if one.part is not Part.COPY]
    return Plan(image=image, regions=everywhere, base=base.id, steps=tuple(steps))
