"""The command that makes a CA and certificates for Dask's TLS."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ami_builder import console
from ami_builder.cli.options import JsonFlag, app, mode, plain

if TYPE_CHECKING:
    from ami_builder.build.certificates import Folder


@app.command()
def certificates(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="Folder of one cluster's CA; it is made if it is missing."),
    ],
    scheduler: Annotated[
        str, typer.Option("--scheduler", metavar="ADDRESS", help="The scheduler's address, for workers.")
    ] = "",
    days: Annotated[
        int, typer.Option("--days", metavar="N", help="How long the certificates are valid.")
    ] = 365,
    as_json: JsonFlag = False,
) -> None:
    """Make a CA and certificates for a cluster that uses TLS.

    Prints one line per role: role and folder.

    Each role (scheduler, worker, local, client) gets a folder with ca.pem,
    cert.pem and key.pem. Machines also get user-data.yaml, and bundle.pem for
    Secrets Manager or SSM; the client gets dask.yaml.

    In a folder with a CA, it makes new certificates and keeps the CA:
    certificates that are in use continue to work until they end. The CA's key,
    ca-key.pem, is only needed here.

    A scheduler's or a worker's key lets its holder act as either. Any key lets
    its holder run programs on the cluster. Dask does not compare host names.
    """
    from ami_builder.build.certificates import make

    with console.open_progress(mode()) as progress, progress.step("certificates", str(folder)) as step:
        made = make(folder, days=days, scheduler=scheduler)
        step.done(f"{'new' if made.new_ca else 'existing'} CA, valid until {made.ca_end:%Y-%m-%d}")
    if as_json:
        console.result_json(plain(made))
    else:
        console.result([f"{one.role}\t{one.folder}" for one in made.issued])
    _explain(made, days)


def _explain(made: Folder, days: int) -> None:
    """Print what the user can do next."""
    ends = {one.end for one in made.issued}
    console.note(f"valid until {min(ends):%Y-%m-%d}; to renew, run this command again")
    if min(ends) == made.ca_end and days > 1:
        console.note("the certificates end with the CA: a new CA needs a new folder")
    if not made.git_ignored:
        console.note(f"{made.folder}/.gitignore does not keep keys out of Git: don't commit them")
    console.note("next: launch machines with the user data of their role")
    for one in made.issued:
        if one.user_data is not None:
            console.note(f"  {one.role}: {one.user_data}")
        elif one.role == "worker":
            console.note("  worker: run this command again with --scheduler ADDRESS")
    console.note(f"then: ami-builder doctor --tls {made.folder} HOST:8786")
