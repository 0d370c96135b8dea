"""Pruning this machine: what is needed stays with its reason, and what goes leaves nothing half."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ami_builder.build.channels import current, promote, references, revoke, rollback
from ami_builder.cli import app as cli
from ami_builder.core.channels import ChannelEntry
from ami_builder.core.cleanup import Action, Candidate, RetentionPolicy, plan
from ami_builder.core.errors import UsageError
from ami_builder.core.orphans import Resource
from ami_builder.core.records import Artifact, CheckResult, Outcome, TargetKind, Verdict
from ami_builder.qemu import cleanup
from ami_builder.qemu.channels import ChannelFile
from ami_builder.state import ledger
from ami_builder.state.ledger import Ledger
from ami_builder.state.workspace import StoredImage, Workspace
from tests.stored_images import stored

KNOWN = ("testing", "stable")
NOW = datetime.now(UTC)
POLICY = "[images.dask.lifecycle]\nkeep = 1\nkeep_days = 10\nmost_deletions = 3\n"


@pytest.fixture(autouse=True)
def configured(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ami-builder.toml").write_text(POLICY)
    monkeypatch.setenv("AMI_BUILDER_CONFIG", str(tmp_path / "ami-builder.toml"))


@pytest.fixture
def local(workspace: Workspace) -> ChannelFile:
    return ChannelFile(workspace=workspace, image="dask")


def aged(workspace: Workspace, letter: str, days: float, **more: Any) -> StoredImage:
    return stored(workspace, letter, created=NOW - timedelta(days=days), **more)


def cache(workspace: Workspace, name: str, days: float) -> Path:
    folder = workspace.cache / name
    folder.mkdir(parents=True)
    (folder / "disk").write_bytes(b"x" * 2048)
    then = (NOW - timedelta(days=days)).timestamp()
    os.utime(folder, (then, then))
    return folder


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, tuple[str, str]]:
    """Return what `prune` says: the first letter of a digest or a cache's name -> (action, reason)."""
    capsys.readouterr()
    assert cli.run(["prune", "--json", *flags]) == 0
    found = json.loads(capsys.readouterr().out)["plan"]
    return {Path(d["candidate"]["id"]).name[:1]: (d["action"], d["reason"]) for d in found}


def left(workspace: Workspace) -> str:
    return "".join(sorted(one.artifact.digest[0] for one in workspace.images()))


