"""`ami-builder report`: collect the page of a run or a nightly run from the records in the workspace."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ami_builder import console
from ami_builder.core.records import NightlyRun, NightlyStatus, Outcome, RunStatus, Verdict
from ami_builder.report import html, sections
from ami_builder.report.page import Fact, Page, Tone
from ami_builder.state import runs
from ami_builder.state.journal import NightlyJournal, NightlyStep
from ami_builder.state.runs import RecordedNightlyRun, RecordedRun, compare_images
from ami_builder.state.workspace import Workspace, dump, write_atomically

if TYPE_CHECKING:
    from pathlib import Path

PAGE = "report.html"
_COMMANDS = {"build": "Build", "verify": "Verification"}


def write_page(
    subject: RecordedRun | RecordedNightlyRun, workspace: Workspace, output: Path | None = None
) -> Path:
    """Write the page of a run or a nightly run beside its record, or to `output`, and return its path."""
    path = output or subject.directory / PAGE
    known = runs.runs(workspace)
    if isinstance(subject, RecordedRun):
        page = _of_run(subject, known, workspace, path)
    else:
        page = _of_nightly_run(subject, known, workspace, path)
    write_atomically(path, html.render(page))
    return path


def save_nightly_run(record: NightlyRun, directory: Path, workspace: Workspace) -> None:
    """Write the record of a nightly run, and its page if anything happened. A failing page raises nothing."""
    dump(record, directory / runs.NIGHTLY_RECORD)
    if record.ending is NightlyStatus.UNCHANGED:
        # Its page would repeat the previous one. `ami-builder report` can still make it.
        return
    try:
        write_page(RecordedNightlyRun(record=record, directory=directory), workspace)
    except Exception as wrong:
        # The promotion has already happened: a page that can't be made must not fail the nightly run.
        console.note(
            f"the report of nightly run {record.id} could not be written: {type(wrong).__name__}: {wrong}"
        )


def _of_run(run: RecordedRun, known: tuple[RecordedRun, ...], workspace: Workspace, path: Path) -> Page:
    record = run.record
    tone, word, sentence = _run_ended(run, workspace)
    build = run if run.baked else _builder(known, record.digest, run.when)
    page = Page(
        title=f"{_COMMANDS.get(record.command, record.command)} of image {record.image}",
        tone=tone,
        word=word,
        sentence=sentence,
        facts=(
            *_image_facts(record.digest, build),
            *_time_facts(run.when, sections.took(run)),
            Fact(name="Run", text=run.id, exact=True),
        ),
        steps=sections.bars(run.record.own_steps),
        links=sections.links([run.directory], path),
    )
    return _with_images(_with_verdict(page, run), build, known, workspace)


def _run_ended(run: RecordedRun, workspace: Workspace) -> tuple[Tone, str, str]:
    record, verdict = run.record, run.record.verdict
    match record.status:
        case RunStatus.PASSED if verdict is not None:
            return Tone.GOOD, "Passed", f"All four numbers are equal: {_counted(verdict)}."
        case RunStatus.PASSED:
            return Tone.WARN, "Not verified", "The image was built but not verified."
        case RunStatus.FAILED:
            return Tone.BAD, "Failed", record.error or "The record gives no reason."
        case RunStatus.INCONCLUSIVE:
            return Tone.UNSURE, "Inconclusive", record.error or "The host was too busy to judge the image."
        case RunStatus.INTERRUPTED:
            return Tone.WARN, "Interrupted", record.error or "The run was stopped."
        case RunStatus.RUNNING if workspace.is_live(run.id):
            return Tone.IDLE, "Running", "The run has not finished yet."
        case RunStatus.RUNNING:
            return Tone.WARN, "Interrupted", "The process was killed."


def _counted(verdict: Verdict) -> str:
    machines = dict.fromkeys(result.machine for result in verdict.results)
    ran = sum(result.outcome is not Outcome.SKIPPED for result in verdict.results)
    skipped = len(verdict.results) - ran
    left_out = f", {skipped} skipped" if skipped else ""
    return f"{ran} checks passed on {' and '.join(machines)}{left_out}"


def _of_nightly_run(
    one: RecordedNightlyRun, known: tuple[RecordedRun, ...], workspace: Workspace, path: Path
) -> Page:
    record = one.record
    tone, word, sentence = _night_ended(record)
    run, build = _run_of(one, known), _builder(known, record.digest, one.when)
    # An earlier run is not part of the time of this nightly run.
    mine = run.record.own_steps if run is not None and run.when >= record.started else ()
    ended = (record.ended - record.started).total_seconds() if record.ended else None
    page = Page(
        title=f"Nightly run of image {record.image}",
        tone=tone,
        word=word,
        sentence=f"{sentence} {record.error}".rstrip(),
        facts=(
            Fact(name="Channel", text=record.channel),
            *_image_facts(record.digest, build),
            *([Fact(name="Current before", text=record.before, exact=True)] if record.before else []),
            *_time_facts(record.started, ended),
            Fact(name="Nightly run", text=record.id, exact=True),
            *([Fact(name="Run", text=run.id, exact=True)] if run else []),
        ),
        nightly=record,
        steps=sections.bars(record.steps or mine),
        links=sections.links([one.directory, *([run.directory] if run else [])], path),
    )
    if run is None:
        return page
    return _with_images(_with_verdict(page, run), build, known, workspace, record.before)


def _night_ended(record: NightlyRun) -> tuple[Tone, str, str]:
    channel = record.channel
    match record.ending:
        case NightlyStatus.UNCHANGED:
            return (
                Tone.IDLE,
                "Unchanged",
                f"Nothing was built: the current image of {channel} has these inputs.",
            )
        case NightlyStatus.PROMOTED:
            return (
                Tone.GOOD,
                "Promoted",
                f"The image passed all checks and is now the current one of {channel}.",
            )
        case NightlyStatus.HELD:
            return Tone.WARN, "On hold", f"The image was not promoted to {channel}. A person has to decide."
        case NightlyStatus.INCONCLUSIVE:
            sentence = f"Nothing was promoted to {channel}. The next nightly run verifies the image again."
            return Tone.UNSURE, "Inconclusive", sentence
        case NightlyStatus.PARTLY:
            sentence = f"The image is now the current one of {channel}, but not in every region."
            return Tone.BAD, "Promoted in part", sentence
        case NightlyStatus.UNSHARED:
            sentence = f"The current image of {channel} has these inputs, but it was not shared everywhere."
            return Tone.BAD, "Not shared", sentence
        case NightlyStatus.FAILED:
            return Tone.BAD, "Failed", f"Nothing was promoted to {channel}."


def _run_of(one: RecordedNightlyRun, known: tuple[RecordedRun, ...]) -> RecordedRun | None:
    """Return the run that a nightly run made, else the run that verified the image it found."""
    record = one.record
    # A part of a run (one machine of an AMI) has no verdict.
    same = [r for r in known if record.digest and r.record.digest == record.digest and not r.is_part]
    about = [run for run in same if run.when <= one.when]
    noted = (NightlyJournal(one.directory).find(NightlyStep.BUILT) or {}).get("run")
    verified = [run for run in about if run.record.verdict is not None]
    in_it = [run for run in about if run.when >= record.started]
    return next(iter([*in_it[-1:], *verified[-1:], *(run for run in about if run.id == noted)]), None)


def _builder(known: tuple[RecordedRun, ...], digest: str | None, until: datetime) -> RecordedRun | None:
    """Return the last run that built the image with a digest."""
    made = [run for run in known if run.baked and run.record.digest == digest and run.when <= until]
    return made[-1] if made else None


def _image_facts(digest: str | None, build: RecordedRun | None) -> tuple[Fact, ...]:
    facts = [Fact(name="Digest", text=digest, exact=True)] if digest else []
    if build is not None and build.baked is not None:
        artifact = build.baked.artifact
        place = f"{artifact.target} ({artifact.region})" if artifact.region else str(artifact.target)
        facts.append(Fact(name="Target", text=place))
        facts.append(Fact(name="Image", text=artifact.location, exact=True))
        facts.append(Fact(name="Size", text=console.size(artifact.size)))
        if build.record.base:
            facts.append(Fact(name="Base AMI", text=build.record.base, exact=True))
    return tuple(facts)


def _time_facts(began: datetime, seconds: float | None) -> tuple[Fact, ...]:
    facts = [Fact(name="Started", text=f"{began.astimezone(UTC):%Y-%m-%d %H:%M} UTC")]
    if seconds is not None:
        facts.append(Fact(name="Took", text=console.duration(seconds)))
    return tuple(facts)


def _with_verdict(page: Page, run: RecordedRun) -> Page:
    verdict = run.record.verdict
    if verdict is None:
        return page
    return replace(
        page,
        starts=sections.starts(verdict, run.directory / "machines"),
        failures=sections.failures(verdict),
        columns=sections.columns(verdict),
        checks=sections.checks(verdict),
    )


def _with_images(
    page: Page,
    build: RecordedRun | None,
    known: tuple[RecordedRun, ...],
    workspace: Workspace,
    before: str | None = None,
) -> Page:
    """Return the page with the trends of an image's builds, and with what changed since an earlier image.

    That is the image with the digest or location `before` (empty: none), else the last other build.
    """
    if build is None or build.baked is None:
        return page
    new = build.baked.artifact
    builds = runs.builds(known, new.image, new.target, build.when)
    page = replace(page, trends=sections.trends(builds))
    for run in reversed(builds if before is None else known):
        if (old := run.baked) is None or old.artifact.digest == new.digest:
            continue
        if before is None or before in (old.artifact.digest, old.artifact.location):
            difference = compare_images(old, build.baked, workspace)
            return replace(page, before=old.artifact.digest, difference=difference)
    return page
