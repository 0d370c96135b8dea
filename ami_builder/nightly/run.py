"""`ami-builder nightly`: from the inputs of today to a promoted image, or to nothing if nothing has changed.

resolve -> skip if the current images are of these inputs -> build and verify -> compare with the current
image -> copy to every target, share -> promote -> clean up -> report. Each step is noted when it is done, so
a nightly run that was killed continues where it stopped. A region that fails does not stop the others: its
channel is unchanged, and the next run tries it again.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from ami_builder.build import channels
from ami_builder.build.build import Options, build_from, resolve
from ami_builder.build.inputs import Inputs
from ami_builder.build.target import Target
from ami_builder.config.schema import Image
from ami_builder.console import Progress
from ami_builder.core.cleanup import Action, Decision
from ami_builder.core.errors import AmiBuilderError, CloudFailed, Inconclusive, Locked, OnHold
from ami_builder.core.records import NightlyRun, NightlyStatus, RegionResult
from ami_builder.nightly import gate, summary
from ami_builder.report.collect import save_nightly_run
from ami_builder.state.journal import NightlyJournal, NightlyStep, open_journal
from ami_builder.state.runs import compare_images
from ami_builder.state.workspace import StoredImage, Workspace, write_atomically
from ami_builder.verify.executor import side_by_side
from ami_builder.verify.verdict import is_verified

Prune = Callable[[Progress], Iterable[Decision]]
"""Plans and deletes for all images; yields what is done. Raises Locked and CloudFailed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A nightly run, and the error that ended it, if one did."""

    run: NightlyRun
    error: AmiBuilderError | None


def nightly(
    subjects: Sequence[tuple[Image, Target]],
    workspace: Workspace,
    progress: Progress,
    *,
    prune: Prune | None,
    notify: Callable[[str], str],
) -> tuple[Ended, ...]:
    """Do a nightly run for each image at its home target, clean up once, report, and return the results.

    `notify` sends a text and returns an error message, or nothing; its errors never fail a run. Raises Locked
    when another nightly run of one of the images is active, UsageError for wrong targets, and Interrupted.
    All other errors are in what is returned.
    """
    workspace.ensure()
    with ExitStack() as locks:
        for image, home in subjects:
            locks.enter_context(workspace.lock_nightly_run(image.name, home.kind))
        runs = [
            _ImageRun(image, (home, *home.copies(image)), workspace, progress) for image, home in subjects
        ]
        at_once = len(runs) if all(home.builds_side_by_side for _, home in subjects) else 1
        ended = side_by_side([run.go for run in runs], workers=at_once or 1)
        retired, failed = _prune(prune, progress)
        finish = partial(_finish, workspace=workspace, retired=retired, failed=failed, notify=notify)
        return tuple(
            Ended(run=finish(replace(run, steps=progress.steps), journal), error=error)
            for run, journal, error in ended
        )


def _prune(prune: Prune | None, progress: Progress) -> tuple[Sequence[Decision], AmiBuilderError | None]:
    done: list[Decision] = []
    try:
        if prune is not None:
            done.extend(prune(progress))
    except AmiBuilderError as failed:
        return done, failed
    return done, None


def _finish(
    run: NightlyRun,
    journal: NightlyJournal,
    workspace: Workspace,
    retired: Sequence[Decision],
    failed: AmiBuilderError | None,
    notify: Callable[[str], str],
) -> NightlyRun:
    """Report on a nightly run, once, and end its journal."""
    mine = [
        f"{one.action}d {one.candidate.id}: {one.reason}"
        for one in retired
        if one.candidate.image == run.image and one.action is not Action.KEEP
    ]
    # The report includes what was deleted before the run was killed.
    mine = [*(journal.find(NightlyStep.PRUNED) or {}).get("retired", ()), *mine]
    if failed is not None:
        changed = any(one.action is not Action.KEEP for one in retired)
        result = "the clean-up did not finish" if changed else "nothing was deleted"
        mine.append(f"{result}: {failed.message}")
        # While a build is running nothing can be deleted, and that is fine: the next nightly run does it.
        if not run.exit_code and not isinstance(failed, Locked):
            run = replace(run, exit_code=failed.exit_code)
    journal.note(NightlyStep.PRUNED, retired=mine)
    run = replace(run, retired=tuple(mine), ended=datetime.now(UTC))
    write_atomically(journal.directory / "summary.md", summary.markdown(run))
    save_nightly_run(run, journal.directory, workspace)
    unsent = ""
    if journal.find(NightlyStep.REPORTED) is None:
        # Noted first: a message that a crash loses is better than one that is sent twice.
        journal.note(NightlyStep.REPORTED)
        unsent = notify(summary.text(run)) if run.ending is not NightlyStatus.UNCHANGED else ""
    journal.note(
        NightlyStep.ENDED,
        ending=str(run.ending),
        exit_code=run.exit_code,
        error=run.error,
        unsent=unsent,
    )
    return run


class _ImageRun:
    """The nightly run of one image, without the clean-up and the report."""

    def __init__(
        self, image: Image, targets: Sequence[Target], workspace: Workspace, progress: Progress
    ) -> None:
        self.image, self.home, self.targets = image, targets[0], targets
        self.workspace, self.progress = workspace, progress
        self.channel = image.nightly.channel
        self.run = NightlyRun(
            id="",
            image=image.name,
            target=self.home.kind,
            channel=self.channel,
            started=datetime.now(UTC),
            ended=None,
            ending=NightlyStatus.FAILED,
            digest="",
            before="",
            location="",
        )

    def go(self) -> tuple[NightlyRun, NightlyJournal, AmiBuilderError | None]:
        """Return how it ended, the journal to note that in, and the error. Raises no AmiBuilderError."""
        journal: NightlyJournal | None = None
        error: AmiBuilderError | None = None
        try:
            inputs = resolve(self.image, self.home, self.workspace, self.progress, refresh=True)
            journal = open_journal(self.workspace, self.image.name, self.home.kind, inputs.digest)
            self._record(digest=inputs.digest, base=inputs.base)
            self._go(inputs, journal)
        except AmiBuilderError as failed:
            error = failed
            ending = NightlyStatus.INCONCLUSIVE if isinstance(failed, Inconclusive) else NightlyStatus.FAILED
            self._record(ending=ending, error=failed.message, exit_code=failed.exit_code)
        journal = journal or open_journal(self.workspace, self.image.name, self.home.kind, "")
        self._record(id=journal.id, started=journal.started)
        return self.run, journal, error

    def _go(self, inputs: Inputs, journal: NightlyJournal) -> None:
        self._record(before=channels.current(self.home.channels(self.image), self.channel))
        if journal.find(NightlyStep.BUILT) is None and (unchanged := self._unchanged(inputs)):
            results = [
                self._shared(target, stored) for target, stored in zip(self.targets, unchanged, strict=True)
            ]
            self._record(location=unchanged[0].artifact.location, places=tuple(results), **_together(results))
            return
        stored = build_from(inputs, Options(), self.home, self.workspace, self.progress).stored
        if journal.find(NightlyStep.BUILT) is None:
            journal.note(NightlyStep.BUILT, location=stored.artifact.location, run=stored.artifact.run_id)
        self._record(location=stored.artifact.location)
        with self.progress.step(f"compare with {self.channel}") as step:
            drifts = self._compared(stored, journal)
            step.done("; ".join(drifts) or "no drift")
        if drifts:
            self._record(ending=NightlyStatus.HELD, exit_code=OnHold.exit_code)
            return
        results = self._release(stored, journal)
        self._record(places=tuple(results), **_together(results))

    def _record(self, **changes: object) -> None:
        self.run = replace(self.run, **changes)  # type: ignore[arg-type]

    def _unchanged(self, inputs: Inputs) -> list[StoredImage]:
        """Return the current image of each target if all are verified and of these inputs, else nothing."""
        found = []
        for target in self.targets:
            record = target.channels(self.image)
            current = channels.current(record, self.channel)
            stored = record.find(current) if current else None
            if (
                stored is None
                or channels.is_lost(record, self.channel)
                or stored.artifact.digest != inputs.digest
                or not is_verified(stored, self.image)
            ):
                return []
            found.append(stored)
        return found

    def _shared(self, target: Target, stored: StoredImage) -> RegionResult:
        """Share an unchanged image, since the configuration of that is no part of its digest."""
        try:
            id_there = target.channels(self.image).id_of(stored)
            with self.progress.step(f"share in {target.name}") as step:
                added = target.share(self.image, stored, step).added
        except AmiBuilderError as failed:
            return replace(_failed(target, stored.name, failed), ending=NightlyStatus.UNSHARED)
        return RegionResult(
            place=target.name,
            id=id_there,
            ending=NightlyStatus.UNCHANGED,
            text="already current" + (f"; now shared with {', '.join(added)}" if added else ""),
        )

    def _compared(self, stored: StoredImage, journal: NightlyJournal) -> Sequence[str]:
        """Return the reasons to put the image on hold, as noted if they were noted before."""
        noted = journal.find(NightlyStep.COMPARED)
        if noted is None:
            noted = self._compare(stored)
            journal.note(NightlyStep.COMPARED, **noted)
        drifts = tuple(noted["drifts"])
        self._record(
            before=str(noted["before"]),
            drifts=drifts,
            moved=tuple(noted["moved"]),
            not_compared=tuple(noted["not_compared"]),
        )
        return drifts

    def _compare(self, stored: StoredImage) -> Mapping[str, Any]:
        record = self.home.channels(self.image)
        current = channels.current(record, self.channel)
        same: Mapping[str, Any] = {"before": current, "drifts": [], "moved": [], "not_compared": []}
        if why := channels.taken_out(record, self.channel, record.id_of(stored)):
            return {**same, "drifts": [why]}
        before = record.find(current) if current else None
        if before is None or before.artifact.digest == stored.artifact.digest:
            return same
        difference = compare_images(before, stored, self.workspace)
        bounds = self.image.nightly
        drifts = [drift.text for drift in gate.judge(difference, bounds)]
        return {
            "before": current,
            "drifts": drifts,
            "moved": list(gate.moved(difference, bounds)),
            "not_compared": list(gate.not_compared(difference)),
        }

    def _release(self, stored: StoredImage, journal: NightlyJournal) -> list[RegionResult]:
        """Copy the image to every target, and promote it wherever that succeeded."""
        received = side_by_side([partial(self._receive, one, stored, journal) for one in self.targets])
        return [
            found if isinstance(found, RegionResult) else self._promote(target, found, journal)
            for target, found in zip(self.targets, received, strict=True)
        ]

    def _receive(
        self, target: Target, stored: StoredImage, journal: NightlyJournal
    ) -> StoredImage | RegionResult:
        try:
            with self.progress.step(f"release in {target.name}") as step:
                there = target.receive(self.image, stored, step)
                target.share(self.image, there, step)
                step.done(there.name)
        except AmiBuilderError as failed:
            return _failed(target, "", failed)
        journal.note(NightlyStep.COPIED, target.name, location=there.artifact.location)
        return there

    def _promote(self, target: Target, stored: StoredImage, journal: NightlyJournal) -> RegionResult:
        result = partial(RegionResult, place=target.name, id=stored.name)
        try:
            record = target.channels(self.image)
            id_there = record.id_of(stored)
            result = partial(result, id=id_there)
            if (noted := journal.find(NightlyStep.PROMOTED, target.name)) is not None:
                return result(ending=NightlyStatus(noted["ending"]), text=str(noted["text"]))
            if why := channels.taken_out(record, self.channel, id_there):
                return result(ending=NightlyStatus.HELD, text=f"{why}; promote it by hand to override that")
            with self.progress.step(f"promote in {target.name}") as step:
                known, why = self.image.lifecycle.channels, f"nightly run {journal.id}"
                moved = channels.promote(record, stored, self.channel, known, why)
                # Killed before it was noted, this run finds its own move.
                ours = moved.entries or [e for e in record.entries(self.channel)[-1:] if e.reason == why]
                done = result(
                    ending=NightlyStatus.PROMOTED if ours else NightlyStatus.UNCHANGED,
                    text=f"now current in {self.channel}" if ours else "already current",
                )
                step.done(done.text)
        except AmiBuilderError as failed:
            return _failed(target, stored.name, failed)
        journal.note(NightlyStep.PROMOTED, target.name, id=id_there, ending=str(done.ending), text=done.text)
        return done


def _failed(target: Target, id_there: str, failed: AmiBuilderError) -> RegionResult:
    return RegionResult(place=target.name, id=id_there, ending=NightlyStatus.FAILED, text=failed.message)


def _together(results: Sequence[RegionResult]) -> Mapping[str, object]:
    """Return how a nightly run ended, from its results at all targets."""
    endings = {one.ending for one in results}
    # A run that fails to share an unchanged image promotes nothing, so it has no other failures.
    if found := endings & {NightlyStatus.UNSHARED, NightlyStatus.FAILED}:
        ending = next(iter(found))
        failed = [f"{one.place}: {one.text}" for one in results if one.ending is ending]
        code = {"error": ", ".join(failed), "exit_code": CloudFailed.exit_code}
    elif NightlyStatus.HELD in endings:
        ending, code = NightlyStatus.HELD, {"exit_code": OnHold.exit_code}
    else:
        promoted = NightlyStatus.PROMOTED in endings
        return {"ending": NightlyStatus.PROMOTED if promoted else NightlyStatus.UNCHANGED}
    if ending is not NightlyStatus.UNSHARED and endings & {NightlyStatus.PROMOTED, NightlyStatus.UNCHANGED}:
        ending = NightlyStatus.PARTLY
    return {"ending": ending, **code}
