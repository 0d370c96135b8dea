"""The commands and their flags; each makes one pipeline call and prints its result."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ami_builder import __version__, console, proc
from ami_builder.errors import AmiBuilderError, BuildFailed, Interrupted, UsageError

if TYPE_CHECKING:
    from ami_builder.config import Config
    from ami_builder.model import Image
    from ami_builder.workspace import StoredImage, Workspace

app = typer.Typer(
    name="ami-builder",
    help="Bake VM images for Dask whose memory limit is right, and prove it on a booted machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="Show and explain the configuration.", no_args_is_help=True)
app.add_typer(config_app, name="config")


class _Shared:
    """The flags that stand before a command."""

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
        typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, e.g. memory.reserve=5%."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only results.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    shared.config = config
    shared.quiet = quiet
    shared.debug = debug
    shared.overrides = {}
    if settings:
        from ami_builder.config import overrides_from

        shared.overrides = overrides_from(settings)


ImageArgument = Annotated[
    str | None, typer.Argument(metavar="[IMAGE]", help="An image of ami-builder.toml.", show_default=False)
]
JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@app.command()
def build(
    image: ImageArgument = None,
    verify: Annotated[bool, typer.Option(help="Boot the baked image and check it.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Bake again though nothing changed.")] = False,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Ask the package archive again for its newest versions.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Bake an image, boot it, verify it, and print its path.

    An image whose inputs have not changed since it was verified is answered at once.
    """
    from ami_builder.pipeline.build import Options
    from ami_builder.pipeline.build import build as build_image

    chosen = _config().select(image)
    with console.open_progress(_mode()) as progress:
        built = build_image(
            chosen, Options(verify=verify, force=force, refresh=refresh), _workspace(), progress
        )
    _print_image(built.stored, as_json=as_json, unchanged=built.unchanged)


