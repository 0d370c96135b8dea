"""`ami-builder nightly`: from today's inputs to a promoted image, or to nothing where nothing has changed.

resolve -> skip if that already stands promoted -> build and verify -> compare with what stands there -> bring
to every place, share -> promote -> prune -> report. Each step is noted once it is done and finds what it did
before, so a night that was killed anywhere goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from ami_builder.build import channels
from ami_builder.build.build import Options, build_from, resolve
from ami_builder.build.inputs import Inputs
from ami_builder.build.place import Place
from ami_builder.build.target import Site
from ami_builder.config.schema import Image
from ami_builder.console import Progress, Step
from ami_builder.core.cleanup import Action, Decision
from ami_builder.core.errors import AmiBuilderError, CloudFailed, Inconclusive, Locked, OnHold
from ami_builder.core.records import NightlyRun, NightlyStatus, RegionResult, TargetKind
from ami_builder.nightly import gate, summary
from ami_builder.report.collect import save_nightly_run
from ami_builder.state.journal import NightlyJournal, NightlyStep, open_journal
from ami_builder.state.runs import compare_images
from ami_builder.state.workspace import StoredImage, Workspace, write_atomically
from ami_builder.verify.concurrency import side_by_side
from ami_builder.verify.verdict import is_verified


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What a night is about: an image, where it is baked, and where it is promoted, home first."""

    image: Image
    site: Site
    places: Sequence[Place]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A night, and the error that it ended with, if it did."""

    night: NightlyRun
    error: AmiBuilderError | None


Prune = Callable[[Progress], Sequence[Decision]]
"""Plans and deletes over all images; raises Locked, CloudFailed."""


def nightly(
    subjects: Sequence[Subject],
    workspace: Workspace,
    progress: Progress,
    *,
    prune: Prune | None,
    notify: Callable[[str], str],
) -> tuple[Ended, ...]:
    """Do a night for each image, prune once, report, and return how each night ended.

    `notify` sends a text and returns what went wrong, or nothing; that never fails a night. Raises Locked
    when another night of one of the images is going, Interrupted; all else is told in what is returned.
    """
    workspace.ensure()
    with ExitStack() as locks:
        for one in subjects:
            locks.enter_context(workspace.lock_nightly_run(one.image.name, one.site.target))
        # Machines of this computer would only make each other late; an account has room for all.
        at_once = len(subjects) if all(one.site.target is TargetKind.AWS for one in subjects) else 1
        calls = [_Going(one, workspace, progress).go for one in subjects]
        going = side_by_side(calls, workers=at_once or 1)
        retired, wrong = _prune(prune, progress)
        finish = partial(_finish, workspace=workspace, retired=retired, wrong=wrong, notify=notify)
        return tuple(
            Ended(night=finish(replace(night, steps=progress.steps), journal), error=error)
            for night, journal, error in going
        )


def _prune(prune: Prune | None, progress: Progress) -> tuple[Sequence[Decision], AmiBuilderError | None]:
    if prune is None:
        return (), None
    try:
        return prune(progress), None
    except AmiBuilderError as failed:
        return (), failed


def _finish(
    night: NightlyRun,
    journal: NightlyJournal,
    workspace: Workspace,
    retired: Sequence[Decision],
    wrong: AmiBuilderError | None,
    notify: Callable[[str], str],
) -> NightlyRun:
    """Report on a night, once, and end its journal."""
    mine = [
        f"{one.action}d {one.candidate.id}: {one.reason}"
        for one in retired
        if one.candidate.image == night.image and one.action is not Action.KEEP
    ]
    # What was pruned before this night was cut off belongs to its report too.
    mine = [*(journal.find(NightlyStep.PRUNED) or {}).get("retired", ()), *mine]
    if wrong is not None:
        mine.append(f"nothing was pruned: {wrong.message}")
        # A build that is going meanwhile is nothing wrong; the next night prunes.
        if not night.exit_code and not isinstance(wrong, Locked):
            night = replace(night, exit_code=wrong.exit_code)
    journal.note(NightlyStep.PRUNED, retired=mine)
    night = replace(night, retired=tuple(mine), ended=datetime.now(UTC))
    write_atomically(journal.directory / "summary.md", summary.markdown(night))
    save_nightly_run(night, journal.directory, workspace)
    unsent = ""
    if journal.find(NightlyStep.REPORTED) is None:
        # Noted before: a message that is lost with the machine is better than one that comes twice.
        journal.note(NightlyStep.REPORTED)
        unsent = notify(summary.text(night)) if night.ending is not NightlyStatus.UNCHANGED else ""
    journal.note(
        NightlyStep.ENDED,
        ending=str(night.ending),
        exit_code=night.exit_code,
        error=night.error,
        unsent=unsent,
    )
    return night


class _Going:
    """A night of one image, but for the pruning and the report."""

    def __init__(self, subject: Subject, workspace: Workspace, progress: Progress) -> None:
        self.image, self.site, self.places = subject.image, subject.site, subject.places
        self.workspace, self.progress = workspace, progress
        self.channel = self.image.nightly.channel
        self.night = NightlyRun(
            id="",
            image=self.image.name,
            target=self.site.target,
            channel=self.channel,
            started=datetime.now(UTC),
            ended=None,
            ending=NightlyStatus.FAILED,
            digest="",
            before="",
            location="",
            places=(),
            drifts=(),
            moved=(),
            retired=(),
            error="",
            exit_code=0,
            steps=(),
        )

    def go(self) -> tuple[NightlyRun, NightlyJournal, AmiBuilderError | None]:
        """Tell how it ended, and where that is to be noted; raises Interrupted alone."""
        journal: NightlyJournal | None = None
        error: AmiBuilderError | None = None
        try:
            inputs = resolve(self.image, self.site, self.workspace, self.progress, refresh=True)
            journal = open_journal(self.workspace, self.image.name, self.site.target, inputs.digest)
            self._tell(digest=inputs.digest)
            self._go(inputs, journal)
        except AmiBuilderError as failed:
            error = failed
            ending = NightlyStatus.INCONCLUSIVE if isinstance(failed, Inconclusive) else NightlyStatus.FAILED
            self._tell(ending=ending, error=failed.message, exit_code=failed.exit_code)
        journal = journal or open_journal(self.workspace, self.image.name, self.site.target, "")
        self._tell(id=journal.id, started=journal.started)
        return self.night, journal, error

    def _go(self, inputs: Inputs, journal: NightlyJournal) -> None:
        self._tell(before=channels.current(self.places[0].channels, self.channel))
        if journal.find(NightlyStep.BUILT) is None and (standing := self._standing(inputs)):
            self._tell(
                ending=NightlyStatus.UNCHANGED,
                location=standing[0].artifact.location,
                places=tuple(
                    RegionResult(
                        place=place.name,
                        id=place.channels.id_of(stored),
                        ending=NightlyStatus.UNCHANGED,
                        text="stands there already",
                    )
                    for place, stored in zip(self.places, standing, strict=True)
                ),
            )
            return
        stored = build_from(inputs, Options(), self.site, self.workspace, self.progress).stored
        if journal.find(NightlyStep.BUILT) is None:
            journal.note(NightlyStep.BUILT, location=stored.artifact.location, run=stored.artifact.run_id)
        self._tell(location=stored.artifact.location)
        with self.progress.step(f"compare with {self.channel}") as step:
            drifts = self._compared(stored, journal)
            step.done("; ".join(drifts) or "no drift")
        if drifts:
            self._tell(ending=NightlyStatus.HELD, exit_code=OnHold.exit_code)
            return
        endings = self._release(stored, journal)
        self._tell(places=tuple(endings), **_sum(endings))

    def _tell(self, **changes: object) -> None:
        self.night = replace(self.night, **changes)  # type: ignore[arg-type]

    def _standing(self, inputs: Inputs) -> list[StoredImage]:
        """Return what stands in each place if all of it is of these inputs and proved, else nothing."""
        found = []
        for place in self.places:
            record = place.channels
            id = channels.current(record, self.channel)
            stored = record.find(id) if id else None
            if (
                stored is None
                or stored.artifact.digest != inputs.digest
                or not is_verified(stored, self.image)
            ):
                return []
            found.append(stored)
        return found

    def _compared(self, stored: StoredImage, journal: NightlyJournal) -> Sequence[str]:
        """Return what holds the image back from the channel at home; what was found before stands."""
        told = journal.find(NightlyStep.COMPARED)
        if told is None:
            told = self._compare(stored)
            journal.note(NightlyStep.COMPARED, **told)
        drifts = tuple(told["drifts"])
        self._tell(
            before=str(told["before"]),
            drifts=drifts,
            moved=tuple(told["moved"]),
            not_compared=tuple(told["not_compared"]),
        )
        return drifts

    def _compare(self, stored: StoredImage) -> Mapping[str, Any]:
        record = self.places[0].channels
        id = channels.current(record, self.channel)
        same: Mapping[str, Any] = {"before": id, "drifts": [], "moved": [], "not_compared": []}
        if why := channels.taken_out(record, self.channel, record.id_of(stored)):
            return {**same, "drifts": [why]}
        before = record.find(id) if id else None
        if before is None or before.artifact.digest == stored.artifact.digest:
            return same
        difference = compare_images(before, stored, self.workspace)
        bounds = self.image.nightly
        drifts = [drift.text for drift in gate.judge(difference, bounds)]
        return {
            "before": id,
            "drifts": drifts,
            "moved": list(gate.moved(difference, bounds)),
            "not_compared": list(gate.not_compared(difference)),
        }

    def _release(self, stored: StoredImage, journal: NightlyJournal) -> list[RegionResult]:
        """Bring the image to every place, and promote it wherever that went well."""
        calls = [partial(self._brought, place, stored, journal) for place in self.places]
        brought = side_by_side(calls)
        return [
            found if isinstance(found, RegionResult) else self._promote(place, found, journal)
            for place, found in zip(self.places, brought, strict=True)
        ]

    def _brought(
        self, place: Place, stored: StoredImage, journal: NightlyJournal
    ) -> StoredImage | RegionResult:
        def bring(step: Step) -> StoredImage:
            there = place.bring(stored, step)
            place.share(there, step)
            return there

        try:
            with self.progress.step(f"bring to {place.name}") as step:
                there = bring(step)
                step.done(there.name)
        except AmiBuilderError as failed:
            return _failed(place, "", failed)
        journal.note(NightlyStep.COPIED, place.name, location=there.artifact.location)
        return there

    def _promote(self, place: Place, stored: StoredImage, journal: NightlyJournal) -> RegionResult:
        ending = partial(RegionResult, place=place.name, id=stored.name)
        try:
            record = place.channels
            id = record.id_of(stored)
            ending = partial(ending, id=id)
            if (told := journal.find(NightlyStep.PROMOTED, place.name)) is not None:
                return ending(ending=NightlyStatus(told["ending"]), text=str(told["text"]))
            if why := channels.taken_out(record, self.channel, id):
                return ending(ending=NightlyStatus.HELD, text=f"{why}; promote it by hand if that is meant")
            with self.progress.step(f"promote in {place.name}") as step:
                known, why = self.image.lifecycle.channels, f"night {journal.id}"
                moved = channels.promote(record, stored, self.channel, known, why)
                # Killed before it was noted, this night finds there what it did itself.
                ours = moved.entries or [e for e in record.entries(self.channel)[-1:] if e.reason == why]
                done = ending(
                    ending=NightlyStatus.PROMOTED if ours else NightlyStatus.UNCHANGED,
                    text=f"stands in {self.channel} now" if ours else "stands there already",
                )
                step.done(done.text)
        except AmiBuilderError as failed:
            return _failed(place, stored.name, failed)
        journal.note(NightlyStep.PROMOTED, place.name, id=id, ending=str(done.ending), text=done.text)
        return done


def _failed(place: Place, id: str, failed: AmiBuilderError) -> RegionResult:
    return RegionResult(place=place.name, id=id, ending=NightlyStatus.FAILED, text=failed.message)


def _sum(endings: Sequence[RegionResult]) -> Mapping[str, object]:
    """Return how a night ended by how it ended in each place."""
    kinds = {one.ending for one in endings}
    lacking = ", ".join(f"{one.place}: {one.text}" for one in endings if one.ending is NightlyStatus.FAILED)
    if NightlyStatus.FAILED in kinds:
        whole = kinds == {NightlyStatus.FAILED}
        ending = NightlyStatus.FAILED if whole else NightlyStatus.PARTLY
        return {"ending": ending, "error": lacking, "exit_code": CloudFailed.exit_code}
    if NightlyStatus.HELD in kinds:
        return {"ending": NightlyStatus.HELD, "exit_code": OnHold.exit_code}
    return {"ending": NightlyStatus.PROMOTED if NightlyStatus.PROMOTED in kinds else NightlyStatus.UNCHANGED}
