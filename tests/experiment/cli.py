"""The command that shows what a memory limit changes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from ami_builder import console
from ami_builder.cli.images import find_finished
from ami_builder.cli.options import (
    JsonFlag,
    app,
    load_config,
    mode,
    open_workspace,
    parse_choice,
    parse_seconds,
    plain,
    shared,
)
from ami_builder.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.experiment.criteria import Judged, Row
    from tests.experiment.runs import Outcome

_POLICIES, _WORK = ("none", "available"), ("spikes",)


@app.command()
def experiment(
    image: Annotated[
        str | None, typer.Argument(metavar="[IMAGE|PATH]", help="A built image's name, or a disk's path.")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            help="none, available, headroom-2, nanny, headroom, fraction, gke, dask-only; repeatable.  "
            "[default: none and available]",
        ),
    ] = None,
    work: Annotated[
        list[str] | None,
        typer.Option(
            "--work",
            help="spikes, leak-slow, leak-fast, array, matrix, agent, restarts (the control); repeatable.  "
            "[default: spikes]",
        ),
    ] = None,
    memory: Annotated[
        list[str] | None,
        typer.Option(
            "--memory", metavar="SIZE", help="Of a machine, e.g. 1GiB; repeatable.  [default: verify.memory]"
        ),
    ] = None,
    repeat: Annotated[int, typer.Option("--repeat", min=1, max=1000, help="Runs of each kind.")] = 3,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Decides order and work.")] = 1,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", min=1, help="Machines side by side.  [default: as the processors allow]"),
    ] = None,
    timeout: Annotated[
        str, typer.Option("--timeout", metavar="DURATION", help="For the work of one run.")
    ] = "10min",
    only_for: Annotated[
        str | None,
        typer.Option(
            "--for", metavar="DURATION", help="Start no run after this time; the next call goes on."
        ),
    ] = None,
    run: Annotated[
        bool, typer.Option("--run/--no-run", help="Make the runs, or only say what there is.")
    ] = True,
    as_json: JsonFlag = False,
) -> None:
    """Give Dask the same work under several memory limits, and show what becomes of the machine.

    Every run boots the image anew. A run that was made is not made again, whatever ended the call: the same
    command goes on. Prints what was found and where its page is; exits with 0 whatever the findings are.
    """  # fmt: skip
    from tests.experiment.cases import Policy, Work, plan
    from tests.experiment.page import write_page
    from tests.experiment.runs import Wanted
    from tests.experiment.runs import experiment as make

    if memory:
        shared.overrides["verify.memory"] = ",".join(memory)
    policies = [parse_choice("--policy", word, Policy) for word in policy or _POLICIES]
    works = [parse_choice("--work", word, Work) for word in work or _WORK]
    chosen, stored, _ = find_finished(image, load_config(), "qemu")
    cases = plan(
        memory=chosen.verify.memory,
        cpus=chosen.verify.cpus,
        policies=policies,
        work=works,
        repeat=repeat,
        seed=seed,
    )
    wanted = Wanted(
        cases=cases if run else (),
        timeout=parse_seconds("--timeout", timeout),
        # As many processors again for emulating disks, for the scheduler and for who watches: a machine that
        # thrashes takes them from the one beside it, and what is measured there is its neighbour.
        jobs=jobs or max(1, (os.cpu_count() or 1) // (2 * chosen.verify.cpus)),
        time=None if only_for is None else parse_seconds("--for", only_for),
    )
    workspace = open_workspace()
    with console.open_progress(mode()) as progress:
        outcome = make(chosen, stored, wanted, workspace, progress)
    page = write_page(chosen.name, stored.artifact.digest, workspace)
    if page is None:
        raise UsageError("no run of this image has been made yet", hint="leave --no-run out")
    _print(outcome, str(page), as_json=as_json)


def _print(outcome: Outcome, page: str, *, as_json: bool) -> None:
    from tests.experiment.criteria import judge, rows

    judged, found = judge(outcome.results), rows(outcome.results)
    if as_json:
        console.result_json(
            {
                "criteria": plain(judged),
                "results": plain(outcome.results),
                "left": [case.name for case in outcome.left],
                "failed": {case.name: wrong.message for case, wrong in outcome.failed},
                "page": page,
            }
        )
        return
    for case, wrong in outcome.failed:
        console.note(f"{case.name} could not be run: {wrong.message}")
    if outcome.left:
        console.note(f"{len(outcome.left)} runs are left: the same command goes on with them")
    _print_rows(found)
    _print_criteria(judged)
    console.result(page)


def _print_rows(found: Sequence[Row]) -> None:
    from tests.experiment.page import COLUMNS, cells

    console.table(("machine", "work", "policy", "runs", *COLUMNS), [cells(row) for row in found])


def _print_criteria(judged: Sequence[Judged]) -> None:
    console.table(
        ("criterion", "", "found", "runs"), [(one.text, one.answer, one.found, one.runs) for one in judged]
    )