@app.command()
def verify(
    image: Annotated[
        str | None, typer.Argument(metavar="[IMAGE|PATH]", help="A built image's name, or a disk's path.")
    ] = None,
    memory: Annotated[
        list[str] | None,
        typer.Option("--memory", metavar="SIZE", help="Memory of the test machine, e.g. 2GiB; repeatable."),
    ] = None,
    datasource: Annotated[
        str | None, typer.Option("--datasource", help="ec2 or nocloud: how the machine gets its user data.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Boot a finished image on a throw-away overlay and run the checks."""
    from ami_builder.pipeline.standalone import verify_disk

    if memory:
        shared.overrides["verify.memory"] = ",".join(memory)
    if datasource:
        shared.overrides["verify.datasource"] = datasource
    config, workspace = _config(), _workspace()
    chosen, disk, stored = _disk_of(image, config, workspace)
    with console.open_progress(_mode()) as progress:
        proof = verify_disk(chosen, disk, stored, workspace, progress)
    if as_json:
        console.result_json({"passed": proof.passed, "verdict": _plain(proof)})
    else:
        console.verdict(proof)
        console.result(str(disk))


@app.command("run")
def run_image(
    image: Annotated[
        str | None, typer.Argument(metavar="[IMAGE|PATH]", help="A built image's name, or a disk's path.")
    ] = None,
    memory: Annotated[str | None, typer.Option("--memory", metavar="SIZE", help="e.g. 4GiB.")] = None,
    user_data: Annotated[
        Path | None, typer.Option("--user-data", help="A user-data file, as a control plane sends.")
    ] = None,
) -> None:
    """Boot an image as EC2 would, on a throw-away overlay, until Ctrl-C."""
    from ami_builder.pipeline.launch import Launched, launch

    if memory:
        shared.overrides["verify.memory"] = memory
    if user_data is not None and not user_data.is_file():
        raise UsageError(f"--user-data {user_data}: there is no such file")
    chosen, disk, _ = _disk_of(image, _config(), _workspace())

    def ready(launched: Launched) -> None:
        console.result(
            [
                f"ssh        {launched.ssh}",
                f"dashboard  {launched.dashboard}",
                f"scheduler  {launched.scheduler}",
                f"console    {launched.console_log}",
                "Ctrl-C stops the machine; nothing that it wrote is kept.",
            ]
        )

    with console.open_progress(_mode()) as progress:
        launch(
            chosen,
            disk,
            memory=chosen.verify.memory[0],
            user_data=user_data,
            workspace=_workspace(),
            progress=progress,
            on_ready=ready,
        )


@app.command()
def render(
    image: ImageArgument = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the files into this new folder.")
    ] = None,
) -> None:
    """Show the guest's files as they will stand in the image, or write them into a folder."""
    from ami_builder.render import guest

    files = guest(_config().select(image))
    if output is None:
        for path, file in files.items():
            console.result([f"# {path} {file.mode:04o}", file.content.decode().rstrip("\n"), ""])
        return
    if output.exists():
        raise UsageError(f"--output {output}: exists already", hint="name a folder that does not exist yet")
    for path, file in files.items():
        target = output / str(path).lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.content)
        target.chmod(file.mode)
    console.result([str(output / str(path).lstrip("/")) for path in files])


@app.command()
def check(image: ImageArgument = None, as_json: JsonFlag = False) -> None:
    """Tell what would stop a build: configuration, tools, accelerator, memory, disk space."""
    from ami_builder.pipeline.preflight import State
    from ami_builder.pipeline.preflight import check as look

    config = _config()
    findings = tuple(look(config.select(image), _workspace()))
    stopping = [f for f in findings if f.state is State.STOPS]
    if as_json:
        console.result_json({"ready": not stopping, "findings": _plain(findings)})
    else:
        rows = [("configuration", State.OK, str(config.path), "")]
        rows += [(f.name, f.state, f.found, f.hint) for f in findings]
        console.table(("what", "state", "found", "what to do"), rows)
    if stopping:
        raise typer.Exit(stopping[0].exit_code)


@app.command("list")
def list_images(as_json: JsonFlag = False) -> None:
    """List the finished images, the newest last."""
    images = _workspace().images()
    if as_json:
        console.result_json({"images": [_image_object(stored) for stored in images]})
        return
    console.table(
        ("image", "digest", "created", "size", "verdict", "path"),
        [
            (
                s.artifact.image,
                s.artifact.digest[:16],
                f"{s.artifact.created:%Y-%m-%d %H:%M}Z",
                console.size(s.artifact.size),
                _verdict_word(s),
                s.path,
            )
            for s in images
        ],
    )


@config_app.command("show")
def config_show(image: ImageArgument = None, as_json: JsonFlag = False) -> None:
    """Show every setting with its value and where it came from."""
    config = _config()
    settings = config.origins(config.select(image).name)
    if as_json:
        console.result_json({"settings": _plain(settings)})
    else:
        console.table(("setting", "value", "from"), [(s.key, s.text, s.origin) for s in settings])


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of ami-builder.toml, for editors."""
    from ami_builder.config import schema_text

    console.result(schema_text().rstrip("\n"))


def _config() -> Config:
    from ami_builder.config import load

    return load(shared.config, environ=os.environ, overrides=shared.overrides)


def _workspace() -> Workspace:
    from ami_builder.workspace import Workspace

    return Workspace.open(os.environ)


def _mode() -> console.Mode:
    return console.choose_mode(quiet=shared.quiet)


def _disk_of(
    name: str | None, config: Config, workspace: Workspace
) -> tuple[Image, Path, StoredImage | None]:
    """Tell which disk is meant: a path, or the newest finished image of a name."""
    images = workspace.images()
    if name is not None and (os.sep in name or name.endswith((".qcow2", ".raw", ".img"))):
        path = Path(name).absolute()
        if not path.is_file():
            raise UsageError(f"{name}: there is no such disk image", hint="`ami-builder list` shows them")
        stored = next((s for s in images if s.path == path), None)
        return config.select(stored.artifact.image if stored is not None else None), path, stored
    chosen = config.select(name)
    built = [s for s in images if s.artifact.image == chosen.name]
    if not built:
        raise UsageError(
            f"image {chosen.name!r} has not been built yet",
            hint=f"run `ami-builder build {chosen.name}` first",
        )
    return chosen, built[-1].path, built[-1]


def _print_image(stored: StoredImage, *, as_json: bool, unchanged: bool) -> None:
    if as_json:
        console.result_json({**_image_object(stored), "unchanged": unchanged})
        return
    if stored.verdict is not None:
        console.verdict(stored.verdict)
    console.result(str(stored.path))


def _image_object(stored: StoredImage) -> dict[str, Any]:
    return {"artifact": _plain(stored.artifact), "verdict": _plain(stored.verdict)}


def _verdict_word(stored: StoredImage) -> str:
    if stored.verdict is None:
        return "not verified"
    return "passed" if stored.verdict.passed else "FAILED"


def _plain(value: object) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Any).dump_python(value, mode="json")


def _stop(number: int, _: FrameType | None) -> NoReturn:
    # A second signal must not cut the cleaning up short.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Interrupted(f"stopped by {signal.Signals(number).name}; everything that was started has been ended")


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; an error is shown with what to do next."""
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    shared.debug = "--debug" in arguments
    try:
        status = app(list(arguments), prog_name="ami-builder", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except AmiBuilderError as failed:
        return _fail(failed)
    except typer.Exit as leaving:
        return leaving.exit_code
    except typer.TyperException as wrong:
        # Without a message there was no command, and the help has been shown instead.
        if not wrong.format_message():
            return UsageError.exit_code
        hint = "`ami-builder --help` shows the commands and their flags"
        return _fail(UsageError(wrong.format_message(), hint=hint))
    except BrokenPipeError:
        # Whoever read our output has seen enough, as in `ami-builder list | head -1`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as broken:
        if broken.errno not in {errno.ENOSPC, errno.EDQUOT}:
            return _defect(broken)
        where = f" ({broken.filename})" if broken.filename else ""
        return _fail(
            BuildFailed(f"no space left on the disk{where}; nothing half-made was kept", hint=proc.DISK_FULL)
        )
    except Exception as defect:  # the last line of defence: a defect of ours
        return _defect(defect)


def _fail(failed: AmiBuilderError) -> int:
    if shared.debug:
        traceback.print_exception(failed)
    console.error(failed)
    return failed.exit_code


def _defect(defect: Exception) -> int:
    hint = "this is a defect of ami-builder; run the command again with --debug and report what it prints"
    failed = AmiBuilderError(f"{type(defect).__name__}: {defect}", hint=hint)
    failed.__cause__ = defect
    return _fail(failed)
