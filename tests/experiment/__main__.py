"""`python -m tests.experiment`: give Dask the same work under several memory limits, and report what happens.

Each run boots a fresh VM from a finished image. A run that is on disk is not repeated: the same command
continues where the last one stopped.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from ami_builder import console
from ami_builder.config import loading
from ami_builder.core.errors import AmiBuilderError, UsageError
from ami_builder.core.records import TargetKind
from ami_builder.core.units import parse_duration, parse_size
from ami_builder.state.workspace import StoredImage, Workspace
from tests.experiment import docs, page, series
from tests.experiment.cases import LimitPolicy, Work, plan
from tests.experiment.criteria import groups
from tests.experiment.layers import IMAGE, LAYERS, parse_layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ami_builder.config.schema import Image


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code: 0 whatever the results are, else that of the error."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    flags = _parser().parse_args(arguments)
    if flags.docs:
        docs.write()
        return 0
    try:
        return _experiment(flags)
    except AmiBuilderError as failed:
        console.error(failed)
        return failed.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.experiment", description=__doc__)
    add = parser.add_argument
    add("image", nargs="?", help="name or path of a finished local image; default: the newest one")
    add("--config", type=Path, help="configuration file; default: the nearest ami-builder.toml")
    add(
        "--policy",
        action="append",
        type=LimitPolicy,
        choices=list(LimitPolicy),
        help="repeatable; default: none, available",
    )
    add(
        "--layers",
        action="append",
        type=_layers,
        help="layers of defence: image (what it has; the default), off, or names joined by +: "
        f"{', '.join(LAYERS)}, ttl-MILLISECONDS; repeatable",
    )
    add("--work", action="append", type=Work, choices=list(Work), help="repeatable; default: spikes")
    add(
        "--memory",
        action="append",
        type=parse_size,
        help="of a VM, such as 1GiB; repeatable; default: verify.memory",
    )
    add("--cpus", type=int, help="of a VM; default: verify.cpus")
    add("--repeat", type=int, default=3, help="runs of each kind; default: 3")
    add("--seed", type=int, default=1, help="decides the order and the work; default: 1")
    add("--saved", action="store_true", help="boot one VM of each kind, and let each run go on from there")
    add("--jobs", type=int, help="VMs that run side by side; default: a quarter of what the processors allow")
    add("--timeout", type=parse_duration, help="for the work of one run; default: by work and memory")
    add("--for", type=parse_duration, dest="time", help="start no run after this time, such as 8h")
    add("--no-run", action="store_true", help="report the runs that exist, without making more")
    add("--docs", action="store_true", help="update the tables and the plot in docs from the recorded runs")
    add("--json", action="store_true", help="print one JSON object")
    add("--quiet", action="store_true", help="print no progress")
    return parser


def _layers(text: str) -> str:
    try:
        return parse_layers(text)
    except ValueError as wrong:
        raise argparse.ArgumentTypeError(str(wrong)) from wrong


def _experiment(flags: argparse.Namespace) -> int:
    config = loading.load(flags.config, environ=os.environ)
    workspace = Workspace.open(os.environ)
    image, stored = _find(flags.image, config, workspace)
    cpus = flags.cpus or image.verify.cpus
    cases = plan(
        memory=flags.memory or image.verify.memory,
        cpus=cpus,
        policies=flags.policy or (LimitPolicy.NONE, LimitPolicy.AVAILABLE),
        work=flags.work or (Work.SPIKES,),
        layers=flags.layers or (IMAGE,),
        repeat=flags.repeat,
        seed=flags.seed,
    )
    wanted = series.Wanted(
        cases=() if flags.no_run else cases,
        timeout=flags.timeout,
        # QEMU's disks, the scheduler and the observer need as many processors again: a VM that thrashes
        # would take them from its neighbour, and the neighbour's results would be wrong.
        jobs=flags.jobs or max(1, (os.cpu_count() or 1) // (2 * cpus)),
        saved=flags.saved,
        time=flags.time,
    )
    with console.open_progress(console.choose_mode(quiet=flags.quiet)) as progress:
        outcome = series.run_series(image, stored, wanted, workspace, progress)
    path = page.write_page(image.name, stored.artifact.digest, workspace)
    if path is None:
        raise UsageError("no run of this image has been made yet", hint="leave out --no-run")
    _print(outcome, str(path), as_json=flags.json)
    return 0


def _find(word: str | None, config: loading.Config, workspace: Workspace) -> tuple[Image, StoredImage]:
    """Return the newest finished local image of a name, or the one at a path."""
    local = [one for one in workspace.images() if one.artifact.target is TargetKind.QEMU]
    if word is not None and os.sep in word:
        found = [one for one in local if one.path == Path(word).absolute()]
        image = config.select(found[0].artifact.image if found else None)
    else:
        image = config.select(word)
        found = [one for one in local if one.artifact.image == image.name]
    if not found:
        raise UsageError(
            f"{word or image.name}: no such finished image", hint="run `ami-builder build` first"
        )
    return image, found[-1]


def _print(outcome: series.SeriesResult, path: str, *, as_json: bool) -> None:
    judged, found = page.judge_all(outcome.results), groups(outcome.results)
    if as_json:
        plain = TypeAdapter(Any).dump_python
        console.result_json(
            {
                "criteria": plain(judged, mode="json"),
                "results": plain(outcome.results, mode="json"),
                "left": [case.name for case in outcome.left],
                "failed": {case.name: wrong.message for case, wrong in outcome.failed},
                "page": path,
            }
        )
        return
    for case, wrong in outcome.failed:
        console.note(f"{case.name} could not be run: {wrong.message}")
    if outcome.left:
        console.note(f"{len(outcome.left)} runs are left: the same command continues with them")
    columns = ("VM", "work", "policy", "layers", "runs", *page.COLUMNS)
    console.table(columns, [page.cells(group) for group in found])
    console.table(
        ("criterion", "", "found", "runs"), [(one.text, one.grade, one.found, one.runs) for one in judged]
    )
    console.result(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
