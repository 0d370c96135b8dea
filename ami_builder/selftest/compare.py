"""An account's recording against the loopback cloud's: a row for each call, and what differs. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib import resources
from typing import TypeAlias

from ami_builder.aws.session import DENIED, NOT_ENABLED
from ami_builder.selftest.plan import Part
from ami_builder.selftest.recording import ELSEWHERE, NO_ANSWER, OK, Behaviour, Recording

FILE = "recorded.json"
"""What the loopback cloud does, beside this module; `python -m tests.selftest.record` writes it."""

SOMETIMES = {
    "ec2:GetInstanceMetadataDefaults": "only with Packer 1.6.6",
    "ec2:ModifyInstanceMetadataOptions": "only with Packer 1.6.6",
    "ec2:DescribeSubnets": "for a launch only with aws.subnets",
    "ec2:DescribeVpcs": "only without aws.subnets",
    "ec2:GetEbsEncryptionByDefault": "only without a KMS key, or if AMIs are shared",
    "ec2:GetEbsDefaultKmsKeyId": "only if EBS encrypts by default, or shared AMIs are encrypted",
    "kms:DescribeKey": "only with a KMS key",
    "ec2:DescribeRegions": "only with aws.copy_to",
    "iam:SimulatePrincipalPolicy": "as often as regions and settings need",
    "iam:GetRole": "only with the credentials of a role",
    "ssm:GetParameter": "for the base AMI only with aws.source = ssm:…",
    "ec2:DescribeLaunchTemplateVersions": "only if the account has launch templates",
}
"""Calls that depend on settings, on Packer, or on what the account has, each with the reason."""

_UNANSWERED = DENIED | NOT_ENABLED | {NO_ANSWER}
_BY_POLICY = frozenset({"iam:SimulatePrincipalPolicy"})
"""Calls whose answers have what the caller's own policies put into them."""
MANY_MORE = 10
"""How many times as often as in the test cloud something must be asked to be listed."""
_PAUSE = 20
_Key: TypeAlias = tuple[str, str]
"""A step and a call."""


class Kind(StrEnum):
    """How an account and the test cloud differ."""

    UNEXPECTED = "not expected"
    NOT_CALLED = "expected, not called"
    OUTCOME = "another outcome"
    COUNT = "another number of calls"
    FACTS = "another answer"
    STATES = "states in another order"
    MISSING = "fields missing"
    # What follows is listed, but fails nothing.
    MORE_STATES = "more states"
    MORE_FIELDS = "additional fields"
    LATE = "not found at first"
    POLLS = "many more polls"
    RETRIED = "repeated by botocore"
    SOMETIMES = "depends on settings"
    ELSEWHERE = "not answered in other regions"

    @property
    def matters(self) -> bool:
        """Whether our code may do something else in the account than it does in the tests."""
        return self not in _NOTED


