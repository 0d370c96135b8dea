"""The command that tries everything in a real account, and prints what it did there."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ami_builder import __version__, console
from ami_builder.cli.options import (
    ImageArgument,
    JsonFlag,
    TargetFlag,
    app,
    load_config,
    mode,
    open_workspace,
)
from ami_builder.core.errors import ChecksFailed, UsageError
from ami_builder.core.records import TargetKind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ami_builder.config.schema import Image
    from ami_builder.selftest.compare import Comparison
    from ami_builder.selftest.plan import Plan
    from ami_builder.selftest.recording import Behaviour
    from ami_builder.selftest.run import Result


@app.command()
def selftest(
    image: ImageArgument = None,
    target: TargetFlag = TargetKind.AWS,
    spend: Annotated[
        float, typer.Option("--spend", metavar="USD", min=0, help="The most that it may cost, in US dollars.")
    ] = 2.0,
    copy_region: Annotated[
        str,
        typer.Option(
            "--copy-region", metavar="REGION", help="Region to copy to. Default: the first of aws.copy_to."
        ),
    ] = "",
    assume_hourly: Annotated[
        float | None,
        typer.Option(
            "--assume-hourly",
            metavar="USD",
            min=0,
            help="Price of an instance per hour where the Pricing API returns none.",
        ),
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Carry out the plan.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Bake, verify, copy, promote, roll back, prune and collect an AMI in an account, and compare.

    It prints a plan, and with --apply carries it out, under an image name of its own.
    It changes only what has the tag of that image, and removes all of it.
    Then it prints, call by call, what AWS did and what ami-builder's test cloud does.
    There are no ids, names or addresses in it, so that you can send it to the maintainers.

    Exit codes: 0 no difference that matters, 5 AWS differs, or --spend ended it early,
    2 the first step that costs something does not fit --spend, or a price is unknown.
    If a step fails, the code is that of its command, such as `build` or `copy`.
    """
    if target is not TargetKind.AWS:
        raise UsageError(f"--target {target}: a selftest is for an AWS account", hint="use --target aws")
    chosen = load_config(target).select(image)
    from ami_builder.aws.session import Account
    from ami_builder.selftest import plan as planning
    from ami_builder.selftest.budget import Budget

    own = _own(chosen, copy_region)
    with console.open_progress(mode()) as progress, progress.step("plan"):
        account = Account.open(chosen.aws.region)
        whole = planning.plan(account, own, assume_hourly)
    _print_plan(whole, spend, as_json=as_json and not apply, apply=apply)
    budget = Budget(spend=spend)
    first = next(step for step in whole.steps if step.most)
    budget.require(first.part, first.cost)
    if not apply:
        return
    _run(whole, budget, account.identity(), as_json=as_json)


def _own(image: Image, copy_region: str) -> Image:
    """Return the selftest's own image, with a name that nothing else has."""
    from ami_builder.config.types import parse_destination
    from ami_builder.selftest.plan import PREFIX, selftest_image

    destination = next(iter(image.aws.copy_to), None)
    if copy_region:
        try:
            destination = parse_destination(copy_region)
        except ValueError as wrong:
            raise UsageError(f"--copy-region {copy_region}: {wrong}") from wrong
    return selftest_image(image, f"{PREFIX}{secrets.token_hex(4)}", destination)


def _print_plan(plan: Plan, spend: float, *, as_json: bool, apply: bool) -> None:
    if as_json:
        steps = [
            {
                "step": one.part,
                "what": one.text,
                "regions": one.regions,
                "instance_types": one.instance_types,
                "most_usd": round(one.most, 4),
            }
            for one in plan.steps
        ]
        console.result_json({"applied": False, "plan": steps, "most_usd": round(plan.most, 4)})
    rows = [
        (one.part, one.text, ", ".join(one.regions), " or ".join(one.instance_types), f"{one.most:.2f} USD")
        for one in plan.steps
    ]
    # With --apply the table of the results is what stdout is for.
    if apply:
        for row in rows:
            console.note(": ".join(part for part in row if part))
    elif not as_json:
        console.table(("step", "what", "where", "on", "at most"), rows)
    console.note(f"image {plan.image.name}; at most {plan.most:.2f} USD, {spend:.2f} may be spent")
    if plan.most > spend:
        console.note(f"it may stop before its end: the whole plan needs --spend {plan.most + 0.005:.2f}")
    if len(plan.regions) == 1:
        console.note("nothing is copied to another region: set aws.copy_to, or add --copy-region")
    if not apply:
        console.note("nothing was done; add --apply to carry out the plan")


