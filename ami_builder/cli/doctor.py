"""The command that checks the memory limits of a running Dask cluster."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ami_builder import console
from ami_builder.cli.options import JsonFlag, app, load_config, mode, plain
from ami_builder.core.errors import ChecksFailed, CloudFailed, TimedOut, UsageError
from ami_builder.core.units import parse_duration

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ami_builder.aws.session import Account
    from ami_builder.console import Progress
    from ami_builder.core.records import Origin
    from ami_builder.doctor.history import Death
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
    history: Annotated[
        bool, typer.Option("--history", help="Show why workers ended, instead of examining those that run.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Examine a running Dask cluster: memory limits, machines, spilling and versions.

    Lists the workers whose memory limit is missing, too high or too low, and the
    machines with what they spill to. Warns about versions and AMIs that differ.
    Works on any cluster and changes nothing. The exit code is 0 if all limits are
    right, 5 if a limit is wrong or can't be read or there are no workers, and 7 if
    the scheduler or some workers did not answer and all other limits are right.

    --history lists the workers that ended, as far as the scheduler remembers: when,
    who ended them, the limit, and the tasks they had. The exit code is then 0, or 7 if no
    scheduler answered.

    With --aws it asks EC2 and SSM about the instances; if they refuse, that is a
    warning. The region is --region, else aws.region of the default image, else
    that of the AWS chain.

    For a TLS cluster, use --tls FOLDER: a folder that `ami-builder certificates`
    made, or one with ca.pem, cert.pem and key.pem. Without --tls, a tls://
    address uses Dask's own configuration (distributed.comm.tls).
    """
    from ami_builder.doctor.client import read_cluster
    from ami_builder.doctor.machines import machines, warnings
    from ami_builder.doctor.rules import Health, diagnose, summary

    try:
        seconds = parse_duration(timeout)
    except ValueError as invalid:
        raise UsageError(f"--timeout {timeout}: {invalid}") from invalid
    if history:
        if aws or region or every:
            raise UsageError("--history goes with --timeout, --tls and --json only")
        _history(address, seconds, tls, as_json=as_json)
        return
    origins: Mapping[str, Origin] = {}
    asked = _Asked(region) if aws or region else None
    with console.open_progress(mode()) as progress:
        with progress.step("ask the workers", address) as step:
            cluster = read_cluster(address, seconds, tls)
            answered = sum(not worker.silent for worker in cluster.workers)
            step.done(f"{answered} of {len(cluster.workers)} answered")
        if asked is not None:
            origins = asked.origins(cluster, progress)
    diagnoses = sorted(
        diagnose(cluster.workers), key=lambda d: (d.health is Health.RIGHT, d.worker.name, d.worker.address)
    )
    found = machines(cluster, origins)
    warned = warnings(cluster, found, asked.region if asked is not None else "")
    if asked is not None and asked.problem:
        warned = (*warned, asked.problem)
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
        many = console.is_terminal() and not every and max(len(diagnoses), len(found)) > _MANY
        console.note(summary(diagnoses))
        _print(diagnoses, found, many=many)
        _warn(diagnoses, warned)
        if many:
            # The first line is scrolled away.
            console.note(summary(diagnoses))
    wrong = {d.health for d in diagnoses} - {Health.RIGHT}
    if wrong == {Health.NO_ANSWER}:
        raise typer.Exit(TimedOut.exit_code)
    if wrong or not diagnoses:
        raise typer.Exit(ChecksFailed.exit_code)


def _history(address: str, seconds: float, tls: Path | None, *, as_json: bool) -> None:
    """Print the ends of workers that a scheduler remembers."""
    from ami_builder.doctor.client import read_history

    with console.open_progress(mode()) as progress, progress.step("ask the scheduler", address) as step:
        found = read_history(address, seconds, tls)
        step.done(f"{len(found.deaths)} workers ended")
    if as_json:
        console.result_json({"address": address, **plain(found)})
        return
    if not console.is_terminal():
        console.table((), [_death_row(each) for each in found.deaths])
    elif found.deaths:
        console.table(("when", "worker", "why", "tasks"), [_death_cells(each) for each in found.deaths])
    else:
        console.note("no worker ended unexpectedly")
    since = "" if found.since is None else f"; the oldest of its events is from {_when(found.since)}"
    if found.started is not None:
        console.note(f"the scheduler started {_when(found.started)}{since}")


def _death_cells(death: Death) -> tuple[str, ...]:
    where = f"\non {death.host}" if death.host else ""
    return _when(death.time).replace(" ", "\n"), f"{_death_name(death)}{where}", death.cause, _tasks(death)


def _death_row(death: Death) -> tuple[str, ...]:
    """Return an end as other programs read it; new columns come last."""
    limit = "" if death.limit is None else str(death.limit)
    of = (death.worker, death.host, death.by)
    return _when(death.time), _death_name(death), death.cause, limit, _tasks(death), *of


def _death_name(death: Death) -> str:
    return death.name if death.name not in ("", death.worker) else death.worker or "(it was starting)"


def _tasks(death: Death) -> str:
    if death.tasks is None:
        return "?"
    more = (death.task_count or 0) - len(death.tasks)
    return ", ".join(death.tasks) + (f" and {more} more" if more > 0 else "")


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


