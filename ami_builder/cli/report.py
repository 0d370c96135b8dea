"""The command that draws what was recorded."""

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
            metavar="[RUN|NIGHT]",
            help="An id, its first characters, or the folder.  [default: what ran last]",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write here instead of beside the record."),
    ] = None,
) -> None:
    """Draw a run or a night as one HTML page that needs nothing else, and print where it is."""
    from ami_builder.report.collect import write_page
    from ami_builder.state.runs import find

    if output is not None and output.is_dir():
        raise UsageError(f"--output {output} is a folder", hint="name the file, such as report.html")
    workspace = open_workspace()
    console.result(str(write_page(find(workspace, subject), workspace, output)))
