"""The commands that change nothing: list, show, diff, render, check and config."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ami_builder import console
from ami_builder.cli.options import (
    ImageArgument,
    ImageWord,
    JsonFlag,
    TargetFlag,
    app,
    config_app,
    image_object,
    load_config,
    open_workspace,
    plain,
)
from ami_builder.cli.targets import channels_on_host, choose, preflight, revoked_on_host
from ami_builder.core.errors import UsageError
from ami_builder.core.records import Finding, Outcome, State, TargetKind
from ami_builder.system import resources

if TYPE_CHECKING:
    from ami_builder.config.loading import Config
    from ami_builder.core.diff import Difference, QuantityChange
    from ami_builder.state.workspace import StoredImage


@app.command()
def render(
    image: ImageArgument = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Write the files to this new folder."),
    ] = None,
) -> None:
    """Print the files that ami-builder puts into an image, or write them to a folder."""
    from ami_builder.build.guest import guest

    files = guest(load_config().select(image))
    if output is None:
        for path, file in files.items():
            console.result([f"# {path} {file.mode:04o}", file.content.decode().rstrip("\n"), ""])
        return
    if output.exists():
        raise UsageError(f"--output {output}: already exists", hint="name a folder that does not exist yet")
    output.parent.mkdir(parents=True, exist_ok=True)
    # Only a complete folder gets its name.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as aside:
        for path, file in files.items():
            target = Path(aside, "files", str(path).lstrip("/"))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.content)
            target.chmod(file.mode)
        Path(aside, "files").rename(output)
    console.result([str(output / str(path).lstrip("/")) for path in files])


@app.command()
def check(
    image: ImageArgument = None, target: TargetFlag = TargetKind.QEMU, as_json: JsonFlag = False
) -> None:
    """Check what a build needs: configuration, tools, KVM or AWS account, memory, disk space."""
    config = load_config(target)
    findings = (_configuration(config), *preflight(config.select(image), target))
    stopping = [f for f in findings if f.state is State.STOPS]
    if as_json:
        console.result_json({"ready": not stopping, "findings": plain(findings)})
    else:
        rows = [(f.name, f.state, f.found, f.hint) for f in findings]
        console.table(("what", "state", "found", "what to do"), rows)
    if stopping:
        raise typer.Exit(stopping[0].exit_code)


def _configuration(config: Config) -> Finding:
    if config.path != resources.default_config():
        return Finding(name="configuration", state=State.OK, found=str(config.path))
    return Finding(
        name="configuration",
        state=State.NOTE,
        found="no ami-builder.toml here: the defaults apply",
        hint="to have your own: ami-builder config example > ami-builder.toml",
    )


@app.command("list")
def list_images(as_json: JsonFlag = False) -> None:
    """List the finished images that this host knows of, newest last."""
    images = open_workspace().images()
    channels, revoked = channels_on_host(images), revoked_on_host(images)
    if as_json:
        console.result_json(
            {
                "images": [
                    {
                        **image_object(one),
                        "channels": channels.get(one.artifact.digest, ()),
                        "revoked": revoked.get(one.artifact.digest),
                    }
                    for one in images
                ]
            }
        )
        return
    if not images:
        console.note("no finished image yet; run `ami-builder build`")
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
                ", ".join(channels.get(s.artifact.digest, ())) or "revoked" * (s.artifact.digest in revoked),
                f"{s.artifact.location} ({s.artifact.region})" if s.artifact.region else s.artifact.location,
            )
            for s in images
        ],
    )


@app.command()
def show(
    image: ImageWord,
    as_json: JsonFlag = False,
) -> None:
    """Show one finished image: location, origin, verdict and channels."""
    workspace, config = open_workspace(), load_config()
    stored = choose(workspace.images(), image, config.images)
    artifact, verdict = stored.artifact, stored.verdict
    current_in = channels_on_host([stored]).get(artifact.digest, ())
    revoked = revoked_on_host([stored]).get(artifact.digest)
    run = workspace.runs_dir / artifact.run_id
    if as_json:
        console.result_json({**image_object(stored), "channels": current_in, "revoked": revoked, "run": run})
        return
    rows = [
        ("image", artifact.image),
        ("target", artifact.target),
        ("architecture", artifact.arch),
        ("where", artifact.location),
        *([("region", artifact.region)] if artifact.region else []),
        ("digest", artifact.digest),
        ("created", f"{artifact.created:%Y-%m-%d %H:%M}Z"),
        ("size", console.size(artifact.size)),
        # The channels of AMIs are in their accounts: see `history`.
        *([("channels", ", ".join(current_in) or "none")] if not artifact.region else []),
        *([("revoked", revoked)] if revoked is not None else []),
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
    rows.append(("run", str(run) if run.is_dir() else f"{artifact.run_id} (its record was deleted)"))
    console.table(("what", "value"), rows)


def _verdict_word(stored: StoredImage) -> str:
    if stored.verdict is None:
        return "not verified"
    outcome = stored.verdict.outcome
    return "FAILED" if outcome is Outcome.FAILED else str(outcome)


@app.command()
def diff(
    before: Annotated[
        str, typer.Argument(metavar="A", help="Image name, first digits of a digest, path, or AMI id.")
    ],
    after: Annotated[
        str, typer.Argument(metavar="B", help="Image to compare with A. A plus means that B has more.")
    ],
    gate: Annotated[
        bool,
        typer.Option("--gate", help="Exit with code 9 if a nightly run would put B on hold."),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Compare two images: size, available memory at boot, times, packages and container."""
    from ami_builder.nightly.gate import judge, not_compared, require_close
    from ami_builder.state.runs import compare_images

    workspace, config = open_workspace(), load_config()
    images, names = workspace.images(), config.images
    one, other = choose(images, before, names), choose(images, after, names)
    bounds = config.select(other.artifact.image).nightly if gate else None
    found = compare_images(one, other, workspace)
    if as_json:
        answer = {
            "before": plain(one.artifact),
            "after": plain(other.artifact),
            "packages": plain(found.packages),
        }
        answer["measured"] = [{**plain(each), "change": each.change} for each in found.measured]
        if bounds is not None:
            answer["held"] = plain(judge(found, bounds))
            answer["not_compared"] = plain(not_compared(found))
        console.result_json(answer)
    else:
        _print_difference(one, other, found)
        for line in not_compared(found):
            console.note(line)
        if one.artifact.digest == other.artifact.digest:
            console.note(f"{before} and {after} are the same image")
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


def _amount(measured: QuantityChange, value: float | None) -> str:
    return "-" if value is None else console.amount(measured.quantity, value)


@config_app.command("show")
def config_show(image: ImageArgument = None, as_json: JsonFlag = False) -> None:
    """Print every setting with its value and its origin."""
    config = load_config()
    settings = config.settings[config.select(image).name]
    if as_json:
        console.result_json({"settings": plain(settings)})
    else:
        console.table(("setting", "value", "from"), [(s.key, s.text, s.origin) for s in settings])


@config_app.command("example")
def config_example() -> None:
    """Print a complete ami-builder.toml in which every setting has its default."""
    from ami_builder.config.reference import example_file

    console.result(example_file().rstrip("\n"))


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of ami-builder.toml, for editors."""
    from ami_builder.config.reference import schema_text

    console.result(schema_text().rstrip("\n"))
