"""The image of the Dask container: built here or on the baking machine, or pulled from a registry."""

import hashlib
import shlex
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from ami_builder.build import packer
from ami_builder.build.guest import RenderedFile
from ami_builder.build.recipe import Recipe, debian_recipe
from ami_builder.config.schema import Image
from ami_builder.console import Step
from ami_builder.core.options import ContainerSource
from ami_builder.state.workspace import Run, Workspace
from ami_builder.system.resources import scripts_dir

KIND = "container"
UPLOADED = "/var/tmp/container.tar"  # noqa: S108 - on the baking machine
"""Where the archive is on the baking machine, if it was uploaded or built there."""

_RECIPE = "container-recipe.tar"


def digest(image: Image, workspace: Workspace, *, refresh: bool) -> str:
    """Return the digest of the archive that would be built now, or of the reference that is pulled.

    What the baking machine builds is known by its recipe alone: only a host with apt can look up the versions
    of Debian's packages, and the digest is the same on every host.
    """
    if image.container.requirements is None:
        return hashlib.sha256(image.container.reference.encode()).hexdigest()
    recipe = _recipe(image)
    if image.container.source is ContainerSource.MACHINE:
        return recipe.text_digest()
    return recipe.resolve(workspace, workspace.log_dir() / "resolve-container.log", refresh=refresh)


def prepare(image: Image, digest: str, workspace: Workspace, run: Run, step: Step) -> Path | None:
    """Return what the baking machine gets: the archive, its recipe, or None if the image is pulled.

    The archive comes from the cache, and is built if it isn't there.
    """
    if image.container.requirements is None:
        step.done(f"{image.container.reference}, pulled while baking")
        return None
    if image.container.source is ContainerSource.MACHINE:
        step.done("built while baking")
        file = run.directory / _RECIPE
        file.write_bytes(_recipe_archive(_recipe(image)))
        return file
    if (workspace.cache / KIND / digest).is_dir():
        step.done("cached")
    folder = _recipe(image).make(workspace, digest, "container.tar", run.log("container"), step.update)
    return folder / "container.tar"


def variables(image: Image, archive: str = UPLOADED) -> Mapping[str, packer.Variable]:
    """Return Packer's variables about the container. `archive` is its path on the baking machine."""
    source = image.container.source
    return {
        "container_reference": image.container.reference,
        "container_archive": "" if source is ContainerSource.REGISTRY else archive,
        "container_recipe": f"/var/tmp/{_RECIPE}" if source is ContainerSource.MACHINE else "",  # noqa: S108
        "insecure_registry": image.container.insecure_registry or "",
    }


def _recipe(image: Image) -> Recipe:
    settings = image.container
    assert settings.requirements is not None
    return debian_recipe(
        KIND,
        "container-archive",
        ["--reference", settings.reference, "--suite", image.base.suite],
        arch=image.arch,
        mirror=image.base.mirror,
        packages=settings.packages,
        paths=(("--requirements", settings.requirements),),
    )


def _recipe_archive(recipe: Recipe) -> bytes:
    """Return a tar archive of a recipe and its files. `build FILE` in it makes what the recipe makes here."""
    files = {
        PurePosixPath(source.relative_to(scripts_dir())): RenderedFile(
            content=source.read_bytes(), mode=0o755
        )
        for source in recipe.sources
    }
    words = [f"./{recipe.script.name}", *recipe.flags]
    for flag, path in recipe.paths:
        name = flag.lstrip("-")
        files[PurePosixPath(name)] = RenderedFile(content=path.read_bytes(), mode=0o644)
        words += [flag, name]
    build = f'#!/bin/sh\nset -eu\ncd "$(dirname "$0")"\nexec {shlex.join(words)} --output "$1"\n'
    files[PurePosixPath("build")] = RenderedFile(content=build.encode(), mode=0o755)
    return packer.guest_archive(files)
