"""`ami-builder build`: returns the verified image if nothing has changed, else bakes and verifies one."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from ami_builder.build.inputs import Inputs
from ami_builder.build.target import Target
from ami_builder.build.verify import Located, verify
from ami_builder.config.schema import Image
from ami_builder.console import Progress, Step
from ami_builder.core.errors import AmiBuilderError
from ami_builder.state import runs
from ami_builder.state.workspace import Run, StoredImage, Workspace
from ami_builder.verify import estimate
from ami_builder.verify.executor import side_by_side
from ami_builder.verify.verdict import is_verified, require_passed


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user wants of a build."""

    verify: bool = True
    force: bool = False
    refresh: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """The image, and whether it existed before."""

    stored: StoredImage
    unchanged: bool


def build(image: Image, options: Options, target: Target, workspace: Workspace, progress: Progress) -> Built:
    """Return the baked and verified image; make it only if there is none with the same inputs.

    Raises Locked, MissingTool, BuildFailed, ChecksFailed, Inconclusive, CloudFailed, TimedOut, Interrupted.
    """
    inputs = resolve(image, target, workspace, progress, refresh=options.refresh)
    return build_from(inputs, options, target, workspace, progress)


def build_each(
    subjects: Sequence[tuple[Image, Target]], options: Options, workspace: Workspace, progress: Progress
) -> list[Built | AmiBuilderError]:
    """Build several images, such as one for each architecture, as many at once as there is room for.

    An image that fails does not keep the others from being built: its error is in the result.
    """

    def one(image: Image, target: Target) -> Built | AmiBuilderError:
        try:
            return build(image, options, target, workspace, progress)
        except AmiBuilderError as failed:
            return failed

    at_once = len(subjects)
    if not all(target.builds_side_by_side for _, target in subjects):
        # Each has VMs of so many processors here.
        needed = max(max(image.bake.cpus, image.verify.cpus) for image, _ in subjects)
        at_once = max(1, (os.cpu_count() or 1) // needed)
    return side_by_side([partial(one, *subject) for subject in subjects], workers=at_once)


def resolve(
    image: Image, target: Target, workspace: Workspace, progress: Progress, *, refresh: bool
) -> Inputs:
    """Return what would go into an image now; `refresh` asks the package archive again."""
    workspace.ensure()
    with progress.step("resolve inputs") as step:
        inputs = target.gather(image, refresh=refresh)
        step.done(f"{inputs.digest[:16]}, on {inputs.base}" if inputs.base else inputs.digest[:16])
    return inputs


def build_from(
    inputs: Inputs, options: Options, target: Target, workspace: Workspace, progress: Progress
) -> Built:
    """Return the baked and verified image of these inputs. Raises what `build` does."""
    image = inputs.image
    if (stored := _finished(inputs, options, target)) is not None:
        return Built(stored=stored, unchanged=True)
    with workspace.lock(image.name, target.kind):
        # The process that had the lock may have built this image.
        if (stored := _finished(inputs, options, target)) is not None:
            return Built(stored=stored, unchanged=True)
        workspace.sweep()
        with workspace.run("build", image.name, inputs.digest) as run:
            run.update(base=inputs.base)
            try:
                with progress.step(f"build {image.name}") as step:
                    stored = _make(inputs, options, target, workspace, run, step)
            finally:
                run.update(steps=progress.steps)
    return Built(stored=stored, unchanged=False)


def _finished(inputs: Inputs, options: Options, target: Target) -> StoredImage | None:
    """Return the finished image if nothing is left to do for it."""
    if options.force:
        return None
    stored = target.find(inputs.image, inputs.digest)
    if stored is None or (options.verify and not is_verified(stored, inputs.image)):
        return None
    return stored


def _make(
    inputs: Inputs, options: Options, target: Target, workspace: Workspace, run: Run, step: Step
) -> StoredImage:
    stored = None if options.force else target.find(inputs.image, inputs.digest)
    early = estimate.of_build(
        runs.run_records(workspace),
        inputs.image,
        target.kind,
        ready=_ready(inputs, workspace),
        baked=stored is not None,
        verify=options.verify,
        emulated=target.emulated,
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
        stored = target.bake(inputs, run, step, again=options.force, on_boot=booted)
    run.update(artifact=stored.artifact)
    if options.verify:
        with step.step("verify") as child:
            evidence = run.directory / "machines"
            at = Located(target=target, stored=stored)
            stored, verdict = verify(inputs.image, at, run, child, evidence)
        require_passed(verdict, evidence, f"ami-builder verify {stored.artifact.location}")
    return stored


def _ready(inputs: Inputs, workspace: Workspace) -> set[str]:
    """Return the steps whose result is in the cache."""
    found = {estimate.BASE: inputs.base_digest, estimate.CONTAINER: inputs.container_digest}
    kinds = {estimate.BASE: "base", estimate.CONTAINER: "container"}
    return {name for name, digest in found.items() if (workspace.cache / kinds[name] / digest).is_dir()}
