"""`ami-builder prune` on this host: images, caches and records that nothing needs."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from ami_builder.build.channels import references as references_of
from ami_builder.build.cleanup import KEEP_ALL, policy
from ami_builder.config.schema import Image
from ami_builder.core.cleanup import Action, Candidate, Decision, Reference, RetentionPolicy, plan
from ami_builder.core.records import RunRecord, RunStatus, TargetKind
from ami_builder.qemu.channels import ChannelFile
from ami_builder.state import ledger
from ami_builder.state.journal import unfinished
from ami_builder.state.workspace import StoredImage, Workspace, folders, load

CACHES = ("base", "container")
_DAY = timedelta(days=1)
_RECORDS_KEPT = 365 * _DAY
_MOST_RECORDS = 1000


def plan_cleanup(workspace: Workspace, images: Mapping[str, Image], now: datetime) -> tuple[Decision, ...]:
    """Decide about every finished image, cache and record on this host; change nothing.

    `images` are the configured ones; an image of another name has no policy, and is kept.
    """
    decisions: list[Decision] = []
    stored = [one for one in workspace.images() if one.artifact.target is TargetKind.QEMU]
    for name in sorted({one.artifact.image for one in stored}):
        mine = [one for one in stored if one.artifact.image == name]
        decisions += _plan_images(workspace, name, mine, images, now)
    decisions += _plan_others(workspace, now)
    return (*decisions, *_plan_caches(workspace, images, now), *_plan_records(workspace, now))


@contextmanager
def exclusive(workspace: Workspace, images: Mapping[str, Image]) -> Iterator[None]:
    """Lock the builds and channels of all images, and remove what killed builds left among the images.

    Raises Locked while a build is running.
    """
    workspace.ensure()
    names = sorted({one.artifact.image for one in workspace.images()} | set(images))
    with ExitStack() as locks:
        for name in names:
            for kind in TargetKind:  # a build of either kind uses the caches
                locks.enter_context(workspace.lock(name, kind))
        for name in names:
            locks.enter_context(ChannelFile(workspace=workspace, image=name).locked())
            _sweep(workspace.images_dir / name)
        yield


def delete(decisions: Sequence[Decision]) -> int:
    """Carry out a plan that was made under `exclusive`, and return how many folders were deleted."""
    chosen = [one for one in decisions if one.action is Action.DELETE]
    for decision in chosen:
        _delete(Path(decision.candidate.id))
    return len(chosen)


def _plan_images(
    workspace: Workspace,
    name: str,
    stored: Sequence[StoredImage],
    images: Mapping[str, Image],
    now: datetime,
) -> tuple[Decision, ...]:
    record = ChannelFile(workspace=workspace, image=name)
    been = {channel: {entry.id for entry in record.entries(channel)} for channel in record.used()}
    revoked = record.revoked([one.artifact.digest for one in stored])
    used = {reference.id: reference.by for reference in references_of(record)}
    # A path may go through links, and through a folder that was moved.
    bases = {other: _real(image.base.source) for other, image in images.items() if image.base.source}
    live = [run for run in _live(workspace) if run.image == name]
    journals = {journal.digest: journal.id for journal in unfinished(workspace)}
    candidates, references = [], []
    for one in stored:
        assert one.directory is not None
        image_id = str(one.directory)
        candidates.append(
            Candidate(
                id=image_id,
                image=name,
                created=one.artifact.created,
                size=one.artifact.size,
                channels=frozenset(channel for channel, ids in been.items() if one.artifact.digest in ids),
                revoked=one.artifact.digest in revoked,
                protected=_link(one.directory)
                or ("" if name in images else "no policy: ami-builder.toml does not have this image"),
            )
        )
        if by := used.get(one.artifact.digest):
            references.append(Reference(id=image_id, by=by))
        references += [
            Reference(id=image_id, by=f"the base of image {other}")
            for other, base in bases.items()
            if _real(one.directory) in base.parents
        ]
        if journal := journals.get(one.artifact.digest):
            references.append(Reference(id=image_id, by=f"nightly run {journal} continues with it"))
        references += [Reference(id=image_id, by=f"run {run.run_id} is in progress") for run in live]
    rules = policy(images[name].lifecycle) if name in images else KEEP_ALL
    return plan(candidates, references, rules, now)


def _plan_others(workspace: Workspace, now: datetime) -> tuple[Decision, ...]:
    """Return the folders among the images that are no image; they are kept."""
    found = [
        replace(
            _candidate(name.name, folder),
            protected="it has no artifact.json: delete it yourself if nothing needs it",
        )
        for name in folders(workspace.images_dir)
        for folder in folders(name)
        if not folder.name.startswith(".") and not (folder / "artifact.json").exists()
    ]
    return plan(found, (), KEEP_ALL, now)


def _plan_caches(workspace: Workspace, images: Mapping[str, Image], now: datetime) -> tuple[Decision, ...]:
    """Decide about what a build can make again; every image may need its own."""
    if not images:
        return ()
    settings = [image.lifecycle for image in images.values()]
    rules = RetentionPolicy(
        keep=sum(one.keep for one in settings),
        young=max(one.keep_days for one in settings) * _DAY,
        grace=timedelta(0),
        most=max(one.most_deletions for one in settings),
        size=sum(one.size for one in settings) if all(one.size for one in settings) else 0,
    )
    found = [
        _candidate(f"cache {kind}", folder)
        for kind in CACHES
        for folder in folders(workspace.cache / kind)
        if not folder.name.startswith(".")
    ]
    live = _live(workspace)
    references = [
        Reference(id=one.id, by=f"run {run.run_id} is in progress") for one in found for run in live
    ]
    return plan(found, references, rules, now)


def _plan_records(workspace: Workspace, now: datetime) -> tuple[Decision, ...]:
    """Return which folders of past runs to delete; the kept ones are left out, for there are many."""
    rules = RetentionPolicy(keep=0, young=_RECORDS_KEPT, grace=timedelta(0), most=_MOST_RECORDS)
    runs = [_candidate("runs", folder) for folder in folders(workspace.runs_dir)]
    of_images = folders(workspace.nightly_dir)
    nightly_runs = [
        _candidate("nightly runs", folder)
        for of_image in of_images
        for folder in folders(of_image)
        if not folder.is_symlink()
    ]
    made = {one.artifact.run_id: one.artifact.location for one in workspace.images()}
    references = [
        Reference(id=one.id, by=why) for one in runs for why in _needs(Path(one.id), workspace, made)
    ]
    latest = {_real(of_image / "latest") for of_image in of_images}
    references += [
        Reference(id=one.id, by="the last nightly run") for one in nightly_runs if _real(one.id) in latest
    ]
    decisions = plan([*runs, *nightly_runs], references, rules, now)
    return tuple(one for one in decisions if one.action is not Action.KEEP)


def _candidate(kind: str, folder: Path) -> Candidate:
    return Candidate(
        id=str(folder),
        image=kind,
        created=datetime.fromtimestamp(folder.stat().st_mtime, UTC),
        size=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        protected=_link(folder),
    )


def _real(path: Path | str) -> Path:
    # Path.resolve raises for a link to itself.
    return Path(os.path.realpath(path))


def _link(folder: Path) -> str:
    return "its folder is a symbolic link" if folder.is_symlink() else ""


def _needs(folder: Path, workspace: Workspace, made: Mapping[str, str]) -> Iterator[str]:
    if workspace.is_live(folder.name):
        yield "it is in progress"
    if folder.name in made:
        yield f"it made {made[folder.name]}"
    if any(not entry.deleted for entry in ledger.read(folder / ledger.FILE)):
        yield "`ami-builder gc` needs its ledger"


def _live(workspace: Workspace) -> list[RunRecord]:
    records = (load(RunRecord, folder / "record.json") for folder in folders(workspace.runs_dir))
    running = [record for record in records if record and record.status is RunStatus.RUNNING]
    return [record for record in running if workspace.is_live(record.run_id)]


def _sweep(folder: Path) -> None:
    """Remove unfinished images of killed runs from the images of a name."""
    for each in folders(folder):
        if each.match(".new-*") or each.match(".*.half"):
            each.unlink() if each.is_symlink() else shutil.rmtree(each)


def _delete(folder: Path) -> None:
    """Remove a folder. If this is killed halfway, the rest is not taken for an image or a cache entry."""
    aside = folder.with_name(f".{folder.name}.half")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)
