"""The page with the results of an image, and the columns of the table on stdout."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ami_builder.console import duration, size
from ami_builder.core.units import format_size
from ami_builder.report import html
from ami_builder.report.page import Tone
from ami_builder.state.workspace import Workspace, write_atomically
from tests.experiment.cases import Case, LimitPolicy, Work
from tests.experiment.charts import BarChart, MemoryChart, MemoryCurve, bar_chart, memory_chart
from tests.experiment.criteria import PUBLISHED, Grade, Group, Judged, format_kind, grouped, groups, judge
from tests.experiment.findings import notes, shares
from tests.experiment.layer_criteria import judge_layers
from tests.experiment.layers import IMAGE, OFF
from tests.experiment.results import Result
from tests.experiment.series import folder_of, read_results, read_trace

PAGE = "report.html"
_MAIN = Work.SPIKES
# The later in this list, the more its memory curve explains.
_LEGIBLE = (Work.RESTARTS, Work.MATRIX, Work.ARRAY, Work.AGENT, Work.SPIKES, Work.LEAK_SLOW, Work.LEAK_FAST)

_Value = Callable[[Result], float]
_NUMBERS: tuple[tuple[str, _Value, Callable[[float], str]], ...] = (
    ("done", lambda r: r.done, "{:g}".format),
    ("failed", lambda r: r.failed, "{:g}".format),
    ("unfinished", lambda r: r.unfinished, "{:g}".format),
    ("took", lambda r: r.seconds, duration),
    ("restarts by nanny", lambda r: r.by_nanny, "{:g}".format),
    ("restarts by kernel", lambda r: r.by_kernel, "{:g}".format),
    ("system-wide OOM kills", lambda r: r.system_oom_kills, "{:g}".format),
    ("cgroup OOM kills", lambda r: r.cgroup_oom_kills, "{:g}".format),
    ("stalled", lambda r: r.stalled, duration),
    ("longest stall", lambda r: r.longest_stall, duration),
    ("CPU steal", lambda r: r.cpu_steal, duration),
    ("ssh failed", lambda r: r.ssh_failed, "{:g}".format),
    ("longest wait for ssh", lambda r: r.ssh_longest, duration),
    ("login at rest", lambda r: r.ssh_rest or 0.0, duration),
    ("PSI full", lambda r: r.psi_full, duration),
    ("spilled", lambda r: r.spilled, lambda value: size(int(value))),
    ("peak", lambda r: r.peak, lambda value: size(int(value))),
)
COLUMNS = tuple(name for name, _, _ in _NUMBERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTable:
    """A table of the page."""

    title: str
    text: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def cells(group: Group) -> tuple[str, ...]:
    """Return a group's kind, number of runs, and the median and spread of each number, as text."""
    about = (format_kind(group.kind), str(group.work), str(group.policy), group.layers, str(group.runs))
    return (*about, *(_cell(group, value, text) for _, value, text in _NUMBERS))


def _cell(group: Group, value: _Value, text: Callable[[float], str]) -> str:
    spread = group.spread(value)
    least, middle, most = text(spread.least), text(spread.median), text(spread.most)
    return middle if least == most else f"{middle} ({least} – {most})"


def write_page(image: str, digest: str, workspace: Workspace) -> Path | None:
    """Write the page beside the results and return its path; None without results."""
    folder = folder_of(image, digest, workspace)
    results = read_results(folder)
    if not results:
        return None
    template = html.environment(Path(__file__).parent).get_template("page.html.j2")
    write_atomically(folder / PAGE, template.render(**_content(image, digest, folder, results)))
    return folder / PAGE


def _content(image: str, digest: str, folder: Path, results: Sequence[Result]) -> Mapping[str, object]:
    judged, found = judge_all(results), groups(results)
    # The same layers in all of them: those of the image, if it was run with them.
    same = [r for r in results if r.case.layers == IMAGE] or [r for r in results if r.case.layers == OFF]
    tone, word, sentence = _verdict(judged)
    fewest = min(group.runs for group in found)
    few = f"; a published number should have {PUBLISHED}" if fewest < PUBLISHED else ""
    kinds = "; ".join(format_kind(kind) for kind in sorted({group.kind for group in found}))
    accelerators = ", ".join(sorted({result.accelerator.upper() for result in results}))
    return {
        "title": f"Experiment with image {image}",
        "tone": tone,
        "word": word,
        "sentence": sentence,
        "facts": (
            ("Digest", digest),
            ("Runs", f"{len(results)}, at least {fewest} of each kind{few}"),
            ("VMs", f"{kinds}; {accelerators}, no swap"),
            ("Time", f"{min(r.when for r in results)} to {max(r.when for r in results)}"),
        ),
        "curves": tuple(_curves(folder, found)),
        "panels": tuple(_panels(found)),
        "notes": notes(same),
        "tables": (_criteria(judged), _shares(same), _all(found)),
        "commands": _commands(image, results),
    }


def judge_all(results: Sequence[Result]) -> tuple[Judged, ...]:
    """Return the criteria of the limit, and those of the image's layers if it was run with them."""
    by_layers = grouped(results, lambda result: result.case.layers)
    if IMAGE not in by_layers:
        return judge(by_layers.get(OFF, results))
    return (*judge(by_layers[IMAGE]), *judge_layers(results))


