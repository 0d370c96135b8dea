"""Opens targets by the name of their kind, and finds the images that words name.

This is the one module that asks which kind a target is; commands about one kind alone (such as `run`, `copy`
and `gc`) import that kind. Only `aws` imports boto3.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ami_builder.cli.options import load_config, open_workspace
from ami_builder.core.errors import UsageError, did_you_mean
from ami_builder.core.records import TargetKind

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from ami_builder.aws.target import AwsTarget
    from ami_builder.build.target import Target
    from ami_builder.config.loading import Config
    from ami_builder.config.schema import Image
    from ami_builder.core.records import Finding
    from ami_builder.qemu.channels import ChannelFile
    from ami_builder.state.workspace import StoredImage

_AMI = re.compile(r"ami-[0-9a-f]{8,17}")
_DISK_NAMES = (".qcow2", ".raw", ".img")
_LEAST_DIGITS = 4


def open_target(
    image: Image, kind: TargetKind, *, public: bool = False, dask_scheduler: str | None = None
) -> Target:
    """Return the home target of an image. Raises UsageError for flags of another kind, and CloudFailed."""
    if kind is TargetKind.AWS:
        return open_aws(image, public=public, dask_scheduler=dask_scheduler)
    from ami_builder.qemu.target import QemuTarget

    if public:
        raise UsageError("--public: only an AMI can be published", hint="add --target aws")
    if dask_scheduler is not None:
        raise UsageError(
            f"--dask-scheduler {dask_scheduler}: a local disk image can't be sent to a Dask worker",
            hint="add --target aws, or leave out the flag: local VMs already run in parallel",
        )
    return QemuTarget(workspace=open_workspace(), arch=image.arch)


def open_aws(
    image: Image, *, region: str = "", public: bool = False, dask_scheduler: str | None = None
) -> AwsTarget:
    """Return the region that an image's AMI is baked in, or another one, for commands that are about AMIs."""
    from ami_builder.aws.target import AwsTarget

    workspace = open_workspace()
    return AwsTarget.open(image, workspace, region=region, public=public, dask_scheduler=dask_scheduler)


def preflight(image: Image, kind: TargetKind) -> Iterator[Finding]:
    """Yield what a build needs. This works where the target can't be opened, such as without credentials."""
    if kind is TargetKind.AWS:
        from ami_builder.aws.target import check

        return check(image, open_workspace())
    from ami_builder.qemu.preflight import check as check_host

    return check_host(image, open_workspace())


def channels_on_host(images: Sequence[StoredImage]) -> dict[str, tuple[str, ...]]:
    """Return the channels of this host in which images are current, by digest. The account is not asked."""
    from ami_builder.build.channels import all_current

    found: dict[str, tuple[str, ...]] = {}
    for file, _ in _channel_files(images):
        found |= all_current(file)
    return found


def revoked_on_host(images: Sequence[StoredImage]) -> dict[str, str]:
    """Return which local images were revoked, by digest, each with the reason. The account is not asked."""
    found: dict[str, str] = {}
    for file, digests in _channel_files(images):
        found |= file.revoked(digests)
    return found


def _channel_files(images: Sequence[StoredImage]) -> Iterator[tuple[ChannelFile, list[str]]]:
    """Yield the record of channels of each name among the local images, with their digests."""
    digests: dict[str, list[str]] = {}
    for one in images:
        if one.artifact.target is TargetKind.QEMU:
            digests.setdefault(one.artifact.image, []).append(one.artifact.digest)
    if not digests:  # on a host that can't run VMs, their code is not imported
        return
    from ami_builder.qemu.channels import ChannelFile

    workspace = open_workspace()
    for name, its in digests.items():
        yield ChannelFile(workspace=workspace, image=name), its


