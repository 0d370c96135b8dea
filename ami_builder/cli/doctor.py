"""The command that checks the memory limits of a running Dask cluster."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ami_builder import console
from ami_builder.cli.options import JsonFlag, app, mode, plain
from ami_builder.core.errors import ChecksFailed, TimedOut, UsageError
from ami_builder.core.units import parse_duration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ami_builder.doctor.rules import Diagnosis


@app.command()
def doctor(
    address: Annotated[
        str, typer.Argument(metavar="ADDRESS", help="Address of the scheduler, e.g. tcp://10.0.0.5:8786.")
    ],
    timeout: Annotated[
        str, typer.Option("--timeout", metavar="DURATION", help="Time limit for all workers together.")
    ] = "30s",
    tls: Annotated[
        Path | None,
        typer.Option(
            "--tls",
            metavar="FOLDER",
            help="Use TLS, with the client's files of a folder from `ami-builder certificates`.",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """List the workers of a running Dask cluster whose memory limit is missing, too high or too low.

    Works on any cluster and changes nothing. The exit code is 0 if all limits are right, 5 if a limit is
    wrong or can't be read, and 7 if the scheduler or some workers did not answer and all other limits are
    right.

    For a TLS cluster, use --tls FOLDER: a folder that `ami-builder certificates` made, or one with ca.pem,
    cert.pem and key.pem. Without --tls, a tls:// address uses Dask's own configuration
    (distributed.comm.tls).
    """
    from ami_builder.doctor.client import read_cluster
    from ami_builder.doctor.rules import Health, diagnose, summary

    try:
        seconds = parse_duration(timeout)
    except ValueError as invalid:
        raise UsageError(f"--timeout {timeout}: {invalid}") from invalid
    with console.open_progress(mode()) as progress, progress.step("ask the workers", address) as step:
        workers = read_cluster(address, seconds, tls)
        step.done(f"{sum(not worker.silent for worker in workers)} of {len(workers)} answered")
    diagnoses = sorted(
        diagnose(workers), key=lambda d: (d.health is Health.RIGHT, d.worker.name, d.worker.address)
    )
    if as_json:
        right = sum(d.health is Health.RIGHT for d in diagnoses)
        healthy = 0 < right == len(diagnoses)
        console.result_json(
            {"address": address, "healthy": healthy, "right": right, "workers": plain(diagnoses)}
        )
    else:
        _print(diagnoses, summary(diagnoses))
    wrong = {d.health for d in diagnoses} - {Health.RIGHT}
    if wrong == {Health.NO_ANSWER}:
        raise typer.Exit(TimedOut.exit_code)
    if wrong or not diagnoses:
        raise typer.Exit(ChecksFailed.exit_code)


def _print(diagnoses: Sequence[Diagnosis], verdict: str) -> None:
    console.note(verdict)
    if not diagnoses:
        return
    rows = [
        (
            d.worker.name if d.worker.name not in ("", d.worker.address) else d.worker.address,
            d.worker.host,
            d.health,
            _limit(d),
            "" if d.excess is None else _sized(d.excess),
            "" if d.advised is None else _sized(d.advised),
            d.reason,
        )
        for d in diagnoses
    ]
    console.table(("worker", "host", "verdict", "limit", "off by", "set it to", "reason"), rows)
    warned: dict[str, list[str]] = defaultdict(list)
    for d in diagnoses:
        for warning in d.warnings:
            warned[warning].append(d.worker.name or d.worker.address)
    for warning, names in warned.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        console.note(f"warning: {names[0]}{more}: {warning}")


def _limit(diagnosis: Diagnosis) -> str:
    reading = diagnosis.worker.reading
    if reading is None:
        return "?"
    return _sized(reading.limit) if reading.limit else "none"


def _sized(number: int) -> str:
    """Return a size in bytes, to be copied, and in a readable unit."""
    sign = "-" if number < 0 else ""
    return f"{number} ({sign}{console.size(abs(number))})"
