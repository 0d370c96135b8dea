"""The page of a run or a night: what was recorded and nothing else, as text, the same every time."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ami_builder.cli import app as cli
from ami_builder.core.diff import Quantity
from ami_builder.core.records import (
    Artifact,
    CheckResult,
    Measurement,
    NightlyRun,
    NightlyStatus,
    Outcome,
    RegionResult,
    RunRecord,
    RunStatus,
    StepRecord,
    TargetKind,
    Verdict,
)
from ami_builder.core.units import MIB
from ami_builder.report import html, sections
from ami_builder.report.collect import save_nightly_run, write_page
from ami_builder.report.page import ChainNumber, Page, Tone, Trend
from ami_builder.report.plot import BOTTOM, TOP, plot, ticks
from ami_builder.state import runs
from ami_builder.state.runs import RecordedNightlyRun
from ami_builder.state.workspace import Workspace, dump, load
from ami_builder.system import processes
from tests.unit.test_checks import identity

ROOT = Path(__file__).resolve().parents[2]
MACHINE = json.loads((Path(__file__).parents[1] / "recorded" / "healthy.json").read_text())
VALUE = int(MACHINE["memory.env"].split("=")[1])
GIB = 1 << 30
DAY = datetime(2026, 11, 20, 22, 0, tzinfo=UTC)
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}$\\frac{$&amp;\x1b[31m\u202e"
VOID = {"meta", "wbr", "br", "img", "link", "input", "use", "path"}


class Parsed(HTMLParser):
    """A page's elements in order, its texts, and whether what was opened was closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def find(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def shape(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(tag, tuple(attributes)) for tag, attributes in self.tags]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setenv("AMI_BUILDER_HOME", str(tmp_path / "home"))
    return Workspace.open({"AMI_BUILDER_HOME": str(tmp_path / "home")})


def result(
    name: str, outcome: Outcome = Outcome.PASSED, message: str = "", phase: str = "boot"
) -> CheckResult:
    return CheckResult(name=name, phase=phase, machine="2 GiB", outcome=outcome, seconds=0, message=message)


def build(
    workspace: Workspace,
    day: int,
    *,
    image: str = "dask",
    status: RunStatus = RunStatus.PASSED,
    results: tuple[CheckResult, ...] = (
        result("memory limit chain: docker has the variable"),
        result("container: no swap"),
    ),
    packages: str = "apt=1\nsystemd=257\n",
    error: str | None = None,
    detail: str = "",
    wall: float | None = None,
    cpu: float | None = None,
) -> runs.RecordedRun:
    """Record a build of that day, as `ami-builder build` does."""
    when = DAY + timedelta(days=day)
    run_id, digest = f"{when:%Y%m%dT%H%M%SZ}-{day:06}", f"{day:02}" * 32
    directory = workspace.runs_dir / run_id
    evidence = directory / "machines" / "2GiB"
    evidence.mkdir(parents=True)
    (directory / ".alive").touch()
    (directory / "logs").mkdir()
    (directory / "logs" / "packer.log").write_text("log")
    (directory / "packages.txt").write_text(packages)
    (evidence / "machine-boot.json").write_text(json.dumps(MACHINE))
    (evidence / "client-boot.json").write_text(json.dumps({"stdout": "", "stderr": "", "status": 0}))
    measured = Measurement(
        machine="2 GiB",
        phase="boot",
        total=2 * GIB,
        available=VALUE,
        ssh_seconds=wall and wall - 20,
        dask_seconds=wall,
        cpu_seconds=cpu,
        control_seconds=4.0,
    )
    step = f"build {image}"
    record = RunRecord(
        run_id=run_id,
        command="build",
        image=image,
        digest=digest,
        status=status,
        started=when,
        steps=(
            StepRecord(name=step, seconds=90.0 + day, status=status, began=2.0),
            StepRecord(
                name=f"{step} > bake", seconds=30.0, status=RunStatus.PASSED, began=2.0, detail=detail
            ),
            StepRecord(name=f"{step} > verify", seconds=60.0, status=status, began=32.0),
        ),
        artifact=Artifact(
            image=image,
            target=TargetKind.QEMU,
            location=f"/images/{digest[:16]}/image.qcow2",
            digest=digest,
            created=when,
            run_id=run_id,
            size=(280 + day) << 20,
        ),
        verdict=Verdict(digest=digest, checks_digest="c", results=results, measured=(measured,)),
        error=error,
    )
    dump(record, directory / "record.json")
    return runs.RecordedRun(record=record, directory=directory)


