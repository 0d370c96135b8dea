"""The application object and the flags that several commands share, parsed into the values they stand for."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ami_builder import __version__, console
from ami_builder.core.records import TargetKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ami_builder.build.target import TargetOutcome
    from ami_builder.config.loading import Config
    from ami_builder.state.workspace import StoredImage, Workspace

app = typer.Typer(
    name="ami-builder",
    help="Build VM images for Dask with the right memory limit, and verify them on a booted VM or instance.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="Print the configuration and its schema.", no_args_is_help=True)
app.add_typer(config_app, name="config", rich_help_panel="Inspect")


@dataclass(slots=True, kw_only=True)
class _Shared:
    """The flags that come before a command."""

    config: Path | None = None
    overrides: dict[str, str] = field(default_factory=dict)
    """Settings from flags."""
    flags: dict[str, str] = field(default_factory=dict)
    """The flag of each override that is not from --set."""
    quiet: bool = False
    debug: bool = False

    def override(self, key: str, flag: str, text: str | None) -> None:
        """Set a setting from a command's own flag, if that was given."""
        if text:
            self.overrides[key] = text
            self.flags[key] = flag


shared = _Shared()


def _version(wanted: bool) -> None:
    if wanted:
        console.result(f"ami-builder {__version__}")
        raise typer.Exit


@app.callback()
def _flags(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FILE",
            help="Configuration file. Default: the nearest ami-builder.toml.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override one setting, e.g. memory.reserve=5%; repeatable."
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print results only, no progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print a traceback when a command fails.")] = False,
    version: Annotated[  # noqa: ARG001 - its callback prints it
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    shared.config = config
    shared.quiet = quiet
    shared.debug = debug
    shared.overrides, shared.flags = {}, {}
    if settings:
        from ami_builder.config.loading import overrides_from

        shared.overrides = overrides_from(settings)


ImageArgument = Annotated[
    str | None,
    typer.Argument(metavar="IMAGE", help="Name of an image in ami-builder.toml.", show_default=False),
]
ImageWord = Annotated[
    str,
    typer.Argument(
        metavar="IMAGE", help="Image name (its newest image), first digits of a digest, path, or AMI id."
    ),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
TargetFlag = Annotated[
    TargetKind,
    typer.Option(metavar="|".join(TargetKind), help="Use a local disk image (qemu) or an AMI (aws)."),
]


def load_config(target: TargetKind = TargetKind.QEMU) -> Config:
    """Read the configuration for a kind of target, and apply the overrides given as flags."""
    from ami_builder.config.loading import load

    return load(
        shared.config, environ=os.environ, overrides=shared.overrides, flags=shared.flags, target=target
    )


def command(*words: str) -> str:
    """Return a command line with the configuration that this command was given."""
    given = [] if shared.config is None else ["--config", str(shared.config)]
    for key, text in shared.overrides.items():
        if key not in shared.flags:
            given += ["--set", f"{key}={text}"]
    return shlex.join(["ami-builder", *given, *words])


def open_workspace() -> Workspace:
    """Return the user's workspace."""
    from ami_builder.state.workspace import Workspace

    return Workspace.open(os.environ)


DaskFlag = Annotated[
    str | None,
    typer.Option(
        "--dask-scheduler",
        metavar="ADDRESS",
        help="With --target aws: run the checks from the workers of this Dask cluster, e.g. tcp://10.0.0.7:8786.",
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
