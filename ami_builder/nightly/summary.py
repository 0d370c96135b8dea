"""Texts about a nightly run for people: one line, a chat message, and a page."""

import re
from collections.abc import Iterable, Sequence

from ami_builder.console import duration
from ami_builder.core.errors import AmiBuilderError
from ami_builder.core.records import NightlyRun, NightlyStatus, RegionResult

_LONGEST_LIST = 10
_LONGEST_LINE = 300
_DIGEST = re.compile(r"[0-9a-f]{64}")
_DIGITS = 16


def headline(run: NightlyRun) -> str:
    """Return the result of a nightly run in one line."""
    return " ".join(f"{run.image} ({run.target}): {_outcome(run)}".split())


def text(run: NightlyRun) -> str:
    """Return a chat message for Slack: the result, then what a person needs to act."""
    lines = [f"*{_escaped(headline(run))}*"]
    for heading, details in _details(run):
        lines.append(f"{heading}:")
        lines += (f"• {_escaped(line)}" for line in _shortened(details))
    if todo := _todo(run):
        lines.append(_escaped(todo))
    lines.append(f"nightly run {_escaped(run.id or '-')}, {_took(run)}, exit code {run.exit_code}")
    return "\n".join(lines)


def aborted_text(images: Sequence[str], target: str, error: Exception) -> str:
    """Return the chat message about a nightly run that could not start, or had an unexpected error."""
    what = f"{', '.join(images) or 'all images'} ({target})"
    if isinstance(error, AmiBuilderError):
        result, why, code = "did not start", error.message, error.exit_code
    else:
        # Some images may have been promoted already.
        result, why, code = "ended early", f"{type(error).__name__}: {error}", 1
    line = " ".join(f"{what}: FAILED, the nightly run {result}: {why}".split())[:_LONGEST_LINE]
    return f"*{_escaped(line)}*\nexit code {code}"


def markdown(run: NightlyRun) -> str:
    """Return summary.md: the result, what to do next, then everything else."""
    facts = {
        "nightly run": run.id,
        "started": f"{run.started:%Y-%m-%d %H:%M:%S %Z}".rstrip(),
        "took": _took(run),
        "image": run.location,
        "digest": run.digest,
        **({"base AMI": run.base} if run.base else {}),
        f"previous image of {run.channel}": run.before,
        "exit code": str(run.exit_code),
    }
    parts = [f"# {_plain(headline(run))}", _plain(_todo(run)), _table(("", ""), facts.items())]
    if run.places:
        rows = [(one.place, one.ending, short(one.id), one.text) for one in run.places]
        parts += ["## Regions", _table(("where", "result", "image", "reason"), rows)]
    if run.error and run.places:
        parts += ["## Errors", _plain(run.error)]
    parts += [_list("On hold because of", run.drifts)]
    parts += [_list("Changed packages", run.moved)]
    parts += [_list("Not compared", run.not_compared)]
    parts += [_list("Deprecated or deleted", run.retired)]
    if run.steps:
        steps = [(one.name, one.status, duration(one.seconds), one.detail) for one in run.steps]
        parts += ["## Steps", _table(("step", "result", "took", ""), steps)]
    return "\n\n".join(part for part in parts if part) + "\n"


def short(image_id: str) -> str:
    """Return an id in short: the first digits of a digest, or a whole AMI id."""
    return image_id[:_DIGITS] if _DIGEST.fullmatch(image_id) else image_id