def test_what_is_needed_stays_and_the_rest_goes(
    workspace: Workspace, local: ChannelFile, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {letter: aged(workspace, letter, 60 - number) for number, letter in enumerate("abcdefg")}
    aged(workspace, "h", 1)
    for letter in "abc":
        promote(local, made[letter], "stable", KNOWN)
    rollback(local, "stable", KNOWN)
    promote(local, made["e"], "testing", KNOWN)
    revoke(local, made["e"], "leaks")
    plan = planned(capsys)
    assert plan == {
        "a": ("keep", "channel stable would roll back to it"),
        "b": ("keep", "in channel stable"),
        "c": ("keep", "among the newest 1 of channel stable"),
        "d": ("delete", "57 days old, and nothing needs it"),
        "e": ("delete", "revoked"),
        "f": ("delete", "55 days old, and nothing needs it"),
        "g": ("keep", "a later run deletes it: this one deletes 3 at most"),
        "h": ("keep", "younger than 10 days"),
    }
    assert left(workspace) == "abcdefgh"
    assert planned(capsys, "--apply") == plan
    assert left(workspace) == "abcgh"
    assert {path.name for path in (workspace.images_dir / "dask").iterdir()} == {
        *(letter * 16 for letter in "abcgh"),
        "channels.json",
    }
    # What was revoked stays known though its image has gone.
    assert local.revoked(["e" * 64]) == {"e" * 64: "leaks"}


def test_the_table(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    aged(workspace, "a", 30)
    aged(workspace, "b", 20)
    assert cli.run(["prune"]) == 0
    shown = capsys.readouterr()
    first, second = (line.split("\t") for line in shown.out.splitlines())
    assert first[3:5] == ["to delete", "30 days old, and nothing needs it"]
    assert second[3] == "keep"
    assert "1 to delete (1 KiB)" in shown.err
    assert "run `ami-builder prune --apply`" in shown.err
    assert cli.run(["--set", "lifecycle.keep_days=1", "prune"]) == 0
    assert "run `ami-builder --set lifecycle.keep_days=1 prune --apply`" in capsys.readouterr().err
    assert left(workspace) == "ab"
    assert cli.run(["prune", "--apply"]) == 0
    assert "deleted" in capsys.readouterr().out
    assert left(workspace) == "b"


def test_an_image_without_a_policy_stays(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    aged(workspace, "a", 900, name="gone")
    assert planned(capsys)["a"] == ("keep", "no policy: ami-builder.toml does not have this image")


@pytest.mark.parametrize("path", ["absolute", "relative", "linked"])
def test_a_base_of_another_image_stays(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], tmp_path: Path, path: str
) -> None:
    base = aged(workspace, "a", 90)
    aged(workspace, "b", 80)
    (tmp_path / "link").symlink_to(base.path.parent)
    sources = {
        "absolute": base.path,
        "relative": f"../{tmp_path.name}/{os.path.relpath(base.path, tmp_path)}",
        "linked": tmp_path / "link" / base.path.name,
    }
    other = f'[images.other.base]\nsource = "{sources[path]}"\n'
    (tmp_path / "ami-builder.toml").write_text(POLICY + other)
    assert planned(capsys)["a"] == ("keep", "the base of image other")


def test_an_image_on_another_disk_stays(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    linked = aged(workspace, "a", 90)
    aged(workspace, "b", 80)
    assert linked.directory is not None
    elsewhere = linked.directory.rename(tmp_path / "large-disk")
    linked.directory.symlink_to(elsewhere)
    assert planned(capsys, "--apply")["a"] == ("keep", "its folder is a symbolic link")
    assert left(workspace) == "ab"


def test_what_is_no_image_is_listed_and_stays(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = aged(workspace, "a", 90)
    aged(workspace, "b", 80)
    assert damaged.directory is not None
    (damaged.directory / "artifact.json").unlink()
    (damaged.directory.parent / "mine").mkdir()
    plan = planned(capsys, "--apply")
    assert (
        plan["a"] == plan["m"] == ("keep", "it has no artifact.json: delete it yourself if nothing needs it")
    )
    assert damaged.path.exists()


def test_a_workspace_can_be_moved(workspace: Workspace, tmp_path: Path) -> None:
    aged(workspace, "a", 90)
    workspace.state.rename(tmp_path / "moved")
    (image,) = replace(workspace, state=tmp_path / "moved").images()
    assert image.path.is_file()


def test_while_a_run_is_at_work_its_images_and_the_caches_stay(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    aged(workspace, "a", 90)
    aged(workspace, "b", 80)
    for number in range(3):
        cache(workspace, f"base/{number}", 90 - number)
    with workspace.run("verify", "dask") as run:
        for action, reason in planned(capsys).values():
            assert (action, reason) == ("keep", f"run {run.record.run_id} is in progress")
    assert planned(capsys)["a"][0] == planned(capsys)["0"][0] == "delete"


def test_caches_go_by_count_and_age(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    old, newest = cache(workspace, "base/0", 50), cache(workspace, "base/1", 40)
    container = cache(workspace, "container/2", 60)
    (workspace.cache / "base" / "0.lock").touch()
    assert planned(capsys, "--apply")["0"] == ("delete", "50 days old, and nothing needs it")
    assert not old.exists()
    assert newest.exists()
    assert container.exists()


def test_while_there_is_room_nothing_goes(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, letter in enumerate("abcd"):
        aged(workspace, letter, 60 - number, size=1 << 20)
    monkeypatch.setenv("AMI_BUILDER_LIFECYCLE__SIZE", "3MiB")
    plan = planned(capsys)
    assert [action for action, _ in plan.values()] == ["delete", "keep", "keep", "keep"]
    assert plan["b"][1] == "all images together are no larger than allowed"


@pytest.mark.parametrize("what", ["nights", "runs"])
def test_what_cannot_be_read_may_need_an_image(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    made = stored(workspace, "a")
    folder = workspace.state / what
    if folder.exists():
        folder.rmdir()
    folder.symlink_to(folder)
    flags = ["--set", "lifecycle.keep=0", "--set", "lifecycle.keep_days=0"]
    assert cli.run([*flags, "prune", "--apply"]) == 2
    assert str(folder) in capsys.readouterr().err
    assert made.path.exists()


@pytest.mark.parametrize("target", TargetKind)
def test_no_pruning_while_a_build_is_going(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], target: TargetKind
) -> None:
    aged(workspace, "a", 90)
    aged(workspace, "b", 80)
    with workspace.lock("dask", target):
        assert cli.run(["prune", "--apply"]) == 8
    assert "is being built" in capsys.readouterr().err
    assert left(workspace) == "ab"


@pytest.mark.parametrize("step", [1, 2])
def test_killed_on_the_way_nothing_half_is_left(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    deleted = aged(workspace, "a", 90)
    aged(workspace, "b", 80)
    assert deleted.directory is not None

    class Killed(BaseException):
        pass

    steps: Iterator[int] = iter(range(1, 9))

    def killed(*_: object, **__: object) -> None:
        if next(steps) == step:  # the first rmtree is of what an earlier run left
            raise Killed

    target = {1: (Path, "rename"), 2: (cleanup.shutil, "rmtree")}[step]  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(*target, killed)
        with pytest.raises(Killed):
            cleanup._delete(deleted.directory)
    assert left(workspace) == ("ab" if step == 1 else "b")
    assert planned(capsys, "--apply")["b"][0] == "keep"
    assert [path.name[:1] for path in (workspace.images_dir / "dask").iterdir()] == ["b"]


def test_what_was_pruned_meanwhile_is_not_promoted(
    workspace: Workspace, local: ChannelFile, capsys: pytest.CaptureFixture[str]
) -> None:
    old = aged(workspace, "a", 90)
    aged(workspace, "b", 80)
    assert planned(capsys, "--apply")["a"][0] == Action.DELETE
    with pytest.raises(Exception, match="does not exist any more"):
        promote(local, old, "stable", KNOWN)


def test_records_go_after_a_year_unless_something_needs_them(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    aged(workspace, "a", 1)
    folders = {name: workspace.runs_dir / name for name in ("old", "young", "r", "owing")}
    night = workspace.nightly_dir / "dask.qemu"
    folders |= {name: night / name for name in ("old-night", "last-night")}
    for name, folder in folders.items():
        folder.mkdir(parents=True)
        if name == "owing":
            Ledger(folder / ledger.FILE).intend(Resource.INSTANCE, "us-east-1")
        then = (NOW - timedelta(days=300 if name == "young" else 400)).timestamp()
        os.utime(folder, (then, then))
    (night / "latest").symlink_to("last-night")
    assert cli.run(["prune", "--apply"]) == 0
    assert {name for name, folder in folders.items() if folder.exists()} == {
        *("young", "r", "owing", "last-night")
    }
    assert "a" in left(workspace)


class Record:
    """Channels in memory, whose images are letters."""

    def __init__(self) -> None:
        self.moves: list[ChannelEntry] = []
        self.reasons: dict[str, str] = {}

    def locked(self) -> AbstractContextManager[object]:
        return nullcontext()

    def id_of(self, stored: StoredImage) -> str:
        return stored.artifact.digest

    def find(self, id: str) -> StoredImage | None:
        artifact = Artifact(
            image="dask", target=TargetKind.QEMU, location=id, digest=id, created=NOW, run_id="r", size=0
        )
        return StoredImage(artifact=artifact, verdict=passed_verdict(id), directory=None)

    def entries(self, channel: str) -> tuple[ChannelEntry, ...]:
        return tuple(entry for entry in self.moves if entry.channel == channel)

    def used(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(entry.channel for entry in self.moves))

    def revoked(self, ids: Sequence[str]) -> Mapping[str, str]:
        return {id: self.reasons[id] for id in ids if id in self.reasons}

    def require_movable(self, channel: str) -> None:
        """Any move is possible."""

    def write(self, entry: ChannelEntry) -> None:
        self.moves.append(entry)

    def revoke(self, id: str, reason: str, entries: Sequence[ChannelEntry]) -> None:
        self.reasons.setdefault(id, reason)
        self.moves += entries


def passed_verdict(digest: str) -> Verdict:
    result = CheckResult(
        name="x", phase="boot", machine="2 GiB", outcome=Outcome.PASSED, seconds=1, message=""
    )
    return Verdict(digest=digest, checks_digest="c", results=(result,), measured=())


moves = st.tuples(
    st.sampled_from(["promote", "promote", "rollback", "revoke"]),
    st.sampled_from("abcde"),
    st.sampled_from(KNOWN),
)


@given(st.lists(moves, max_size=20))
def test_whatever_people_did_what_stands_and_what_it_goes_back_to_stays(
    done: list[tuple[str, str, str]],
) -> None:
    record = Record()
    for move, letter, channel in done:
        image = record.find(letter)
        assert image is not None
        with suppress(UsageError):
            match move:
                case "promote":
                    promote(record, image, channel, KNOWN)
                case "rollback":
                    rollback(record, channel, KNOWN)
                case _:
                    revoke(record, image, "leaks")
    harsh = RetentionPolicy(keep=0, young=timedelta(0), grace=timedelta(0), most=9)
    old = [Candidate(id=letter, image="dask", created=NOW - timedelta(days=900)) for letter in "abcde"]
    decisions = plan(old, list(references(record)), harsh, NOW)
    deleted = {one.candidate.id for one in decisions if one.action is Action.DELETE}
    needed = set()
    for channel in record.used():
        needed |= {current(record, channel)} - {""}
        with suppress(UsageError):
            needed.add(rollback(record, channel, KNOWN).stored.artifact.digest)
    assert deleted == set("abcde") - needed
    assert not needed & record.reasons.keys()
