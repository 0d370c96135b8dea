"""Records are whole or absent, locks tell who holds them, and what a killed run left goes away."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from ami_builder.core.errors import BuildFailed, Inconclusive, Interrupted, Locked, UsageError
from ami_builder.core.records import (
    Artifact,
    CheckResult,
    Measurement,
    Outcome,
    RunRecord,
    RunStatus,
    StepRecord,
    TargetKind,
    Verdict,
)
from ami_builder.state.workspace import StoredImage, Workspace, dump, load, write_atomically

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace.open({"AMI_BUILDER_HOME": str(tmp_path / "home")})
    made.ensure()
    return made


def _artifact(digest: str = "a" * 64) -> Artifact:
    return Artifact(
        image="dask",
        target=TargetKind.QEMU,
        location="",
        digest=digest,
        created=datetime(2026, 1, 2, tzinfo=UTC),
        run_id="r",
        size=0,
    )


def _store(workspace: Workspace, tmp_path: Path, content: bytes = b"disk") -> StoredImage:
    disk = tmp_path / "out.qcow2"
    disk.write_bytes(content)
    return workspace.store(_artifact(), disk, None)


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record"
    write_atomically(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["record"]


def test_a_verdict_survives_the_round_trip(tmp_path: Path) -> None:
    result = CheckResult(
        name="chain", phase="boot", machine="2 GiB", outcome=Outcome.FAILED, seconds=0.5, message="1 != 2"
    )
    verdict = Verdict(
        digest="d",
        checks_digest="c",
        results=(result,),
        measured=(Measurement(machine="2 GiB", phase="boot", total=4, available=3),),
    )
    dump(verdict, tmp_path / "v.json")
    assert load(Verdict, tmp_path / "v.json") == verdict


def test_a_verdict_from_before_times_were_measured_loads(tmp_path: Path) -> None:
    measured = '{"machine": "2 GiB", "phase": "boot", "total": 4, "available": 3}'
    path = tmp_path / "v.json"
    path.write_text(f'{{"digest": "d", "checks_digest": "c", "results": [], "measured": [{measured}]}}')
    verdict = load(Verdict, path)
    assert verdict is not None
    assert verdict.measured == (Measurement(machine="2 GiB", phase="boot", total=4, available=3),)
    assert verdict.measured[0].ssh_seconds is None
    assert verdict.measured[0].cpu_seconds is None
    assert verdict.measured[0].boot_ratio is None


@pytest.mark.parametrize(
    ("cpu", "control", "ratio"),
    [(207.0, 4.0, 51.75), (None, 4.0, None), (207.0, None, None), (207.0, 0.0, None)],
)
def test_a_boot_in_multiples_of_a_fixed_piece_of_work(
    cpu: float | None, control: float | None, ratio: float | None
) -> None:
    one = Measurement(
        machine="2 GiB", phase="boot", total=4, available=3, cpu_seconds=cpu, control_seconds=control
    )
    assert one.boot_ratio == ratio


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"digest": 1}', b"\xff\xfe"])
def test_a_broken_record_is_no_record(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "v.json"
    path.write_bytes(content)
    assert load(Verdict, path) is None


def test_no_result_is_no_pass() -> None:
    def verdict(*outcomes: Outcome) -> Verdict:
        results = tuple(
            CheckResult(name="x", phase="boot", machine="2 GiB", outcome=o, seconds=0, message="")
            for o in outcomes
        )
        return Verdict(digest="d", checks_digest="c", results=results, measured=())

    assert not verdict().passed
    assert not verdict(Outcome.SKIPPED, Outcome.SKIPPED).passed
    assert not verdict(Outcome.PASSED, Outcome.FAILED).passed
    assert verdict(Outcome.PASSED, Outcome.SKIPPED).passed
    assert not verdict(Outcome.PASSED, Outcome.INCONCLUSIVE).passed
    assert not verdict(Outcome.SKIPPED, Outcome.INCONCLUSIVE).passed


@pytest.mark.parametrize(
    ("outcomes", "outcome"),
    [
        ((), Outcome.FAILED),
        ((Outcome.SKIPPED,), Outcome.FAILED),
        ((Outcome.PASSED, Outcome.SKIPPED), Outcome.PASSED),
        ((Outcome.PASSED, Outcome.INCONCLUSIVE), Outcome.INCONCLUSIVE),
        ((Outcome.SKIPPED, Outcome.INCONCLUSIVE), Outcome.INCONCLUSIVE),
        ((Outcome.INCONCLUSIVE, Outcome.FAILED, Outcome.PASSED), Outcome.FAILED),
    ],
)
def test_a_verdict_is_inconclusive_only_when_nothing_failed(
    outcomes: tuple[Outcome, ...], outcome: Outcome
) -> None:
    results = tuple(
        CheckResult(name="x", phase="boot", machine="2 GiB", outcome=one, seconds=0, message="")
        for one in outcomes
    )
    verdict = Verdict(digest="d", checks_digest="c", results=results, measured=())
    assert verdict.outcome is outcome
    assert verdict.passed == (outcome is Outcome.PASSED)
    assert verdict.inconclusive == (outcome is Outcome.INCONCLUSIVE)


def test_a_run_ends_with_its_status(workspace: Workspace) -> None:
    with workspace.run("build", "dask") as run:
        (run.work / "big").write_text("x")
    assert load(RunRecord, run.directory / "record.json") == replace(run.record, status=RunStatus.PASSED)
    assert not run.work.exists()
    with pytest.raises(BuildFailed), workspace.run("build", "dask") as run:
        raise BuildFailed("broken")
    assert (run.record.status, run.record.error) == (RunStatus.FAILED, "broken")
    with pytest.raises(Inconclusive), workspace.run("build", "dask") as run:
        raise Inconclusive("too busy")
    assert (run.record.status, run.record.error) == (RunStatus.INCONCLUSIVE, "too busy")
    for stopped in (KeyboardInterrupt(), Interrupted("by SIGTERM")):
        with pytest.raises(type(stopped)), workspace.run("build", "dask") as run:
            raise stopped
        assert run.record.status is RunStatus.INTERRUPTED


def test_the_cache_makes_an_entry_once_and_whole(workspace: Workspace) -> None:
    def broken(folder: Path) -> None:
        (folder / "disk").write_text("half")
        raise BuildFailed("no")

    with pytest.raises(BuildFailed):
        workspace.cached("base", "d", broken)
    assert not (workspace.cache / "base" / "d").exists()
    made: list[int] = []

    def good(folder: Path) -> None:
        made.append(1)
        (folder / "disk").write_text("whole")

    for _ in range(2):
        folder = workspace.cached("base", "d", good)
    assert (made, (folder / "disk").read_text(), sorted(p.name for p in folder.iterdir())) == (
        [1],
        "whole",
        ["disk"],
    )


def test_a_second_build_is_told_who_holds_the_lock(workspace: Workspace) -> None:
    with (
        workspace.lock("dask", TargetKind.QEMU),
        pytest.raises(Locked, match=r"process \d+, since"),
        workspace.lock("dask", TargetKind.QEMU),
    ):
        pass
    with workspace.lock("dask", TargetKind.QEMU):
        pass


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_of_two_amis_of_one_second_the_later_record_is_the_newer(workspace: Workspace, order: str) -> None:
    for place, letter in enumerate(order):
        stored = workspace.store_remote(replace(_artifact(letter * 64), target=TargetKind.AWS), None)
        assert stored.directory is not None
        os.utime(stored.directory / "artifact.json", (place, place))
    assert "".join(one.artifact.digest[0] for one in workspace.images()) == order


def test_a_run_that_just_begins_is_not_swept(workspace: Workspace) -> None:
    workspace.ensure()
    folder = workspace.runs_dir / "20260101T000000Z-abcdef"
    (folder / "work").mkdir(parents=True)
    assert workspace.sweep() == ()
    assert workspace.is_live(folder.name)
    assert (folder / "work").is_dir()
    os.utime(folder, (0, 0))
    assert workspace.sweep() == (folder.name,)
    assert not (folder / "work").exists()


def test_images_are_found_again(workspace: Workspace, tmp_path: Path) -> None:
    stored = _store(workspace, tmp_path)
    assert stored.path.read_bytes() == b"disk"
    assert stored.artifact.size == 4
    assert not (tmp_path / "out.qcow2").exists()
    verdict = Verdict(digest="a" * 64, checks_digest="c", results=(), measured=())
    workspace.store_verdict(stored, verdict)
    (found,) = workspace.images()
    assert (found.artifact, found.verdict) == (stored.artifact, verdict)
    assert workspace.image("dask", "b" * 64) is None


def test_a_new_bake_of_the_same_digest_has_no_verdict(workspace: Workspace, tmp_path: Path) -> None:
    first = _store(workspace, tmp_path)
    workspace.store_verdict(first, Verdict(digest="a" * 64, checks_digest="c", results=(), measured=()))
    _store(workspace, tmp_path, b"second")
    (found,) = workspace.images()
    assert (found.path.read_bytes(), found.verdict) == (b"second", None)
    assert sorted(p.name for p in found.path.parents[1].iterdir()) == ["a" * 16]


def test_a_folder_that_may_not_be_written_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="can't create") as error:
        Workspace.open({"AMI_BUILDER_HOME": str(tmp_path / "file")}).ensure()
    assert "AMI_BUILDER_HOME" in (error.value.hint or "")


@pytest.mark.parametrize(
    "damage", [('"seconds": 1.5', '"seconds": NaN'), ('"seconds": 1.5', '"seconds": Infinity'), ("Z", "")]
)
def test_a_record_that_cannot_be_compared_is_damaged(tmp_path: Path, damage: tuple[str, str]) -> None:
    file = tmp_path / "record.json"
    step = StepRecord(name="bake", seconds=1.5, status=RunStatus.PASSED)
    record = RunRecord(
        run_id="a", command="build", image="dask", digest=None, status=RunStatus.PASSED,
        started=datetime(2026, 11, 30, tzinfo=UTC), steps=(step,),
    )  # fmt: skip
    dump(record, file)
    assert load(RunRecord, file) == record
    whole = file.read_text()
    file.write_text(whole.replace(*damage))
    assert file.read_text() != whole
    assert load(RunRecord, file) is None