def _verdict(judged: Sequence[Judged]) -> tuple[Tone, str, str]:
    counts = Counter(one.grade for one in judged)
    sentence = (
        f"Of {len(judged)} criteria, {counts[Grade.PASSED]} passed, {counts[Grade.FAILED]} failed, and "
        f"{counts[Grade.NOT_SHOWN]} could not be judged."
    )
    if counts[Grade.FAILED]:
        return Tone.BAD, "Not all passed", sentence
    return (Tone.WARN, "Incomplete", sentence) if counts[Grade.NOT_SHOWN] else (Tone.GOOD, "Passed", sentence)


def _panels(found: Sequence[Group]) -> Iterator[BarChart]:
    """Yield the numbers of the main work under each policy, or of another work if that was not run."""
    work = _MAIN if any(group.work is _MAIN for group in found) else found[0].work
    numbers: tuple[tuple[str, str, _Value], ...] = (
        ("tasks done", "", lambda r: r.done),
        ("stalled", "s", lambda r: r.stalled),
        ("took", "s", lambda r: r.seconds),
        ("longest wait for ssh", "s", lambda r: r.ssh_longest),
        ("system-wide OOM kills", "", lambda r: r.system_oom_kills),
    )
    for kind in sorted({group.kind for group in found if group.work is work}):
        same = [group for group in found if (group.kind, group.work) == (kind, work)]
        for title, unit, value in numbers:
            bars = [(_label(group), [value(result) for result in group.results]) for group in same]
            if any(number for _, values in bars for number in values):
                yield bar_chart(f"{format_kind(kind)}, {work}: {title}", unit, bars)


def _label(group: Group) -> str:
    return str(group.policy) if group.layers == OFF else f"{group.policy}, {group.layers}"


def _curves(folder: Path, found: Sequence[Group]) -> Iterator[tuple[str, MemoryCurve, MemoryChart]]:
    """Yield a run of each policy on each VM, of the work that was run under most policies."""
    policies = Counter((group.kind, group.work) for group in found)
    for group in found:
        same = [work for work in Work if policies[group.kind, work]]
        if group.work is not max(same, key=lambda work: (policies[group.kind, work], _LEGIBLE.index(work))):
            continue
        # The median run, by the time that the VM stalled.
        result = sorted(group.results, key=lambda each: each.stalled)[group.runs // 2]
        trace = read_trace(folder, result.case)
        if trace is None or not trace.times:
            continue
        curve = MemoryCurve(
            times=trace.times,
            held=trace.held,
            seconds=result.seconds,
            limit=None if group.policy is LimitPolicy.NONE else result.limit,
            available=result.available,
            total=result.total,
            paused=tuple(time for time, kind in trace.marks if kind == "paused"),
            lost=tuple(time for time, kind in trace.marks if kind == "lost"),
        )
        title = f"{format_kind(group.kind)}, {group.work}: {_label(group)}"
        yield title, curve, memory_chart(curve)


def _criteria(judged: Sequence[Judged]) -> TextTable:
    return TextTable(
        title="Criteria",
        text="Set in tests/experiment/criteria.py before the runs.",
        columns=("criterion", "result", "found", "runs"),
        rows=tuple((one.text, one.grade, one.found, str(one.runs)) for one in judged),
    )


def _shares(results: Sequence[Result]) -> TextTable:
    return TextTable(
        title="What Dask may use",
        text=(
            "Its limit, as part of MemTotal and of what a leak held before the first stall; and the runs in "
            "which something outside the container was affected."
        ),
        columns=("VM", "policy", "limit", "of MemTotal", "of what a leak held", "affected"),
        rows=tuple(
            (
                format_kind(one.kind),
                one.policy.text,
                size(int(one.limit)),
                f"{one.of_total:.1%}",
                "–" if one.of_given is None else f"{one.of_given:.1%}",
                f"{one.affected} of {one.runs}",
            )
            for one in shares(results)
        ),
    )


def _all(found: Sequence[Group]) -> TextTable:
    return TextTable(
        title="All numbers",
        text="Medians, with the least and the most of all runs. Stalls are gaps of more than a second.",
        columns=("VM", "work", "policy", "layers", "runs", *COLUMNS),
        rows=tuple(cells(group) for group in found),
    )


def _commands(image: str, results: Sequence[Result]) -> tuple[str, ...]:
    """Return the commands that make these runs; they may make more of some kinds."""
    same = grouped((result.case for result in results), lambda case: (case.cpus, case.seed, case.layers))
    return tuple(_command(image, cases) for _, cases in sorted(same.items()))


def _command(image: str, cases: Sequence[Case]) -> str:
    words = ["python", "-m", "tests.experiment", image, "--cpus", str(cases[0].cpus)]
    words += ["--layers", cases[0].layers]
    for memory in sorted({case.memory for case in cases}):
        words += ["--memory", format_size(memory)]
    for policy in LimitPolicy:
        words += ["--policy", policy] if any(case.policy is policy for case in cases) else []
    for work in Work:
        words += ["--work", work] if any(case.work is work for case in cases) else []
    words += ["--repeat", str(max(case.repeat for case in cases)), "--seed", str(cases[0].seed)]
    return shlex.join(words)
