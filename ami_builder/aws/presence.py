"""Calls on a resource that may be deleted already, or that EC2 may not show yet.

For such a resource EC2 answers UnauthorizedOperation, and not NotFound, under a policy with conditions on
tags: it has none. Whether the resource exists is then asked with a describe. Source:
https://github.com/aws/karpenter-provider-aws/issues/2100 and its pull request 2253.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any, TypeVar

from ami_builder.aws.session import DENIED, Account, aws_errors, code_of, poll
from ami_builder.core.errors import CloudFailed

T = TypeVar("T")

VISIBLE_SECONDS = 60.0
"""How long EC2 may take to show a new resource to every call."""

_MISSING = re.compile(r".*NotFound.*|InvalidAMIID\.Unavailable")
# A describe may show a deleted resource for a while, and miss one that another describe has shown.
_LOOKS = 2
_DENIALS = 6
_ENDED = frozenset({"deleted", "deleting", "deregistered", "shutting-down", "terminated"})
_DESCRIBE = {
    "ami": ("describe_images", "ImageIds", "Images"),
    "i": ("describe_instances", "InstanceIds", "Reservations"),
    "lt": ("describe_launch_templates", "LaunchTemplateIds", "LaunchTemplates"),
    "sg": ("describe_security_groups", "GroupIds", "SecurityGroups"),
    "snap": ("describe_snapshots", "SnapshotIds", "Snapshots"),
    "vol": ("describe_volumes", "VolumeIds", "Volumes"),
}


class Presence(StrEnum):
    """What a describe says of a resource."""

    SHOWN = "shown"
    ABSENT = "absent"
    ENDED = "ended"
    """Deleted, but still shown."""


def look(account: Account, resource: str) -> Presence:
    """Ask EC2 whether there is a resource, by its id; raises CloudFailed when that can't be known."""
    call, parameter, key = _DESCRIBE[resource.partition("-")[0]]
    more = {"IncludeDeprecated": True, "IncludeDisabled": True} if key == "Images" else {}
    found: list[Any] = []
    with aws_errors(ignore=r".*NotFound.*|InvalidAMIID\..+"):
        found = getattr(account.ec2, call)(**{parameter: [resource]}, **more)[key]
    if key == "Reservations":
        found = [one for reservation in found for one in reservation.get("Instances", [])]
    if not found:
        return Presence.ABSENT
    state = found[0].get("State", "")
    return (
        Presence.ENDED if (state["Name"] if isinstance(state, dict) else state) in _ENDED else Presence.SHOWN
    )


def wait_shown(account: Account, resource: str, *, seconds: float = VISIBLE_SECONDS) -> None:
    """Wait until EC2 shows a new resource, but at most for `seconds`: the next call says what is wrong."""
    poll(lambda: look(account, resource) is Presence.SHOWN, seconds=seconds)


def is_gone(account: Account, resource: str) -> bool:
    """Return whether EC2 shows a resource as deleted, or does not show it to any of several describes."""
    found = [look(account, resource)]
    while found[-1] is Presence.ABSENT and len(found) < _LOOKS:
        found.append(look(account, resource))
    return Presence.SHOWN not in found


def if_present(
    account: Account,
    resources: str | Sequence[str],
    call: Callable[[], object],
    *,
    appears: float = 0.0,
    busy: str = "",
    frees: float = 0.0,
) -> bool:
    """Make an EC2 call on resources that may be missing; return False when one of them is.

    A resource that was made just now may take `appears` seconds until EC2 shows it. The call is repeated for
    `frees` seconds while its error code matches `busy`. Raises CloudFailed when something still uses the
    resource then, for any other error, and for a denial that concerns resources that EC2 shows.
    """
    ids = [resources] if isinstance(resources, str) else resources
    began = time.monotonic()
    absences = denials = 0
    made = False

    def settled() -> bool:
        nonlocal absences, denials, made
        try:
            with aws_errors():
                call()
        except CloudFailed as failed:
            waited, code = time.monotonic() - began, code_of(failed)
            if busy and re.fullmatch(busy, code):
                if waited < frees:
                    return False
                raise CloudFailed(
                    f"{', '.join(ids)} can't be deleted: it is still in use",
                    hint="`ami-builder gc` lists what is left; with --apply it tries again",
                ) from failed
            missing = _MISSING.fullmatch(code) is not None
            if not missing and code not in DENIED:
                raise
            # NotFound of what must exist may also be about something else, such as a key.
            certain = missing and not appears
            presence = Presence.ABSENT if certain else _presence(account, ids, failed)
            if presence is Presence.SHOWN:
                denials += 1
                if denials >= _DENIALS:
                    raise
                return False
            absences += _LOOKS if missing else 1
            return presence is Presence.ENDED or (absences >= _LOOKS and waited >= appears)
        made = True
        return True

    poll(settled, seconds=math.inf)
    return made


def once_visible(
    account: Account,
    resources: str | Sequence[str],
    call: Callable[[], T],
    *,
    seconds: float = VISIBLE_SECONDS,
) -> T:
    """Make an EC2 call on resources that exist, but that EC2 may not show to every call yet.

    Returns what the call returns. Raises CloudFailed, also when they are still missing after `seconds`.
    """
    answers: list[T] = []
    if if_present(account, resources, lambda: answers.append(call()), appears=seconds):
        return answers[0]
    shown = resources if isinstance(resources, str) else ", ".join(resources)
    raise CloudFailed(
        f"EC2 does not show {shown} in {account.region}, or not within {seconds:.0f} s",
        hint="run the command again; if it was deleted, `ami-builder list --target aws` shows what is left",
    )


def _presence(account: Account, ids: Sequence[str], failed: CloudFailed) -> Presence:
    """Return whether a failed call can be explained by what EC2 does not show."""
    try:
        found = {look(account, one) for one in ids}
    except CloudFailed as unknown:
        # Without a look the call's own error is all that is known.
        raise failed from unknown
    return next((one for one in (Presence.ABSENT, Presence.ENDED) if one in found), Presence.SHOWN)
