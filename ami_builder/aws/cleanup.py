"""`ami-builder prune --target aws`: which AMIs and snapshots nothing needs; AMIs are deprecated first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial

from ami_builder.aws import images as amis
from ami_builder.aws import references, sharing, snapshots, tags
from ami_builder.aws.place import CloudPlace, places
from ami_builder.aws.session import Account
from ami_builder.config.schema import Image
from ami_builder.console import Progress
from ami_builder.core.cleanup import Action, Candidate, Decision, Reference, RetentionPolicy, plan
from ami_builder.core.errors import CloudFailed
from ami_builder.qemu.cleanup import KEEP_ALL, channel_references, policy
from ami_builder.state.journal import unfinished
from ami_builder.state.workspace import Workspace
from ami_builder.verify.concurrency import side_by_side

_NO_POLICY = "no policy: ami-builder.toml does not have this image in this region"
# A snapshot is there before the AMI that it is made for is shown.
_LEAST_AGE = timedelta(days=1)


def plan_cloud(
    workspace: Workspace, images: Mapping[str, Image], progress: Progress
) -> tuple[tuple[Account, tuple[Decision, ...]], ...]:
    """Decide about every AMI and orphan snapshot of ours, each region by itself; nothing is changed.

    The regions are those that images are baked in or copied to. Raises CloudFailed when anything that may
    need an AMI can't be read in any of them: then there is no plan at all.
    """
    regions: dict[str, dict[str, CloudPlace]] = defaultdict(dict)
    for name, image in images.items():
        for place in places(image, workspace):
            regions[place.name][name] = place

    going = [
        Reference(id=location, by=f"night {night.id} goes on with it")
        for night in unfinished(workspace)
        for location in night.locations
    ]

    def one(mine: Mapping[str, CloudPlace]) -> tuple[Account, tuple[Decision, ...]]:
        account = next(iter(mine.values())).site.account
        with progress.step(f"look in {account.region}") as step:
            decisions = _plan_region(account, mine, going)
            doomed = sum(one.action is not Action.KEEP for one in decisions)
            step.done(f"{len(decisions)} AMIs and orphans, {doomed} to deprecate or delete")
        return account, decisions

    return tuple(side_by_side([partial(one, mine) for mine in regions.values()]))


def prune_cloud(planned: Sequence[tuple[Account, tuple[Decision, ...]]], progress: Progress) -> None:
    """Do what a plan that was made just now says; an AMI goes with its snapshots. Raises CloudFailed."""
    for account, decisions in planned:
        for decision in decisions:
            id = decision.candidate.id
            if decision.action is Action.DEPRECATE:
                with progress.step(f"deprecate {id}"):
                    amis.deprecate(account, id)
            elif decision.action is Action.DELETE and id.startswith("snap-"):
                with progress.step(f"delete {id}"):
                    if not snapshots.delete(account, id):
                        raise CloudFailed(f"the snapshot {id} can't be deleted: an AMI uses it")
            elif decision.action is Action.DELETE:
                with progress.step(f"deregister {id}"):
                    amis.deregister(account, id)


def _plan_region(
    account: Account, mine: Mapping[str, CloudPlace], going: Sequence[Reference]
) -> tuple[Decision, ...]:
    owned = amis.list_owned(account)
    uses: list[Reference] = [*references.find(account), *going]
    found: dict[str, list[amis.Ami]] = defaultdict(list)
    for ami in owned:
        if tags.RUN in ami.tags:
            found[ami.tags.get(tags.IMAGE, "")].append(ami)
    decisions: list[Decision] = []
    for name, group in sorted(found.items()):
        if name not in mine:
            candidates = [_candidate(account, ami, name, {}, _NO_POLICY) for ami in group]
            decisions += plan(candidates, uses, KEEP_ALL, datetime.now(UTC))
            continue
        record = mine[name].channels
        been = {channel: {entry.id for entry in record.entries(channel)} for channel in record.used()}
        candidates = [_candidate(account, ami, name, been) for ami in group]
        rules = policy(mine[name].image.lifecycle, grace=True)
        needed = [*channel_references(record), *uses]
        decisions += _unshared(
            candidates, needed, rules, lambda one: _shared(sharing.image_users(account, one))
        )
    return (*decisions, *_orphans(account, mine, owned, uses))


def _orphans(
    account: Account, mine: Mapping[str, CloudPlace], owned: Sequence[amis.Ami], uses: Sequence[Reference]
) -> tuple[Decision, ...]:
    """Decide about the snapshots of ours that no AMI uses any more."""
    found: dict[str, list[Candidate]] = defaultdict(list)
    for one in amis.list_orphan_snapshots(account, owned):
        name = one.tags.get(tags.IMAGE, "")
        protected = "" if name in mine else _NO_POLICY
        found[name].append(
            Candidate(
                id=one.id,
                image=name,
                region=account.region,
                created=one.created,
                size=one.size,
                protected=protected or ("" if one.complete else "not complete: something still makes it"),
            )
        )
    decisions: list[Decision] = []
    for name, candidates in sorted(found.items()):
        rules = KEEP_ALL
        if name in mine:
            told = policy(mine[name].image.lifecycle)
            rules = replace(told, keep=0, young=max(told.young, _LEAST_AGE), size=0)
        decisions += _unshared(
            candidates, uses, rules, lambda one: _shared(sharing.snapshot_users(account, one))
        )
    return tuple(replace(one, reason=f"its AMI is gone; {one.reason}") for one in decisions)


def _unshared(
    candidates: Sequence[Candidate],
    needed: Sequence[Reference],
    rules: RetentionPolicy,
    shared_with: Callable[[str], str],
) -> tuple[Decision, ...]:
    """Plan, asking only of those that would go whom they are shared with, until none of these is shared."""
    asked: dict[str, str] = {}
    while True:
        told = [replace(one, shared=one.shared or asked.get(one.id, "")) for one in candidates]
        decisions = plan(told, needed, rules, datetime.now(UTC))
        doomed = [one.candidate.id for one in decisions if one.action is not Action.KEEP]
        if all(id in asked for id in doomed):
            return decisions
        asked |= {id: shared_with(id) for id in doomed if id not in asked}


def _shared(users: frozenset[str]) -> str:
    return f"shared with {', '.join(sorted(users))}" if users else ""


def _candidate(
    account: Account, ami: amis.Ami, name: str, been: Mapping[str, set[str]], protected: str = ""
) -> Candidate:
    if ami.state == "disabled":
        protected = protected or "disabled: somebody wants to keep it without its being launched"
    return Candidate(
        id=ami.id,
        image=name,
        region=account.region,
        created=ami.created,
        size=ami.size,
        finished=ami.finished and ami.state in ("available", "disabled"),
        channels=frozenset(channel for channel, ids in been.items() if ami.id in ids),
        revoked=ami.revoked is not None,
        shared="public" if ami.public else "",
        protected=protected or ("protected from deregistration" if ami.protected else ""),
        deprecated=ami.deprecated,
    )
