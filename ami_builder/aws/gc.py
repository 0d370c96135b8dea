"""`ami-builder gc`: what killed runs left, here and in the accounts; planned first, removed when asked to."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from ami_builder.aws import orphans
from ami_builder.aws.session import Account
from ami_builder.config.schema import Image
from ami_builder.console import Progress
from ami_builder.core.cleanup import Action
from ami_builder.core.errors import CloudFailed
from ami_builder.core.orphans import Orphan, RunState, plan
from ami_builder.state.ledger import FILE as LEDGER
from ami_builder.state.ledger import Ledger, LedgerEntry, read
from ami_builder.state.workspace import Workspace

Regions = Mapping[Account, float]
"""Each region of an account, with the longest lifetime of our instances there, in seconds."""
_LATE_SECONDS = 24 * 3600.0
"""How long a ledger stays open: an AMI whose making was not answered may show late, and a run that was live
when all was planned may have ended since."""


def find_orphans(regions: Regions, workspace: Workspace, progress: Progress) -> tuple[Orphan, ...]:
    """Decide about everything that runs have made; change nothing. Raises CloudFailed."""
    workspace.ensure()
    known = entries(workspace)
    states = {run: RunState.LIVE if workspace.is_live(run) else RunState.ENDED for run in runs(workspace)}
    decisions: list[Orphan] = []
    for account, lifetime in regions.items():
        with progress.step(f"look in {account.region}") as step:
            planned = plan(orphans.find(account, known), states, datetime.now(UTC), lifetime)
            step.done(
                f"{len(planned)} found, {sum(one.action is Action.DELETE for one in planned)} to delete"
            )
        decisions += planned
    return tuple(decisions)


def remove_orphans(
    decisions: Sequence[Orphan], regions: Regions, workspace: Workspace, progress: Progress
) -> None:
    """Delete what the plan says, in its order, and close the ledgers of runs that ended long ago.

    A failure does not keep the rest from being deleted. Raises CloudFailed at the end, with every failure.
    """
    workspace.sweep()
    accounts = {account.region: account for account in regions}
    failed: list[str] = []
    for one in decisions:
        if one.action is not Action.DELETE:
            continue
        what = f"{one.found.kind} {one.found.id}"
        try:
            with progress.step(f"delete {what}"):
                orphans.remove(accounts[one.found.region], one)
        except CloudFailed as refused:
            failed.append(f"{what}: {refused.message}")
    if failed:
        raise CloudFailed(
            f"{len(failed)} resources could not be deleted",
            tail=tuple(failed),
            hint="run it again, or delete them yourself",
        )
    _close(workspace, accounts)


def _close(workspace: Workspace, accounts: Mapping[str, Account]) -> None:
    """Mark the entries of runs that ended long ago as deleted: the accounts have none of them any more."""
    for run in runs(workspace):
        path = workspace.runs_dir / run / LEDGER
        if workspace.is_live(run) or not path.exists() or time.time() - path.stat().st_mtime < _LATE_SECONDS:
            continue
        ledger = Ledger(path)
        for entry in read(path):
            if not entry.deleted and entry.region in accounts:
                ledger.deleted(entry)


def entries(workspace: Workspace) -> list[LedgerEntry]:
    """Return what the ledgers of this host's runs have."""
    return [entry for run in runs(workspace) for entry in read(workspace.runs_dir / run / LEDGER)]


def runs(workspace: Workspace) -> list[str]:
    """Return the ids of this host's runs."""
    return sorted(path.name for path in workspace.runs_dir.glob("*/"))


def every_region(images: Iterable[Image], extra: Sequence[str] = ()) -> Regions:
    """Return the regions of all images and of their copies, and the `extra` ones, each once."""
    found: dict[str, tuple[Account, float]] = {}
    named = [
        (region, image.aws.lifetime)
        for image in images
        for region in (image.aws.region, *(one.region for one in image.aws.copy_to))
    ]
    longest = max((lifetime for _, lifetime in named), default=0.0)
    for region, lifetime in [*named, *((name, longest) for name in extra)]:
        opened = Account.open(region)
        _, known = found.get(opened.region, (opened, 0.0))
        found[opened.region] = (opened, max(known, lifetime))
    return dict(found.values())
