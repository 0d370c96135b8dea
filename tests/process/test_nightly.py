"""Nights: nothing twice, nothing half, and whatever a person did to a channel stands."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING

import pytest
import time_machine

from ami_builder.build import channels
from ami_builder.cli import app as cli
from ami_builder.cli.nightly import worst
from ami_builder.core.errors import CloudFailed
from ami_builder.core.records import NightlyRun, RunRecord, RunStatus, TargetKind
from ami_builder.qemu.channels import ChannelFile
from ami_builder.state.journal import NightlyJournal, NightlyStep, open_journal, unfinished
from ami_builder.state.runs import NIGHTLY_RECORD, run_records
from ami_builder.state.workspace import Workspace, load
from tests.process.nightly_host import WORLD, World, begin, ended, install

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CONFIG = """
[images.dask.lifecycle]
keep = 1
keep_days = 2
[images.dask.verify]
memory = ["1GiB", "2GiB"]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a world stands in which nothing has been built yet."""
    (tmp_path / "ami-builder.toml").write_text(CONFIG)
    install(tmp_path, monkeypatch)
    monkeypatch.delenv("AMI_BUILDER_WEBHOOK", raising=False)
    meet(tmp_path, World())
    return tmp_path


@pytest.fixture
def workspace(folder: Path) -> Workspace:
    return Workspace.open({"AMI_BUILDER_HOME": str(folder / "home")})


@pytest.fixture
def record(workspace: Workspace) -> ChannelFile:
    return ChannelFile(workspace=workspace, image="dask")


def meet(folder: Path, world: World) -> None:
    (folder / WORLD).write_text(json.dumps(asdict(world)))


def bakes(folder: Path) -> list[str]:
    path = folder / "bakes"
    return path.read_text().split() if path.exists() else []


def standing(record: ChannelFile, channel: str = "testing") -> str:
    return channels.current(record, channel)


def night(capsys: pytest.CaptureFixture[str], *flags: str, status: int = 0) -> dict[str, object]:
    """Run one night and return what --json says of it."""
    capsys.readouterr()
    assert cli.run(["nightly", "--json", *flags]) == status
    (found,) = json.loads(capsys.readouterr().out)["nights"]
    return dict(found)


def test_a_first_night_builds_proves_and_promotes_and_the_next_finds_nothing_to_do(
    folder: Path, workspace: Workspace, record: ChannelFile, capsys: pytest.CaptureFixture[str]
) -> None:
    first = night(capsys)
    assert first["ending"] == "promoted"
    assert standing(record) == first["digest"] == bakes(folder)[0]
    second = night(capsys)
    assert second["ending"] == "unchanged"
    assert second["id"] != first["id"]
    assert len(bakes(folder)) == 1
    assert len(list(workspace.runs_dir.iterdir())) == 1
    assert len(record.entries("testing")) == 1


def test_a_night_promotes_every_machine_size_that_is_configured(
    folder: Path, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    night(capsys)
    (image,) = workspace.images()
    assert image.verdict is not None
    assert [one.machine for one in image.verdict.measured] == ["1 GiB", "2 GiB"]


def test_what_drifts_too_far_is_held_until_a_person_promotes_it(
    folder: Path, record: ChannelFile, capsys: pytest.CaptureFixture[str]
) -> None:
    before = night(capsys)["digest"]
    heavy = World(inputs="two", available=1_500_000_000, packages=("systemd=258", "agent=1"))
    meet(folder, heavy)
    for _ in range(2):
        held = night(capsys, status=9)
        assert held["ending"] == "held"
        assert any("available memory" in line for line in held["drifts"])  # type: ignore[attr-defined]
        assert any("systemd" in line for line in held["moved"])  # type: ignore[attr-defined]
        assert standing(record) == before == held["before"]
    assert len(bakes(folder)) == 2
    assert cli.run(["promote", str(held["digest"]), "testing"]) == 0
    assert night(capsys)["ending"] == "unchanged"


def test_a_failed_build_or_check_leaves_the_channel_and_the_next_night_tries_again(
    folder: Path, workspace: Workspace, record: ChannelFile, capsys: pytest.CaptureFixture[str]
) -> None:
    before = night(capsys)["digest"]
    for world, status, said in (
        (World(archive=False), 4, "the package archive does not answer"),
        (World(inputs="two", bakes=False), 4, "provisioner"),
        (World(inputs="two", passes=False), 5, "checks failed"),
    ):
        meet(folder, world)
        failed = night(capsys, status=status)
        assert failed["ending"] == "failed"
        assert said in str(failed["error"])
        assert standing(record) == before
    last = run_records(workspace)[-1]
    (verify,) = [step for step in last.own_steps if step.name.endswith(" > verify")]
    assert verify.status is RunStatus.FAILED, "it ran to the end, and its checks failed"
    meet(folder, World(inputs="two"))
    # What was baked is verified again, not baked again.
    assert night(capsys)["ending"] == "promoted"
    assert len(bakes(folder)) == 3
    assert standing(record) != before


def test_a_host_that_is_too_busy_to_judge_leaves_the_channel_and_the_next_run_verifies_again(
    folder: Path, workspace: Workspace, record: ChannelFile, capsys: pytest.CaptureFixture[str]
) -> None:
    before = night(capsys)["digest"]
    meet(folder, World(inputs="two", busy=True))
    for _ in range(2):
        busy = night(capsys, status=10)
        assert busy["ending"] == "inconclusive"
        assert "too busy to judge" in str(busy["error"])
        assert standing(record) == before == busy["before"]
    assert not list(unfinished(workspace))
    assert cli.run(["promote", str(busy["digest"]), "testing"]) == 2
    assert "inconclusive" in capsys.readouterr().err
    statuses = [load(RunRecord, path) for path in workspace.runs_dir.glob("*/record.json")]
    assert sorted(str(one.status) for one in statuses if one) == ["inconclusive", "inconclusive", "passed"]
    meet(folder, World(inputs="two"))
    assert night(capsys)["ending"] == "promoted"
    assert len(bakes(folder)) == 2, "what was baked is kept"
    assert standing(record) == busy["digest"]


def test_an_inconclusive_run_that_is_killed_is_not_taken_for_a_verified_one(
    folder: Path, workspace: Workspace, record: ChannelFile
) -> None:
    """Whatever entry of its journal it is killed after."""
    for number in range(1, 5):
        meet(folder, World(inputs=f"killed at {number}", busy=True))
        assert ended(begin(folder, dies_after=number, drawn=False)) == -9
        assert ended(begin(folder, drawn=False)) == 10, (folder / "out").read_text()
        assert standing(record) == ""
    meet(folder, World(inputs="killed at 4"))
    assert ended(begin(folder, drawn=False)) == 0
    assert len(bakes(folder)) == 4
    assert standing(record) == bakes(folder)[-1]


def test_a_failure_does_not_hide_behind_a_busy_host_nor_that_behind_a_held_image() -> None:
    assert [worst(codes) for codes in ([9, 10], [10, 9, 5], [10, 10], [9], [6, 5])] == [10, 5, 10, 9, 6]


@pytest.mark.parametrize("command", ["rollback testing --reason slow", "revoke IMAGE --reason slow"])
def test_what_a_person_took_out_of_a_channel_does_not_come_back_by_itself(
    folder: Path, record: ChannelFile, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    before = night(capsys)["digest"]
    meet(folder, World(inputs="two"))
    bad = str(night(capsys)["digest"])
    assert cli.run(command.replace("IMAGE", bad).split()) == 0
    held = night(capsys, status=9)
    assert held["ending"] == "held"
    assert "slow" in str(held["drifts"])
    assert standing(record) == before
    meet(folder, World(inputs="three"))
    assert night(capsys)["ending"] == "promoted"
    assert len(bakes(folder)) == 3


@pytest.mark.long
@pytest.mark.parametrize("unnoted", [False, True], ids=["once it is made", "before it is made"])
def test_a_night_that_is_killed_at_any_entry_of_its_journal_goes_on_where_it_was(
    folder: Path, workspace: Workspace, record: ChannelFile, unnoted: bool
) -> None:
    meet(folder, World(inputs="zero"))
    assert ended(begin(folder)) == 0
    entries = len((workspace.nightly_dir / "dask.qemu" / "latest" / "journal.jsonl").read_text().splitlines())
    assert entries == len(NightlyStep)
    for number in range(1, entries + 1):
        meet(folder, World(inputs=f"killed at {number}"))
        built = len(bakes(folder))
        assert ended(begin(folder, dies_after=number, unnoted=unnoted, drawn=False)) == -9
        cut_off = [journal.id for journal in unfinished(workspace)]
        noted = number - unnoted
        assert len(cut_off) == (noted < entries)
        assert ended(begin(folder, drawn=False)) == 0, (folder / "out").read_text()
        assert not list(unfinished(workspace))
        latest = NightlyJournal((workspace.nightly_dir / "dask.qemu" / "latest").resolve())
        assert latest.id in cut_off or noted == entries
        end = latest.find(NightlyStep.ENDED)
        assert end is not None
        assert end["ending"] == ("unchanged" if noted == entries else "promoted")
        assert len(bakes(folder)) == built + 1
        assert standing(record) == bakes(folder)[-1]
        assert [entry.id for entry in record.entries("testing")].count(standing(record)) == 1


def test_a_night_whose_inputs_change_after_it_was_killed_begins_anew(
    folder: Path, workspace: Workspace, record: ChannelFile
) -> None:
    assert ended(begin(folder, dies_after=1)) == -9
    (cut_off,) = unfinished(workspace)
    meet(folder, World(inputs="two"))
    assert ended(begin(folder)) == 0
    last = NightlyJournal(cut_off.directory.parent / cut_off.id).find(NightlyStep.ENDED)
    assert len(bakes(folder)) == 1
    assert standing(record) == bakes(folder)[0]
    assert last is not None
    assert "inputs have changed" in last["ending"]


def test_of_two_nights_at_once_the_second_says_who_is_at_it(
    folder: Path, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    with workspace.lock_nightly_run("dask", TargetKind.QEMU):
        assert cli.run(["nightly"]) == 8
        assert "a nightly run of image 'dask' for qemu is in progress (process" in capsys.readouterr().err
    assert not bakes(folder)
    assert cli.run(["nightly"]) == 0


def test_nights_that_begin_at_the_same_moment_make_one_image(
    folder: Path, workspace: Workspace, record: ChannelFile
) -> None:
    statuses = [ended(each) for each in [begin(folder) for _ in range(4)]]
    # One does it; the others find it going, or done.
    assert set(statuses) <= {0, 8}, (folder / "out").read_text()
    assert 0 in statuses
    assert bakes(folder) == [standing(record)]
    assert len(record.entries("testing")) == 1
    assert not list(unfinished(workspace))


def test_a_clock_that_jumps_back_does_not_hide_the_last_night(
    workspace: Workspace, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = datetime.now(UTC)
    with time_machine.travel(now, tick=True):
        workspace.ensure()
        cut_off = open_journal(workspace, "dask", TargetKind.QEMU, "d" * 64)
    with time_machine.travel(now - timedelta(days=400), tick=True):
        assert open_journal(workspace, "dask", TargetKind.QEMU, "d" * 64).id == cut_off.id
        cut_off.note(NightlyStep.ENDED)
        assert night(capsys)["ending"] == "promoted"
    with time_machine.travel(now - timedelta(days=800), tick=True):
        assert night(capsys)["ending"] == "unchanged"


@pytest.mark.parametrize("deletes", [True, False])
def test_a_clean_up_that_fails_reports_what_it_deleted(
    workspace: Workspace,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    deletes: bool,
) -> None:
    def refuse(*_: object) -> None:
        raise CloudFailed("eu-west-1 does not answer")

    now = datetime.now(UTC)
    for number, inputs in enumerate(("one", "two", "three")):
        meet(folder, World(inputs=inputs))
        if inputs == "three":
            monkeypatch.setattr("ami_builder.build.cleanup.remove_orphans", refuse)
        with time_machine.travel(now + number * timedelta(days=10 if deletes else 0, seconds=1), tick=True):
            last = night(capsys, status=6 if inputs == "three" else 0)
    assert last["ending"] == "promoted"
    assert len(workspace.images()) == (2 if deletes else 3)
    retired = last["retired"]
    assert isinstance(retired, list)
    *deleted, failed = retired
    result = "the clean-up did not finish" if deletes else "nothing was deleted"
    assert failed == f"{result}: eu-west-1 does not answer"
    assert [line.startswith("deleted ") for line in deleted] == [True] * deletes


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """A webhook on loopback; returns the texts that it was sent."""
    texts: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            texts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("AMI_BUILDER_WEBHOOK", f"http://127.0.0.1:{server.server_port}/secret")
    yield lambda: texts
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_night_that_can_not_begin_is_told_too(
    folder: Path,
    workspace: Workspace,
    hook: Callable[[], list[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (folder / "ami-builder.toml").write_text("[images.dask.nightly]\nchanel = 'testing'\n")
    assert cli.run(["nightly"]) == 2
    (folder / "ami-builder.toml").write_text(CONFIG)
    with workspace.lock_nightly_run("dask", TargetKind.QEMU):
        assert cli.run(["nightly", "dask"]) == 8

    def broken(*_: object, **__: object) -> None:
        raise KeyError("a <defect>")

    with monkeypatch.context() as patch:
        patch.setattr("ami_builder.nightly.run.resolve", broken)
        assert cli.run(["nightly"]) == 1
    config, locked, defect = hook()
    assert config.startswith("*all images (qemu): FAILED, the nightly run did not start: ")
    assert "chanel" in config
    assert "exit code 2" in config
    assert (
        "dask (qemu): FAILED, the nightly run did not start: a nightly run of image 'dask' for qemu is in"
        in locked
    )
    assert "FAILED, the nightly run ended early: KeyError: 'a &lt;defect&gt;'" in defect
    # What a defect cut off is gone on with.
    assert cli.run(["nightly"]) == 0
    assert hook()[-1].startswith("*dask (qemu): promoted")


@pytest.mark.parametrize("webhook", ["http://127.0.0.1:9/nobody", "http://example.com/not-secure", "no url"])
def test_a_webhook_that_fails_does_not_fail_a_night(
    folder: Path,
    workspace: Workspace,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    webhook: str,
) -> None:
    monkeypatch.setenv("AMI_BUILDER_WEBHOOK", webhook)
    ended = night(capsys)
    assert ended["ending"] == "promoted"
    entries = (workspace.nightly_dir / "dask.qemu" / "latest" / "journal.jsonl").read_text().splitlines()
    last = json.loads(entries[-1])
    assert last["unsent"].startswith("webhook")
    assert "nobody" not in last["unsent"]
    assert night(capsys)["ending"] == "unchanged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One night of a week: what it meets, and how it must end."""

    at: datetime
    world: World
    status: int
    ending: str
    dies_after: int = 0


