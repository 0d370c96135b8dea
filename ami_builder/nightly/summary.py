"""A night in words for people: one line, a message, and a page. Pure, from what the night was."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ami_builder.console import duration
from ami_builder.core.errors import AmiBuilderError
from ami_builder.core.records import NightlyRun, NightlyStatus, RegionResult, TargetKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_LONGEST_LIST = 10
_LONGEST_LINE = 300
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SHOWN_DIGITS = 16


def headline(night: NightlyRun) -> str:
    """Return how a night ended, in one line that tells it all."""
    return " ".join(f"{night.image} ({night.target}): {_outcome(night)}".split())


def text(night: NightlyRun) -> str:
    """Return the message for a chat, as Slack reads it: how it ended, then what a person needs to act."""
    lines = [f"*{_escaped(headline(night))}*"]
    for heading, told in _particulars(night):
        lines.append(f"{heading}:")
        lines += (f"• {_escaped(line)}" for line in _shortened(told))
    if todo := _todo(night):
        lines.append(_escaped(todo))
    lines.append(f"night {_escaped(night.id or '-')}, {_took(night)}, exit code {night.exit_code}")
    return "\n".join(lines)


def aborted_text(images: Sequence[str], target: str, error: Exception) -> str:
    """Return the message about a night that could not begin, or that a defect of ours ended."""
    what = f"{', '.join(images) or 'all images'} ({target})"
    if isinstance(error, AmiBuilderError):
        why, code = error.message, error.exit_code
    else:
        why, code = f"a defect of ami-builder, or of this machine: {type(error).__name__}: {error}", 1
    line = " ".join(f"{what}: FAILED, there was no night: {why}".split())[:_LONGEST_LINE]
    return f"*{_escaped(line)}*\nexit code {code}"


def markdown(night: NightlyRun) -> str:
    """Return the page of a night, summary.md: how it ended first, what to do next, then everything."""
    facts = {
        "night": night.id,
        "began": f"{night.started:%Y-%m-%d %H:%M:%S %Z}".rstrip(),
        "took": _took(night),
        "image": night.location,
        "made of": night.digest,
        f"in {night.channel} before": night.before,
        "exit code": str(night.exit_code),
    }
    parts = [f"# {_plain(headline(night))}", _plain(_todo(night)), _table(("", ""), facts.items())]
    if night.places:
        rows = [(one.place, one.ending, short(one.id), one.text) for one in night.places]
        parts += ["## Where", _table(("place", "ended", "stands", "because"), rows)]
    if night.error and night.places:
        parts += ["## What went wrong", _plain(night.error)]
    parts += [_list("What held it back", night.drifts)]
    parts += [_list("Packages that moved", night.moved)]
    parts += [_list("Not compared", night.not_compared)]
    parts += [_list("Retired", night.retired)]
    if night.steps:
        steps = [(one.name, one.status, duration(one.seconds), one.detail) for one in night.steps]
        parts += ["## Steps", _table(("step", "ended", "took", ""), steps)]
    return "\n\n".join(part for part in parts if part) + "\n"


def short(image_id: str) -> str:
    """Return an id as a person reads it: the first digits of a digest, an AMI's id whole."""
    return image_id[:_SHOWN_DIGITS] if _DIGEST.fullmatch(image_id) else image_id


def _outcome(night: NightlyRun) -> str:
    stays = f"{night.channel} stays at {short(night.before)}" if night.before else ""
    empty = f"nothing stands in {night.channel}"
    match night.ending:
        case NightlyStatus.UNCHANGED:
            return f"unchanged, nothing was built for {night.channel}"
        case NightlyStatus.PROMOTED:
            was = f", before it {short(night.before)}" if night.before else ", the first one there"
            return f"promoted to {night.channel}: {_new(night)}{was}"
        case NightlyStatus.HELD:
            return f"HELD for a person to decide, {_new(night)} is not promoted; {stays or empty}"
        case NightlyStatus.INCONCLUSIVE:
            return f"INCONCLUSIVE, {_first_line(night)}; {stays or empty}"
        case NightlyStatus.PARTLY:
            failed = [one.place for one in night.places if one.ending is NightlyStatus.FAILED]
            well = len(night.places) - len(failed)
            where = f"in {well} of {len(night.places)} places"
            return f"PARTLY promoted to {night.channel}, {where}; FAILED in {', '.join(failed)}"
        case NightlyStatus.FAILED:
            return f"FAILED, {_first_line(night)}{'; ' + stays if stays else ''}"


def _first_line(night: NightlyRun) -> str:
    first = night.error.strip().split("\n")[0] or "for a reason that was not told"
    return first[:_LONGEST_LINE]


def _new(night: NightlyRun) -> str:
    """Return the image of this night as `ami-builder` takes it: an AMI's id, or the digits of a digest."""
    return night.location if night.target is TargetKind.AWS else short(night.digest)


def _todo(night: NightlyRun) -> str:
    if night.ending is NightlyStatus.INCONCLUSIVE:
        return "The image is kept, and the next nightly run verifies it again."
    if night.ending is not NightlyStatus.HELD:
        return ""
    diff = (
        f"`ami-builder diff {short(night.before)} {_new(night)}` shows what changed; " if night.before else ""
    )
    return f'{diff}`ami-builder promote {_new(night)} {night.channel} --reason "…"` lets it through.'


def _particulars(night: NightlyRun) -> Iterable[tuple[str, tuple[str, ...]]]:
    """Return what belongs into a message: nothing of what went as always."""
    amiss = tuple(
        _place(one) for one in night.places if one.ending in {NightlyStatus.FAILED, NightlyStatus.HELD}
    )
    told = {
        "Held back by": night.drifts,
        "Not as it should be": amiss,
        "Packages that moved": night.moved,
        "Retired": night.retired,
    }
    return [(heading, lines) for heading, lines in told.items() if lines]


def _place(one: RegionResult) -> str:
    return f"{one.place}: {one.ending}, {one.text}"


def _took(night: NightlyRun) -> str:
    if night.ended is None:
        return "not ended"
    # A clock may have been set back meanwhile.
    return duration(max((night.ended - night.started).total_seconds(), 0))


def _shortened(lines: tuple[str, ...]) -> tuple[str, ...]:
    shown = tuple(line[:_LONGEST_LINE] for line in lines[:_LONGEST_LIST])
    left = len(lines) - len(shown)
    return (*shown, f"and {left} more") if left else shown


def _escaped(line: str) -> str:
    """Return text that Slack takes for nothing but text: no mention, no link."""
    for special, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        line = line.replace(special, entity)
    return " ".join(line.split())


def _plain(line: str) -> str:
    """Return one line of Markdown in which nothing is a tag, a cell's border or a line's end."""
    return _escaped(line).replace("|", "&#124;")


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *((_plain(cell) for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _list(heading: str, lines: tuple[str, ...]) -> str:
    return "\n".join([f"## {heading}", "", *(f"- {_plain(line)}" for line in lines)]) if lines else ""
