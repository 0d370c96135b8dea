"""`ami-builder prune --target aws`: which AMIs nothing needs, deprecated first, then deregistered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from ami_builder.adapters.aws import images as amis
from ami_builder.adapters.aws import references, tags
from ami_builder.adapters.aws.session import Account
from ami_builder.console import Progress
from ami_builder.model import Image
from ami_builder.pipeline.cloud import CloudSite
from ami_builder.pipeline.cloud_channels import CloudChannels
from ami_builder.pipeline.prune import KEEP_ALL, channel_references, policy
from ami_builder.retention import Action, Candidate, Decision, Reference, plan
from ami_builder.workspace import Workspace


def plan_cloud(
    workspace: Workspace, images: Mapping[str, Image], progress: Progress
) -> tuple[tuple[Account, tuple[Decision, ...]], ...]:
    """Decide about every AMI of ours in the region of each image; nothing is changed.

    Raises CloudFailed when anything that may need an AMI can't be read: then there is no plan at all.
    """
    regions: dict[str, tuple[Account, dict[str, Image]]] = {}
    for name, image in images.items():
        account = Account.open(image.aws.region)
        regions.setdefault(account.region, (account, {}))[1][name] = image
    planned = []
    for account, mine in regions.values():
        with progress.step(f"look in {account.region}") as step:
            decisions = _plan_region(account, workspace, mine)
            doomed = sum(one.action is not Action.KEEP for one in decisions)
            step.done(f"{len(decisions)} AMIs, {doomed} to deprecate or delete")
        planned.append((account, decisions))
    return tuple(planned)


def prune_cloud(planned: Sequence[tuple[Account, tuple[Decision, ...]]], progress: Progress) -> None:
    """Do what a plan that was made just now says; an AMI goes with its snapshots. Raises CloudFailed."""
    for account, decisions in planned:
        for decision in decisions:
            ami = decision.candidate.id
            if decision.action is Action.DEPRECATE:
                with progress.step(f"deprecate {ami}"):
                    amis.deprecate(account, ami)
            elif decision.action is Action.DELETE:
                with progress.step(f"deregister {ami}"):
                    amis.deregister(account, ami)


def _plan_region(account: Account, workspace: Workspace, images: Mapping[str, Image]) -> tuple[Decision, ...]:
    found = amis.ours(account)
    uses: list[Reference] = references.find(account)
    decisions: list[Decision] = []
    for name in sorted({ami.tags.get(tags.IMAGE, "") for ami in found}):
        mine = [ami for ami in found if ami.tags.get(tags.IMAGE, "") == name]
        if name not in images:
            stays = "no policy: ami-builder.toml does not have this image in this region"
            candidates = [_candidate(account, ami, name, {}, stays) for ami in mine]
            decisions += plan(candidates, uses, KEEP_ALL, datetime.now(UTC))
            continue
        site = CloudSite(account=account, workspace=workspace)
        record = CloudChannels(site=site, image=images[name])
        been = {channel: {entry.id for entry in record.entries(channel)} for channel in record.used()}
        candidates = [_candidate(account, ami, name, been) for ami in mine]
        needed = [*channel_references(record), *uses]
        decisions += _unshared(account, candidates, needed, images[name])
    return tuple(decisions)


def _unshared(
    account: Account, candidates: list[Candidate], needed: Sequence[Reference], image: Image
) -> tuple[Decision, ...]:
    """Plan, asking only of those that would go whom they are shared with, until none of these is shared."""
    asked: dict[str, str] = {}
    while True:
        told = [replace(one, shared=one.shared or asked.get(one.id, "")) for one in candidates]
        decisions = plan(told, needed, policy(image.lifecycle, grace=True), datetime.now(UTC))
        doomed = [one.candidate.id for one in decisions if one.action is not Action.KEEP]
        if all(id in asked for id in doomed):
            return decisions
        asked |= {id: amis.shared_with(account, id) for id in doomed if id not in asked}


def _candidate(
    account: Account, ami: amis.Ami, name: str, been: Mapping[str, set[str]], protected: str = ""
) -> Candidate:
    return Candidate(
        id=ami.id,
        image=name,
        region=account.region,
        created=ami.created,
        size=ami.size,
        finished=ami.finished and ami.state == "available",
        channels=frozenset(channel for channel, ids in been.items() if ami.id in ids),
        revoked=ami.revoked is not None,
        shared="public" if ami.public else "",
        protected=protected or ("protected from deregistration" if ami.protected else ""),
        deprecated=ami.deprecated,
    )
