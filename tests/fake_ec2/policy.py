"""Least privilege: which calls a policy document allows to those who sign with a given access key.

A call is allowed when, for each resource that it touches (resources.py), a statement allows the action on
the resource under its conditions, and none denies it. What is not understood (an operator, a condition key,
a policy variable, NotAction, NotResource) raises ValueError as soon as the document is given, so that nothing
is allowed by mistake. Not imitated: service control policies, permission boundaries, sessions, resource
policies, KMS's own permissions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from tests.fake_ec2.api_call import ACCOUNT, ApiCall, Refused
from tests.fake_ec2.touched_resources import Touched, touched

_STATEMENT = {"Sid", "Effect", "Action", "Resource", "Condition"}
_KEYS = {
    "aws:tagkeys", "ec2:createaction", "aws:requestedregion", "ec2:region", "ec2:owner", "ec2:public",
    "ec2:instancetype", "iam:passedtoservice",
}  # fmt: skip
_TAG_KEYS = ("aws:requesttag/", "aws:resourcetag/", "ec2:resourcetag/")


def _equal(value: str, wanted: str) -> bool:
    return value == wanted


_COMPARE: dict[str, tuple[Callable[[str, str], bool], bool]] = {
    "StringEquals": (_equal, True),
    "StringNotEquals": (_equal, False),
    "StringLike": (fnmatchcase, True),
    "StringNotLike": (fnmatchcase, False),
    "Bool": (lambda value, wanted: value.lower() == wanted.lower(), True),
}


@dataclass(slots=True, kw_only=True)
class Enforced:
    """One access key's policy, and what came of it; tries (DryRun) don't count as use."""

    statements: Sequence[Mapping[str, Any]]
    used: set[str] = field(default_factory=set)
    """Actions that were allowed and called."""
    refused: list[tuple[str, str]] = field(default_factory=list)
    """(action, ARN) that were called and not allowed."""

    @property
    def unused(self) -> set[str]:
        """The policy's actions that nothing called, as the document writes them."""
        written = {a for s in self.statements if s["Effect"] == "Allow" for a in _list(s["Action"])}
        return {each for each in written if not any(_like(used, each) for used in self.used)}

    def allows(self, it: Touched, call: ApiCall) -> bool:
        """Tell whether a statement allows it and none denies it."""
        context = _context(it, call)
        effects = {
            statement["Effect"]
            for statement in self.statements
            if any(_like(it.action, action) for action in _list(statement["Action"]))
            and any(fnmatchcase(it.arn, arn) for arn in _list(statement["Resource"]))
            and _holds(statement.get("Condition", {}), context)
        }
        return effects == {"Allow"}

    def knows(self, action: str) -> bool:
        """Tell whether any statement allows the action on anything."""
        return any(
            _like(action, each)
            for s in self.statements
            if s["Effect"] == "Allow"
            for each in _list(s["Action"])
        )


class Guard:
    """The policies in force, by access key; a key without one may do everything."""

    def __init__(self) -> None:
        self._enforced: dict[str, Enforced] = {}

    def clear(self) -> None:
        """Allow everything again."""
        self._enforced.clear()

    def enforce(self, document: Mapping[str, Any], access_key: str) -> Enforced:
        """Allow an access key only what a policy allows; raises ValueError when it isn't understood."""
        statements = (
            [document["Statement"]] if isinstance(document["Statement"], dict) else document["Statement"]
        )
        for statement in statements:
            _check(statement)
        enforced = Enforced(statements=statements)
        self._enforced[access_key] = enforced
        return enforced

    def judge(self, call: ApiCall, backend: Any) -> list[Touched]:
        """Return what the call touches; raises Refused when its access key may not do that."""
        enforced = self._enforced.get(call.access_key)
        if enforced is None:
            return []
        everything = touched(call, backend)
        for it in everything:
            # EC2 looks a resource up before it judges: who may do that at all learns that it isn't there.
            if enforced.allows(it, call) or (it.unknown and enforced.knows(it.action)):
                continue
            call.authorised = False
            enforced.refused.append((it.action, it.arn))
            raise _unauthorized(call, it)
        if not call.params.get("DryRun"):
            enforced.used |= {it.action for it in everything}
        return everything