class _Asked:
    """The account that has the instances. An error there does not fail the diagnosis."""

    def __init__(self, region: str) -> None:
        """Open the account of a region, or of the default image's; raises UsageError."""
        from ami_builder.aws.session import Account

        self.region = ""
        """The region that was asked; empty until it has answered."""
        self.problem = ""
        self._account: Account | None = None
        try:
            wanted = region or load_config().select().aws.region
        except UsageError as unclear:
            raise UsageError(unclear.message, hint=f"{unclear.hint}; or give --region") from unclear
        try:
            self._account = Account.open(wanted)
        except CloudFailed as failed:
            self._failed(failed)

    def origins(self, cluster: Cluster, progress: Progress) -> Mapping[str, Origin]:
        """Return where the instances of a cluster came from, by their ids."""
        from ami_builder.aws import origins

        account = self._account
        if account is None:
            return {}
        read = [worker.reading for worker in cluster.workers if worker.reading is not None]
        instances = {cluster.scheduler.instance, *(one.instance for one in read)} - {""}
        try:
            with progress.step("ask EC2") as step:
                found = origins.find(account, sorted(instances)) if instances else {}
                step.done(f"{len(found)} instances in {account.region}")
        except CloudFailed as failed:
            self._failed(failed)
            return {}
        self.region = account.region
        return found

    def _failed(self, failed: CloudFailed) -> None:
        more = f" ({failed.hint})" if failed.hint else ""
        self.problem = f"the images and channels of the machines are unknown: {failed.message}{more}"


def _print(diagnoses: Sequence[Diagnosis], found: Sequence[Machine], *, many: bool) -> None:
    """Print workers and machines; of many, those that are alike share a row, and the workers come last."""
    if not diagnoses:
        return
    of = {address: machine for machine in found for address in machine.workers}
    if not console.is_terminal():
        console.table((), [_row(d, of.get(d.worker.address)) for d in diagnoses])
        return
    if many:
        _print_machines(found, many=True)
        console.result("")
        _print_workers(diagnoses, of, many=True)
        return
    _print_workers(diagnoses, of, many=False)
    console.result("")
    _print_machines(found, many=False)


def _print_workers(diagnoses: Sequence[Diagnosis], machines: Mapping[str, Machine], *, many: bool) -> None:
    alike: dict[tuple[object, ...], list[Diagnosis]] = defaultdict(list)
    for number, d in enumerate(diagnoses):
        # Machines of one type differ by a few pages, so by their limits no two would be alike.
        alike[(d.health, d.reason) if many else (number,)].append(d)
    rows = []
    for same in alike.values():
        machine = machines.get(same[0].worker.address)
        where = machine.name if machine is not None else same[0].worker.host
        names = _several([_name(d) for d in same], _where(where, len(same)))
        rows.append((names, same[0].health, _short(same), _advice(same)))
    console.table(("worker", "verdict", "limit", "what to do"), rows)


def _print_machines(found: Sequence[Machine], *, many: bool) -> None:
    alike: dict[tuple[object, ...], list[Machine]] = defaultdict(list)
    for number, one in enumerate(found):
        folders = tuple((spill.folder, spill.system, spill.bound) for spill in one.spills)
        key: tuple[object, ...] = (number,)
        if many:
            key = (one.scheduler, _memory(one), _outgrown(one), folders, str(one.versions), one.origin)
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
            "spills to": "\n".join(map(_spill, zip(*(each.spills for each in same), strict=True))) or "-",
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
    return ", ".join(parts) + _outgrown(machine)


def _outgrown(machine: Machine) -> str:
    """Return a line about a system that has taken what Dask's limit promises; the warning says who."""
    growth = machine.growth
    if growth is None or not growth.is_news(machine.total or 0):
        return ""
    return f"\noutgrown by {console.size(growth.excess)}"


def _short(same: Sequence[Diagnosis]) -> str:
    readings = [d.worker.reading for d in same if d.worker.reading is not None]
    if not readings:
        return "?"
    limits = [one.limit for one in readings if one.limit]
    return _range(limits, "\n") if limits else "none"


def _advice(same: Sequence[Diagnosis]) -> str:
    advised = [d.advised for d in same if d.advised is not None]
    if not advised:
        return same[0].reason
    if len(set(advised)) == 1:
        return f"set it to {_sized(advised[0])}: {same[0].reason}"
    return f"set them to {_range(advised)} (--all shows each): {same[0].reason}"


def _range(sizes: Sequence[int], separator: str = " ") -> str:
    least, most = console.size(min(sizes)), console.size(max(sizes))
    return least if least == most else f"{least}{separator}to {most}"


def _memory(machine: Machine) -> str:
    return f"{(machine.total or 0) / (1 << 30):.3g} GiB"


def _spill(same: Sequence[Spill]) -> str:
    """Return what one folder is on machines that are alike."""
    spill, frees = same[0], [one.free for one in same if one.free is not None]
    free = f", {'at least ' * (len(frees) > 1)}{console.size(min(frees))} free" if frees else ""
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
