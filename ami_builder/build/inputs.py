"""The inputs of an image, and their digest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from ami_builder.build import base_image, recipe
from ami_builder.build.guest import RenderedFile, guest
from ami_builder.config.schema import Image
from ami_builder.state.workspace import Workspace
from ami_builder.system.resources import packer_dir
from ami_builder.verify.concurrency import side_by_side

if TYPE_CHECKING:
    from ami_builder.aws.source_ami import BaseAmi

RECIPE_VERSION = 1
"""Part of the digest. Raise it when a change of this program's code alters what an image contains and nothing
else that the digest covers changes with it (settings, base, container, the guest's files, packer/): a release
by itself does not bake every image again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Everything that decides about an image's content."""

    image: Image
    guest: Mapping[PurePosixPath, RenderedFile]
    base_digest: str
    container_digest: str
    digest: str
    base_ami: BaseAmi | None = None
    """What an AMI is baked from; None where the base is a disk."""


def gather(
    image: Image,
    workspace: Workspace,
    *,
    base_ami: Callable[[], BaseAmi] | None = None,
    refresh: bool = False,
) -> Inputs:
    """Render the guest's files, resolve base and container to what they would be now, and digest it all.

    With `base_ami` the base is the AMI that it returns, instead of a disk. How an image is verified is not
    part of the digest: other checks don't make another image.
    """
    logs = workspace.log_dir()
    found: list[BaseAmi] = []

    def base() -> str:
        if base_ami is None:
            return _base_digest(image, workspace, logs, refresh=refresh)
        found.append(base_ami())
        return found[0].id

    base_digest, container_digest = side_by_side(
        [base, lambda: _container_digest(image, workspace, logs, refresh=refresh)]
    )
    rendered = guest(image)
    digest = hashlib.sha256()
    settings = _content_settings(image, ami=base_ami is not None)
    for part in (RECIPE_VERSION, settings, base_digest, container_digest):
        digest.update(f"{part}\0".encode())
    for path, file in sorted(rendered.items()):
        digest.update(f"{path}\0{file.mode:o}\0".encode() + file.content + b"\0")
    for source in sorted([*packer_dir().glob("*.pkr.hcl"), *packer_dir().glob("provisioners/*")]):
        digest.update(f"{source.name}\0".encode() + source.read_bytes() + b"\0")
    return Inputs(
        image=image,
        guest=rendered,
        base_digest=base_digest,
        container_digest=container_digest,
        digest=digest.hexdigest(),
        base_ami=found[0] if found else None,
    )


def _content_settings(image: Image, *, ami: bool) -> str:
    """Return the settings that decide about the content, not those of baking and verification."""
    base = {"source", "suite", "mirror", "checksum"} if ami else {"source"}
    without = dict.fromkeys(("description", "bake", "verify", "aws", "lifecycle", "nightly"), True)
    exclude = without | {"base": base, "container": {"requirements"}}
    settings = TypeAdapter(Image).dump_json(image, exclude=exclude).decode()
    return f"{settings} {image.aws.encrypt} {image.aws.kms_key}" if ami else settings


def _base_digest(image: Image, workspace: Workspace, logs: Path, *, refresh: bool) -> str:
    if image.base.source is not None:
        return base_image.digest(image.base, workspace)
    return recipe.base_recipe(image).resolve(workspace, logs / "resolve-base.log", refresh=refresh)


def _container_digest(image: Image, workspace: Workspace, logs: Path, *, refresh: bool) -> str:
    if image.container.requirements is None:
        return hashlib.sha256(image.container.reference.encode()).hexdigest()
    made = recipe.container_recipe(image)
    return made.resolve(workspace, logs / "resolve-container.log", refresh=refresh)
