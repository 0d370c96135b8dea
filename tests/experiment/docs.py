"""The tables and the plots of docs/explanation/experiment.md, made from the recorded runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ami_builder.core.units import GIB, MIB
from ami_builder.report import html
from ami_builder.state import jsonl
from tests.experiment import results
from tests.experiment.cases import TWO_PERCENT, LimitPolicy, Work
from tests.experiment.charts import MemoryCurve, memory_chart
from tests.experiment.criteria import Group, format_kind, groups, judge
from tests.experiment.findings import shares
from tests.experiment.layer_criteria import above_rest, judge_layers
from tests.experiment.layers import IMAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.experiment.results import Result

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "explanation" / "experiment.md"
PLOT = ROOT / "docs" / "images" / "experiment.svg"
LAYERS_PLOT = ROOT / "docs" / "images" / "experiment-layers.svg"
_RECORDED = Path(__file__).parent / "recorded"


def recorded() -> tuple[Result, ...]:
    """Return the recorded runs."""
    return tuple(map(results.parse, jsonl.read(_RECORDED / "results.jsonl")))


def recorded_layers() -> tuple[Result, ...]:
    """Return the recorded runs of an image with layers of defence, and their controls."""
    return tuple(map(results.parse, jsonl.read(_RECORDED / "layers.jsonl")))


def write() -> None:
    """Update the tables of the page, and draw its plots."""
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    PLOT.write_text(plot(), encoding="utf-8")
    LAYERS_PLOT.write_text(layers_plot(), encoding="utf-8")


def with_tables(page: str) -> str:
    """Return the page with the tables that follow `<!-- recorded: NAME -->` replaced."""
    for name, lines in (_tables(recorded()) | _layer_tables(recorded_layers())).items():
        table = "\n".join(lines)
        marked = re.compile(rf"(<!-- recorded: {name} -->\n\n)(?:\|.*\n)+")
        page = marked.sub(lambda found, table=table: f"{found[1]}{table}\n", page)  # type: ignore[misc]
    return page


def _tables(runs: Sequence[Result]) -> dict[str, list[str]]:
    found = groups(runs)
    main = (LimitPolicy.NONE, LimitPolicy.AVAILABLE, TWO_PERCENT)
    return {
        "main": _table(
            "VM | policy | runs | tasks done, of 200 | VM stalled for | longest wait for ssh "
            "| system-wide OOM kills",
            (_main(group) for group in found if group.work is Work.SPIKES and group.policy in main),
        ),
        "all": _table(
            "VM, work | policy | runs | tasks done | took | restarts | system-wide OOM kills | longest stall "
            "| stalls in all | ssh failed | longest wait for ssh",
            map(_all, found),
        ),
        "criteria": _table(
            "criterion | result | found | runs",
            ((one.text, f"**{one.grade}**", one.found, str(one.runs)) for one in judge(runs)),
        ),
        "shares": _table(
            "VM | policy | limit | of MemTotal | of what the system gave | runs affected",
            (
                (
                    format_kind(one.kind),
                    f"`{one.policy}`",
                    f"{one.limit / MIB:.0f} MiB",
                    f"{one.of_total:.1%}",
                    "–" if one.of_given is None else f"{one.of_given:.1%}",
                    f"{one.affected} of {one.runs}",
                )
                for one in shares(runs)
            ),
        ),
    }


def _layer_tables(runs: Sequence[Result]) -> dict[str, list[str]]:
    return {
        "layers": _table(
            "VM, work | policy | layers | runs | tasks done | took | restarts | system-wide OOM kills "
            "| killed outside | longest stall | ssh failed | login at rest | longest wait for ssh "
            "| above rest, without CPU steal | CPU steal | held",
            map(_with_layers, groups(runs)),
        ),
        "layer-criteria": _table(
            "criterion | result | found | runs",
            ((one.text, f"**{one.grade}**", one.found, str(one.runs)) for one in judge_layers(runs)),
        ),
    }


def _with_layers(group: Group) -> tuple[str, ...]:
    work, policy, runs, done, took, restarts, kills, longest, _, failed, wait = _all(group)
    outside = sorted({task for result in group.results for task in result.killed_outside})
    return (
        *(work, policy, f"`{group.layers}`", runs, done, took, restarts, kills, ", ".join(outside) or "–"),
        *(longest, failed, _spread(group, lambda r: r.ssh_rest or 0.0, 1) + " s", wait),
        _spread(group, above_rest, 1) + " s",
        _spread(group, lambda r: r.cpu_steal) + " s",
        _spread(group, lambda r: (r.held_before_long_stall or 0) / MIB) + " MiB",
    )


def _table(columns: str, rows: Iterator[tuple[str, ...]]) -> list[str]:
    head = f"| {columns} |"
    return [head, "|" + "---|" * columns.count("|") + "---|", *(f"| {' | '.join(row)} |" for row in rows)]


def _main(group: Group) -> tuple[str, ...]:
    return (
        f"{group.kind[0] // GIB} GiB",
        f"`{group.policy}`",
        str(group.runs),
        _spread(group, lambda r: r.done),
        _spread(group, lambda r: r.stalled) + " s",
        _spread(group, lambda r: r.ssh_longest) + " s",
        _spread(group, lambda r: r.system_oom_kills),
    )


def _all(group: Group) -> tuple[str, ...]:
    late = all(result.unfinished for result in group.results)
    return (
        f"{format_kind(group.kind)}, {group.work.text.split(':')[0]} ({group.work})",
        f"`{group.policy}`",
        str(group.runs),
        _spread(group, lambda r: r.done),
        _spread(group, lambda r: r.seconds) + " s" + (", the time was up" if late else ""),
        _restarts(group),
        _spread(group, lambda r: r.system_oom_kills),
        _spread(group, lambda r: r.longest_stall, 1) + " s",
        _spread(group, lambda r: r.stalled) + " s",
        f"{sum(r.ssh_failed for r in group.results)} of {sum(r.ssh_tries for r in group.results)}",
        _spread(group, lambda r: r.ssh_longest, 1) + " s",
    )


def _spread(group: Group, value: Callable[[Result], float], digits: int = 0) -> str:
    spread = group.spread(value)
    least, middle, most = (f"{each:.{digits}f}" for each in (spread.least, spread.median, spread.most))
    return middle if least == most else f"{middle} ({least} to {most})"


def _restarts(group: Group) -> str:
    by = (("the nanny", lambda r: r.by_nanny), ("the kernel", lambda r: r.by_kernel))
    found = [f"{_spread(group, value)} by {who}" for who, value in by if group.spread(value).most]
    return ", ".join(found) or "0"


def plot() -> str:
    """Return the SVG with memory over time, of a run without the limit and a run with it."""
    chosen = sorted(curves(), key=lambda each: each[1].limit or 0)
    return _draw(chosen, [_heading(run) for run, _ in chosen])


def layers_plot() -> str:
    """Return the SVG with memory over time, of two runs without a limit: without and with layers."""
    chosen = sorted(layer_curves(), key=lambda each: each[0].case.layers == IMAGE)
    return _draw(chosen, [_layers_heading(run) for run, _ in chosen])


def _draw(runs: Sequence[tuple[Result, MemoryCurve]], headings: Sequence[str]) -> str:
    longest = max(run.seconds for run, _ in runs)
    panels = [
        {"heading": heading, "detail": _detail(run), "chart": memory_chart(curve, longest)}
        for heading, (run, curve) in zip(headings, runs, strict=True)
    ]
    description = ". ".join(f"{panel['heading']}; {panel['detail']}" for panel in panels)
    template = html.environment(Path(__file__).parent).get_template("docs.svg.j2")
    return template.render(panels=panels, description=description) + "\n"


def _heading(run: Result) -> str:
    limit = "Without a limit" if run.case.policy is LimitPolicy.NONE else "With the limit"
    of = run.done + run.failed + run.unfinished
    return f"{limit}: {run.done} of {of} tasks done"


def _layers_heading(run: Result) -> str:
    layers = "With" if run.case.layers == IMAGE else "Without"
    failed = f"{run.ssh_failed} of" if run.ssh_failed else "none of"
    return f"{layers} the layers: {failed} {run.ssh_tries} logins failed"


def _detail(run: Result) -> str:
    end = "stopped" if run.unfinished else "ended" if run.failed else "finished"
    time = f"{end} after {run.seconds:.0f} s"
    stalled = f"VM stalled for {run.stalled:.0f} s" if run.stalled else "no stall"
    restarts = run.by_nanny + run.by_kernel
    return f"{time}, {stalled}" + (f", worker restarted {restarts} times (×)" if restarts else "")


def curves() -> Iterator[tuple[Result, MemoryCurve]]:
    """Yield the recorded runs whose memory over time was kept."""
    return _curves(recorded(), "memory.json")


def layer_curves() -> Iterator[tuple[Result, MemoryCurve]]:
    """Yield the same of the runs of an image with layers."""
    return _curves(recorded_layers(), "layers-memory.json")


def _curves(runs: Sequence[Result], file: str) -> Iterator[tuple[Result, MemoryCurve]]:
    kept = json.loads((_RECORDED / file).read_text(encoding="utf-8"))["runs"]
    for run in runs:
        found = kept.get(run.case.name)
        if found and found.get("when", run.when) == run.when:
            times, held = zip(*found["held"], strict=True)
            yield (
                run,
                MemoryCurve(
                    times=times,
                    held=[size * MIB for size in held],
                    seconds=run.seconds,
                    limit=None if run.case.policy is LimitPolicy.NONE else run.limit,
                    available=run.available,
                    total=run.total,
                    lost=found["lost"],
                ),
            )
