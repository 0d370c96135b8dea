"""Policy documents: whether their statements allow an action on a resource in a request's context.

What is not understood (an operator, a condition key, a policy variable, NotResource) raises ValueError as
soon as a document is given, so that nothing is allowed by mistake. Not imitated: session policies, resource
policies, KMS's own permissions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

Document = Mapping[str, Any]
Context = Mapping[str, Sequence[str]]
"""Condition key, as `normal` spells it -> its values."""

_STATEMENT = {"Sid", "Effect", "Action", "NotAction", "Resource", "Condition"}
_KEYS = {
    "aws:tagkeys", "aws:requestedregion", "aws:principalarn", "aws:principalaccount",
    "ec2:createaction", "ec2:region", "ec2:owner", "ec2:public", "ec2:instancetype", "ec2:imageid",
    "ec2:metadatahttptokens", "iam:passedtoservice", "iam:awsservicename", "kms:grantisforawsresource",
}  # fmt: skip
_TAG_KEYS = ("aws:requesttag/", "aws:resourcetag/", "ec2:resourcetag/", "ssm:resourcetag/")


class Decision(StrEnum):
    """What comes of a request, as SimulatePrincipalPolicy names it."""

    ALLOWED = "allowed"
    EXPLICIT_DENY = "explicitDeny"
    IMPLICIT_DENY = "implicitDeny"


def _equal(value: str, wanted: str) -> bool:
    return value == wanted


def _like_number(value: str, wanted: str) -> bool:
    return float(value) == float(wanted)


_COMPARE: dict[str, tuple[Callable[[str, str], bool], bool]] = {
    "StringEquals": (_equal, True),
    "StringNotEquals": (_equal, False),
    "StringEqualsIgnoreCase": (lambda value, wanted: value.lower() == wanted.lower(), True),
    "StringNotEqualsIgnoreCase": (lambda value, wanted: value.lower() == wanted.lower(), False),
    "StringLike": (fnmatchcase, True),
    "StringNotLike": (fnmatchcase, False),
    "ArnEquals": (fnmatchcase, True),
    "ArnLike": (fnmatchcase, True),
    "ArnNotEquals": (fnmatchcase, False),
    "ArnNotLike": (fnmatchcase, False),
    "NumericEquals": (_like_number, True),
    "Bool": (lambda value, wanted: value.lower() == wanted.lower(), True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One document's statements."""

    statements: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, document: Document) -> Policy:
        """Return a document's policy; raises ValueError when it isn't understood."""
        statements = document["Statement"]
        policy = cls(statements=[statements] if isinstance(statements, Mapping) else list(statements))
        for statement in policy.statements:
            _check(statement)
        return policy

    @property
    def actions(self) -> set[str]:
        """The actions that the document allows, as it writes them."""
        allowing = (s for s in self.statements if s["Effect"] == "Allow")
        return {action for statement in allowing for action in _list(statement.get("Action", ()))}

    @property
    def allows_something(self) -> bool:
        """Whether any statement allows anything."""
        return any(statement["Effect"] == "Allow" for statement in self.statements)

    def decision(self, action: str, arn: str, context: Context) -> Decision:
        """Return what the statements say together about one action on one resource."""
        effects = {
            statement["Effect"]
            for statement in self.statements
            if _concerns(statement, action)
            and any(fnmatchcase(arn, each) for each in _list(statement["Resource"]))
            and _holds(statement.get("Condition", {}), context)
        }
        if "Deny" in effects:
            return Decision.EXPLICIT_DENY
        return Decision.ALLOWED if effects else Decision.IMPLICIT_DENY

    def keys_of(self, action: str, arn: str) -> set[str]:
        """Return the condition keys, as written, of the statements about one action on one resource."""
        return {
            key
            for statement in self.statements
            if _concerns(statement, action)
            and any(fnmatchcase(arn, each) for each in _list(statement["Resource"]))
            for keys in statement.get("Condition", {}).values()
            for key in keys
        }


def normal(key: str) -> str:
    """Return a condition key as a context has it: the name ignores case, a tag's own key doesn't."""
    name, slash, tag = key.partition("/")
    return f"{name.lower()}{slash}{tag}"


def like(action: str, pattern: str) -> bool:
    """Tell whether an action is what a policy's pattern means."""
    return fnmatchcase(action.lower(), pattern.lower())


def _concerns(statement: Mapping[str, Any], action: str) -> bool:
    if "NotAction" in statement:
        return not any(like(action, each) for each in _list(statement["NotAction"]))
    return any(like(action, each) for each in _list(statement["Action"]))


def _check(statement: Mapping[str, Any]) -> None:
    if strange := set(statement) - _STATEMENT:
        raise ValueError(f"not understood in a policy statement: {', '.join(sorted(strange))}")
    if statement["Effect"] not in ("Allow", "Deny"):
        raise ValueError(f"a statement's effect is {statement['Effect']!r}")
    if "NotAction" in statement and (statement["Effect"] == "Allow" or "Action" in statement):
        raise ValueError("not understood in a policy statement: NotAction, unless it denies")
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


def _holds(condition: Mapping[str, Mapping[str, Any]], context: Context) -> bool:
    """Tell whether all of a statement's conditions hold; several values of one key are alternatives."""
    for operator, keys in condition.items():
        quantifier, name, lenient = _split(operator)
        for key, wanted in keys.items():
            values = context.get(normal(key))
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


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple, set)) else [value]
