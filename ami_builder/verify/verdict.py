"""Prove an image: boot it untouched on each configured machine, and put what they showed into one verdict."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter

from ami_builder.build.target import Site
from ami_builder.config.schema import Image, VerifySettings
from ami_builder.console import Step
from ami_builder.core.errors import ChecksFailed, Inconclusive
from ami_builder.core.records import Outcome, TargetKind, Verdict
from ami_builder.state.workspace import Run, StoredImage
from ami_builder.system.resources import checks_dir
from ami_builder.verify import runner
from ami_builder.verify.journey import Proof

# Of the settings, what says nothing about a target's machines.
_ELSEWHERE = {
    TargetKind.QEMU: {"instance_types"},
    TargetKind.AWS: {"memory", "cpus", "datasource", "network"},
}


def checks_digest(image: Image, target: TargetKind) -> str:
    """Return what a verdict is bound to besides the image: the checks and the machines they ran on."""
    settings = TypeAdapter(VerifySettings).dump_json(
        image.verify, exclude={"checks", "timeout", *_ELSEWHERE[target]}
    )
    files = runner.digest([*runner.shipped(checks_dir()), *image.verify.checks])
    return hashlib.sha256(files.encode() + settings).hexdigest()


def is_verified(stored: StoredImage, image: Image) -> bool:
    """Tell whether an image has passed the checks of today on the machines configured today."""
    verdict = stored.verdict
    if verdict is None or not verdict.passed:
        return False
    return verdict.checks_digest == checks_digest(image, stored.artifact.target)


def verify(image: Image, stored: StoredImage, site: Site, run: Run, step: Step) -> Verdict:
    """Prove an image on every machine that the site offers; the image is never written.

    Raises BuildFailed, CloudFailed or TimedOut when a machine doesn't come up; failed checks are in the
    verdict.
    """
    proofs = site.prove(image, stored, run, step)
    verdict = verdict_of(image, stored, proofs)
    run.update(verdict=verdict)
    return verdict


def verdict_of(image: Image, stored: StoredImage, proofs: Sequence[Proof]) -> Verdict:
    """Return what the proofs of all of an image's machines come to."""
    return Verdict(
        digest=stored.artifact.digest,
        checks_digest=checks_digest(image, stored.artifact.target),
        results=tuple(result for proof in proofs for result in proof.results),
        measured=tuple(one for proof in proofs for one in proof.measured),
    )


def keep_verdict(stored: StoredImage, verdict: Verdict, site: Site) -> StoredImage:
    """Keep a verdict with the image that it is about.

    An inconclusive one says nothing, so it does not replace what the same checks found before.
    """
    known = stored.verdict
    if (
        verdict.inconclusive
        and known is not None
        and not known.inconclusive
        and (known.digest, known.checks_digest) == (verdict.digest, verdict.checks_digest)
    ):
        return stored
    return site.judge(stored, verdict)


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
        f"{len(failed)} of {of} checks failed: this image does not keep its promise",
        tail=failed,
        log=evidence,
        hint="the console, the journal and docker inspect of the machine are in that folder",
    )


def _named(verdict: Verdict, outcome: Outcome) -> tuple[str, ...]:
    return tuple(
        f"{r.name} ({r.phase}, {r.machine}): {r.message}" for r in verdict.results if r.outcome is outcome
    )
