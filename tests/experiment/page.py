"""The page of an experiment, and its groups as a table on stdout."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from ami_builder.console import duration, size
from ami_builder.core.units import format_size
from ami_builder.report import Tone, html
from ami_builder.state.workspace import Workspace, write_atomically
from tests.experiment import plots
from tests.experiment.cases import Case, LimitPolicy, Work
from tests.experiment.comparison import Comparison, Criterion, Curve, Panel, Table
from tests.experiment.criteria import PUBLISHED, Grade, Judged, Group, grouped, judge, groups, said
from tests.experiment.findings import notes, shares
from tests.experiment.results import Result
from tests.experiment.series import folder_of, read_results, read_trace

PAGE = "report.html"
_MAIN = Work.SPIKES
# The later, the better what happened is seen in the curve of its memory.
_LEGIBLE = (Work.RESTARTS, Work.MATRIX, Work.ARRAY, Work.AGENT, Work.SPIKES, Work.LEAK_SLOW, Work.LEAK_FAST)
_TONES = {Grade.PASSED: Tone.GOOD, Grade.FAILED: Tone.BAD, Grade.NOT_SHOWN: Tone.IDLE}

_Value = Callable[[Result], float]
_NUMBERS: tuple[tuple[str, _Value, Callable[[float], str]], ...] = (
    ("done", lambda r: r.done, "{:g}".format),
    ("failed", lambda r: r.failed, "{:g}".format),
    ("unfinished", lambda r: r.unfinished, "{:g}".format),
    ("took", lambda r: r.seconds, duration),
    ("by nanny", lambda r: r.by_nanny, "{:g}".format),
    ("by kernel", lambda r: r.by_kernel, "{:g}".format),
    ("global kills", lambda r: r.system_oom_kills, "{:g}".format),
    ("container kills", lambda r: r.cgroup_oom_kills, "{:g}".format),
    ("stalled", lambda r: r.stalled, duration),
    ("longest", lambda r: r.longest_stall, duration),
    ("host busy", lambda r: r.cpu_steal, duration),
    ("ssh failed", lambda r: r.ssh_failed, "{:g}".format),
    ("ssh longest", lambda r: r.ssh_longest, duration),
    ("stalled", lambda r: r.psi_full, duration),
    ("spilled", lambda r: r.spilled, lambda value: size(int(value))),
    ("peak", lambda r: r.peak, lambda value: size(int(value))),
)
COLUMNS = tuple(name for name, _, _ in _NUMBERS)


def cells(row: Group) -> tuple[str, ...]:
    """Return a row's texts: what it is about, how many runs, and each number's median with its spread."""
    about = (said(row.kind), str(row.work), str(row.policy), str(row.runs))
    return (*about, *(_cell(row, value, text) for _, value, text in _NUMBERS))


def _cell(row: Group, value: _Value, text: Callable[[float], str]) -> str:
    spread = row.spread(value)
    least, middle, most = text(spread.least), text(spread.median), text(spread.most)
    return middle if least == most else f"{middle} ({least} – {most})"


def write_page(image: str, digest: str, workspace: Workspace, output: Path | None = None) -> Path | None:
    """Write the page beside the results, or to `output`, and return where it is; None without results."""
    folder = folder_of(image, digest, workspace)
    results = read_results(folder)
    if not results:
        return None
    path = output or folder / PAGE
    write_atomically(path, _page(image, digest, folder, results))
    return path


def _page(image: str, digest: str, folder: Path, results: tuple[Result, ...]) -> str:
    judged = judge(results)
    tone, word, sentence = _verdict(judged)
    found = groups(results)
    fewest = min(row.runs for row in found)
    accelerators = ", ".join(sorted({result.accelerator.upper() for result in results}))
    comparison = Comparison(
        criteria=tuple(
            Criterion(text=one.text, tone=_TONES[one.answer], word=one.answer, found=one.found, runs=one.runs)
            for one in judged
        ),
        panels=_panels(found),
        curves=_curves(folder, found),
        tables=(_shares(results), _all(found)),
        notes=notes(results),
        commands=_commands(image, results),
    )
    facts = (
        ("Digest", digest),
        ("Runs", _counted(len(results), fewest)),
        ("Machines", f"{_machines(results)}; under {accelerators}, without swap"),
        ("Made", f"{min(r.when for r in results)} to {max(r.when for r in results)}"),
    )
    template = html.environment(Path(__file__).parent).get_template("experiment.html.j2")
    return template.render(
        title=f"Experiment with image {image}", tone=tone, word=word, sentence=sentence, facts=facts,
        comparison=comparison, plots=_plots(comparison),
    )  # fmt: skip


def _plots(comparison: Comparison) -> Mapping[str, object]:
    def plot(svg: str, text: str) -> Mapping[str, object]:
        return {"svg": Markup(svg), "text": text}

    panels = [(one, plot(plots.bars(one), plots.told_bars(one))) for one in comparison.panels]
    curves = [(one, plot(plots.curve(one), plots.told_curve(one))) for one in comparison.curves]
    return {"panels": panels, "curves": curves}


def _verdict(judged: Sequence[Judged]) -> tuple[Tone, str, str]:
    counts = {answer: sum(one.answer is answer for one in judged) for answer in Grade}
    told = f"Of {len(judged)} criteria {counts[Grade.PASSED]} are reached"
    for answer, word in ((Grade.FAILED, "not"), (Grade.NOT_SHOWN, "not shown")):
        verb = "is" if counts[answer] == 1 else "are"
        told += f", {counts[answer]} {verb} {word}" if counts[answer] else ""
    if counts[Grade.FAILED]:
        return Tone.BAD, "Not all reached", f"{told}."
    if counts[Grade.NOT_SHOWN]:
        return Tone.WARN, "Not all shown", f"{told}."
    return Tone.GOOD, "Reached", f"{told}."


def _counted(count: int, fewest: int) -> str:
    few = (
        f"; fewer than the {PUBLISHED} of a kind that a published number should have"
        if fewest < PUBLISHED
        else ""
    )
    return f"{count}, at least {fewest} of each kind{few}"


def _machines(results: Sequence[Result]) -> str:
    return "; ".join(said(kind) for kind in sorted({result.case.kind for result in results}))


def _panels(found: Sequence[Group]) -> tuple[Panel, ...]:
    """Return what became of the main work under each policy; of any other one where that was not run."""
    work = _MAIN if any(row.work is _MAIN for row in found) else found[0].work
    panels = []
    for kind in sorted({row.kind for row in found if row.work is work}):
        group = [row for row in found if (row.kind, row.work) == (kind, work)]
        for title, unit, value in (
            ("tasks done", "", lambda r: r.done),
            ("stood still", "s", lambda r: r.stalled),
            ("took", "s", lambda r: r.seconds),
            ("longest wait for ssh", "s", lambda r: r.ssh_longest),
            ("kills for want of the machine’s memory", "", lambda r: r.system_oom_kills),
        ):
            bars = tuple((str(row.policy), tuple(map(value, row.results))) for row in group)
            if any(number for _, numbers in bars for number in numbers):
                panels.append(Panel(title=f"{said(kind)}, {work}: {title}", unit=unit, bars=bars))
    return tuple(panels)


def _curves(folder: Path, found: Sequence[Group]) -> tuple[Curve, ...]:
    """Return a run of each policy on each machine: of the work that was run under most policies."""
    policies = Counter((row.kind, row.work) for row in found)
    curves = []
    for row in found:
        same = [work for work in Work if policies[row.kind, work]]
        if row.work is not max(same, key=lambda work: (policies[row.kind, work], _LEGIBLE.index(work))):
            continue
        # The one in the middle, by how long the machine stood still.
        result = sorted(row.results, key=lambda each: each.stalled)[row.runs // 2]
        trace = read_trace(folder, result.case)
        if trace is None or not trace.times:
            continue
        curves.append(
            Curve(
                title=f"{said(row.kind)}, {row.work}: {row.policy.text}",
                times=trace.times,
                held=trace.held,
                seconds=result.seconds,
                limit=None if row.policy is LimitPolicy.NONE else result.limit,
                available=result.available,
                total=result.total,
                paused=tuple(time for time, kind in trace.marks if kind == "paused"),
                lost=tuple(time for time, kind in trace.marks if kind == "lost"),
            )
        )
    return tuple(curves)


def _shares(results: Sequence[Result]) -> Table:
    return Table(
        title="What Dask may use",
        text=(
            "Its limit, as part of MemTotal, and as part of what the system really gave a leak before it "
            "first stood still; and in how many runs something outside the container was hurt."
        ),
        columns=("machine", "policy", "limit", "of MemTotal", "of what it gave", "hurt"),
        named=2,
        groups=tuple(
            (
                said(one.kind),
                one.policy.text,
                size(int(one.limit)),
                f"{one.of_total:.1%}",
                "–" if one.of_given is None else f"{one.of_given:.1%}",
                f"{one.hurt} of {one.runs}",
            )
            for one in shares(results)
        ),
    )


def _all(found: Sequence[Group]) -> Table:
    return Table(
        title="All numbers",
        text=(
            "Medians, with the least and the most of all runs. Frozen: silences of more than a second inside "
            "the machine, in all and the longest. Host busy: how long the machine itself had to wait for a "
            "processor of the host. Stalled: PSI, full."
        ),
        columns=("machine", "work", "policy", "runs", *COLUMNS),
        named=3,
        groups=tuple(cells(row) for row in found),
    )


def _commands(image: str, results: Sequence[Result]) -> tuple[str, ...]:
    """Return what makes these runs again; there may be more of a kind than some had."""
    groups = grouped((result.case for result in results), lambda case: (case.cpus, case.seed))
    return tuple(_command(image, cases) for _, cases in sorted(groups.items()))


def _command(image: str, cases: Sequence[Case]) -> str:
    words = ["python", "-m", "tests.experiment", image, "--cpus", str(cases[0].cpus)]
    for memory in sorted({case.memory for case in cases}):
        words += ["--memory", format_size(memory)]
    for policy in LimitPolicy:
        words += ["--policy", policy] if any(case.policy is policy for case in cases) else []
    for work in Work:
        words += ["--work", work] if any(case.work is work for case in cases) else []
    words += ["--repeat", str(max(case.repeat for case in cases)), "--seed", str(cases[0].seed)]
    return shlex.join(words)
