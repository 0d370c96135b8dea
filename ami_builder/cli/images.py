"""The commands that build, verify and run images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ami_builder import console
from ami_builder.cli.options import (
    DaskFlag,
    JsonFlag,
    TargetFlag,
    app,
    image_object,
    load_config,
    mode,
    open_workspace,
    plain,
    shared,
)
from ami_builder.cli.targets import find_image, open_target
from ami_builder.core.errors import Interrupted, UsageError
from ami_builder.core.options import Datasource
from ami_builder.core.records import TargetKind


@app.command()
def build(
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGE", help="Names of images in ami-builder.toml, such as one for each architecture."
        ),
    ] = None,
    target: TargetFlag = TargetKind.QEMU,
    every: Annotated[bool, typer.Option("--all", help="Build every image in ami-builder.toml.")] = False,
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

    Nothing is built if no input has changed since the image was verified. Several images are built side by
    side where there is room: one that fails does not stop the others.
    """
    from ami_builder.build.build import Built, Options, build_each
    from ami_builder.cli.nightly import worst
    from ami_builder.verify.executor import open_executor

    config = load_config(target)
    if every and images:
        raise UsageError(
            f"--all builds every image, but {images[0]} is named too", hint="use --all, or names"
        )
    names: list[str | None] = [*dict.fromkeys(config.images if every else images or ())]
    chosen = [config.select(name) for name in names or [None]]
    subjects = [
        (one, open_target(one, target, public=public, dask_scheduler=dask_scheduler)) for one in chosen
    ]
    if dask_scheduler is not None and verify:
        # Report a broken cluster before baking, not after.
        with open_executor(dask_scheduler, 1):
            pass
    with console.open_progress(mode()) as progress:
        ended = build_each(
            subjects, Options(verify=verify, force=force, refresh=refresh), open_workspace(), progress
        )
    built = [one for one in ended if isinstance(one, Built)]
    failed = [one for one in ended if not isinstance(one, Built)]
    if len(ended) == 1 and failed:
        raise failed[0]
    for error in failed:
        console.error(error)
    if as_json:
        found = [{**image_object(one.stored), "unchanged": one.unchanged} for one in built]
        console.result_json(found[0] if len(ended) == 1 else {"images": found})
    else:
        for one in built:
            if one.stored.verdict is not None:
                console.verdict(one.stored.verdict)
            console.result(one.stored.artifact.location)
    if failed:
        raise typer.Exit(worst([error.exit_code for error in failed]))


@app.command()
def verify(
    image: Annotated[
        str | None,
        typer.Argument(
            metavar="IMAGE|PATH|AMI", help="Name of a finished image, path of a disk image, or AMI id."
        ),
    ] = None,
    target: TargetFlag = TargetKind.QEMU,
    memory: Annotated[
        list[str] | None,
        typer.Option(
            "--memory", metavar="SIZE", help="With --target qemu: memory of the VM, e.g. 2GiB; repeatable."
        ),
    ] = None,
    instance_type: Annotated[
        list[str] | None,
        typer.Option(
            "--instance-type",
            metavar="TYPE",
            help="With --target aws: instance type to verify on; repeatable.",
        ),
    ] = None,
    region: Annotated[
        list[str] | None,
        typer.Option(
            "--region", metavar="REGION", help="With --target aws: verify the AMI in this region; repeatable."
        ),
    ] = None,
    datasource: Annotated[
        Datasource | None,
        typer.Option(metavar="|".join(Datasource), help="With --target qemu: how the VM gets its user data."),
    ] = None,
    dask_scheduler: DaskFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Boot a finished image on new VMs or instances, and run the checks."""
    from ami_builder.build.verify import located, verify_images

    shared.override("verify.memory", "--memory", ",".join(memory or ()))
    shared.override("verify.instance_types", "--instance-type", ",".join(instance_type or ()))
    shared.override("verify.datasource", "--datasource", datasource)
    chosen, stored, home = find_image(
        image, target, region=region[0] if region else "", dask_scheduler=dask_scheduler
    )
    if home.region:
        useless, of = {"--memory": memory, "--datasource": datasource}, "a local disk image"
    else:
        useless, of = {"--instance-type": instance_type}, "an AMI"
    if flag := next((flag for flag, value in useless.items() if value), None):
        where = stored.artifact.location
        raise UsageError(f"{flag}: it is for {of}, but {where} is not one", hint=f"leave out {flag}")
    # Without --region the AMI is verified where it is, which may not be where images are baked now.
    where_it_is = [stored.artifact.region] if stored.artifact.region else []
    copies = located(home.elsewhere(region or where_it_is), chosen, stored)
    with console.open_progress(mode()) as progress:
        verified = verify_images(chosen, copies, open_workspace(), progress)
    if as_json:
        found = [
            {"region": artifact.region, "ami": artifact.location, "verdict": plain(verdict)}
            for artifact, verdict in zip(
                (one.stored.artifact for one in copies), verified.verdicts, strict=True
            )
        ]
        whole = {"passed": verified.whole.passed, "verdict": plain(verified.whole)}
        console.result_json({**whole, "amis": found} if stored.artifact.region else whole)
    else:
        console.verdict(verified.whole)
        console.result([one.stored.artifact.location for one in copies])


@app.command("run")
def run_image(
    image: Annotated[
        str | None,
        typer.Argument(metavar="IMAGE|PATH", help="Name of a finished image, or path of a disk image."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="Memory of the VM, e.g. 4GiB.")
    ] = None,
    user_data: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, metavar="FILE", help="User data for cloud-init, as a file."
        ),
    ] = None,
    instance_store: Annotated[
        list[str] | None,
        typer.Option(
            "--instance-store",
            metavar="SIZE",
            help="An empty NVMe disk that the VM takes for an EC2 instance store, e.g. 4GiB; repeatable.",
        ),
    ] = None,
) -> None:
    """Boot an image in a local VM, as EC2 would, until Ctrl-C. Its disk changes are discarded."""
    from ami_builder.core.units import MIB, parse_size
    from ami_builder.qemu.extra_disks import ExtraDisk
    from ami_builder.qemu.target import Launched, launch

    disks = []
    for one in instance_store or ():
        try:
            size = parse_size(one)
        except ValueError as error:
            raise UsageError(f"--instance-store {one}: {error}") from None
        if size < MIB:
            raise UsageError(f"--instance-store {one}: expected at least 1MiB, such as 4GiB")
        disks.append(ExtraDisk(size=size))
    shared.override("verify.memory", "--memory", memory)
    chosen, stored, _ = find_image(image, TargetKind.QEMU)
    is_up = False

    def ready(launched: Launched) -> None:
        nonlocal is_up
        is_up = True
        console.result(
            [
                f"ssh        {launched.ssh}",
                f"tunnel     {launched.tunnel}",
                "           then the scheduler is tcp://127.0.0.1:8786",
                "           and, if the container has bokeh, the dashboard is http://127.0.0.1:8787/status",
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
                disks=disks,
                workspace=open_workspace(),
                progress=progress,
                on_ready=ready,
            )
    except Interrupted:
        if not is_up:
            raise
        console.note("the VM is stopped")
