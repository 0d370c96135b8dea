"""`ami-builder build`: answer from the verified image when nothing changed, else bake and prove."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ami_builder.build.inputs import Inputs
from ami_builder.build.target import Site
from ami_builder.config.schema import Image
from ami_builder.console import Progress, Step
from ami_builder.state import runs
from ami_builder.state.workspace import Run, StoredImage, Workspace
from ami_builder.verify import estimate
from ami_builder.verify.verdict import is_verified, keep_verdict, require_passed, verify


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a user asks of one build."""

    verify: bool = True
    force: bool = False
    refresh: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """The image, and whether anything had to be done for it."""

    stored: StoredImage
    unchanged: bool


def build(image: Image, options: Options, site: Site, workspace: Workspace, progress: Progress) -> Built:
    """Return the baked and verified image of these inputs, made only when there is none yet.

    Raises Locked, MissingTool, BuildFailed, ChecksFailed, Inconclusive, CloudFailed, TimedOut, Interrupted.
    """
    inputs = resolve(image, site, workspace, progress, refresh=options.refresh)
    return build_from(inputs, options, site, workspace, progress)


def resolve(image: Image, site: Site, workspace: Workspace, progress: Progress, *, refresh: bool) -> Inputs:
    """Return what would go into an image now; `refresh` asks the package archive again."""
    workspace.ensure()
    with progress.step("resolve inputs") as step:
        inputs = site.gather(image, refresh=refresh)
        step.done(inputs.digest[:16])
    return inputs


def build_from(
    inputs: Inputs, options: Options, site: Site, workspace: Workspace, progress: Progress
) -> Built:
    """Return the baked and verified image of inputs that were resolved before; raises what `build` does."""
    image = inputs.image
    if (stored := _answer(inputs, options, site)) is not None:
        return Built(stored=stored, unchanged=True)
    with workspace.lock(image.name, site.target):
        # Whoever held the lock may have built just this.
        if (stored := _answer(inputs, options, site)) is not None:
            return Built(stored=stored, unchanged=True)
        workspace.sweep()
        with workspace.run("build", image.name, inputs.digest) as run:
            try:
                with progress.step(f"build {image.name}") as step:
                    stored = _make(inputs, options, site, workspace, run, step)
            finally:
                run.update(steps=progress.steps)
    return Built(stored=stored, unchanged=False)


def _answer(inputs: Inputs, options: Options, site: Site) -> StoredImage | None:
    """Return the finished image if it is all that was asked for."""
    if options.force:
        return None
    stored = site.find(inputs)
    if stored is None or (options.verify and not is_verified(stored, inputs.image)):
        return None
    return stored


def _make(
    inputs: Inputs, options: Options, site: Site, workspace: Workspace, run: Run, step: Step
) -> StoredImage:
    stored = None if options.force else site.find(inputs)
    early = estimate.of_build(
        runs.run_records(workspace),
        inputs.image,
        site.target,
        ready=_ready(inputs, workspace),
        baked=stored is not None,
        verify=options.verify,
        emulated=site.emulated,
    )
    if early is not None:
        step.announce(str(early))

    def booted(seconds: float) -> None:
        late = estimate.from_boot(
            inputs.image, seconds, verify=options.verify, processors=os.cpu_count() or 1
        )
        if early is None and late is not None:
            step.announce(str(late))

    if stored is None:
        stored = site.bake(inputs, run, step, again=options.force, on_boot=booted)
    run.update(artifact=stored.artifact)
    if options.verify:
        with step.step("verify") as child:
            verdict = verify(inputs.image, stored, site, run, child)
        stored = keep_verdict(stored, verdict, site)
        again = f"ami-builder verify {stored.artifact.location}"
        require_passed(verdict, run.directory / "machines", again)
    return stored


def _ready(inputs: Inputs, workspace: Workspace) -> set[str]:
    """Return the steps that find in the cache what they make."""
    found = {estimate.BASE: inputs.base_digest, estimate.CONTAINER: inputs.container_digest}
    kinds = {estimate.BASE: "base", estimate.CONTAINER: "container"}
    return {name for name, digest in found.items() if (workspace.cache / kinds[name] / digest).is_dir()}