def find_image(
    word: str | None, kind: TargetKind, *, region: str = "", dask_scheduler: str | None = None
) -> tuple[Image, StoredImage, Target]:
    """Return the finished image that a word names, with its settings and its home target.

    With `region`, the target is that region instead. A word is an image's name (its newest image), the first
    digits of a digest, a path, or an AMI id; None is the default image. An AMI of another host is named by
    its id, and an AMI is returned as the account has it now. Raises UsageError and CloudFailed.
    """
    if word is not None and (os.sep in word or word.endswith(_DISK_NAMES)):
        if kind is TargetKind.AWS:
            raise UsageError(
                f"{word}: this is not an AMI",
                hint="name an image in ami-builder.toml, or an AMI id, or leave out --target aws",
            )
        return _disk(word, load_config(), dask_scheduler)
    if word is not None and _AMI.fullmatch(word):
        kind = TargetKind.AWS
    config = load_config(kind)
    known = [one for one in open_workspace().images() if one.artifact.target is kind]
    word = config.select().name if word is None else word
    foreign = _AMI.fullmatch(word) and not any(one.artifact.location == word for one in known)
    stored = None if foreign else choose(known, word, config.images, kind)
    image = config.select(stored.artifact.image if stored is not None else None)
    if kind is TargetKind.AWS:
        home = open_aws(image, region=region, dask_scheduler=dask_scheduler)
        there, ami = home, word
        if stored is not None:
            (there,) = home.elsewhere([stored.artifact.region])
            ami = stored.artifact.location
        found = there.ami(image, ami)
        return _of_its_arch(image, found), found, home
    assert stored is not None
    image = _of_its_arch(image, stored)
    return image, stored, open_target(image, kind, dask_scheduler=dask_scheduler)


def choose(
    images: Sequence[StoredImage],
    word: str,
    names: Collection[str],
    kind: TargetKind = TargetKind.QEMU,
) -> StoredImage:
    """Return the image that a word means: the newest of a name, or the one whose digest begins like that.

    A path or an AMI id works too. Raises UsageError with the nearest valid word.
    """
    tests: tuple[Callable[[StoredImage], bool], ...] = (
        lambda one: one.artifact.image == word,
        lambda one: one.artifact.location in (word, os.path.abspath(word)),  # noqa: PTH100 - of text, not a file
        lambda one: len(word) >= _LEAST_DIGITS and one.artifact.digest.startswith(word.lower()),
    )
    for test in tests:
        found = [one for one in images if test(one)]
        if found and len({one.artifact.digest for one in found}) > 1 and test is tests[-1]:
            begin = ", ".join(dict.fromkeys(one.artifact.digest[:16] for one in found))
            raise UsageError(f"{word}: several digests begin like that: {begin}", hint="give more digits")
        if found:
            return found[-1]
    if word in names:
        flag = "" if kind is TargetKind.QEMU else f" --target {kind}"
        raise UsageError(
            f"image {word!r} has not been built yet", hint=f"run `ami-builder build {word}{flag}` first"
        )
    digests = [one.artifact.digest[: max(len(word), _LEAST_DIGITS)] for one in images]
    raise UsageError(
        f"there is no image {word}{did_you_mean(word, [*names, *digests])}",
        hint=f"give the name of an image ({', '.join(names)}), or at least {_LEAST_DIGITS} digits of a digest"
        " from `ami-builder list`",
    )


def _disk(word: str, config: Config, dask_scheduler: str | None) -> tuple[Image, StoredImage, Target]:
    from ami_builder.qemu.target import foreign

    path = Path(word).absolute()
    if not path.is_file():
        raise UsageError(
            f"{word}: no such disk image", hint="run `ami-builder list` to see the finished images"
        )
    stored = next((s for s in open_workspace().images() if s.path == path), None)
    image = config.select(stored.artifact.image if stored is not None else None)
    home = open_target(image, TargetKind.QEMU, dask_scheduler=dask_scheduler)
    stored = stored or foreign(path, image)
    return _of_its_arch(image, stored), stored, home


def _of_its_arch(image: Image, stored: StoredImage) -> Image:
    """Return the settings for the architecture of a finished image. Raises UsageError for another AMI's."""
    found = stored.artifact.arch
    if found is image.arch:
        return image
    if stored.artifact.target is TargetKind.QEMU:
        return replace(image, arch=found)
    raise UsageError(
        f"{stored.artifact.location} is for {found}, but image {image.name} is for {image.arch}",
        hint=f"add --set arch={found}, or name an image of that architecture",
    )
