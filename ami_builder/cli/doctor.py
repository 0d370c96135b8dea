"""The command that checks the memory limits of a running Dask cluster."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ami_builder import console
from ami_builder.cli.options import JsonFlag, app, load_config, mode, plain
from ami_builder.core.errors import ChecksFailed, TimedOut, UsageError
from ami_builder.core.units import parse_duration

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ami_builder.core.records import Origin
    from ami_builder.doctor.machines import Machine, Spill
    from ami_builder.doctor.rules import Cluster, Diagnosis

_MANY = 20
"""Above this, workers and machines that are alike share a row."""


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
    aws: Annotated[
        bool,
        typer.Option("--aws", help="Also find the AMI, image and channel that each EC2 instance came from."),
    ] = False,
    region: Annotated[
        str, typer.Option("--region", metavar="REGION", help="Region of the instances; implies --aws.")
    ] = "",
    every: Annotated[
        bool, typer.Option("--all", help="Show every worker and machine, also if there are many alike.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Examine a running Dask cluster: memory limits, machines, spilling and versions.

    Lists the workers whose memory limit is missing, too high or too low, and the machines with what they
    spill to. Warns about versions and AMIs that differ. Works on any cluster and changes nothing. The exit
    code is 0 if all limits are right, 5 if a limit is wrong or can't be read, and 7 if the scheduler or some
    workers did not answer and all other limits are right.

    With --aws it asks EC2 and SSM about the instances. The region is --region, else aws.region of the default
    image, else that of the AWS chain.

    For a TLS cluster, use --tls FOLDER: a folder that `ami-builder certificates` made, or one with ca.pem,
    cert.pem and key.pem. Without --tls, a tls:// address uses Dask's own configuration
    (distributed.comm.tls).
    """
    from ami_builder.doctor.client import read_cluster
    from ami_builder.doctor.machines import machines, warnings
    from ami_builder.doctor.rules import Health, diagnose, summary

    try:
        seconds = parse_duration(timeout)
    except ValueError as invalid:
        raise UsageError(f"--timeout {timeout}: {invalid}") from invalid
    origins: Mapping[str, Origin] = {}
    where = ""
    with console.open_progress(mode()) as progress:
        with progress.step("ask the workers", address) as step:
            cluster = read_cluster(address, seconds, tls)
            answered = sum(not worker.silent for worker in cluster.workers)
            step.done(f"{answered} of {len(cluster.workers)} answered")
        if aws or region:
            with progress.step("ask EC2") as step:
                where, origins = _origins(cluster, region)
                step.done(f"{len(origins)} instances in {where}")
    diagnoses = sorted(
        diagnose(cluster.workers), key=lambda d: (d.health is Health.RIGHT, d.worker.name, d.worker.address)
    )
    found = machines(cluster, origins)
    warned = warnings(cluster, found, where)
    if as_json:
        right = sum(d.health is Health.RIGHT for d in diagnoses)
        healthy = 0 < right == len(diagnoses)
        console.result_json(
            {
                "address": address,
                "healthy": healthy,
                "right": right,
                "workers": plain(diagnoses),
                "scheduler": plain(cluster.scheduler),
                "machines": plain(found),
                "here": dict(cluster.here),
                "warnings": list(warned),
            }
        )
    else:
        _print(diagnoses, summary(diagnoses), found, every=every)
        _warn(diagnoses, warned)
    wrong = {d.health for d in diagnoses} - {Health.RIGHT}
    if wrong == {Health.NO_ANSWER}:
        raise typer.Exit(TimedOut.exit_code)
    if wrong or not diagnoses:
        raise typer.Exit(ChecksFailed.exit_code)


def _origins(cluster: Cluster, region: str) -> tuple[str, Mapping[str, Origin]]:
    """Return the region, and where the instances of a cluster came from, by their ids."""
    from ami_builder.aws import origins
    from ami_builder.aws.session import Account

    account = Account.open(region or load_config().select().aws.region)
    read = [worker.reading for worker in cluster.workers if worker.reading is not None]
    instances = {cluster.scheduler.instance, *(one.instance for one in read)} - {""}
    return account.region, origins.find(account, sorted(instances)) if instances else {}


def _print(diagnoses: Sequence[Diagnosis], verdict: str, found: Sequence[Machine], *, every: bool) -> None:
    console.note(verdict)
    if not diagnoses:
        return
    of = {address: machine for machine in found for address in machine.workers}
    if not console.is_terminal():
        console.table((), [_row(d, of.get(d.worker.address)) for d in diagnoses])
        return
    many = len(diagnoses) > _MANY and not every
    alike: dict[tuple[object, ...], list[tuple[str, str, Diagnosis]]] = defaultdict(list)
    for number, d in enumerate(diagnoses):
        machine = of.get(d.worker.address)
        where = machine.name if machine is not None else d.worker.host
        key = (d.health, d.reason, _short(d)) if many else (number,)
        alike[key].append((_name(d), where, d))
    console.table(
        ("worker", "verdict", "limit", "what to do"),
        [
            (
                _several([name for name, _, _ in same], _where(where, len(same))),
                d.health,
                _short(d),
                _advice(d),
            )
            for same in alike.values()
            for _, where, d in same[:1]
        ],
    )
    console.result("")
    _print_machines(found, every=every)


