"""`ami-builder verify`: the checks alone, on an image that was built before or comes from elsewhere."""

from __future__ import annotations

from ami_builder.build.target import Site
from ami_builder.config.schema import Image
from ami_builder.console import Progress
from ami_builder.core.records import Verdict
from ami_builder.state import runs
from ami_builder.state.workspace import StoredImage, Workspace
from ami_builder.verify import estimate
from ami_builder.verify.verdict import keep_verdict, require_passed, verify


def verify_image(
    image: Image, stored: StoredImage, site: Site, workspace: Workspace, progress: Progress
) -> Verdict:
    """Prove an image as `image` is configured; the verdict on one of ours is kept with it.

    Raises ChecksFailed or Inconclusive, with what did not pass.
    """
    workspace.ensure()
    workspace.sweep()
    with workspace.run("verify", image.name, stored.artifact.digest) as run:
        run.update(artifact=stored.artifact)
        known = runs.run_records(workspace)
        try:
            with progress.step(f"verify {stored.name}") as step:
                early = estimate.of_verification(known, image, site.target, emulated=site.emulated)
                if early is not None:
                    step.announce(str(early))
                verdict = verify(image, stored, site, run, step)
        finally:
            run.update(steps=progress.steps)
        keep_verdict(stored, verdict, site)
        again = f"ami-builder verify {stored.artifact.location}"
        require_passed(verdict, run.directory / "machines", again)
    return verdict