def verdict_of(run: runs.RecordedRun) -> Verdict:
    assert run.record.verdict is not None
    return run.record.verdict


def with_workers(run: runs.RecordedRun, *limits: int) -> None:
    """Have the scheduler list workers with these limits."""
    file = run.directory / "machines/2GiB/machine-boot.json"
    file.write_text(json.dumps(MACHINE | {"identity": identity(limits)}))


def night(
    run: runs.RecordedRun, ending: NightlyStatus = NightlyStatus.PROMOTED, **more: object
) -> NightlyRun:
    told = NightlyRun(
        id="20261123T230000Z-abcdef",
        image=run.record.image,
        target=TargetKind.QEMU,
        channel="testing",
        started=run.when - timedelta(seconds=5),
        ended=run.when + timedelta(seconds=200),
        ending=ending,
        digest=run.record.digest or "",
        before="",
        location="/images/x",
    )
    return replace(told, **more)  # type: ignore[arg-type]


def page_of(subject: runs.RecordedRun | runs.RecordedNightlyRun, workspace: Workspace) -> Parsed:
    return Parsed(write_page(subject, workspace).read_text())


def test_the_verdict_comes_first_then_the_chain(workspace: Workspace) -> None:
    build(workspace, 0, packages="apt=1\nold=1\nsystemd=256\n")
    page = page_of(build(workspace, 1), workspace)
    order = [
        "Passed",
        "All four numbers are equal: 2 checks",
        "01" * 32,
        "all equal",
        f"{VALUE:,}".replace(",", "\u202f"),
    ]
    order += ["every start: 2 passed", "bake", "Size of the image", "systemd", "packer.log"]
    places = [page.text.index(text) for text in order]
    assert places == sorted(places)
    assert page.text.count(f"{VALUE:,}".replace(",", "\u202f")) == 4
    assert f"{VALUE / (2 * GIB):.1%}" in page.text
    assert "– (removed)" in page.text


@pytest.mark.parametrize(("memory", "shown_as"), [(0, "✗ no limit"), (VALUE - 4096, "✗ 1\u202f7")])
def test_a_broken_chain_shows_the_link_that_broke(workspace: Workspace, memory: int, shown_as: str) -> None:
    wrong = result("memory limit chain: docker has the variable", Outcome.FAILED, "first line\n  second line")
    run = build(workspace, 0, status=RunStatus.FAILED, results=(wrong,), error="1 of 1 checks failed")
    containers = json.loads(MACHINE["containers"])
    containers[0]["HostConfig"]["Memory"] = memory
    (run.directory / "machines/2GiB/machine-boot.json").write_text(
        json.dumps({**MACHINE, "containers": json.dumps(containers)})
    )
    page = page_of(run, workspace)
    assert shown_as in page.text
    assert "✗ not equal" in page.text
    assert page.text.index("Failed") < page.text.index("1 of 1 checks failed")
    assert "first line\nsecond line" in page.text
    assert ("details", {"open": None}) in page.tags


def test_machines_of_several_regions_have_their_evidence_too(workspace: Workspace) -> None:
    run = build(workspace, 0)
    evidence = run.directory / "machines"
    (evidence / "eu-west-1").mkdir()
    (evidence / "2GiB").rename(evidence / "eu-west-1/t3.large")
    (evidence / "eu-west-1/t3.large/checks-boot").mkdir()
    (evidence / "eu-west-1/t3.large/checks-boot/context.json").write_text("{}")
    verdict = verdict_of(run)
    measured = tuple(replace(one, machine="t3.large in eu-west-1") for one in verdict.measured)
    results = tuple(replace(one, machine="t3.large in eu-west-1") for one in verdict.results)
    (start,) = sections.starts(replace(verdict, measured=measured, results=results), evidence)
    assert [one.value for one in start.further] == [VALUE] * 3
    found = sections.links([run.directory], run.directory / "page.html")
    assert "machine-boot.json" in found[f"{run.directory.name}/machines/eu-west-1/t3.large"]
    assert not any("context.json" in files for files in found.values())


