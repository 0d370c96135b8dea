"""Make the calls of a probe: data in, a record of what AWS answered out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import jmespath
from botocore import xform_name
from botocore.exceptions import BotoCoreError, ClientError

from ami_builder.aws import tags as tagging
from ami_builder.aws.session import Account, poll
from ami_builder.selftest.recording import Recorder


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of a probe."""

    action: str
    """Such as `ec2:DescribeImages`."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Words in braces are replaced by values that were kept before."""
    tagged: tuple[str, ...] = ()
    """The kinds of resources that get the run's tags in this call."""
    keep: Mapping[str, str] = field(default_factory=dict)
    """Name of a value -> where the answer has it (JMESPath)."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Name of a fact -> JMESPath; `kept` has the values that were kept before."""
    until: str = ""
    """The name of a fact: the call is repeated until it is true, for `seconds` at most."""
    seconds: float = 60.0
    after: float = 0.0
    """How many seconds to wait first, for what AWS does later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A few calls that show whether a belief is true."""

    name: str
    belief: str
    calls: tuple[Call, ...]

    def steps(self) -> tuple[str, ...]:
        """Return the names of its calls' steps."""
        return tuple(f"probe: {self.name} {number}" for number in range(1, len(self.calls) + 1))


def values(known: Mapping[str, str]) -> dict[str, str]:
    """Return what the parameters of probes are filled with; answers of calls are added to it."""
    now = datetime.now(UTC)
    return {
        **known,
        "token": f"{known['name']}-probe",
        "past": (now - timedelta(days=1)).isoformat(),
        "soon": (now + timedelta(minutes=30)).isoformat(),
    }


def run(
    probe: Probe,
    account: Account,
    recorder: Recorder,
    kept: dict[str, str],
    tags: Mapping[str, str],
    *,
    patience: float = 1.0,
) -> None:
    """Make the calls of a probe; an error of AWS is a result like any other.

    A call is left out when it needs a value that no answer had. `patience` scales the waits.
    """
    for call, step in zip(probe.calls, probe.steps(), strict=True):
        try:
            parameters = _filled(call.parameters, kept)
        except KeyError:
            continue
        if call.tagged:
            parameters["TagSpecifications"] = tagging.specifications(tags, *call.tagged)  # type: ignore[arg-type]
        with recorder.step(step):
            _make(call, parameters, account, recorder, step, kept, patience)


def _make(
    call: Call,
    parameters: Mapping[str, Any],
    account: Account,
    recorder: Recorder,
    step: str,
    kept: dict[str, str],
    patience: float,
) -> None:
    service, _, action = call.action.partition(":")
    method = getattr(account.client(service), xform_name(action))
    if call.after:
        poll(lambda: False, seconds=call.after * patience)
    facts: dict[str, object] = {}

    def once() -> bool:
        try:
            answer = method(**parameters)
        except (ClientError, BotoCoreError):
            return not call.until  # the recorder has its code; what is awaited may not exist yet
        facts.update({name: _in(answer | {"kept": kept}, path) for name, path in call.facts.items()})
        found = {name: _in(answer, path) for name, path in call.keep.items()}
        kept.update({name: value for name, value in found.items() if value})
        return bool(facts.get(call.until, True))

    if call.until:
        poll(once, seconds=call.seconds * patience)
    else:
        once()
    recorder.note(step, call.action, facts)


def _in(answer: Any, path: str) -> Any:
    """Return what a path finds; None where the answer is not as it is expected to be."""
    try:
        return jmespath.search(path, answer)
    except jmespath.exceptions.JMESPathError:
        return None


def _filled(value: Any, kept: Mapping[str, str]) -> Any:
    """Return parameters with their words in braces replaced; raises KeyError for one without a value."""
    if isinstance(value, str):
        return value.format_map(dict(kept)) if "{" in value else value
    if isinstance(value, Mapping):
        return {key: _filled(each, kept) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, kept) for each in value]
    return value
