"""The image of the Dask container: built here as an archive, or pulled from a registry while baking."""

import hashlib
from pathlib import Path

from ami_builder.build.recipe import Recipe, debian_recipe
from ami_builder.config.schema import Image
from ami_builder.console import Step
from ami_builder.state.workspace import Run, Workspace

KIND = "container"


def digest(image: Image, workspace: Workspace, *, refresh: bool) -> str:
    """Return the digest of the archive that would be built now, or of the reference that is pulled."""
    if image.container.requirements is None:
        return hashlib.sha256(image.container.reference.encode()).hexdigest()
    log = workspace.log_dir() / "resolve-container.log"
    return _recipe(image).resolve(workspace, log, refresh=refresh)


def archive(image: Image, digest: str, workspace: Workspace, run: Run, step: Step) -> Path | None:
    """Return the archive from the cache, built if it isn't there; None if the image is pulled."""
    if image.container.requirements is None:
        step.done(f"{image.container.reference}, pulled while baking")
        return None
    if (workspace.cache / KIND / digest).is_dir():
        step.done("cached")
    folder = _recipe(image).make(workspace, digest, "container.tar", run.log("container"), step.update)
    return folder / "container.tar"


def _recipe(image: Image) -> Recipe:
    settings = image.container
    assert settings.requirements is not None
    return debian_recipe(
        KIND,
        "container-archive",
        ["--arch", image.arch, "--reference", settings.reference, "--suite", image.base.suite],
        mirror=image.base.mirror,
        packages=settings.packages,
        paths=(("--requirements", settings.requirements),),
    )
