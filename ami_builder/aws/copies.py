"""Copies of an AMI in other regions: find the existing copy, or make exactly one and finish it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ami_builder.aws import images, presence
from ami_builder.aws import tags as tagging
from ami_builder.aws.session import Account
from ami_builder.config.types import Destination
from ami_builder.core.errors import CloudFailed, TimedOut
from ami_builder.core.orphans import COPYING

_FAILED = frozenset({"failed", "error", "invalid"})
_ATTEMPTS = 3
# Tags that may change after an AMI was made. A client token is only valid for the same request, so a copy
# is requested without them.
_LATER = frozenset({tagging.FINISHED, tagging.VERDICT, tagging.MEASURED, tagging.REVOKED})


def find(there: Account, source: images.Ami) -> images.Ami | None:
    """Return the copy of an AMI in another region, available or pending, else disabled; None without one."""
    known = images.find_copies(there, source.id, source.name)
    return _best(known) or next((ami for ami in known if ami.state == "disabled"), None)


def copy(
    source: images.Ami,
    origin: str,
    there: Account,
    destination: Destination,
    *,
    encrypt: bool = False,
    own_tags: Mapping[str, str] | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> images.Ami:
    """Return the finished copy of a finished AMI with its current tags; make it when there is none.

    `origin` is the region of the source. A copy that a killed run began is waited for and finished; a failed
    copy is deregistered and replaced. `own_tags` of the user's are on it from the start. Raises CloudFailed
    with EC2's reason, TimedOut.
    """
    known = images.find_copies(there, source.id, source.name)
    spent = sorted(ami.id for ami in known if ami.state in _FAILED)
    found = _best(known)
    for failed in spent:
        images.deregister(there, failed)
    if found is None:
        found = _made(
            source, origin, there, destination, encrypt=encrypt, own_tags=own_tags or {}, spent=spent
        )
    whole = images.wait_available(there, found.id, COPYING.total_seconds(), on_progress)
    if (encrypt or destination.kms_key) and not whole.encrypted:
        raise CloudFailed(
            f"the copy {whole.id} of {source.id} is not encrypted, but must be",
            hint="deregister it; the next run makes another copy",
        )
    return _finished(there, whole, source)


def _best(known: Sequence[images.Ami]) -> images.Ami | None:
    fitting = [ami for ami in known if ami.state == "available" or ami.pending]
    return max(fitting, key=lambda ami: (ami.finished, not ami.pending, ami.id), default=None)


def _made(
    source: images.Ami,
    origin: str,
    there: Account,
    destination: Destination,
    *,
    encrypt: bool,
    own_tags: Mapping[str, str],
    spent: Sequence[str],
) -> images.Ami:
    """Begin a copy, or return the one that the same call began before: EC2 makes one for each client token.

    A token stays bound to a copy that failed or was deregistered, so their ids are part of the next token.
    """
    encrypted = encrypt or bool(destination.kms_key)
    settings: dict[str, Any] = {"Encrypted": True} if encrypted else {}
    if destination.kms_key:
        settings["KmsKeyId"] = destination.kms_key
    missing = list(spent)
    tags = {**own_tags, **_own(source)}
    # EC2 refuses a token that comes again with other parameters.
    asked = (encrypted, destination.kms_key, *(f"{key}={own_tags[key]}" for key in sorted(own_tags)))
    for _ in range(_ATTEMPTS):
        call = partial(
            there.ec2.copy_image,
            Name=source.name,
            SourceImageId=source.id,
            SourceRegion=origin,
            ClientToken=_token(source, there.region, *asked, *missing),
            TagSpecifications=tagging.specifications(tags, "image", "snapshot"),
            **settings,
        )
        # The source was described just now, but not every call may find it yet.
        made = presence.once_visible(there.in_region(origin), source.id, call)
        try:
            return images.wait_visible(there, made["ImageId"])
        except TimedOut:
            missing.append(made["ImageId"])
    raise CloudFailed(
        f"EC2 accepted {_ATTEMPTS} requests to copy {source.id} to {there.region}, but shows no copy:"
        f" {', '.join(missing)}",
        hint="run the command again later",
    )


def _token(source: images.Ami, region: str, *more: object) -> str:
    """Return the client token of a copy: 64 characters, the same on every host."""
    parts = (source.tags.get(tagging.DIGEST, ""), source.tags.get(tagging.RUN, ""), source.id, region, *more)
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def _own(source: images.Ami) -> dict[str, str]:
    """Return the tags that a copy and its snapshots are created with; they never change."""
    ours = {
        key: value
        for key, value in source.tags.items()
        if key == tagging.NAME or (key.startswith(tagging.PREFIX) and key not in _LATER)
    }
    return ours | {tagging.COPY_OF: source.id}


def _finished(there: Account, found: images.Ami, source: images.Ami) -> images.Ami:
    """Copy the source's tags, the verdict included, and mark the copy as finished last."""
    own = _own(source)
    wanted = {key: value for key, value in source.tags.items() if not key.startswith("aws:")} | own
    missing = {
        key: value
        for key, value in wanted.items()
        if key != tagging.FINISHED and found.tags.get(key) != value
    }
    # Ours first: the policy allows other tags only on an AMI that has a run's tag.
    ours = {key: value for key, value in missing.items() if key in own or key in _LATER}
    for tags in (ours, {key: value for key, value in missing.items() if key not in ours}):
        if tags:
            images.tag(there, found.id, tags)
    if not found.finished:
        return images.finish(there, found.id, own)
    return images.wait_visible(there, found.id) if missing else found
