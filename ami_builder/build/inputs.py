"""The inputs of an image, and their digest."""

import hashlib
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath

from pydantic import TypeAdapter

from ami_builder.build import container
from ami_builder.build.guest import RenderedFile, guest
from ami_builder.config.schema import Image
from ami_builder.state.workspace import Workspace
from ami_builder.system.resources import packer_dir
from ami_builder.verify.executor import ask_side_by_side

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
    """Of the base disk; the id of a base AMI."""
    container_digest: str
    digest: str
    base: str = ""
    """The base for people: an AMI's name and id; empty for a disk."""


def gather(
    image: Image,
    workspace: Workspace,
    base: Callable[[], str],
    *,
    resolved: AbstractSet[str] = frozenset({"source"}),
    more: str = "",
    refresh: bool = False,
) -> Inputs:
    """Render the guest's files, resolve base and container to what they would be now, and digest it all.

    `base` returns what identifies the base, and covers its `resolved` settings. `more` are settings that
    decide about the content at one kind of target only.
    """
    calls: list[Callable[[], str]] = [base, partial(container.digest, image, workspace, refresh=refresh)]
    base_digest, container_digest = ask_side_by_side(calls)
    rendered = guest(image)
    digest = hashlib.sha256()
    settings = _content_settings(image, resolved) + more
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
    )


def _content_settings(image: Image, resolved: AbstractSet[str]) -> str:
    """Return the settings that decide about the content, not those of baking and verification."""
    without = dict.fromkeys(("description", "bake", "verify", "aws", "lifecycle", "nightly"), True)
    exclude = without | {"base": set(resolved), "container": {"requirements"}}
    return TypeAdapter(Image).dump_json(image, exclude=exclude).decode()
