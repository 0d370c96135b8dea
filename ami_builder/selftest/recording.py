"""What an account answered, call by call, without anything that belongs to the account.

botocore's own events report each call: before its parameters are built, and after its last attempt. A record
has the names of services and actions, error codes, the names of response fields as botocore's models have
them, names of states, and numbers. No value of an answer, no id, no address gets into it.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jmespath

OK = "ok"
NO_ANSWER = "no answer"
_UNREADABLE = "unreadable"
_CODE = re.compile(r"[A-Za-z][A-Za-z0-9]*(\.[A-Za-z0-9]+){0,3}")
_STATE = re.compile(r"[a-z][a-z-]{1,30}")
_CONTEXT = "ami-builder selftest"
_STATES = {
    "DescribeImages": jmespath.compile("Images[].State"),
    "DescribeInstances": jmespath.compile("Reservations[].Instances[].State.Name"),
    "DescribeSnapshots": jmespath.compile("Snapshots[].State"),
    "DescribeVolumes": jmespath.compile("Volumes[].State"),
    "TerminateInstances": jmespath.compile("TerminatingInstances[].CurrentState.Name"),
    "RunInstances": jmespath.compile("Instances[].State.Name"),
}
"""Where an answer has the state of the resource that a call is about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """What came of all calls of one action in one step."""

    step: str
    call: str
    """Such as `ec2:DescribeImages`."""
    outcomes: Mapping[str, int]
    """`ok` or an error code -> number of calls."""
    states: tuple[str, ...] = ()
    """The states of what was asked about by its id, in the order in which they were first seen."""
    facts: Mapping[str, object] = field(default_factory=dict)
    """What a probe looked for in the answer: numbers, yes or no, or words of the API."""
    longest: float = 0.0
    """The most seconds that a call took."""
    seconds: float = 0.0
    """From the first call to the end of the last."""
    retries: int = 0
    """Attempts that botocore repeated."""

    @property
    def calls(self) -> int:
        """The number of calls."""
        return sum(self.outcomes.values())

    @property
    def reads(self) -> bool:
        """Whether the action changes nothing, and may be repeated as often as it takes."""
        return self.call.partition(":")[2].startswith(("Describe", "Get", "List"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """All that an account was seen doing."""

    behaviours: tuple[Behaviour, ...]
    fields: Mapping[str, frozenset[str]]
    """Call -> the fields of its answers, each with its type: `Images[].State: string`."""


@dataclass(slots=True)
class _Counted:
    began: float
    ended: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    states: dict[str, None] = field(default_factory=dict)
    longest: float = 0.0
    retries: int = 0


class Recorder:
    """Records the calls of botocore sessions; calls belong to the step that is current when they begin."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._step = ""
        self._counted: dict[tuple[str, str], _Counted] = {}
        self._facts: dict[tuple[str, str], Mapping[str, object]] = {}
        self._fields: dict[str, set[str]] = {}

    def attach(self, session: Any) -> None:
        """Record the calls of every client that a botocore session makes from now on."""
        session.register("before-parameter-build", self._begun)
        session.register("after-call", self._answered)
        session.register("after-call-error", self._unanswered)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Let the calls in this context, of all threads, belong to a step."""
        before, self._step = self._step, name
        try:
            yield
        finally:
            self._step = before

    def note(self, step: str, call: str, facts: Mapping[str, object]) -> None:
        """Add what a probe looked for in an answer."""
        if facts:
            self._facts[step, call] = {name: plain(value) for name, value in facts.items()}

    def recording(self, steps: Sequence[str] | None = None) -> Recording:
        """Return what was recorded, of these steps or of all."""
        with self._lock:
            behaviours = tuple(
                Behaviour(
                    step=step,
                    call=call,
                    outcomes=dict(sorted(one.outcomes.items())),
                    states=tuple(one.states),
                    facts=self._facts.get((step, call), {}),
                    longest=one.longest,
                    seconds=one.ended - one.began,
                    retries=one.retries,
                )
                for (step, call), one in self._counted.items()
                if steps is None or step in steps
            )
            made = {one.call for one in behaviours}
            fields = {call: frozenset(found) for call, found in self._fields.items() if call in made}
        return Recording(behaviours=behaviours, fields=fields)

    def _begun(self, *, params: Any, context: dict[str, Any], **_: object) -> None:
        # The parameters themselves stay where they are.
        ids = [value for key, value in params.items() if key.endswith(("Ids", "Id"))]
        one = not ids or all(not isinstance(value, list) or len(value) == 1 for value in ids)
        context[_CONTEXT] = (self._step, time.monotonic(), bool(ids) and one)

    def _answered(self, *, parsed: Any, model: Any, context: dict[str, Any], **_: object) -> None:
        code = parsed.get("Error", {}).get("Code")
        if code is not None:
            code = code if _CODE.fullmatch(str(code)) else _UNREADABLE
        retries = int(parsed.get("ResponseMetadata", {}).get("RetryAttempts", 0))
        self._count(model, context, code or OK, parsed if code is None else None, retries)

    def _unanswered(self, *, context: dict[str, Any], event_name: str, **more: object) -> None:
        del more
        _, service, action = event_name.split(".")
        step, began, _ = context.get(_CONTEXT, ("", time.monotonic(), False))
        self._add(step, f"{service}:{action}", began, NO_ANSWER, (), 0)

    def _count(
        self, model: Any, context: dict[str, Any], outcome: str, parsed: Any | None, retries: int
    ) -> None:
        step, began, single = context.get(_CONTEXT, ("", time.monotonic(), False))
        call = f"{model.service_model.signing_name}:{model.name}"
        states: Sequence[str] = ()
        if parsed is not None:
            if model.output_shape is not None:
                found = set(_fields(model.output_shape, parsed))
                with self._lock:
                    self._fields.setdefault(call, set()).update(found)
            if model.name in _STATES and (single or not model.name.startswith("Describe")):
                named = _STATES[model.name].search(parsed) or ()
                states = [one for one in named if _STATE.fullmatch(str(one))]
        self._add(step, call, began, outcome, states, retries)

    def _add(
        self, step: str, call: str, began: float, outcome: str, states: Sequence[str], retries: int
    ) -> None:
        now = time.monotonic()
        with self._lock:
            one = self._counted.setdefault((step, call), _Counted(began))
            one.ended = now
            one.outcomes[outcome] += 1
            one.states.update(dict.fromkeys(states))
            one.longest = max(one.longest, now - began)
            one.retries += retries


def plain(value: object) -> object:
    """Return a fact if it is nothing of the account's: a number, yes or no, words of the API, or a list."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value if isinstance(value, str) and _STATE.fullmatch(value) else "hidden"


def _fields(shape: Any, value: Any, at: str = "") -> Iterator[str]:
    """Yield the fields of an answer that its model knows, each with its type."""
    match shape.type_name:
        case "structure":
            for name, member in shape.members.items():
                if value.get(name) is not None:
                    yield from _fields(member, value[name], f"{at}.{name}" if at else name)
        case "list":
            for each in value:
                yield from _fields(shape.member, each, f"{at}[]")
        case kind:
            # The keys of a map can be the user's.
            yield f"{at}: {kind}"