_NOTED = frozenset(
    {
        Kind.MORE_STATES,
        Kind.MORE_FIELDS,
        Kind.LATE,
        Kind.POLLS,
        Kind.RETRIED,
        Kind.SOMETIMES,
        Kind.ELSEWHERE,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One difference."""

    step: str
    """Empty for the fields of an answer, which are compared over all steps."""
    call: str
    kind: Kind
    account: str
    cloud: str

    @property
    def text(self) -> str:
        """The difference with both sides, for a cell of a table."""
        return f"{self.kind}: AWS {self.account or 'nothing'} / test cloud {self.cloud or 'nothing'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """All calls of one action in one step, on both sides."""

    step: str
    call: str
    account: Behaviour | None
    cloud: Behaviour | None
    differences: tuple[Difference, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All rows, in the order of the calls, and the differences of the answers' fields."""

    credentials: str
    """The kind of credentials whose recording is nearest."""
    rows: tuple[Row, ...]
    fields: tuple[Difference, ...]

    @property
    def differences(self) -> tuple[Difference, ...]:
        """All differences, the rows' first."""
        return (*(one for row in self.rows for one in row.differences), *self.fields)

    @property
    def matters(self) -> tuple[Difference, ...]:
        """The differences that fail the selftest."""
        return tuple(one for one in self.differences if one.kind.matters)


def recorded() -> Mapping[str, Recording]:
    """Return what the loopback cloud does, by kind of credentials."""
    return load((resources.files(__package__) / FILE).read_text(encoding="utf-8"))


def compare(
    account: Recording, clouds: Mapping[str, Recording], steps: Sequence[str], unfinished: Sequence[str] = ()
) -> Comparison:
    """Compare with the nearest recording, in the steps that were completed and the `unfinished` ones.

    Calls that an unfinished step did not come to are no difference.

    EC2's answers about what does not exist depend on the permissions of the credentials, so there is a
    recording for each kind.
    """
    every = [_compare(account, cloud, steps, unfinished, name) for name, cloud in clouds.items()]
    return min(every, key=lambda one: len(one.matters))


def _compare(
    account: Recording, cloud: Recording, steps: Sequence[str], unfinished: Sequence[str], credentials: str
) -> Comparison:
    known = [*steps, *unfinished]
    ours = {(one.step, one.call): one for one in account.behaviours if one.step in known}
    theirs = {(one.step, one.call): one for one in cloud.behaviours if one.step in steps}
    theirs |= {
        (one.step, one.call): one
        for one in cloud.behaviours
        if one.step in unfinished and (one.step, one.call) in ours
    }
    if Part.COPY not in known:
        # Without a copy there is less to do in other regions than when it was recorded.
        ours, theirs = _at_home(ours), _at_home(theirs)
    ordered = sorted({**ours, **theirs}, key=lambda key: known.index(key[0]))
    rows = [
        Row(
            step=step,
            call=call,
            account=ours.get((step, call)),
            cloud=theirs.get((step, call)),
            differences=tuple(
                _differences(
                    step, call, ours.get((step, call)), theirs.get((step, call)), whole=step in steps
                )
            ),
        )
        for step, call in ordered
    ]
    called = {one.action for one in ours.values()} & {one.action for one in theirs.values()}
    fields = [
        one
        for call in sorted(called)
        for one in _fields(call, account.fields.get(call, frozenset()), cloud.fields.get(call, frozenset()))
    ]
    return Comparison(credentials=credentials, rows=tuple(rows), fields=tuple(fields))


def _at_home(behaviours: Mapping[_Key, Behaviour]) -> dict[_Key, Behaviour]:
    return {key: one for key, one in behaviours.items() if not one.call.endswith(ELSEWHERE)}


def _differences(
    step: str, call: str, ours: Behaviour | None, theirs: Behaviour | None, *, whole: bool
) -> Iterator[Difference]:
    def difference(kind: Kind, account: object, cloud: object) -> Difference:
        return Difference(step=step, call=call, kind=kind, account=str(account), cloud=str(cloud))

    if ours is None or theirs is None:
        if why := SOMETIMES.get(call.removesuffix(ELSEWHERE)):
            yield difference(Kind.SOMETIMES, summary(ours), f"{summary(theirs)} ({why})".strip())
        elif ours is not None:
            yield difference(Kind.UNEXPECTED, summary(ours), "")
        else:
            yield difference(Kind.NOT_CALLED, "", summary(theirs))
        return
    other = Kind.ELSEWHERE if _only_unanswered_elsewhere(ours, theirs) else Kind.OUTCOME
    if not whole:
        if ours.outcomes.keys() - theirs.outcomes.keys():
            yield difference(other, _outcomes(ours), _outcomes(theirs))
        return
    if ours.outcomes.keys() != theirs.outcomes.keys():
        late = ours.reads and OK in ours.outcomes and OK in theirs.outcomes and _only_missing(ours, theirs)
        yield difference(Kind.LATE if late else other, _outcomes(ours), _outcomes(theirs))
    elif not ours.reads and ours.outcomes != theirs.outcomes:
        yield difference(Kind.COUNT, _outcomes(ours), _outcomes(theirs))
    if ours.facts != theirs.facts:
        names = [name for name in {**theirs.facts, **ours.facts} if _differ(name, ours, theirs)]
        yield difference(Kind.FACTS, _facts(ours, names), _facts(theirs, names))
    if ours.states != theirs.states:
        known = iter(ours.states)
        same_order = all(state in known for state in theirs.states)
        yield difference(
            Kind.MORE_STATES if same_order else Kind.STATES, _states(ours.states), _states(theirs.states)
        )
    if ours.reads and ours.calls >= max(MANY_MORE * theirs.calls, _PAUSE):
        yield difference(Kind.POLLS, f"{ours.calls} in {ours.seconds:.0f} s", theirs.calls)
    if ours.retries:
        yield difference(Kind.RETRIED, ours.retries, "")


def _only_missing(ours: Behaviour, theirs: Behaviour) -> bool:
    """Return whether outcomes differ only in what was not found, as what was just made may be."""
    return all("NotFound" in code for code in ours.outcomes.keys() ^ theirs.outcomes.keys())


def _only_unanswered_elsewhere(ours: Behaviour, theirs: Behaviour) -> bool:
    """Return whether outcomes differ only since some region does not let `revoke` look there.

    An organization may deny regions, the account may not have enabled them, a network may have no route.
    """
    return (
        ours.step == Part.REVOKE
        and ours.call.endswith(ELSEWHERE)
        and ours.reads
        and OK in ours.outcomes
        and ours.outcomes.keys() ^ theirs.outcomes.keys() <= _UNANSWERED
    )


def _differ(name: str, ours: Behaviour, theirs: Behaviour) -> bool:
    return ours.facts.get(name) != theirs.facts.get(name)


def _fields(call: str, ours: frozenset[str], theirs: frozenset[str]) -> Iterator[Difference]:
    if not ours or not theirs or call in _BY_POLICY:
        return  # another outcome is reported as such
    for kind, more, less in ((Kind.MISSING, theirs, ours), (Kind.MORE_FIELDS, ours, theirs)):
        if names := sorted(more - less):
            sides = ("", ", ".join(names)) if kind is Kind.MISSING else (", ".join(names), "")
            yield Difference(step="", call=call, kind=kind, account=sides[0], cloud=sides[1])


def summary(one: Behaviour | None) -> str:
    """Return outcomes, states and facts in a few words."""
    if one is None:
        return ""
    parts = (_outcomes(one), _states(one.states), _facts(one, list(one.facts)))
    return "; ".join(part for part in parts if part)


def _outcomes(one: Behaviour) -> str:
    return ", ".join(f"{count} × {code}" if count > 1 else code for code, count in one.outcomes.items())


def _states(states: Sequence[str]) -> str:
    return " → ".join(states)


def _facts(one: Behaviour, names: Sequence[str]) -> str:
    return ", ".join(f"{name} = {json.dumps(one.facts.get(name))}" for name in names)


def dump(recordings: Mapping[str, Recording]) -> str:
    """Return recordings of the loopback cloud as the text of a file, one behaviour a line.

    Times are left out: on loopback they say nothing.
    """
    fields: dict[str, set[str]] = {}
    for each in recordings.values():
        for call, names in each.fields.items():
            fields.setdefault(call, set()).update(names)
    lines = ["{", ' "fields": {']
    lines += [
        ",\n".join(f"  {json.dumps(call)}: {json.dumps(sorted(fields[call]))}" for call in sorted(fields))
    ]
    lines += [" }"]
    for name, recording in recordings.items():
        lines[-1] += ","
        lines += [f" {json.dumps(name)}: ["]
        # Regions are worked on side by side: the order of their calls says nothing.
        steps = list(dict.fromkeys(one.step for one in recording.behaviours))
        ordered = sorted(recording.behaviours, key=lambda one: (steps.index(one.step), one.call))
        lines += [",\n".join(f"  {json.dumps(_plain(one))}" for one in ordered)]
        lines += [" ]"]
    return "\n".join([*lines, "}", ""])


def _plain(one: Behaviour) -> Mapping[str, object]:
    found: dict[str, object] = {"step": one.step, "call": one.call, "outcomes": dict(one.outcomes)}
    if one.states:
        found["states"] = list(one.states)
    if one.facts:
        found["facts"] = dict(one.facts)
    return found


def load(text: str) -> Mapping[str, Recording]:
    """Return the recordings in a file's text."""
    whole = json.loads(text)
    fields = {call: frozenset(names) for call, names in whole.pop("fields").items()}
    return {
        name: Recording(
            behaviours=tuple(
                Behaviour(
                    step=one["step"],
                    call=one["call"],
                    outcomes=one["outcomes"],
                    states=tuple(one.get("states", ())),
                    facts=one.get("facts", {}),
                )
                for one in behaviours
            ),
            fields=fields,
        )
        for name, behaviours in whole.items()
    }