def test_seven_nights(
    folder: Path,
    workspace: Workspace,
    record: ChannelFile,
    hook: Callable[[], list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A week unattended, each night a process: inputs change, faults come, one is killed, the clock jumps."""
    monday, day = datetime(2026, 3, 2, 2, 30, tzinfo=UTC), timedelta(days=1)
    base = World(webhook=os.environ["AMI_BUILDER_WEBHOOK"])
    two = replace(base, inputs="two", packages=("systemd=258",))
    heavy = replace(base, inputs="three", available=1_500_000_000, packages=("agent=1",))
    last_year = datetime(2025, 1, 1, tzinfo=UTC)
    week = [
        Planned(at=monday, world=base, status=0, ending="promoted"),
        Planned(at=monday + day, world=base, status=0, ending="unchanged"),
        # The power fails once the image is built; the timer starts the night again.
        Planned(at=monday + 2 * day, world=two, status=-9, ending="", dies_after=2),
        Planned(at=monday + 2 * day + day / 96, world=two, status=0, ending="promoted"),
        # Neither the archive answers, nor who is to be told of it.
        Planned(
            at=monday + 3 * day,
            world=replace(base, archive=False, webhook="http://127.0.0.1:9/x"),
            status=4,
            ending="failed",
        ),
        Planned(at=monday + 4 * day, world=heavy, status=9, ending="held"),
        # The clock has lost its battery.
        Planned(at=last_year, world=replace(base, inputs="four", passes=False), status=5, ending="failed"),
        Planned(at=monday + 6 * day, world=replace(base, inputs="four"), status=0, ending="promoted"),
    ]
    digests: dict[str, str] = {}
    for one in week:
        meet(folder, one.world)
        assert ended(begin(folder, at=one.at, dies_after=one.dies_after)) == one.status, one
        if not one.ending:
            continue
        last = load(NightlyRun, workspace.nightly_dir / "dask.qemu" / "latest" / NIGHTLY_RECORD)
        assert last is not None
        assert (last.ending, last.exit_code) == (one.ending, one.status)
        digests |= {one.world.inputs: last.digest} if last.digest else {}
    assert bakes(folder) == list(digests.values()), "nothing twice"

    # The right channel, and the right images: those of the channel and what it goes back to, and the newest
    # that never stood anywhere.
    assert standing(record) == digests["four"]
    assert [entry.id for entry in record.entries("testing")] == [digests[i] for i in ("one", "two", "four")]
    kept = {digests[i] for i in ("two", "three", "four")}
    assert {one.artifact.digest for one in workspace.images()} == kept

    # Nothing left over.
    assert {path.name for path in (workspace.images_dir / "dask").iterdir()} == {
        "channels.json",
        *(one.directory.name for one in workspace.images() if one.directory),
    }
    assert not list(unfinished(workspace))
    assert not list(workspace.runs_dir.glob("*/work"))
    assert not [one for one in workspace.runs_dir.iterdir() if workspace.is_live(one.name)]
    hidden = {path.name for path in (folder / "home").rglob(".*") if path.is_file()}
    assert hidden <= {".alive"}, "nothing half-written"
    records = [load(RunRecord, path) for path in workspace.runs_dir.glob("*/record.json")]
    assert sorted(str(one.status) for one in records if one) == ["failed", *["passed"] * 4]

    # Who was to be told was told, once of each night but the unchanged one and the one that could not.
    assert [text.split(":")[1].split()[0] for text in hook()] == [
        *("promoted", "promoted", "ON", "FAILED,", "promoted")
    ]
    nights = sorted((workspace.nightly_dir / "dask.qemu").glob("202*"))
    assert len(nights) == 7
    drawn = [(night / "report.html").is_file() for night in nights]
    assert drawn == [True, True, False, True, True, True, True], "an unchanged one has nothing to show"
    lines = [(night / "summary.md").read_text().splitlines()[0] for night in nights]
    assert [line.removeprefix("# dask (qemu): ").split()[0].rstrip(",") for line in lines] == [
        *("FAILED", "promoted", "unchanged", "promoted", "FAILED", "ON", "promoted")
    ]
    assert "the package archive does not answer" in lines[4]

    # And a history that a person can read.
    capsys.readouterr()
    assert cli.run(["history", "testing"]) == 0
    told = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [(when[:10], move, image, why[:14]) for when, move, image, _, why in told] == [
        ("2026-03-02", "promoted", digests["one"][:16], "nightly run 20"),
        ("2026-03-04", "promoted", digests["two"][:16], "nightly run 20"),
        ("2026-03-08", "promoted", digests["four"][:16], "nightly run 20"),
    ]
