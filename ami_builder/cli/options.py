"""The application object and the flags that several commands share, parsed into the values they stand for."""

from __future__ import annotations

import os
import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ami_builder import __version__, console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ami_builder.aws.place import Outcome
    from ami_builder.build.target import Site
    from ami_builder.config.loading import Config
    from ami_builder.config.schema import Image
    from ami_builder.core.records import TargetKind
    from ami_builder.state.workspace import StoredImage, Workspace

app = typer.Typer(
    name="ami-builder",
    help="Bake VM images for Dask with the right memory limit, and verify them on a booted machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="Print the configuration and its schema.", no_args_is_help=True)
app.add_typer(config_app, name="config", rich_help_panel="Inspect")


E = TypeVar("E", bound=StrEnum)

AMI = re.compile(r"ami-[0-9a-f]{8,17}")
"""The pattern of an AMI id."""


class _Shared:
    """The flags that come before a command."""

    config: Path | None = None
    overrides: dict[str, str]
    quiet: bool = False
    debug: bool = False


shared = _Shared()
shared.overrides = {}


def _version(wanted: bool) -> None:
    if wanted:
        console.result(f"ami-builder {__version__}")
        raise typer.Exit


@app.callback()
def _flags(
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="Configuration file.  [default: the nearest ami-builder.toml]"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override one setting, e.g. memory.reserve=5%; repeatable."
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print results only, no progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print a traceback with an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    shared.config = config
    shared.quiet = quiet
    shared.debug = debug
    shared.overrides = {}
    if settings:
        from ami_builder.config.loading import overrides_from

        shared.overrides = overrides_from(settings)


ImageArgument = Annotated[
    str | None,
    typer.Argument(metavar="[IMAGE]", help="Name of an image in ami-builder.toml.", show_default=False),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
TargetFlag = Annotated[
    str, typer.Option("--target", metavar="qemu|aws", help="Use a local disk image (qemu) or an AMI (aws).")
]


def load_config() -> Config:
    """Read the configuration and apply the overrides given as flags."""
    from ami_builder.config.loading import load

    return load(shared.config, environ=os.environ, overrides=shared.overrides)


def open_workspace() -> Workspace:
    """Return the user's workspace."""
    from ami_builder.state.workspace import Workspace

    return Workspace.open(os.environ)


def parse_choice(flag: str, word: str, kind: type[E], hint: str | None = None) -> E:
    """Return the enum member that a flag names. Raises UsageError with the nearest valid word."""
    from ami_builder.core.errors import UsageError, did_you_mean

    try:
        return kind(word)
    except ValueError as wrong:
        expected = f"expected one of {', '.join(kind)}{did_you_mean(word, list(kind))}"
        raise UsageError(f"{flag} {word}: {expected}", hint=hint) from wrong


def parse_seconds(flag: str, text: str) -> float:
    """Return a flag's duration in seconds. Raises UsageError."""
    from ami_builder.core.errors import UsageError
    from ami_builder.core.units import parse_duration

    try:
        return parse_duration(text)
    except ValueError as wrong:
        raise UsageError(f"{flag} {text}: {wrong}") from wrong


def parse_target(text: str) -> TargetKind:
    """Return the target that --target names. Raises UsageError with the nearest valid word."""
    from ami_builder.core.records import TargetKind

    hint = "qemu needs no account; aws uses the credentials of the standard AWS chain"
    return parse_choice("--target", text, TargetKind, hint)


DaskFlag = Annotated[
    str | None,
    typer.Option(
        "--dask-scheduler",
        metavar="ADDRESS",
        help="With --target aws: run the verification on this Dask cluster's workers, e.g. tcp://10.0.0.7:8786.",
    ),
]


def open_site(
    image: Image, target: TargetKind, *, public: bool = False, dask_scheduler: str | None = None
) -> Site:
    """Open the target that bakes and boots an image. Only AWS imports boto3."""
    from ami_builder.core.records import TargetKind

    if target is TargetKind.AWS:
        from ami_builder.aws.target import CloudSite

        return CloudSite.open(image, open_workspace(), public=public, dask_scheduler=dask_scheduler)
    refuse_dask(dask_scheduler)
    from ami_builder.qemu.target import LocalSite

    return LocalSite(workspace=open_workspace())


def refuse_dask(dask_scheduler: str | None) -> None:
    """Raise UsageError when --dask-scheduler is used with a local image."""
    from ami_builder.core.errors import UsageError

    if dask_scheduler is not None:
        raise UsageError(
            f"--dask-scheduler {dask_scheduler}: a local disk image can't be sent to a Dask worker",
            hint="add --target aws, or leave out the flag: local VMs already run in parallel",
        )


def ami_of(word: str | None) -> tuple[Image, StoredImage]:
    """Return an AMI as the account has it now. An AMI built on another host is named by its id.

    None means the newest of the default image. Raises UsageError, CloudFailed.
    """
    from ami_builder.aws.target import CloudSite
    from ami_builder.build.channels import choose
    from ami_builder.core.records import TargetKind

    config, workspace = load_config(), open_workspace()
    word = word or config.select().name
    known = [one for one in workspace.images() if one.artifact.target is TargetKind.AWS]
    listed = not AMI.fullmatch(word) or any(one.artifact.location == word for one in known)
    found = choose(known, word, config.names).artifact if listed else None
    chosen = config.select(found.image if found is not None else None)
    site = CloudSite.open(chosen, workspace)
    return chosen, site.ami(chosen, found.location if found is not None else word)


def mode() -> console.Mode:
    """Return how to display progress."""
    return console.choose_mode(quiet=shared.quiet)


def plain(value: object) -> Any:
    """Return a value as plain JSON types."""
    from pydantic import TypeAdapter

    return TypeAdapter(Any).dump_python(value, mode="json")


def image_object(stored: StoredImage) -> dict[str, Any]:
    """Return an image and its verdict as `--json` prints them."""
    return {"artifact": plain(stored.artifact), "verdict": plain(stored.verdict)}


def failures(outcomes: Sequence[Outcome[Any]]) -> list[dict[str, str]]:
    """Return the regions that failed, with the reason, as `--json` prints them."""
    failed = [(one.place, one.error) for one in outcomes if one.error is not None]
    return [{"region": place, "error": error.message} for place, error in failed]
