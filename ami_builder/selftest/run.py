"""Run a selftest: each step with the code of its command, every call recorded, everything removed at the end.

Only what has the selftest's own tag (`tags.SELFTEST`) or is a run's of it is ever changed or removed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial

from ami_builder.aws import gc, images, network, orphans, permissions, tags
from ami_builder.aws.session import aws_errors, poll, prepared
from ami_builder.aws.target import AwsTarget, check
from ami_builder.build import promotion
from ami_builder.build.build import Options, build
from ami_builder.build.cleanup import clean_up
from ami_builder.build.target import at_each, require_all
from ami_builder.build.verify import located, verify_images
from ami_builder.config.schema import Image
from ami_builder.console import Progress
from ami_builder.core.cleanup import Action, Decision
from ami_builder.core.errors import AmiBuilderError, ChecksFailed, CloudFailed, MissingTool, UsageError
from ami_builder.core.orphans import Resource
from ami_builder.core.records import State
from ami_builder.selftest import probes, probing
from ami_builder.selftest.budget import Budget
from ami_builder.selftest.plan import CHANNEL, PREFIX, Part, Plan, PlannedStep
from ami_builder.selftest.probing import Probe
from ami_builder.selftest.recording import Recorder, Recording
from ami_builder.state.ledger import FILE as LEDGER
from ami_builder.state.ledger import Ledger
from ami_builder.state.workspace import StoredImage, Workspace

PATIENCE = 1.0
_COPY_SECONDS = 3600.0
_GONE_SECONDS = 300.0
_REASON = "selftest"
_OLD = timedelta(hours=6)
_PROBES = {
    Part.PROBES: [name for one in probes.WITHOUT_AMI for name in one.steps()],
    Part.PROBES_OF_AMI: [name for one in probes.WITH_AMI for name in one.steps()],
}
"""The steps under which the calls of probes are recorded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remnant:
    """Something that a selftest could not remove, for the user's own eyes."""

    region: str
    """Empty if it is not known."""
    kind: str
    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a selftest came to."""

    recording: Recording
    steps: tuple[str, ...]
    """The steps that were completed, as their calls are recorded: each call of a probe is one."""
    parts: tuple[Part, ...]
    """The parts that were completed."""
    unfinished: tuple[str, ...]
    """The names under which the calls of the step are recorded that was not completed."""
    spent: float
    """The most that it can have cost, in US dollars."""
    remnants: tuple[Remnant, ...]
    error: AmiBuilderError | None
    """What stopped it; None if it was completed."""


@dataclass(slots=True, kw_only=True)
class Selftest:
    """One selftest, its state and its steps."""

    plan: Plan
    workspace: Workspace
    """Its own: what earlier selftests or builds left is of no concern to it."""
    budget: Budget
    progress: Progress
    patience: float = field(default_factory=lambda: PATIENCE)
    """Scales its own waits."""
    recorder: Recorder = field(init=False)
    _home: AwsTarget = field(init=False)
    _first: StoredImage = field(init=False)
    _second: StoredImage = field(init=False)

    @property
    def image(self) -> Image:
        """The selftest's image."""
        return self.plan.image

    def run(self) -> Result:
        """Run the steps until one fails or the budget ends, and remove everything in any case.

        An error is in the result; Interrupted is raised when everything has been removed.
        """
        steps: list[str] = []
        parts: list[Part] = []
        unfinished: Sequence[str] = ()
        error: AmiBuilderError | None = None
        remnants: tuple[Remnant, ...] = ()
        self.workspace.ensure()
        self.recorder = Recorder(self.plan.regions[0])
        with prepared(self.recorder.attach):
            self._home = AwsTarget.open(self.image, self.workspace)
            try:
                for step in self.plan.steps[:-1]:
                    self.budget.require(step.part, step.cost)
                    unfinished = [step.part, *_PROBES.get(step.part, ())]
                    self._do(step)
                    steps, unfinished = [*steps, *unfinished], ()
                    parts.append(step.part)
            except AmiBuilderError as failed:
                error = failed
            finally:
                # `check` makes nothing, and what it finds wrong can be a region.
                if Part.CHECK in parts:
                    with self.recorder.step(Part.CLEAN_UP):
                        remnants = self._clean_up()
        if error is None:
            steps.append(Part.CLEAN_UP)
            parts.append(Part.CLEAN_UP)
        return Result(
            recording=self.recorder.recording([*steps, *unfinished]),
            steps=tuple(steps),
            unfinished=tuple(unfinished),
            parts=tuple(parts),
            spent=self.budget.spent,
            remnants=remnants,
            error=error,
        )

    def _do(self, step: PlannedStep) -> None:
        """Do one step, and count its cost."""
        acts: Mapping[Part, Callable[[], None]] = {
            Part.CHECK: self._check,
            Part.PROBES: lambda: self._probe(probes.WITHOUT_AMI),
            Part.BAKE: self._bake,
            Part.VERIFY: self._verify,
            Part.SECOND: self._make_second,
            Part.PROBES_OF_AMI: lambda: self._probe(probes.WITH_AMI),
            Part.COPY: self._copy,
            Part.PROMOTE: self._promote,
            Part.ROLLBACK: self._roll_back,
            Part.DEPRECATE: lambda: self._prune(1, Action.DEPRECATE),
            Part.PRUNE: lambda: self._prune(0, Action.DELETE),
            Part.COLLECT: self._collect,
            Part.REVOKE: self._revoke,
        }
        began, done = time.monotonic(), False
        try:
            with self.recorder.step(step.part):
                acts[step.part]()
            done = True
        finally:
            self.budget.settle(step.cost, time.monotonic() - began, failed=not done)

    def _targets(self) -> Sequence[AwsTarget]:
        return (self._home, *self._home.copies(self.image))

    def _check(self) -> None:
        """Stop where `check` stops a build, except for what it says of permissions, which is a belief too.

        Neither the simulator's verdict nor a dry run's stops it: the steps themselves show who is right.
        """
        with self.progress.step("check") as step:
            for one in check(self.image, self.workspace):
                if one.state is not State.STOPS:
                    continue
                if one.name.startswith((permissions.NAME, permissions.DRY_RUN)):
                    step.announce(f"{one.name}: {one.found}")
                    continue
                kinds = {kind.exit_code: kind for kind in (UsageError, MissingTool, CloudFailed)}
                raise kinds.get(one.exit_code, CloudFailed)(f"{one.name}: {one.found}", hint=one.hint)

    def _probe(self, chosen: Sequence[Probe]) -> None:
        account = self._home.account
        with self.workspace.run("selftest", self.image.name) as run, self.progress.step("probes") as step:
            known = {
                "name": self.image.name,
                "region": account.region,
                "folder": self._home.channels(self.image).folder,
                "base": self.plan.base,
                "type": self.image.verify.instance_types[0],
                "vpc": self._vpc(),
                "ami": self._first.artifact.location if chosen is probes.WITH_AMI else "",
            }
            kept = probing.values(known)
            tagged = tags.resource_tags(self.image, "0" * 64, run.record.run_id, tags.Purpose.VERIFY)
            for one in chosen:
                with step.step(one.name):
                    probing.run(one, account, self.recorder, kept, tagged, patience=self.patience)

    def _bake(self) -> None:
        built = build(self.image, Options(verify=False), self._home, self.workspace, self.progress)
        self._first = built.stored

    def _verify(self) -> None:
        copies = located([self._home], self.image, self._first)
        verify_images(self.image, copies, self.workspace, self.progress)
        self._first = self._home.ami(self.image, self._first.artifact.location)

    def _make_second(self) -> None:
        """Copy the AMI within its region, with another digest and the first one's verdict: they are equal."""
        account = self._home.account
        with self.workspace.run("selftest", self.image.name) as run, self.progress.step("second AMI") as step:
            ami = self._copied(Ledger(run.directory / LEDGER), run.record.run_id)
            images.wait_available(account, ami, _COPY_SECONDS, step.update)
            digest, verdict = self._digest(run.record.run_id), self._first.verdict
            images.finish(account, ami, self._tags(digest, run.record.run_id))
            assert verdict is not None, "it was verified"
            images.record_verdict(account, ami, verdict.outcome, verdict.checks_digest, verdict.measured)
            self._second = self._home.ami(self.image, ami)
            step.done("a copy of the first one")

    def _copied(self, ledger: Ledger, run_id: str) -> str:
        """Begin a copy of the AMI within its region, and return its id."""
        account, digest = self._home.account, self._digest(run_id)
        name = tags.ami_name(self.image.name, digest, run_id)
        entry = ledger.intend(Resource.IMAGE, account.region, run=run_id, name=name)
        with aws_errors():
            made = account.ec2.copy_image(
                Name=name,
                SourceImageId=self._first.artifact.location,
                SourceRegion=account.region,
                ClientToken=digest,
                TagSpecifications=tags.specifications(self._tags(digest, run_id), "image", "snapshot"),
            )
        return ledger.made(entry, made["ImageId"]).id

    def _digest(self, run_id: str) -> str:
        return hashlib.sha256(f"{self.image.name} {run_id}".encode()).hexdigest()

    def _tags(self, digest: str, run_id: str) -> Mapping[str, str]:
        return tags.resource_tags(self.image, digest, run_id, tags.Purpose.IMAGE)

    def _copy(self) -> None:
        others = self._home.copies(self.image)
        require_all(
            at_each(
                others, lambda one, step: one.receive(self.image, self._first, step), self.progress, "copy"
            )
        )

    def _promote(self) -> None:
        for targets, ami in ((self._targets(), self._first), ([self._home], self._second)):
            moves = promotion.promote(targets, self.image, ami, CHANNEL, _REASON, self.progress)
            require_all(moves)

    def _roll_back(self) -> None:
        require_all(promotion.rollback(self._targets(), self.image, CHANNEL, _REASON, self.progress))

    def _prune(self, grace_days: int, expected: Action) -> None:
        """Prune with this grace period; what is expected of the second AMI must come of it."""
        image = replace(self.image, lifecycle=replace(self.image.lifecycle, grace_days=grace_days))
        decisions = clean_up({image.name: image}, lambda _: self._home, self.progress, apply=True)
        ami = self._second.artifact.location
        found = [one for one in decisions if one.candidate.id == ami]
        if [one.action for one in found] != [expected]:
            raise ChecksFailed(
                f"expected `prune` to {expected} the second AMI, but it decided: {_reasons(found)}",
                hint="this is what the selftest is for: please send its table",
            )

    def _collect(self) -> None:
        """Leave a security group and an unfinished AMI as a killed run would, then find and delete them."""
        account = self._home.account
        with self.workspace.run("selftest", self.image.name) as run:
            run_id, ledger = run.record.run_id, Ledger(run.directory / LEDGER)
            name = tags.group_name(run_id, tags.Purpose.VERIFY)
            vpc = self._vpc()
            entry = ledger.intend(Resource.SECURITY_GROUP, account.region, run=run_id, name=name, vpc=vpc)
            tagged = tags.resource_tags(self.image, "", run_id, tags.Purpose.VERIFY)
            with self.progress.step("leave something behind"), aws_errors():
                made = account.ec2.create_security_group(
                    GroupName=name,
                    Description=f"ami-builder, run {run_id}",
                    VpcId=vpc,
                    TagSpecifications=tags.specifications(tagged, "security-group"),
                )
                ledger.made(entry, made["GroupId"])
                ami = self._copied(ledger, run_id)
                images.wait_available(account, ami, _COPY_SECONDS)
        left = {(one.kind, one.id) for one in self._remnants() if one.kind != "parameter"}
        deleted = {(str(kind), found) for kind, found in self._collected()}
        if missing := {(kind, found) for kind, found in left - deleted if self._unfinished(kind, found)}:
            raise ChecksFailed(
                f"`gc` did not find {len(missing)} of the resources that were left on purpose",
                hint="this is what the selftest is for: please send its table",
            )

    def _vpc(self) -> str:
        """Return the VPC that instances run in."""
        home = self._home.name
        return network.find_vpc(self._home.account, *self.image.aws.at(home, home).subnets[:1])

    def _unfinished(self, kind: str, found: str) -> bool:
        """Return whether a resource is none of the finished AMIs."""
        if kind != Resource.IMAGE:
            return kind != Resource.SNAPSHOT
        ami = images.get(self._home.account, found)
        return ami is not None and not ami.finished

    def _collected(self) -> Sequence[tuple[Resource, str]]:
        """Delete what ended runs of this selftest left, as `gc` does, and return its kinds and ids."""
        regions = {target.account: self.image.aws.lifetime for target in self._targets()}
        found = gc.find_orphans(regions, self.workspace, self.progress)
        ours = [one for one in found if self._ours(one.found.run_id) and one.action is Action.DELETE]
        gc.remove_orphans(ours, regions, self.workspace, self.progress)
        return [(one.found.kind, one.found.id) for one in ours]

    def _revoke(self) -> None:
        require_all(promotion.revoke(self._targets(), self.image, self._first, _REASON, self.progress))

    def _clean_up(self) -> tuple[Remnant, ...]:
        """Remove everything, whatever happened, and return what is still there.

        It is done again for a while if something can't be removed yet, or what was removed is still listed.
        """
        found: list[Remnant] = []

        def cleaned() -> bool:
            found.clear()
            acts: list[tuple[str, Callable[[], object]]] = []
            for target in self._targets():
                acts.append((f"remove channels ({target.name})", partial(self._remove_channels, target)))
                acts.append((f"remove AMIs ({target.name})", partial(self._remove_images, target)))
            acts.append(("remove the rest", self._collected))
            acts.append(("look for anything left", lambda: found.extend(self._remnants())))
            for name, act in acts:
                try:
                    with self.progress.step(name):
                        act()
                except AmiBuilderError as error:
                    kind = f"perhaps something, since it failed to {name}:"
                    found.append(Remnant(region="", kind=kind, id=error.message))
            return not found

        poll(cleaned, seconds=_GONE_SECONDS * self.patience)
        return tuple(found)

    def _remove_channels(self, target: AwsTarget) -> None:
        names = {one.tags[tags.SELFTEST] for one in self._images(target)} | {self.image.name}
        for name in sorted(names):
            channels = target.channels(replace(self.image, name=name))
            for channel in channels.used():
                with aws_errors("ssm", ignore="ParameterNotFound"):
                    target.account.client("ssm").delete_parameter(Name=channels.folder + channel)

    def _remove_images(self, target: AwsTarget) -> None:
        for ami in self._images(target):
            images.deregister(target.account, ami.id)

    def _images(self, target: AwsTarget) -> Sequence[images.Ami]:
        """Return the AMIs of this selftest, and those of old ones, which were killed."""
        old = datetime.now(UTC) - _OLD
        return [
            one
            for one in images.list_owned(target.account)
            # The tag alone could be somebody's own.
            if (name := one.tags.get(tags.SELFTEST, "")).startswith(PREFIX)
            and one.tags.get(tags.IMAGE, name) == name
            and (name == self.image.name or (one.created is not None and one.created < old))
        ]

    def _remnants(self) -> list[Remnant]:
        entries = gc.entries(self.workspace)
        found: dict[tuple[str, str, str], None] = {}
        for target in self._targets():
            region = target.name
            for ami in self._images(target):
                found[region, Resource.IMAGE, ami.id] = None
            for one in orphans.find(target.account, entries):
                if self._ours(one.run_id):
                    found[region, one.kind, one.id] = None
            channels = target.channels(self.image)
            for channel in channels.used():
                found[region, "parameter", channels.folder + channel] = None
        return [Remnant(region=region, kind=str(kind), id=each) for region, kind, each in found]

    def _ours(self, run_id: str) -> bool:
        return run_id in gc.runs(self.workspace)


def _reasons(decisions: Sequence[Decision]) -> str:
    return "; ".join(f"{one.action}: {one.reason}" for one in decisions) or "it was not found"
