"""The commands that build, verify and run images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ami_builder import console
from ami_builder.cli.options import (
    AMI,
    DaskFlag,
    ImageArgument,
    JsonFlag,
    TargetFlag,
    app,
    image_object,
    load_config,
    mode,
    open_site,
    open_workspace,
    parse_target,
    plain,
    refuse_dask,
    shared,
)
from ami_builder.core.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from ami_builder.build.target import Site
    from ami_builder.config.loading import Config
    from ami_builder.config.schema import Image
    from ami_builder.state.workspace import StoredImage

_DISK_NAMES = (".qcow2", ".raw", ".img")


@app.command()
def build(
    image: ImageArgument = None,
    target: TargetFlag = "qemu",
    verify: Annotated[bool, typer.Option(help="Boot the baked image and run the checks.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Bake again even if nothing changed.")] = False,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Look up the newest package versions again.")
    ] = False,
    public: Annotated[
        bool, typer.Option("--public", help="With --target aws: publish the AMI to everyone.")
    ] = False,
    dask_scheduler: DaskFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Bake an image, boot it, verify it, and print its path or AMI id.

    Nothing is built if no input has changed since the image was verified.
    """
    from ami_builder.build.build import Options
    from ami_builder.build.build import build as build_image
    from ami_builder.core.records import TargetKind
    from ami_builder.verify.concurrency import open_executor

    where = parse_target(target)
    if public and where is not TargetKind.AWS:
        raise UsageError("--public: only an AMI can be published", hint="add --target aws")
    chosen = load_config().select(image)
    site = open_site(chosen, where, public=public, dask_scheduler=dask_scheduler)
    if dask_scheduler is not None and verify:
        # Report a broken cluster before baking, not after.
        with open_executor(dask_scheduler, 1):
            pass
    with console.open_progress(mode()) as progress:
        built = build_image(
            chosen,
            Options(verify=verify, force=force, refresh=refresh),
            site,
            open_workspace(),
            progress,
        )
    _print_image(built.stored, as_json=as_json, unchanged=built.unchanged)


