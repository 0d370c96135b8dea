"""The commands that only look: what would be rendered, what would stop a build, what is configured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ami_builder import console
from ami_builder.cli.shared import (
    ImageArgument,
    JsonFlag,
    TargetFlag,
    app,
    config_app,
    load_config,
    open_workspace,
    parse_target,
    plain,
)
from ami_builder.core.errors import UsageError

if TYPE_CHECKING:
    from ami_builder.core.diff import Difference, Measured
    from ami_builder.state.workspace import StoredImage


@app.command()
def render(
    image: ImageArgument = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the files into this new folder.")
    ] = None,
) -> None:
    """Show the guest's files as they will stand in the image, or write them into a folder."""
    from ami_builder.build.guest import guest

    files = guest(load_config().select(image))
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
def check(image: ImageArgument = None, target: TargetFlag = "qemu", as_json: JsonFlag = False) -> None:
    """Tell what would stop a build: configuration, tools, accelerator or account, memory, disk space."""
    from ami_builder.build.preflight import check as look
    from ami_builder.core.records import State

    where = parse_target(target)
    config = load_config()
    findings = tuple(look(config.select(image), open_workspace(), where))
    stopping = [f for f in findings if f.state is State.STOPS]
    if as_json:
        console.result_json({"ready": not stopping, "findings": plain(findings)})
    else:
        rows = [("configuration", State.OK, str(config.path), "")]
        rows += [(f.name, f.state, f.found, f.hint) for f in findings]
        console.table(("what", "state", "found", "what to do"), rows)
    if stopping:
        raise typer.Exit(stopping[0].exit_code)


@app.command()
def diff(
    before: Annotated[
        str, typer.Argument(metavar="A", help="A name, a digest's first digits, a path, an AMI.")
    ],
    after: Annotated[str, typer.Argument(metavar="B", help="Likewise; what B has more counts as plus.")],
    gate: Annotated[
        bool,
        typer.Option("--gate", help="Fail with exit code 9 when this would hold a night's promotion of B."),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show how two images differ: size, available memory at boot, times, packages and container."""
    from ami_builder.build.channels import choose
    from ami_builder.core.gate import judge, not_compared, require_close
    from ami_builder.state.compare import compare_images

    workspace, config = open_workspace(), load_config()
    images, names = workspace.images(), config.names
    one, other = choose(images, before, names), choose(images, after, names)
    bounds = config.select(other.artifact.image).nightly if gate else None
    found = compare_images(one, other, workspace)
    if as_json:
        told = {
            "before": plain(one.artifact),
            "after": plain(other.artifact),
            "packages": plain(found.packages),
        }
        told["measured"] = [{**plain(each), "change": each.change} for each in found.measured]
        if bounds is not None:
            told["held"] = plain(judge(found, bounds))
            told["not_compared"] = plain(not_compared(found))
        console.result_json(told)
    else:
        _print_difference(one, other, found)
        for line in not_compared(found):
            console.note(line)
    if bounds is not None:
        require_close(found, bounds)


def _print_difference(one: StoredImage, other: StoredImage, found: Difference) -> None:
    rows = [
        (
            f"{each.quantity} {each.name}".rstrip(),
            _amount(each, each.before),
            _amount(each, each.after),
            "" if each.change is None else f"{each.change:+.1%}",
        )
        for each in found.measured
    ]
    rows += [
        (f"package {each.name}", each.before or "-", each.after or "-", "") for each in found.packages or ()
    ]
    heading = ("what", one.artifact.digest[:16], other.artifact.digest[:16], "change")
    console.table(heading, rows)
    if found.packages is not None:
        console.note(f"packages that differ: {len(found.packages)}")


def _amount(measured: Measured, value: float | None) -> str:
    return "-" if value is None else console.amount(measured.quantity, value)


@config_app.command("show")
def config_show(image: ImageArgument = None, as_json: JsonFlag = False) -> None:
    """Show every setting with its value and where it came from."""
    config = load_config()
    settings = config.origins(config.select(image).name)
    if as_json:
        console.result_json({"settings": plain(settings)})
    else:
        console.table(("setting", "value", "from"), [(s.key, s.text, s.origin) for s in settings])


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of ami-builder.toml, for editors."""
    from ami_builder.config.loading import schema_text

    console.result(schema_text().rstrip("\n"))
