"""The application object and the flags that several commands share, parsed into the values they stand for."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ami_builder import __version__, console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ami_builder.build.target import TargetOutcome
    from ami_builder.config.loading import Config
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


DaskFlag = Annotated[
    str | None,
    typer.Option(
        "--dask-scheduler",
        metavar="ADDRESS",
        help="With --target aws: run the verification on this Dask cluster's workers, e.g. tcp://10.0.0.7:8786.",
    ),
]


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


def failures(outcomes: Sequence[TargetOutcome[Any]]) -> list[dict[str, str]]:
    """Return the regions that failed, with the reason, as `--json` prints them."""
    failed = [(one.target, one.error) for one in outcomes if one.error is not None]
    return [{"region": name, "error": error.message} for name, error in failed]
