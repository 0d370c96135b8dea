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
from typing import Any, NamedTuple

import jmespath

OK = "ok"
ELSEWHERE = " elsewhere"
"""The end of the name of a call in another region than the one where the AMI is baked."""
NO_ANSWER = "no answer"
_REGIONAL = frozenset({"autoscaling", "ec2", "ssm"})
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
    """Such as `ec2:DescribeImages`, or `ec2:DescribeImages elsewhere`."""
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
    def action(self) -> str:
        """The call, wherever it was made."""
        return self.call.removesuffix(ELSEWHERE)

    @property
    def calls(self) -> int:
        """The number of calls."""
        return sum(self.outcomes.values())

    @property
    def reads(self) -> bool:
        """Whether the action changes nothing, and may be repeated as often as it takes."""
        return self.call.partition(":")[2].startswith(("Describe", "Get", "List", "Simulate"))


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


class _Begun(NamedTuple):
    step: str
    at: float
    single: bool
    """Whether the call names just one resource."""
    elsewhere: str


class Recorder:
    """Records the calls of botocore sessions; calls belong to the step that is current when they begin.

    `home` is the region that the AMI is baked in.
    """

    def __init__(self, home: str) -> None:
        self._home = home
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
            made = {one.action for one in behaviours}
            fields = {call: frozenset(found) for call, found in self._fields.items() if call in made}
        return Recording(behaviours=behaviours, fields=fields)

    def _begun(self, *, params: Any, context: dict[str, Any], **_: object) -> None:
        # The parameters themselves stay where they are.
        ids = [value for key, value in params.items() if key.endswith(("Ids", "Id"))]
        one = not ids or all(not isinstance(value, list) or len(value) == 1 for value in ids)
        elsewhere = ELSEWHERE if context.get("client_region") != self._home else ""
        context[_CONTEXT] = _Begun(self._step, time.monotonic(), bool(ids) and one, elsewhere)

    def _answered(self, *, parsed: Any, model: Any, context: dict[str, Any], **_: object) -> None:
        begun = context[_CONTEXT]
        service, code = model.service_model.signing_name, parsed.get("Error", {}).get("Code")
        call, retries = f"{service}:{model.name}", int(parsed["ResponseMetadata"].get("RetryAttempts", 0))
        if code is not None:
            self._add(call, begun, code if _CODE.fullmatch(str(code)) else _UNREADABLE, retries=retries)
            return
        found = set(_fields(model.output_shape, parsed)) if model.output_shape is not None else set()
        with self._lock:
            self._fields.setdefault(call, set()).update(found)
        states: Sequence[str] = ()
        if model.name in _STATES and (begun.single or not model.name.startswith("Describe")):
            named = _STATES[model.name].search(parsed) or ()
            states = [one for one in named if _STATE.fullmatch(str(one))]
        self._add(call, begun, OK, states, retries)

    def _unanswered(self, *, context: dict[str, Any], event_name: str, **more: object) -> None:
        del more
        _, service, action = event_name.split(".")
        self._add(f"{service}:{action}", context[_CONTEXT], NO_ANSWER)

    def _add(
        self, call: str, begun: _Begun, outcome: str, states: Sequence[str] = (), retries: int = 0
    ) -> None:
        now = time.monotonic()
        if call.partition(":")[0] in _REGIONAL:
            call += begun.elsewhere
        with self._lock:
            one = self._counted.setdefault((begun.step, call), _Counted(begun.at))
            one.ended = now
            one.outcomes[outcome] += 1
            one.states.update(dict.fromkeys(states))
            one.longest = max(one.longest, now - begun.at)
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
