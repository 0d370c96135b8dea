"""`ami-builder prune --target aws`: AMIs and snapshots that nothing needs; AMIs are deprecated first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from ami_builder.aws import images as amis
from ami_builder.aws import references, sharing, tags
from ami_builder.aws.session import Account, code_of
from ami_builder.build.channels import ChannelStore
from ami_builder.build.channels import references as references_of
from ami_builder.build.cleanup import KEEP_ALL, policy
from ami_builder.config.schema import Image
from ami_builder.console import Progress
from ami_builder.core.cleanup import Action, Candidate, Decision, Reference, RetentionPolicy, plan
from ami_builder.core.errors import CloudFailed
from ami_builder.core.units import GIB
from ami_builder.state.journal import unfinished
from ami_builder.state.workspace import Workspace

_NO_POLICY = "no policy: ami-builder.toml does not have this image in this region"
_PUBLIC = "public"
_GONE = "gone already"
_COOLDOWN = "a protection from deregistration with a cooldown lasts 24 hours longer"
# EC2 lists a snapshot before the AMI that it is made for.
_LEAST_AGE = timedelta(days=1)


def plan_cleanup(
    account: Account,
    workspace: Workspace,
    images: Mapping[str, Image],
    channels: Mapping[str, ChannelStore],
) -> tuple[Decision, ...]:
    """Decide about every AMI and orphaned snapshot of ours in a region; change nothing.

    `images` are the configured ones of this region, `channels` their records. Raises CloudFailed when
    anything that may need an AMI can't be read.
    """
    owned = amis.list_owned(account)
    by_id = {ami.id: ami for ami in owned}
    uses = [
        *references.find(account, owned),
        *(
            Reference(id=location, by=f"nightly run {journal.id} continues with it")
            for journal in unfinished(workspace)
            for location in journal.locations
        ),
    ]
    found: dict[str, list[amis.Ami]] = defaultdict(list)
    for ami in owned:
        if tags.RUN in ami.tags:
            found[ami.tags.get(tags.IMAGE, "")].append(ami)
    decisions: list[Decision] = []
    for name, group in sorted(found.items()):
        arch = images[name].arch if name in images else None
        ruled = [ami for ami in group if ami.arch is arch]
        why = _NO_POLICY if arch is None else f"no policy: ami-builder.toml has this image for {arch}"
        others = [_candidate(account, ami, name, {}, why) for ami in group if ami.arch is not arch]
        decisions += plan(others, uses, KEEP_ALL, datetime.now(UTC))
        if not ruled:
            continue
        record = channels[name]
        been = {channel: {entry.id for entry in record.entries(channel)} for channel in record.used()}
        candidates = [_candidate(account, ami, name, been) for ami in ruled]
        rules = policy(images[name].lifecycle, deprecates=True)
        needed = [*references_of(record), *uses]
        decisions += _unshared(candidates, needed, rules, lambda one: _shared(_users(account, by_id[one])))
    return (*decisions, *_orphans(account, images, owned, uses))


def clean_up(account: Account, decisions: Sequence[Decision], progress: Progress) -> Iterator[Decision]:
    """Carry out a plan that was made just now; yield each decision once it is done.

    AMIs are deregistered with their snapshots. Before each change, what may need the AMI or the snapshot is
    read again: another host may have promoted it. Raises CloudFailed.
    """
    uses = references.Watch(account)
    for decision in decisions:
        image_id, verb = decision.candidate.id, str(decision.action)
        if decision.action is Action.KEEP:
            yield decision
            continue
        with progress.step(f"{verb} {image_id}") as step:
            if reason := uses.of(image_id) or _kept_by_now(account, decision.candidate):
                step.done(f"kept: {reason}")
                decision = replace(decision, action=Action.KEEP, reason=reason)
            elif decision.action is Action.DEPRECATE:
                amis.deprecate(account, image_id)
            elif not image_id.startswith("snap-"):
                if reason := _deregistered(account, image_id):
                    step.done(f"kept: {reason}")
                    decision = replace(decision, action=Action.KEEP, reason=reason)
            elif not amis.delete_snapshot(account, image_id):
                raise CloudFailed(f"the snapshot {image_id} can't be deleted: an AMI uses it")
        yield decision


def _deregistered(account: Account, ami: str) -> str:
    """Deregister an AMI; return why EC2 still protects it, though describes say that it does not, or ""."""
    try:
        amis.deregister(account, ami)
    except CloudFailed as failed:
        if code_of(failed) != "OperationNotPermitted":
            raise
        return f"{failed.message} ({_COOLDOWN})"
    return ""


def _kept_by_now(account: Account, candidate: Candidate) -> str:
    """Return what protects what was planned to go, whom it was shared with since, or that it is gone."""
    if candidate.id.startswith("snap-"):
        if not amis.describe_snapshots(account, [candidate.id]):
            return _GONE
        shared = _shared(sharing.snapshot_users(account, candidate.id))
    else:
        if (ami := amis.get(account, candidate.id)) is None:
            return _GONE
        if reason := _protected(ami):
            return reason
        shared = _shared(_users(account, ami))
    # The plan allows for the accounts that it was shared with, but never for everyone.
    return "" if candidate.shared and shared != _PUBLIC else shared


def _orphans(
    account: Account, images: Mapping[str, Image], owned: Sequence[amis.Ami], uses: Sequence[Reference]
) -> tuple[Decision, ...]:
    """Decide about the snapshots of ours that no AMI uses any more."""
    found: dict[str, list[Candidate]] = defaultdict(list)
    for one in amis.list_orphan_snapshots(account, owned):
        name = tags.as_dict(one.get("Tags", [])).get(tags.IMAGE, "")
        protected = "" if one.get("State") == "completed" else "not complete yet"
        found[name].append(
            Candidate(
                id=one["SnapshotId"],
                image=name,
                region=account.region,
                created=one.get("StartTime"),
                size=one.get("VolumeSize", 0) * GIB,
                protected=protected if name in images else _NO_POLICY,
            )
        )
    decisions: list[Decision] = []
    for name, candidates in sorted(found.items()):
        rules = KEEP_ALL
        if name in images:
            rules = policy(images[name].lifecycle)
            rules = replace(rules, keep=0, young=max(rules.young, _LEAST_AGE), size=0)
        decisions += _unshared(
            candidates, uses, rules, lambda one: _shared(sharing.snapshot_users(account, one))
        )
    return tuple(replace(one, reason=f"its AMI does not exist any more; {one.reason}") for one in decisions)


def _unshared(
    candidates: Sequence[Candidate],
    needed: Sequence[Reference],
    rules: RetentionPolicy,
    shared_with: Callable[[str], str],
) -> tuple[Decision, ...]:
    """Plan until no candidate for deletion is shared; ask AWS only about those, since each is a call."""
    asked: dict[str, str] = {}
    while True:
        known = [_shared_as(one, asked.get(one.id, "")) for one in candidates]
        decisions = plan(known, needed, rules, datetime.now(UTC))
        doomed = [one.candidate.id for one in decisions if one.action is not Action.KEEP]
        if all(image_id in asked for image_id in doomed):
            return decisions
        asked |= {image_id: shared_with(image_id) for image_id in doomed if image_id not in asked}


def _shared_as(one: Candidate, shared: str) -> Candidate:
    return replace(one, shared=one.shared or shared, public=one.public or shared == _PUBLIC)


def _users(account: Account, ami: amis.Ami) -> frozenset[str]:
    """Return who can launch an AMI or use one of its snapshots, besides its own account."""
    snapshots = (sharing.snapshot_users(account, one) for one in ami.snapshots)
    return sharing.image_users(account, ami.id).union(*snapshots)


def _shared(users: frozenset[str]) -> str:
    if "all" in users:
        return _PUBLIC
    return f"shared with {', '.join(sorted(users))}" if users else ""


def _protected(ami: amis.Ami) -> str:
    """Return what protects an AMI of ours, or nothing."""
    if ami.state == "disabled":
        return "disabled: someone wants to keep it, but not to launch it"
    if ami.protection:
        return f"protected from deregistration ({ami.protection})" + (
            "; once that is disabled, EC2 protects it for another 24 hours"
            if "with-cool" in ami.protection
            else ""
        )
    age = datetime.now(UTC) - ami.created if ami.created else timedelta.max
    if ami.finished and ami.verdict is None and ami.revoked is None and age < _LEAST_AGE:
        return "not verified yet, and younger than 24 h: another host may be at it"
    return ""


def _candidate(
    account: Account, ami: amis.Ami, name: str, been: Mapping[str, set[str]], protected: str = ""
) -> Candidate:
    return Candidate(
        id=ami.id,
        image=name,
        region=account.region,
        created=ami.created,
        size=ami.size,
        finished=ami.finished and ami.state in ("available", "disabled"),
        channels=frozenset(channel for channel, ids in been.items() if ami.id in ids),
        revoked=ami.revoked is not None,
        shared=_PUBLIC if ami.public else "",
        public=ami.public,
        protected=protected or _protected(ami),
        deprecated=ami.deprecated,
    )