@app.command()
def verify(
    image: Annotated[
        str | None,
        typer.Argument(
            metavar="[IMAGE|PATH|AMI]", help="Name of a finished image, path of a disk image, or AMI id."
        ),
    ] = None,
    target: TargetFlag = "qemu",
    memory: Annotated[
        list[str] | None,
        typer.Option("--memory", metavar="SIZE", help="Memory of the VM, e.g. 2GiB; repeatable."),
    ] = None,
    instance_type: Annotated[
        list[str] | None,
        typer.Option("--instance-type", metavar="TYPE", help="Instance type to verify on; repeatable."),
    ] = None,
    region: Annotated[
        list[str] | None,
        typer.Option(
            "--region", metavar="REGION", help="With --target aws: verify the AMI in this region; repeatable."
        ),
    ] = None,
    datasource: Annotated[
        str | None, typer.Option("--datasource", help="How the VM gets its user data: ec2 or nocloud.")
    ] = None,
    dask_scheduler: DaskFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Boot a finished image on fresh machines and run the checks."""
    from ami_builder.core.records import TargetKind

    if memory:
        shared.overrides["verify.memory"] = ",".join(memory)
    if instance_type:
        shared.overrides["verify.instance_types"] = ",".join(instance_type)
    if datasource:
        shared.overrides["verify.datasource"] = datasource
    if region:
        shared.overrides["aws.region"] = region[0]
    chosen, stored, site = find_finished(image, load_config(), target)
    if site.target is TargetKind.AWS:
        _verify_amis(chosen, stored, region or [], dask_scheduler, as_json=as_json)
        return
    refuse_dask(dask_scheduler)
    if region:
        raise UsageError(f"--region {region[0]}: a local image has no region", hint="add --target aws")
    from ami_builder.build.verify import verify_image

    with console.open_progress(mode()) as progress:
        proof = verify_image(chosen, stored, site, open_workspace(), progress)
    if as_json:
        console.result_json({"passed": proof.passed, "verdict": plain(proof)})
    else:
        console.verdict(proof)
        console.result(stored.artifact.location)


def _verify_amis(
    image: Image,
    stored: StoredImage,
    regions: Sequence[str],
    dask_scheduler: str | None,
    *,
    as_json: bool,
) -> None:
    """Verify an AMI in its own region, or its copies in `regions`, which are found by digest."""
    from ami_builder.aws.matrix import verify_matrix
    from ami_builder.aws.target import subjects_in

    subjects = subjects_in(regions or [stored.artifact.region], image, stored, open_workspace())
    with console.open_progress(mode()) as progress:
        proved = verify_matrix(subjects, dask_scheduler, open_workspace(), progress)
    found = [
        {"region": one.stored.artifact.region, "ami": one.stored.artifact.location, "verdict": plain(verdict)}
        for one, verdict in zip(subjects, proved.verdicts, strict=True)
    ]
    if as_json:
        console.result_json({"passed": proved.whole.passed, "verdict": plain(proved.whole), "amis": found})
    else:
        console.verdict(proved.whole)
        console.result([one.stored.artifact.location for one in subjects])


@app.command("run")
def run_image(
    image: Annotated[
        str | None,
        typer.Argument(metavar="[IMAGE|PATH]", help="Name of a finished image, or path of a disk image."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="Memory of the VM, e.g. 4GiB.")
    ] = None,
    user_data: Annotated[
        Path | None,
        typer.Option("--user-data", help="User-data file to boot with, as a control plane would send it."),
    ] = None,
) -> None:
    """Boot an image in a local VM, as EC2 would, until Ctrl-C. Its disk changes are discarded."""
    from ami_builder.qemu.run import Launched, launch

    if memory:
        shared.overrides["verify.memory"] = memory
    if user_data is not None and not user_data.is_file():
        raise UsageError(f"--user-data {user_data}: no such file")
    chosen, stored, _ = find_finished(image, load_config(), "qemu")
    is_up = False

    def ready(launched: Launched) -> None:
        nonlocal is_up
        is_up = True
        console.result(
            [
                f"ssh        {launched.ssh}",
                f"tunnel     {launched.tunnel}",
                "           then open the dashboard at http://127.0.0.1:8787/status; the scheduler is tcp://127.0.0.1:8786",
                f"console    {launched.console_log}",
                "Press Ctrl-C to stop the VM. Nothing it wrote is kept.",
            ]
        )

    try:
        with console.open_progress(mode()) as progress:
            launch(
                chosen,
                stored.path,
                memory=chosen.verify.memory[0],
                user_data=user_data,
                workspace=open_workspace(),
                progress=progress,
                on_ready=ready,
            )
    except Interrupted:
        if not is_up:
            raise
        console.note("the VM is stopped")


def find_finished(name: str | None, config: Config, target: str) -> tuple[Image, StoredImage, Site]:
    """Find the image that a word names: an AMI, a disk image, or the newest finished image of a name."""
    from ami_builder.core.records import TargetKind

    if name is not None and AMI.fullmatch(name):
        return _ami(name, config)
    if name is not None and (os.sep in name or name.endswith(_DISK_NAMES)):
        return _disk(name, config)
    chosen = config.select(name)
    wanted = parse_target(target)
    built = [
        s
        for s in open_workspace().images()
        if s.artifact.image == chosen.name and s.artifact.target is wanted
    ]
    if not built:
        flag = " --target aws" if wanted is TargetKind.AWS else ""
        raise UsageError(
            f"image {chosen.name!r} has not been built yet",
            hint=f"run `ami-builder build {chosen.name}{flag}` first",
        )
    return chosen, built[-1], open_site(chosen, wanted)


def _ami(name: str, config: Config) -> tuple[Image, StoredImage, Site]:
    from ami_builder.aws.target import CloudSite

    known = next((s for s in open_workspace().images() if s.artifact.location == name), None)
    chosen = config.select(known.artifact.image if known is not None else None)
    site = CloudSite.open(chosen, open_workspace())
    return chosen, site.ami(chosen, name), site


def _disk(name: str, config: Config) -> tuple[Image, StoredImage, Site]:
    from ami_builder.core.records import TargetKind
    from ami_builder.qemu.target import foreign

    path = Path(name).absolute()
    if not path.is_file():
        raise UsageError(
            f"{name}: no such disk image", hint="run `ami-builder list` to see the finished images"
        )
    stored = next((s for s in open_workspace().images() if s.path == path), None)
    chosen = config.select(stored.artifact.image if stored is not None else None)
    return chosen, stored or foreign(path, chosen), open_site(chosen, TargetKind.QEMU)


def _print_image(stored: StoredImage, *, as_json: bool, unchanged: bool) -> None:
    if as_json:
        console.result_json({**image_object(stored), "unchanged": unchanged})
        return
    if stored.verdict is not None:
        console.verdict(stored.verdict)
    console.result(stored.artifact.location)
