"""`ami-builder verify`: boots finished images and keeps a verdict with each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ami_builder.build.target import Target, TargetOutcome, at_each
from ami_builder.config.schema import Image
from ami_builder.console import Progress, Step
from ami_builder.core.errors import AmiBuilderError, UsageError
from ami_builder.core.records import CheckResult, Measurement, RunStatus, Verdict
from ami_builder.state import runs
from ami_builder.state.workspace import Run, StoredImage, Workspace
from ami_builder.verify import estimate
from ami_builder.verify.verdict import replaces, require_passed, verdict_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """An image, and the target that has it."""

    target: Target
    stored: StoredImage


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """The verdict on each image, and all of them as one for display."""

    verdicts: tuple[Verdict, ...]
    whole: Verdict


def located(targets: Sequence[Target], image: Image, stored: StoredImage) -> list[Located]:
    """Return an image and its finished copies, one for each target. Raises UsageError for a missing one."""
    found = []
    for target in targets:
        artifact = stored.artifact
        here = stored if artifact.region in ("", target.name) else None
        if here is None and artifact.digest:
            here = target.find(image, artifact.digest)
        if here is None:
            raise UsageError(
                f"--region {target.name}: there is no copy of {stored.name} (image {image.name},"
                f" digest {artifact.digest[:16] or 'unknown'})",
                hint=f"it is in {artifact.region}; an AMI that isn't finished doesn't count",
            )
        found.append(Located(target=target, stored=here))
    return found


def verify_images(
    image: Image, copies: Sequence[Located], workspace: Workspace, progress: Progress
) -> Verified:
    """Verify an image at each target that has it, and keep the verdicts with its copies.

    A target that fails does not keep the others from their verdicts; then an error is raised that names all.
    Raises ChecksFailed or Inconclusive with all checks that did not pass, and what a machine raises that
    doesn't come up.
    """
    workspace.ensure()
    workspace.sweep()
    first = copies[0]
    artifact = first.stored.artifact
    with workspace.run("verify", image.name, artifact.digest) as run:
        run.update(artifact=artifact)
        known = runs.run_records(workspace)
        evidence = run.directory / "machines"
        try:
            with progress.step(f"verify {first.stored.name}") as step:
                kind, emulated = first.target.kind, first.target.emulated
                early = estimate.of_verification(known, image, kind, emulated=emulated)
                if early is not None:
                    step.announce(str(early))
                verdicts = _verify_all(image, copies, run, step, evidence)
                whole = _together(copies, verdicts)
                step.done("", RunStatus(whole.outcome))
        finally:
            run.update(steps=progress.steps)
        run.update(verdict=whole)
        require_passed(whole, evidence, _again(copies))
    return Verified(verdicts=tuple(verdicts), whole=whole)


def verify(image: Image, at: Located, run: Run, step: Step, evidence: Path) -> tuple[StoredImage, Verdict]:
    """Verify an image on every machine of its target, and keep the verdict with it.

    Returns the image with the verdict that is kept, and the new verdict; an inconclusive one may not be kept.
    Failed checks are in the verdict. Raises BuildFailed, CloudFailed or TimedOut when a machine doesn't come
    up.
    """
    verdict = verdict_of(image, at.stored, at.target.verify(image, at.stored, run, step, evidence))
    step.done("", RunStatus(verdict.outcome))
    run.update(verdict=verdict)  # first, as keeping it can fail
    if not replaces(verdict, at.stored.verdict):
        return at.stored, verdict
    return at.target.keep_verdict(at.stored, verdict), verdict


def _verify_all(
    image: Image, copies: Sequence[Located], run: Run, step: Step, evidence: Path
) -> list[Verdict]:
    if len(copies) == 1:
        return [verify(image, copies[0], run, step, evidence)[1]]
    of = {one.target.name: one for one in copies}

    def act(target: Target, step: Step) -> Verdict:
        return verify(image, of[target.name], run, step, evidence / target.name)[1]

    outcomes = at_each([one.target for one in copies], act, step)
    _require_verdicts(outcomes)
    return [one.value for one in outcomes if one.value is not None]


def _require_verdicts(outcomes: Sequence[TargetOutcome[Verdict]]) -> None:
    """Raise the first error, with the messages of all."""
    errors = [(one.target, one.error) for one in outcomes if one.error is not None]
    if not errors:
        return
    first: AmiBuilderError = errors[0][1]
    raise type(first)(
        f"{len(errors)} of {len(outcomes)} regions could not be verified: {first.message}",
        hint=first.hint,
        log=first.log,
        tail=tuple(
            line
            for target, error in errors
            for line in (f"{target}: {error.message}", *(f"  {each}" for each in error.tail))
        ),
    ) from first


def _together(copies: Sequence[Located], verdicts: Sequence[Verdict]) -> Verdict:
    """Return the verdicts of several regions as one, with the region in each machine's name."""
    if len(verdicts) == 1:
        return verdicts[0]
    results: list[CheckResult] = []
    measured: list[Measurement] = []
    for one, verdict in zip(copies, verdicts, strict=True):
        name = one.target.name
        results += [replace(each, machine=f"{each.machine} in {name}") for each in verdict.results]
        measured += [replace(each, machine=f"{each.machine} in {name}") for each in verdict.measured]
    return replace(verdicts[0], results=tuple(results), measured=tuple(measured))


def _again(copies: Sequence[Located]) -> str:
    """Return the command that verifies the same images once more."""
    first, *others = [one.stored.artifact for one in copies]
    regions = [f" --region {one.region}" for one in (first, *others) if others]
    return f"ami-builder verify {first.location}{''.join(regions)}"
