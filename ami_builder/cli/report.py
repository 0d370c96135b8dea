"""The command that makes an HTML page of a record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ami_builder import console
from ami_builder.cli.options import app, open_workspace
from ami_builder.core.errors import UsageError


@app.command()
def report(
    subject: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="Id of a run or nightly run, or its first characters, or its folder. Default: the last run.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write to this file. Default: report.html in the run's folder.",
        ),
    ] = None,
) -> None:
    """Write the report of a run or a nightly run as one HTML file, and print its path."""
    from ami_builder.report.collect import write_page
    from ami_builder.state.runs import find

    if output is not None and output.is_dir():
        raise UsageError(f"--output {output} is a folder", hint="name the file, such as report.html")
    workspace = open_workspace()
    console.result(str(write_page(find(workspace, subject), workspace, output)))