def _outcome(run: NightlyRun) -> str:
    stays = f"{run.channel} stays at {short(run.before)}" if run.before else ""
    empty = f"{run.channel} has no image"
    match run.ending:
        case NightlyStatus.UNCHANGED:
            return f"unchanged, nothing was built for {run.channel}"
        case NightlyStatus.PROMOTED:
            was = f", previously {short(run.before)}" if run.before else ", its first image"
            return f"promoted to {run.channel}: {_new(run)}{was}"
        case NightlyStatus.HELD:
            return f"ON HOLD, a person decides whether to promote {_new(run)}; {stays or empty}"
        case NightlyStatus.INCONCLUSIVE:
            return f"INCONCLUSIVE, {_first_line(run)}; {stays or empty}"
        case NightlyStatus.PARTLY:
            failed = [one.place for one in run.places if one.ending is NightlyStatus.FAILED]
            held = [one.place for one in _held(run)]
            well = len(run.places) - len(failed) - len(held)
            rest = [("FAILED", failed), ("ON HOLD", held)]
            where = "; ".join(f"{what} in {', '.join(places)}" for what, places in rest if places)
            return f"PARTLY promoted to {run.channel}, in {well} of {len(run.places)} regions; {where}"
        case NightlyStatus.UNSHARED:
            unshared = [one.place for one in run.places if one.ending is NightlyStatus.UNSHARED]
            return f"unchanged, nothing was built for {run.channel}; sharing FAILED in {', '.join(unshared)}"
        case NightlyStatus.FAILED:
            return f"FAILED, {_first_line(run)}{'; ' + stays if stays else ''}"


def _first_line(run: NightlyRun) -> str:
    first = run.error.strip().split("\n")[0] or "for an unknown reason"
    return first[:_LONGEST_LINE]


def _new(run: NightlyRun) -> str:
    """Return the new image as `ami-builder` takes it: the digits of a digest, or an AMI id."""
    # A path would be longer than the digest.
    return short(run.digest) if "/" in run.location else run.location


def _todo(run: NightlyRun) -> str:
    if run.ending is NightlyStatus.INCONCLUSIVE:
        return "The image is kept, and the next nightly run verifies it again."
    if run.ending is NightlyStatus.PARTLY:
        commands = [
            f'`ami-builder promote {short(one.id)} {run.channel} --region {one.place} --reason "…"`'
            for one in _held(run)
        ]
        return f"{'; '.join(commands)} promotes it there anyway." if commands else ""
    if run.ending is not NightlyStatus.HELD:
        return ""
    new = run.before and run.before != run.location
    diff = f"`ami-builder diff {short(run.before)} {_new(run)}` shows what changed; " if new else ""
    return f'{diff}`ami-builder promote {_new(run)} {run.channel} --reason "…"` promotes it anyway.'


def _held(run: NightlyRun) -> Sequence[RegionResult]:
    return [one for one in run.places if one.ending is NightlyStatus.HELD]


def _details(run: NightlyRun) -> Iterable[tuple[str, tuple[str, ...]]]:
    """Return the part of a message about everything unusual."""
    failed = tuple(
        f"{one.place}: {one.ending}, {one.text}"
        for one in run.places
        if one.ending in {NightlyStatus.FAILED, NightlyStatus.HELD}
    )
    unshared = tuple(f"{one.place}: {one.text}" for one in run.places if one.ending is NightlyStatus.UNSHARED)
    details = {
        "On hold because of": run.drifts,
        "Not promoted": failed,
        "Not shared": unshared,
        "Changed packages": run.moved,
        "Deprecated or deleted": run.retired,
    }
    return [(heading, lines) for heading, lines in details.items() if lines]


def _took(run: NightlyRun) -> str:
    if run.ended is None:
        return "not finished"
    # The clock may have been set back.
    return duration(max((run.ended - run.started).total_seconds(), 0))


def _shortened(lines: tuple[str, ...]) -> tuple[str, ...]:
    first = tuple(line[:_LONGEST_LINE] for line in lines[:_LONGEST_LIST])
    left = len(lines) - len(first)
    return (*first, f"and {left} more") if left else first


def _escaped(line: str) -> str:
    """Return a line without markup for Slack: no mention, no link."""
    for special, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        line = line.replace(special, entity)
    return " ".join(line.split())


def _plain(line: str) -> str:
    """Return a line without markup for Markdown: no tag, no border of a table, no line break."""
    return _escaped(line).replace("|", "&#124;")


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *((_plain(cell) for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _list(heading: str, lines: tuple[str, ...]) -> str:
    return "\n".join([f"## {heading}", "", *(f"- {_plain(line)}" for line in lines)]) if lines else ""
