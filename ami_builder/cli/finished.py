"""The commands that tell of finished images: all of them, or one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ami_builder import console
from ami_builder.cli.shared import JsonFlag, app, image_object, load_config, open_workspace
from ami_builder.core.records import Outcome, Target

if TYPE_CHECKING:
    from ami_builder.state.workspace import StoredImage


@app.command("list")
def list_images(as_json: JsonFlag = False) -> None:
    """List the finished images that this machine knows of, the newest last."""
    images = open_workspace().images()
    channels = _channels(images)
    if as_json:
        console.result_json(
            {
                "images": [
                    {**image_object(one), "channels": channels.get(one.artifact.digest, ())} for one in images
                ]
            }
        )
        return
    console.table(
        ("image", "target", "digest", "created", "size", "verdict", "channels", "where"),
        [
            (
                s.artifact.image,
                s.artifact.target,
                s.artifact.digest[:16],
                f"{s.artifact.created:%Y-%m-%d %H:%M}Z",
                console.size(s.artifact.size),
                _verdict_word(s),
                ", ".join(channels.get(s.artifact.digest, ())),
                f"{s.artifact.location} ({s.artifact.region})" if s.artifact.region else s.artifact.location,
            )
            for s in images
        ],
    )


@app.command()
def show(
    image: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE", help="A name (its newest image), a digest's first digits, a path, an AMI."
        ),
    ],
    as_json: JsonFlag = False,
) -> None:
    """Show one finished image: where it is, where it came from, what was proved, and where it stands."""
    from ami_builder.build.channels import choose

    workspace, config = open_workspace(), load_config()
    stored = choose(workspace.images(), image, config.names)
    artifact, verdict = stored.artifact, stored.verdict
    stands = _channels([stored]).get(artifact.digest, ())
    run = workspace.runs_dir / artifact.run_id
    if as_json:
        console.result_json({**image_object(stored), "channels": stands, "run": run})
        return
    rows = [
        ("image", artifact.image),
        ("target", artifact.target),
        ("where", artifact.location),
        *([("region", artifact.region)] if artifact.region else []),
        ("digest", artifact.digest),
        ("created", f"{artifact.created:%Y-%m-%d %H:%M}Z"),
        ("size", console.size(artifact.size)),
        # Those of AMIs stand in their accounts: see `history`.
        *([("channels", ", ".join(stands) or "none")] if artifact.target is Target.QEMU else []),
        ("verdict", _verdict_word(stored)),
    ]
    if verdict is not None:
        rows += [
            (f"{one.machine} {one.phase}", f"AVAILABLE_MEMORY_FOR_DASK={one.available}")
            for one in verdict.measured
        ]
        rows += [
            (f"{outcome} on {one.machine} {one.phase}", f"{one.name}: {one.message}")
            for outcome in (Outcome.FAILED, Outcome.INCONCLUSIVE)
            for one in verdict.results
            if one.outcome is outcome
        ]
    rows.append(("run", str(run) if run.is_dir() else f"{artifact.run_id} (its record is gone)"))
    console.table(("what", "value"), rows)


def _verdict_word(stored: StoredImage) -> str:
    if stored.verdict is None:
        return "not verified"
    outcome = stored.verdict.outcome
    return "FAILED" if outcome is Outcome.FAILED else str(outcome)


def _channels(images: Sequence[StoredImage]) -> dict[str, tuple[str, ...]]:
    """Return the local channels that images stand in, by digest."""
    from ami_builder.build.channels import standing
    from ami_builder.qemu.channels import LocalChannels

    workspace = open_workspace()
    found: dict[str, tuple[str, ...]] = {}
    for name in {one.artifact.image for one in images}:
        found |= standing(LocalChannels(workspace=workspace, image=name))
    return found