def _run(plan: Plan, budget: Any, identity: str, *, as_json: bool) -> None:
    from ami_builder.selftest import compare
    from ami_builder.selftest.run import Selftest

    console.note(f"running as {identity}")
    user = open_workspace()
    with user.run("selftest", plan.image.name) as run, console.open_progress(mode()) as progress:
        # Its images and ledgers are no part of the user's lists.
        own = replace(user, state=run.directory / "workspace")
        result = Selftest(plan=plan, workspace=own, budget=budget, progress=progress).run()
        run.update(steps=progress.steps)
    comparison = compare.compare(result.recording, compare.recorded(), result.steps, result.unfinished)
    if as_json:
        console.result_json({"applied": True, **_as_json(result, comparison)})
    else:
        console.table(("step", "call", "AWS", "test cloud", "calls", "longest", "differs"), _rows(comparison))
        console.result(list(_fields(comparison)))
    _report(result, comparison)


def _rows(comparison: Comparison) -> Iterator[tuple[object, ...]]:
    from ami_builder.selftest.compare import summary

    for row in comparison.rows:
        calls = row.account.calls if row.account else 0
        longest = f"{row.account.longest:.1f} s" if row.account else ""
        kinds = "; ".join(f"{'' if one.kind.matters else 'note: '}{one.kind}" for one in row.differences)
        yield row.step, row.call, summary(row.account), summary(row.cloud), calls, longest, kinds or "same"


def _fields(comparison: Comparison) -> Iterator[str]:
    yield ", ".join(f"{name} {version}" for name, version in _versions().items())
    yield f"compared with the test cloud for {comparison.credentials}"
    yield "not recorded: the calls that Packer makes"
    for one in comparison.fields:
        yield f"{'' if one.kind.matters else 'note: '}{one.call}: {one.text}"


def _versions() -> dict[str, str]:
    """Return the versions of what talks to AWS."""
    import botocore

    from ami_builder.build.plugins import has_plugins

    packer = "with plugins" if has_plugins() else "1.6"
    return {"ami-builder": __version__, "botocore": botocore.__version__, "Packer": packer}


def _side(one: Behaviour | None, *, times: bool) -> dict[str, Any] | None:
    if one is None:
        return None
    found: dict[str, Any] = {"outcomes": one.outcomes, "states": one.states, "facts": one.facts}
    if times:
        found |= {
            "longest_seconds": round(one.longest, 3),
            "seconds": round(one.seconds, 3),
            "retries": one.retries,
        }
    return found


def _as_json(result: Result, comparison: Comparison) -> dict[str, Any]:
    return {
        **_versions(),
        "compared_with": comparison.credentials,
        "not_recorded": "the calls that Packer makes",
        "completed": result.parts,
        "stopped_by": type(result.error).__name__ if result.error is not None else None,
        "most_usd": round(result.spent, 4),
        "left": len(result.remnants),
        "calls": [
            {
                "step": row.step,
                "call": row.call,
                "aws": _side(row.account, times=True),
                "test_cloud": _side(row.cloud, times=False),
                "differences": [{"kind": one.kind, "matters": one.kind.matters} for one in row.differences],
            }
            for row in comparison.rows
        ],
        "fields": [
            {"call": one.call, "kind": one.kind, "matters": one.kind.matters, "text": one.text}
            for one in comparison.fields
        ],
    }


def _report(result: Result, comparison: Comparison) -> None:
    """Print what is for the user's own eyes to stderr, and raise what the exit code is to be."""
    for one in result.remnants:
        console.note(f"left in {one.region or 'some region'}: {one.kind} {one.id}")
    if result.remnants:
        console.note("remove it yourself: `ami-builder gc --apply` finds what is not a finished AMI")
    console.note(f"it cost at most {result.spent:.2f} USD; {len(comparison.matters)} differences matter")
    if result.error is not None:
        raise result.error
    if result.remnants or comparison.matters:
        what = f"AWS and the test cloud differ in {len(comparison.matters)} places"
        if not comparison.matters:
            what = f"{len(result.remnants)} resources could not be removed"
        raise ChecksFailed(what, hint="please send the table to the maintainers; it has no ids or names")
