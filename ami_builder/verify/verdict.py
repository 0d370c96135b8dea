"""Verdicts on images: what they are bound to, whether they still hold, and the errors for bad ones."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter

from ami_builder.config.schema import Image, VerifySettings
from ami_builder.core.errors import ChecksFailed, Inconclusive
from ami_builder.core.records import Outcome, TargetKind, Verdict
from ami_builder.state.workspace import StoredImage
from ami_builder.system.resources import checks_dir
from ami_builder.verify import runner
from ami_builder.verify.machine import MachineResult

# The settings that do not affect a kind's machines.
_IRRELEVANT = {
    TargetKind.QEMU: {"instance_types"},
    TargetKind.AWS: {"memory", "cpus", "datasource", "network"},
}


def checks_digest(image: Image, kind: TargetKind) -> str:
    """Return what a verdict is bound to besides the image: the checks, and the machines they ran on."""
    settings = TypeAdapter(VerifySettings).dump_json(
        image.verify, exclude={"checks", "timeout", *_IRRELEVANT[kind]}
    )
    files = runner.digest([*runner.shipped(checks_dir()), *image.verify.checks])
    return hashlib.sha256(files.encode() + settings).hexdigest()


def verdict_of(image: Image, stored: StoredImage, found: Sequence[MachineResult]) -> Verdict:
    """Return the verdict on an image, from the results of all its machines."""
    return Verdict(
        digest=stored.artifact.digest,
        checks_digest=checks_digest(image, stored.artifact.target),
        results=tuple(result for one in found for result in one.results),
        measured=tuple(measurement for one in found for measurement in one.measured),
    )


def is_verified(stored: StoredImage, image: Image) -> bool:
    """Return whether an image has passed the current checks on the machines that are configured now."""
    verdict = stored.verdict
    if verdict is None or not verdict.passed:
        return False
    return verdict.checks_digest == checks_digest(image, stored.artifact.target)


def replaces(verdict: Verdict, known: Verdict | None) -> bool:
    """Return whether a verdict is worth more than the known one.

    An inconclusive verdict does not replace what the same checks found before.
    """
    return (
        known is None
        or known.inconclusive
        or not verdict.inconclusive
        or (known.digest, known.checks_digest) != (verdict.digest, verdict.checks_digest)
    )


def require_passed(verdict: Verdict, evidence: Path, again: str) -> None:
    """Raise ChecksFailed or Inconclusive, with every check that did not pass.

    `again` is the command that verifies the image once more.
    """
    if verdict.passed:
        return
    of = len(verdict.results)
    if verdict.inconclusive:
        unsure = _named(verdict, Outcome.INCONCLUSIVE)
        raise Inconclusive(
            f"the host was too busy to judge this image: {len(unsure)} of {of} checks"
            f" {'is' if len(unsure) == 1 else 'are'} inconclusive",
            tail=unsure,
            log=evidence,
            hint=f"when the host is idle, run `{again}`; the image is kept",
        )
    failed = _named(verdict, Outcome.FAILED)
    raise ChecksFailed(
        f"{len(failed)} of {of} checks failed",
        tail=failed,
        log=evidence,
        hint="the console, the journal and `docker inspect` of the machine are in that folder",
    )


def _named(verdict: Verdict, outcome: Outcome) -> tuple[str, ...]:
    return tuple(
        f"{r.name} ({r.phase}, {r.machine}): {r.message}" for r in verdict.results if r.outcome is outcome
    )