def _unauthorized(call: ApiCall, it: Touched) -> Refused:
    user = f"User: arn:aws:iam::{ACCOUNT}:user/{call.access_key} is not authorized to perform: {it.action}"
    message = f"{user} on resource: {it.arn} because no identity-based policy allows the {it.action} action"
    if call.service == "ec2":
        return Refused(
            "UnauthorizedOperation", f"You are not authorized to perform this operation. {message}", 403
        )
    if call.service in ("sts", "iam"):
        return Refused("AccessDenied", message, 403)
    return Refused("AccessDeniedException", message, 400)


def _check(statement: Mapping[str, Any]) -> None:
    if strange := set(statement) - _STATEMENT:
        raise ValueError(f"not understood in a policy statement: {', '.join(sorted(strange))}")
    if statement["Effect"] not in ("Allow", "Deny"):
        raise ValueError(f"a statement's effect is {statement['Effect']!r}")
    for operator, keys in statement.get("Condition", {}).items():
        _split(operator)
        for key, values in keys.items():
            if key.lower() not in _KEYS and not key.lower().startswith(_TAG_KEYS):
                raise ValueError(f"condition key not understood: {key}")
            if any("${" in str(value) for value in _list(values)):
                raise ValueError(f"policy variables are not understood: {key}")
    if any("${" in text for text in _list(statement["Resource"])):
        raise ValueError("policy variables are not understood in a resource")


def _split(operator: str) -> tuple[str, str, bool]:
    """Return (`ForAllValues`, `ForAnyValue` or nothing; the comparison; whether a missing key is fine)."""
    quantifier, _, name = operator.rpartition(":")
    lenient = name.endswith("IfExists")
    name = name.removesuffix("IfExists")
    if quantifier not in ("", "ForAllValues", "ForAnyValue") or (name not in _COMPARE and name != "Null"):
        raise ValueError(f"condition operator not understood: {operator}")
    return quantifier, name, lenient


def _holds(condition: Mapping[str, Mapping[str, Any]], context: Mapping[str, Sequence[str]]) -> bool:
    """Tell whether all of a statement's conditions hold; several values of one key are alternatives."""
    for operator, keys in condition.items():
        quantifier, name, lenient = _split(operator)
        for key, wanted in keys.items():
            values = context.get(_normal(key))
            if name == "Null":
                if (values is None) != (str(_list(wanted)[0]).lower() == "true"):
                    return False
                continue
            compare, positive = _COMPARE[name]
            if values is None:
                # As IAM has it: nothing to disagree with under ForAllValues, IfExists and the negations.
                if lenient or quantifier == "ForAllValues" or not positive:
                    continue
                return False
            matches = [any(compare(v, str(w)) for w in _list(wanted)) is positive for v in values]
            if not (all(matches) if quantifier != "ForAnyValue" else any(matches)):
                return False
    return True


def _context(it: Touched, call: ApiCall) -> dict[str, Sequence[str]]:
    context: dict[str, Sequence[str]] = {
        "aws:requestedregion": [call.region],
        "ec2:region": [call.region],
    }
    for key, value in it.tags.items():
        context[f"aws:resourcetag/{key}"] = context[f"ec2:resourcetag/{key}"] = [value]
    if it.requested:
        context |= {f"aws:requesttag/{key}": [value] for key, value in it.requested.items()}
        context["aws:tagkeys"] = list(it.requested)
    if it.create_action:
        context["ec2:createaction"] = [it.create_action]
    if it.owner:
        context["ec2:owner"] = [it.owner]
    if it.public is not None:
        context["ec2:public"] = [str(it.public).lower()]
    if ":instance/" in it.arn and call.params.get("InstanceType"):
        context["ec2:instancetype"] = [call.params["InstanceType"]]
    if it.action == "iam:PassRole":
        context["iam:passedtoservice"] = ["ec2.amazonaws.com"]
    return context


def _normal(key: str) -> str:
    """Return a condition key as `_context` spells it: the name ignores case, a tag's own key doesn't."""
    name, slash, tag = key.partition("/")
    return f"{name.lower()}{slash}{tag}"


def _like(action: str, pattern: str) -> bool:
    return fnmatchcase(action.lower(), pattern.lower())


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
