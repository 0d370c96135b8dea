"""`ami-builder build`: answer from the verified image when nothing changed, else bake, store and prove."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from ami_builder.console import Progress, Step
from ami_builder.model import Artifact, Image, Target
from ami_builder.pipeline.bake import bake
from ami_builder.pipeline.inputs import Inputs, gather
from ami_builder.pipeline.verify import checks_digest, require_passed, verify
from ami_builder.workspace import Run, StoredImage, Workspace


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


def build(image: Image, options: Options, workspace: Workspace, progress: Progress) -> Built:
    """Return the baked and verified image of these inputs, made only when there is none yet.

    Raises Locked, MissingTool, BuildFailed, ChecksFailed, TimedOut, Interrupted.
    """
    workspace.ensure()
    with progress.step("resolve inputs") as step:
        inputs = gather(image, workspace, workspace.resolve_logs(), refresh=options.refresh)
        step.done(inputs.digest[:16])
    if (stored := _answer(inputs, options, workspace)) is not None:
        return Built(stored=stored, unchanged=True)
    with workspace.lock(image.name, Target.QEMU):
        # Whoever held the lock may have built just this.
        if (stored := _answer(inputs, options, workspace)) is not None:
            return Built(stored=stored, unchanged=True)
        workspace.sweep()
        with workspace.run("build", image.name, inputs.digest) as run:
            try:
                with progress.step(f"build {image.name}") as step:
                    stored = _make(inputs, options, workspace, run, step)
            finally:
                run.update(steps=progress.steps)
    return Built(stored=stored, unchanged=False)


def _answer(inputs: Inputs, options: Options, workspace: Workspace) -> StoredImage | None:
    """Return the finished image if it is all that was asked for."""
    if options.force:
        return None
    stored = workspace.image(inputs.image.name, inputs.digest)
    if stored is None or (options.verify and not is_verified(stored, inputs.image)):
        return None
    return stored


def is_verified(stored: StoredImage, image: Image) -> bool:
    """Tell whether an image has passed the checks of today on the machines configured today."""
    verdict = stored.verdict
    return verdict is not None and verdict.passed and verdict.checks_digest == checks_digest(image)


def _make(inputs: Inputs, options: Options, workspace: Workspace, run: Run, step: Step) -> StoredImage:
    image = inputs.image
    stored = None if options.force else workspace.image(image.name, inputs.digest)
    if stored is None:
        baked = bake(inputs, workspace, run, step)
        artifact = Artifact(
            image=image.name,
            target=Target.QEMU,
            location=str(baked.disk),
            digest=inputs.digest,
            created=datetime.now(UTC),
            run_id=run.record.run_id,
            size=baked.disk.stat().st_size,
        )
        stored = workspace.store(artifact, baked.disk, baked.packages)
    run.update(artifact=stored.artifact)
    if options.verify:
        with step.step("verify") as child:
            verdict = verify(image, stored.path, inputs.digest, workspace, run, child)
        stored = workspace.judge(stored, verdict)
        require_passed(verdict, run.directory / "machines")
    return stored