def _print_machines(found: Sequence[Machine], *, every: bool) -> None:
    many = len(found) > _MANY and not every
    alike: dict[tuple[object, ...], list[Machine]] = defaultdict(list)
    for number, one in enumerate(found):
        folders = tuple((spill.folder, spill.system, spill.bound) for spill in one.spills)
        key = (one.scheduler, _memory(one), folders, str(one.versions), one.origin) if many else (number,)
        alike[key].append(one)
    versions = {_versions(each) for one in found for each in one.versions}
    columns = ["machine", "spills to"]
    columns += ["versions"] * (len(versions) > 1)
    columns += ["image"] * any(one.origin is not None for one in found)
    rows = []
    for same in alike.values():
        one = same[0]
        cells = {
            "machine": _several([each.name for each in same], _holds(one)),
            "spills to": "\n".join(_spill(spill) for spill in one.spills) or "-",
            "versions": "\n".join(_versions(each, "\n") for each in one.versions),
            "image": _image(one.origin),
        }
        rows.append([cells[column] for column in columns])
    console.table(columns, rows)
    if len(versions) == 1:
        console.result(f"\nall run {versions.pop()}")


def _warn(diagnoses: Sequence[Diagnosis], more: Iterable[str]) -> None:
    warned: dict[str, list[str]] = defaultdict(list)
    for d in diagnoses:
        for warning in d.warnings:
            warned[warning].append(d.worker.name or d.worker.address)
    for warning, names in warned.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        console.note(f"warning: {names[0]}{others}: {warning}")
    for warning in more:
        console.note(f"warning: {warning}")


def _row(d: Diagnosis, machine: Machine | None) -> tuple[object, ...]:
    """Return a worker as other programs read it; new columns come last."""
    origin = machine.origin if machine is not None else None
    reading = d.worker.reading
    return (
        _name(d),
        d.worker.host,
        d.health,
        _limit(d),
        "" if d.excess is None else _sized(d.excess),
        "" if d.advised is None else _sized(d.advised),
        d.reason,
        machine.name if machine is not None else "",
        reading.directory if reading is not None else "",
        _versions(reading.versions) if reading is not None else "",
        origin.ami if origin is not None else "",
        ",".join(origin.channels) if origin is not None else "",
    )


def _where(machine: str, count: int) -> str:
    return f"on {machine}" if count == 1 else f"on {machine} and others"


def _name(d: Diagnosis) -> str:
    return d.worker.name if d.worker.name not in ("", d.worker.address) else d.worker.address


def _several(names: Sequence[str], more: str) -> str:
    first = f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
    return f"{first}\n{more}"


def _holds(machine: Machine) -> str:
    """Return what a machine has, and what runs on it."""
    count = len(machine.workers)
    parts = [_memory(machine)] if machine.total is not None else []
    parts += ["scheduler"] if machine.scheduler else []
    parts += [f"{count} worker{'s' if count > 1 else ''}"] if count else []
    return ", ".join(parts)


def _short(d: Diagnosis) -> str:
    reading = d.worker.reading
    if reading is None:
        return "?"
    return console.size(reading.limit) if reading.limit else "none"


def _advice(d: Diagnosis) -> str:
    return d.reason if d.advised is None else f"set it to {_sized(d.advised)}: {d.reason}"


def _memory(machine: Machine) -> str:
    return f"{(machine.total or 0) / (1 << 30):.3g} GiB"


def _spill(spill: Spill) -> str:
    free = "" if spill.free is None else f", {console.size(spill.free)} free"
    bound = "unbounded" if spill.bound is None else f"at most {console.size(spill.bound)}"
    return f"{spill.folder}\n{spill.system}{free}\n{bound}"


def _versions(versions: Mapping[str, str], separator: str = ", ") -> str:
    dask = versions.get("dask", versions.get("distributed", "?"))
    return f"Dask {dask}{separator}Python {versions.get('python', '?')}"


def _image(origin: Origin | None) -> str:
    if origin is None:
        return "-"
    named = f"{origin.image} {origin.digest[:12]}" if origin.image else origin.name or "deregistered"
    channels = ", ".join(origin.channels) or ("no channel" if origin.image else "")
    return "\n".join(filter(None, (named, channels, origin.ami)))


def _limit(diagnosis: Diagnosis) -> str:
    reading = diagnosis.worker.reading
    if reading is None:
        return "?"
    return _sized(reading.limit) if reading.limit else "none"


def _sized(number: int) -> str:
    """Return a size in bytes, to be copied, and in a readable unit."""
    sign = "-" if number < 0 else ""
    return f"{number} ({sign}{console.size(abs(number))})"