def test_the_parts_of_several_workers_are_added(workspace: Workspace) -> None:
    run = build(workspace, 0)
    with_workers(run, *[VALUE // 5] * 5)
    (start,) = sections.starts(verdict_of(run), run.directory / "machines")
    assert start.further[-1].name == "memory_limit of 5 workers"
    assert all(one.equal for one in start.further)


def test_a_headroom_is_part_of_the_chain(workspace: Workspace) -> None:
    run = build(workspace, 0)
    folder = run.directory / "machines/2GiB"
    with_workers(run, VALUE - 4096)
    (start,) = sections.starts(verdict_of(run), run.directory / "machines")
    assert not start.further[-1].equal
    (folder / "checks-boot").mkdir()
    (folder / "checks-boot/context.json").write_text(json.dumps({"headroom": 4096}))
    (start,) = sections.starts(verdict_of(run), run.directory / "machines")
    assert start.further[-1] == ChainNumber(name="memory_limit + nanny_headroom", value=VALUE, equal=True)


def test_a_worker_without_a_limit_breaks_the_chain(workspace: Workspace) -> None:
    run = build(workspace, 0)
    with_workers(run, 0)
    (start,) = sections.starts(verdict_of(run), run.directory / "machines")
    assert start.further[-1] == ChainNumber(name="memory_limit", value=0, equal=False)


@pytest.mark.parametrize("answer", ["", "HTTP/1.1 404 Not Found\r\n\r\n404", None])
def test_a_scheduler_that_listed_nobody_has_no_number(workspace: Workspace, answer: str | None) -> None:
    """A record of an older version has no list at all."""
    run = build(workspace, 0)
    machine = {name: text for name, text in MACHINE.items() if name != "identity"}
    machine |= {} if answer is None else {"identity": answer}
    (run.directory / "machines/2GiB/machine-boot.json").write_text(json.dumps(machine))
    (start,) = sections.starts(verdict_of(run), run.directory / "machines")
    assert [one.value for one in start.further] == [VALUE, VALUE, None]
    assert not start.further[-1].equal
    assert page_of(run, workspace).text.count("not recorded") == 1


def test_memory_pressure_is_no_start(workspace: Workspace) -> None:
    """It has its column of checks, and no chain of numbers."""
    results = (
        result("memory limit chain: docker has the variable"),
        result("memory pressure: a", phase="pressure"),
    )
    run = build(workspace, 0, results=results)
    assert [start.phase for start in sections.starts(verdict_of(run), run.directory / "machines")] == ["boot"]
    assert sections.columns(verdict_of(run)) == (("2 GiB", "boot"), ("2 GiB", "pressure"))


def test_a_start_shows_its_boot_in_wall_time_and_in_cpu_time(workspace: Workspace) -> None:
    build(workspace, 0, wall=60.0, cpu=196.0)
    page = page_of(build(workspace, 1, wall=58.0, cpu=200.0), workspace)
    text = " ".join(page.text.split())
    assert "ssh after 38 s, Dask after 58 s, 3:20 min of CPU time (50.00 x control)" in text
    assert "CPU time to boot on 2 GiB" in text
    assert "50.00 x control now, 49.00 x control in the previous build" in text
    rows = {"seconds to ssh": "40 s38 s", "CPU time to boot": "49.00 x control50.00 x control+2.0%"}
    for name, values in rows.items():
        assert f"{name}: 2 GiB{values}" in text, "in its own unit"


def test_a_start_without_times_shows_none(workspace: Workspace) -> None:
    build(workspace, 0)
    page = page_of(build(workspace, 1), workspace)
    assert "of CPU time" not in page.text
    assert "CPU time to boot" not in page.text
    only = page_of(build(workspace, 2, wall=58.0), workspace)
    assert "ssh after 38 s, Dask after 58 s\n" in only.text


def test_evidence_that_is_gone_is_said_to_be(workspace: Workspace) -> None:
    run = build(workspace, 0)
    for file in (run.directory / "machines/2GiB").glob("*.json"):
        file.write_text('{"half')
    assert page_of(run, workspace).text.count("not recorded") == 3


def test_a_machine_that_was_booted_again_is_shown_as_it_was_then(workspace: Workspace) -> None:
    run = build(workspace, 0)
    first = run.directory / "machines/2GiB"
    first.rename(first.with_name("2GiB-2"))
    first.mkdir()
    assert "not recorded" not in page_of(run, workspace).text


def test_a_failure_is_told_once_for_all_starts(workspace: Workspace) -> None:
    again = tuple(result("container: no swap", Outcome.FAILED, "swap", phase) for phase in ("boot", "reboot"))
    page = page_of(build(workspace, 0, results=again, status=RunStatus.FAILED), workspace)
    assert len([one for one in page.find("article") if one["class"] == "failure bad"]) == 1
    assert "2 GiB first boot, 2 GiB reboot" in page.text


@pytest.mark.parametrize(
    ("status", "verdict", "word"),
    [
        (RunStatus.PASSED, True, "Passed"),
        (RunStatus.PASSED, False, "Not verified"),
        (RunStatus.FAILED, True, "Failed"),
        (RunStatus.INCONCLUSIVE, True, "Inconclusive"),
        (RunStatus.INTERRUPTED, False, "Interrupted"),
        (RunStatus.RUNNING, False, "Interrupted"),
    ],
)
def test_how_a_run_ended(workspace: Workspace, status: RunStatus, verdict: bool, word: str) -> None:
    run = build(workspace, 0, status=status)
    record = run.record if verdict else replace(run.record, verdict=None)
    assert f"\n{word}\n" in page_of(replace(run, record=record), workspace).text


def test_what_is_inconclusive_has_its_own_mark_and_colour(workspace: Workspace) -> None:
    busy = result("memory pressure: ssh answers", Outcome.INCONCLUSIVE, "a login at rest takes 40 s")
    chain = result("memory limit chain: docker has the variable", Outcome.INCONCLUSIVE)
    run = build(
        workspace,
        0,
        status=RunStatus.INCONCLUSIVE,
        results=(busy, chain, result("container: no swap")),
        error="the host was too busy to judge this image",
    )
    page = page_of(run, workspace)
    assert "? inconclusive" in page.text
    assert "a login at rest takes 40 s" in page.text
    assert "every start: 1 passed, 2 inconclusive" in page.text
    classes = {
        one["class"]
        for tag in ("section", "article", "li", "span")
        for one in page.find(tag)
        if one.get("class")
    }
    assert {"verdict unsure", "failure unsure", "unsure", "tone unsure"} <= classes
    assert not [one for one in classes if "bad" in str(one).split()], "nothing is red"
    assert "✗" not in page.text.replace("✗ failed, ? inconclusive", "")
    assert "not checked" in page.text, "the chain was not judged"


def test_a_verification_tells_which_image_it_was_about(workspace: Workspace) -> None:
    build(workspace, 0)
    run = build(workspace, 1)
    build(workspace, 2)
    when = DAY + timedelta(days=1, hours=1)
    record = replace(run.record, command="verify", run_id="later", started=when, artifact=None)
    page = page_of(runs.RecordedRun(record=record, directory=workspace.runs_dir / "later"), workspace)
    assert "Verification of image dask" in page.text
    assert f"/images/{'01' * 8}/image.qcow2" in page.text
    assert "281 MiB now, 280 MiB in the previous build" in page.text


def test_a_run_that_goes_on_is_no_failure(workspace: Workspace) -> None:
    with workspace.run("build", "dask", "d" * 64) as run:
        found = runs.find(workspace, run.record.run_id)
        assert "Running" in page_of(found, workspace).text


@pytest.mark.parametrize("ending", NightlyStatus)
def test_how_a_night_ended(workspace: Workspace, ending: NightlyStatus) -> None:
    build(workspace, 0)
    run = build(workspace, 1, packages="apt=2\n")
    place = RegionResult(place="eu-west-1", id="ami-1", ending=ending, text="the reason")
    told = night(
        run,
        ending,
        places=(place,),
        drifts=("less memory",),
        moved=("apt 1 -> 2",),
        retired=("deleted ami-0: old",),
        before="00" * 32,
        error="it broke" if ending is NightlyStatus.FAILED else "",
    )
    directory = workspace.nightly_dir / "dask.qemu" / told.id
    save_nightly_run(told, directory, workspace)
    assert load(NightlyRun, directory / "night.json") == told
    if ending is NightlyStatus.UNCHANGED:
        # Whoever wants a page of nothing new asks for it.
        assert not (directory / "report.html").exists()
        write_page(RecordedNightlyRun(record=told, directory=directory), workspace)
    page = Parsed((directory / "report.html").read_text())
    for text in (
        "eu-west-1",
        "the reason",
        "less memory",
        "deleted ami-0: old",
        "apt",
        "all equal",
        told.error,
    ):
        assert text in page.text
    assert "../../../runs/" in " ".join(one["href"] or "" for one in page.find("a"))
    assert len({one["class"] for one in page.find("section") if one.get("class")}) == 1


def test_a_night_that_got_nowhere_has_a_page(workspace: Workspace) -> None:
    run = build(workspace, 0)
    told = night(
        run, NightlyStatus.FAILED, digest="", error="the package archive does not answer", location=""
    )
    directory = workspace.nightly_dir / "dask.qemu" / told.id
    save_nightly_run(told, directory, workspace)
    text = Parsed((directory / "report.html").read_text()).text
    assert told.error in text
    assert "all equal" not in text


def test_moved_packages_are_told_when_the_image_before_is_gone(workspace: Workspace) -> None:
    told = night(build(workspace, 0), before="ff" * 32, moved=("apt 1 -> 2",))
    directory = workspace.nightly_dir / "dask.qemu" / told.id
    save_nightly_run(told, directory, workspace)
    assert "apt 1 -> 2" in Parsed((directory / "report.html").read_text()).text


def test_a_page_that_can_not_be_drawn_fails_no_night(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: Page) -> str:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(html, "render", broken)
    told = night(build(workspace, 0))
    save_nightly_run(told, workspace.nightly_dir / "dask.qemu" / told.id, workspace)
    assert load(NightlyRun, workspace.nightly_dir / "dask.qemu" / told.id / "night.json") == told
    assert "RuntimeError: no fonts" in capsys.readouterr().err


def everything(workspace: Workspace, text: str) -> str:
    """Return the page of a night in whose every string stands `text`."""
    build(workspace, 0, image=text, packages="apt=1\n")
    failed = result(f"limit: {text}", Outcome.FAILED, text)
    named = tuple(replace(one, machine=text, phase=text) for one in (failed, result(text)))
    run = build(
        workspace,
        1,
        image=text,
        results=named,
        status=RunStatus.FAILED,
        error=text,
        detail=text,
        packages=f"apt={text.replace('=', '')}\n",
    )
    measured = tuple(replace(one, machine=text, phase=text) for one in verdict_of(run).measured)
    record = replace(
        run.record, verdict=Verdict(digest=text, checks_digest="", results=named, measured=measured)
    )
    assert record.artifact is not None
    record = replace(record, artifact=replace(record.artifact, location=text, region=text))
    dump(record, run.directory / "record.json")
    (run.directory / "logs" / f"{text.replace('/', '')}.log").touch()
    place = RegionResult(place=text, id=text, ending=NightlyStatus.FAILED, text=text)
    lines = (text,)
    told = night(run, places=(place,), drifts=lines, moved=lines, retired=lines, error=text, channel=text)
    told = replace(told, before="00" * 32, location=text)
    directory = workspace.nightly_dir / "n" / told.id
    save_nightly_run(told, directory, workspace)
    return (directory / "report.html").read_text()


def test_no_text_of_a_record_is_taken_for_markup(tmp_path: Path) -> None:
    def page(folder: str, text: str) -> Parsed:
        return Parsed(everything(Workspace.open({"AMI_BUILDER_HOME": str(tmp_path / folder)}), text))

    hostile, tame = page("a", HOSTILE), page("b", "tame")
    assert hostile.shape == tame.shape
    assert hostile.text.count("<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}") > 12
    assert "\x1b" not in hostile.text
    assert "tame" in tame.text


def test_nothing_is_loaded_and_nothing_runs(workspace: Workspace) -> None:
    build(workspace, 0)
    path = write_page(build(workspace, 1), workspace)
    page = Parsed(path.read_text())
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "base", "form"}
    policy = [one["content"] for one in page.find("meta") if one.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name.startswith("xmlns") or "://" not in (value or ""), (tag, name, value)
    assert "url(http" not in path.read_text()
    assert "@import" not in path.read_text()


@pytest.mark.parametrize("output", [None, "elsewhere/deep/page.html"])
def test_links_lead_to_the_files(workspace: Workspace, tmp_path: Path, output: str | None) -> None:
    run = build(workspace, 0)
    (run.directory / "logs" / "a b#c?.log").touch()
    path = write_page(run, workspace, tmp_path / output if output else None)
    hrefs = [one["href"] or "" for one in Parsed(path.read_text()).find("a")]
    found = {(path.parent / unquote(href)).resolve() for href in hrefs}
    assert all(file.is_file() for file in found)
    assert {file.name for file in found} == {
        "a b#c?.log", "packer.log", "packages.txt", "record.json", "machine-boot.json", "client-boot.json"
    }  # fmt: skip


def test_a_person_who_can_not_see_it_is_told_the_same(workspace: Workspace) -> None:
    build(workspace, 0)
    page = page_of(build(workspace, 1), workspace)
    assert ("html", {"lang": "en"}) in page.tags
    levels = [int(tag[1]) for tag, _ in page.tags if tag in {"h1", "h2", "h3", "h4"}]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all("scope" in one for one in page.find("th"))
    drawings = [one for one in page.find("svg") if one.get("role") == "img"]
    assert len(drawings) == 3
    assert all("in the previous build; between" in (one["aria-label"] or "") for one in drawings)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_same_record_gives_the_same_bytes(workspace: Workspace) -> None:
    build(workspace, 0)
    run = build(workspace, 1)
    first = write_page(run, workspace).read_bytes()
    # What was built since is no part of this run's past.
    build(workspace, 2)
    assert write_page(run, workspace).read_bytes() == first
    program = "import sys; from ami_builder.cli.app import run; sys.exit(run(['report', sys.argv[1]]))"
    home = str(workspace.state.parent)
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", program, run.id],
            cwd=ROOT,
            env=processes.environment({"AMI_BUILDER_HOME": home, "PYTHONHASHSEED": seed}),
            check=True,
            capture_output=True,
        )
        assert (run.directory / "report.html").read_bytes() == first


def trend(quantity: Quantity, *values: float) -> Trend:
    return Trend(title="t", quantity=quantity, points=tuple((DAY, value) for value in values))


def test_a_plot_starts_at_zero_and_has_round_labels() -> None:
    drawn = plot(trend(Quantity.SIZE, 280 << 20, 290 << 20, 300 << 20))
    assert [label for _, label in drawn.gridlines] == ["0", "100 MiB", "200 MiB", "300 MiB"]
    assert drawn.gridlines[0][0] == BOTTOM
    assert drawn.points[-1][1] == drawn.gridlines[-1][0] > TOP
    distances = [after[0] - before[0] for before, after in pairwise(drawn.points)]
    assert distances[0] > 0
    assert distances[0] == pytest.approx(distances[1], abs=0.2)


@pytest.mark.parametrize(
    ("highest", "found"),
    [
        (1.0, (0, 0.25, 0.5, 0.75, 1)),
        (50, (0, 20, 40)),
        (1969, (0, 500, 1000, 1500)),
        (3, (0, 1, 2, 3)),
    ],
)
def test_ticks(highest: float, found: tuple[float, ...]) -> None:
    assert ticks(highest) == found


@given(st.floats(1e-6, 1e12), st.integers(1, 8))
def test_ticks_are_few_and_on_the_scale(highest: float, most: int) -> None:
    found = ticks(highest, most)
    assert found[0] == 0
    assert 1 <= len(found) - 1 <= most
    assert found[-1] <= highest * 1.000001


def test_the_command_takes_the_last_or_what_is_named(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(*arguments: str) -> tuple[int, str, str]:
        status = cli.run(["report", *arguments])
        said = capsys.readouterr()
        return status, said.out.strip(), said.err

    status, _, err = ask()
    assert (status, "no run is recorded yet" in err) == (2, True)
    first, last = build(workspace, 0), build(workspace, 1)
    assert ask() == (0, str(last.directory / "report.html"), "")
    assert ask(first.id[:8])[1] == str(first.directory / "report.html")
    assert ask(str(first.directory))[1] == str(first.directory / "report.html")
    assert "the beginning of 2 ids" in ask("2026")[2]
    status, _, err = ask(f"{first.id[:-1]}9")
    assert (status, f"did you mean {first.id}?" in err) == (2, True)
    assert f"--output {tmp_path} is a folder" in ask("-o", str(tmp_path))[2]
    assert ask("-o", str(tmp_path / "x.html"))[1] == str(tmp_path / "x.html")
    told = night(last)
    directory = workspace.nightly_dir / "dask.qemu" / told.id
    save_nightly_run(told, directory, workspace)
    (directory.parent / "latest").symlink_to(told.id)
    assert ask()[1] == str(directory / "report.html")


def test_a_run_of_several_machines_comes_before_its_parts(workspace: Workspace) -> None:
    """Each machine of an AMI has a record too, which starts later and has no verdict."""
    run = build(workspace, 0)
    part = replace(
        run.record, run_id=f"{run.id}.0a1b2c", verdict=None, started=run.when + timedelta(minutes=1)
    )
    dump(part, workspace.runs_dir / part.run_id / "record.json")
    for word in (None, run.id, run.id[:8]):
        assert runs.find(workspace, word) == run
    assert runs.find(workspace, part.run_id[:-1]).id == part.run_id
    told = night(run)
    directory = workspace.nightly_dir / "dask.aws" / told.id
    save_nightly_run(told, directory, workspace)
    assert "all equal" in Parsed((directory / "report.html").read_text()).text


def test_of_a_night_a_run_shows_its_own_steps(workspace: Workspace) -> None:
    run = build(workspace, 0)
    other = StepRecord(name="build other", seconds=500.0, status=RunStatus.PASSED)
    longer = StepRecord(name="build dask-gpu", seconds=500.0, status=RunStatus.PASSED, began=100)
    record = replace(run.record, steps=(other, *run.record.steps, longer))
    assert record.own_steps == run.record.steps
    assert sections.took(replace(run, record=record)) == 90


paths = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(" > ".join)
step_lists = st.lists(
    st.builds(
        StepRecord,
        name=paths,
        seconds=st.floats(0, 1e6),
        status=st.sampled_from(RunStatus),
        began=st.floats(0, 1e6),
    ),
    max_size=12,
)


@given(step_lists)
def test_every_step_is_shown_once_below_what_it_is_inside(steps: list[StepRecord]) -> None:
    bars = sections.bars(steps)
    assert sorted(bar.seconds for _, bar in bars) == sorted(step.seconds for step in steps)
    assert all(bar.began >= 0 for _, bar in bars)
    depths = [depth for depth, _ in bars]
    assert all(after <= before + 1 for before, after in pairwise([-1, *depths]))


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(0, 2**50), min_size=2, max_size=5))
def test_any_trend_can_be_drawn(values: list[float]) -> None:
    points = tuple((DAY, value) for value in values)
    page = Page(
        title="t",
        tone=Tone.GOOD,
        word="w",
        sentence="",
        facts=(),
        trends=tuple(Trend(title=str(q), quantity=q, points=points) for q in Quantity),
        links={},
    )
    assert Parsed(html.render(page)).find("svg")


def test_the_growth_of_the_system_is_one_line(workspace: Workspace) -> None:
    run = build(workspace, 0)
    line = "the system has grown by 24 MiB (docker.service +11 MiB)"
    assert line in page_of(run, workspace).text
    evidence = run.directory / "machines/2GiB/machine-boot.json"
    grown = {**json.loads(MACHINE["growth"]), "excess": 52 * MIB}
    evidence.write_text(json.dumps({**MACHINE, "growth": json.dumps(grown)}))
    assert "by 24 MiB, 52 MiB more than its reserve (" in page_of(run, workspace).text
    evidence.write_text(json.dumps({**MACHINE, "growth": ""}))
    assert "has grown" not in page_of(run, workspace).text
