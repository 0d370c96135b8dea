"""Settings that are valid by themselves but not together, and missing files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ami_builder.config.schema import DEBIAN_USER, AwsSettings, ImageSettings
from ami_builder.config.types import DEFAULT_REFERENCE
from ami_builder.core.options import Connect, ContainerSource
from ami_builder.core.regions import partition
from ami_builder.core.units import format_size


class Conflict(NamedTuple):
    """Settings that conflict, or a missing file; the first key is the one to change."""

    keys: tuple[str, ...]
    message: str


def find(settings: ImageSettings) -> Iterator[Conflict]:
    """Yield the conflicts between the settings of one image, each of which is valid by itself."""
    base, container, verify = settings.base, settings.container, settings.verify
    if base.source is not None and "://" not in base.source:
        yield from _missing("base.source", Path(base.source))
    elif base.source is not None and base.checksum is None:
        yield Conflict(
            ("base.checksum", "base.source"), "expected the checksum of the file at the URL in base.source"
        )
    if base.source is None and base.ssh_user != DEBIAN_USER:
        yield Conflict(
            ("base.ssh_user", "base.source"), f"expected {DEBIAN_USER}, the user on a disk of Debian packages"
        )
    host = _registry(container.reference)
    if container.source is not ContainerSource.REGISTRY:
        if container.requirements is not None:
            yield from _missing("container.requirements", container.requirements, "container.source")
        if host or "@" in container.reference:
            yield Conflict(
                ("container.reference", "container.source"),
                'expected name:tag without a registry; to pull this, set container.source to "registry"',
            )
    elif container.reference == DEFAULT_REFERENCE:
        yield Conflict(
            ("container.reference", "container.source"),
            "expected a reference to pull, because container.source is registry",
        )
    if container.insecure_registry and (
        container.source is not ContainerSource.REGISTRY or container.insecure_registry != host
    ):
        yield Conflict(
            ("container.insecure_registry", "container.reference", "container.source"),
            f"has no effect: container.reference is not pulled from {container.insecure_registry}",
        )
    if verify.disk_size < base.disk_size:
        yield Conflict(
            ("verify.disk_size", "base.disk_size"),
            f"expected at least base.disk_size, which is {format_size(base.disk_size)}",
        )
    if settings.memory.reserve.bytes >= min(verify.memory):
        yield Conflict(
            ("memory.reserve", "verify.memory"),
            f"expected less than the smallest verify.memory, which is {format_size(min(verify.memory))}",
        )
    if 2 * (settings.memory.nanny_headroom or 0) > min(verify.memory):
        yield Conflict(
            ("memory.nanny_headroom", "verify.memory"),
            "expected at most half of the smallest verify.memory, which is"
            f" {format_size(min(verify.memory))}: the workers need the rest",
        )
    for check in verify.checks:
        yield from _missing("verify.checks", check)
    if settings.aws.kms_key and not settings.aws.encrypt:
        yield Conflict(("aws.kms_key", "aws.encrypt"), "has no effect, because aws.encrypt is false")
    if settings.aws.connect is Connect.SESSION_MANAGER and not settings.aws.instance_profile:
        yield Conflict(
            ("aws.connect", "aws.instance_profile"),
            "expected ssh, or an aws.instance_profile that allows Session Manager",
        )
    keys = [tag.key for tag in settings.aws.tags]
    for key in sorted({each for each in keys if keys.count(each) > 1}):
        yield Conflict(("aws.tags",), f"expected each key once, but {key} is listed several times")
    if len(keys) > MOST_TAGS:
        yield Conflict(("aws.tags",), f"expected at most {MOST_TAGS} tags: EC2 allows 50 on one resource")
    yield from _regions(settings.aws)
    if settings.nightly.channel not in ("", *settings.lifecycle.channels):
        yield Conflict(
            ("nightly.channel", "lifecycle.channels"),
            f"expected one of lifecycle.channels: {', '.join(settings.lifecycle.channels)}",
        )


def _regions(aws: AwsSettings) -> Iterator[Conflict]:
    regions = [one.region for one in aws.copy_to]
    for region in sorted({each for each in regions if regions.count(each) > 1}):
        yield Conflict(("aws.copy_to",), f"expected each region once, but {region} is listed several times")
    if aws.region in regions:
        yield Conflict(
            ("aws.copy_to", "aws.region"), f"has no effect: {aws.region} is where the AMI is baked"
        )
    partitions = {partition(each) for each in (*regions, aws.region) if each}
    if len(partitions) > 1:
        yield Conflict(
            ("aws.copy_to", "aws.region"),
            "expected regions of one partition: AMIs can't be copied to another",
        )
    for one in aws.copy_to:
        if one.kms_key.startswith("arn:") and one.kms_key.split(":")[3] != one.region:
            yield Conflict(
                ("aws.copy_to",),
                f"expected a key of {one.region}: a copy can't be encrypted with a key of another region",
            )
    if not aws.share_with:
        return
    default = "expected nobody, because snapshots encrypted with the default key can't be shared"
    if aws.encrypt and aws.kms_key in _DEFAULT_KEYS:
        yield Conflict(("aws.share_with", "aws.encrypt", "aws.kms_key"), f"{default}: set aws.kms_key")
    elif own := [
        one.region for one in aws.copy_to if one.kms_key in _DEFAULT_KEYS and (aws.encrypt or one.kms_key)
    ]:
        yield Conflict(
            ("aws.share_with", "aws.copy_to", "aws.encrypt"),
            f"{default}: write {own[0]}=KEY in aws.copy_to",
        )


MOST_TAGS = 30
"""Of EC2's 50 on one resource the rest is for those that ami-builder sets."""
_DEFAULT_KEYS = ("", "alias/aws/ebs")


def _registry(reference: str) -> str | None:
    """Return the registry in a reference: as for Docker, a first part with a dot or a port."""
    first, slash, _ = reference.partition("/")
    return first if slash and (first == "localhost" or "." in first or ":" in first) else None


def _missing(key: str, path: Path, *others: str) -> Iterator[Conflict]:
    try:
        usable = path.is_file() and os.access(path, os.R_OK)
        reason = "is not a file" if path.exists() else "does not exist"
    except OSError as wrong:
        usable, reason = False, f"can't be accessed: {wrong.strerror}"
    if not usable:
        reason = "can't be read" if reason == "is not a file" and path.is_file() else reason
        yield Conflict((key, *others), f"expected a file, but {path} {reason}")
