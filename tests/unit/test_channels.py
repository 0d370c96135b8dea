"""Channels: only verified images get there, rollbacks go back one, revoked images stay out."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ami_builder.build import channels
from ami_builder.build.channels import ChannelMove, all_current, promote, revoke, rollback
from ami_builder.cli import app as cli
from ami_builder.cli.targets import choose
from ami_builder.core.channels import ChannelEntry, Move, stack
from ami_builder.core.errors import UsageError
from ami_builder.core.records import Artifact, Outcome
from ami_builder.qemu import channels as channel_file
from ami_builder.qemu.channels import ChannelFile
from ami_builder.state.workspace import StoredImage, Workspace
from tests.stored_images import stored

ROOT = Path(__file__).resolve().parents[2]
NOW = datetime(2026, 1, 2, tzinfo=UTC)
KNOWN = ("testing", "stable")


@pytest.fixture
def local(workspace: Workspace) -> ChannelFile:
    return ChannelFile(workspace=workspace, image="dask")


def made(workspace: Workspace, letter: str, **more: Any) -> StoredImage:
    """Return a finished image; a later letter is a newer one."""
    return stored(workspace, letter, created=NOW + timedelta(hours=ord(letter)), **more)


def promoted(local: ChannelFile, workspace: Workspace, letters: str) -> list[StoredImage]:
    images = [made(workspace, letter) for letter in letters]
    for one in images:
        promote(local, one, "stable", KNOWN)
    return images


def current(local: ChannelFile) -> str:
    return "".join(id[0] for id, where in all_current(local).items() if "stable" in where)


def test_a_rollback_returns_to_the_one_before(local: ChannelFile, workspace: Workspace) -> None:
    promoted(local, workspace, "abc")
    assert current(local) == "c"
    for expected in "ba":
        moved = rollback(local, "stable", KNOWN, "slow")
        assert moved.stored.artifact.digest[0] == expected == current(local)
    with pytest.raises(UsageError, match="no image before the current one in channel stable"):
        rollback(local, "stable", KNOWN)
    promoted(local, workspace, "d")
    rollback(local, "stable", KNOWN)
    assert current(local) == "a"
    moves = [(e.id[0], e.move) for e in channels.history(local, "stable", KNOWN)]
    assert moves[2:5] == [("c", Move.PROMOTED), ("b", Move.ROLLED_BACK), ("a", Move.ROLLED_BACK)]
    with pytest.raises(UsageError, match="no image is current in channel testing"):
        rollback(local, "testing", KNOWN)


def test_promoting_again_changes_nothing(local: ChannelFile, workspace: Workspace) -> None:
    (one,) = promoted(local, workspace, "a")
    assert promote(local, one, "stable", KNOWN) == ChannelMove(stored=one, entries=())
    promote(local, one, "testing", KNOWN)
    assert all_current(local) == {"a" * 64: ("stable", "testing")}


@pytest.mark.parametrize(("passed", "said"), [(None, "has not been verified"), (False, "failed its checks")])
def test_what_was_not_proved_is_refused(
    local: ChannelFile, workspace: Workspace, passed: bool | None, said: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        promote(local, made(workspace, "a", passed=passed), "stable", KNOWN)
    assert "ami-builder verify" in str(caught.value.hint)
    assert all_current(local) == {}


def test_an_inconclusive_verification_promotes_nothing_and_is_not_called_a_failure(
    local: ChannelFile, workspace: Workspace
) -> None:
    one = made(workspace, "a", outcome=Outcome.INCONCLUSIVE)
    with pytest.raises(UsageError, match="its verification was inconclusive") as caught:
        promote(local, one, "stable", KNOWN)
    assert "failed" not in str(caught.value)
    assert "ami-builder verify" in str(caught.value.hint)
    assert all_current(local) == {}


def test_a_verdict_on_another_digest_is_none(local: ChannelFile, workspace: Workspace) -> None:
    one, other = made(workspace, "a"), made(workspace, "b")
    assert other.verdict is not None
    swapped = workspace.store_verdict(one, other.verdict)
    with pytest.raises(UsageError, match="has not been verified"):
        promote(local, swapped, "stable", KNOWN)


def test_a_rollback_needs_the_image_and_its_proof(local: ChannelFile, workspace: Workspace) -> None:
    first, second, _ = promoted(local, workspace, "abc")
    made(workspace, "b", passed=False)
    with pytest.raises(UsageError, match="failed its checks"):
        rollback(local, "stable", KNOWN)
    assert second.directory is not None
    shutil.rmtree(second.directory)
    with pytest.raises(UsageError, match="does not exist any more"):
        rollback(local, "stable", KNOWN)
    assert current(local) == "c"
    assert first.path.exists()


def test_what_was_revoked_never_comes_back(local: ChannelFile, workspace: Workspace) -> None:
    made = promoted(local, workspace, "abc")
    promote(local, made[2], "testing", KNOWN)
    moved = revoke(local, made[2], "leaks memory")
    assert {(e.channel, e.id[:1]) for e in moved.entries} == {("stable", "b"), ("testing", "")}
    assert all_current(local) == {"b" * 64: ("stable",)}
    with pytest.raises(UsageError, match=r"was revoked and can't be promoted again: leaks memory"):
        promote(local, made[2], "stable", KNOWN)
    assert revoke(local, made[2], "again").entries == ()
    assert local.revoked(["c" * 64]) == {"c" * 64: "leaks memory"}
    # One that does not stand anywhere is not gone back to either.
    promoted(local, workspace, "d")
    assert revoke(local, made[1], "old").entries == ()
    rollback(local, "stable", KNOWN)
    assert current(local) == "a"
    revoke(local, made[0], "all")
    revoke(local, local.find("d" * 64) or made[0], "all")
    assert all_current(local) == {}
    promoted(local, workspace, "e")
    assert current(local) == "e"


def test_a_broken_journal_is_not_taken_for_an_empty_one(local: ChannelFile, workspace: Workspace) -> None:
    (one,) = promoted(local, workspace, "a")
    path = workspace.images_dir / "dask" / "channels.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UsageError, match="can't be read as a record of channels"):
        promote(local, one, "testing", KNOWN)


def test_a_move_that_was_not_written_has_not_happened(
    local: ChannelFile, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = promoted(local, workspace, "ab")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(channel_file, "dump", full)
    with pytest.raises(OSError, match="No space"):
        rollback(local, "stable", KNOWN)
    with pytest.raises(OSError, match="No space"):
        revoke(local, one, "x")
    monkeypatch.undo()
    assert current(local) == "b"
    assert local.revoked(["a" * 64]) == {}


def test_an_image_that_is_not_ours_has_no_channel(local: ChannelFile, workspace: Workspace) -> None:
    one = made(workspace, "a")
    foreign = StoredImage(artifact=one.artifact, verdict=one.verdict, directory=None)
    with pytest.raises(UsageError, match="was not built here"):
        promote(local, foreign, "stable", KNOWN)


def test_an_image_is_chosen_by_name_digest_or_path(workspace: Workspace) -> None:
    one, other = made(workspace, "a"), made(workspace, "b")
    images = [one, other]
    assert choose(images, "dask", ["dask"]) == other
    assert choose(images, "aaaa", ["dask"]) == one
    assert choose(images, str(one.path), ["dask"]) == one
    for word, said in (
        ("dusk", "did you mean dask"),
        ("aaab", "did you mean aaaa"),
        ("aaa", "there is no image"),
    ):
        with pytest.raises(UsageError, match=said):
            choose(images, word, ["dask"])
    with pytest.raises(UsageError, match="has not been built yet"):
        choose([], "dask", ["dask"])
    twin = made(workspace, "a")
    sibling = StoredImage(
        artifact=Artifact(**{f: getattr(twin.artifact, f) for f in twin.artifact.__slots__}
                          | {"digest": "aaaa" + "0" * 60}),
        verdict=None, directory=None,
    )  # fmt: skip
    with pytest.raises(UsageError, match="several digests"):
        choose([one, sibling], "aaaa", [])


def test_the_commands(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = made(workspace, "a"), made(workspace, "b")
    assert cli.run(["promote", "aaaaaaaa", "stable", "--reason", "first"]) == 0
    assert cli.run(["promote", "dask", "stable", "--json"]) == 0
    path, answer = capsys.readouterr().out.splitlines()
    assert path == str(one.path)
    assert json.loads(answer)["entries"][0]["move"] == "promoted"
    assert cli.run(["list"]) == 0
    first, second = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert (first[6], second[6]) == ("", "stable")
    assert cli.run(["rollback", "stable"]) == 0
    assert capsys.readouterr().out == f"{one.path}\n"
    assert cli.run(["list", "--json"]) == 0
    images = json.loads(capsys.readouterr().out)["images"]
    assert [image["channels"] for image in images] == [["stable"], []]
    assert cli.run(["revoke", "aaaaaaaa", "--reason", "slow"]) == 0
    assert f"channel stable: {'b' * 64}" not in capsys.readouterr().err
    assert cli.run(["history", "stable"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [(row[1], row[2][:1], row[4]) for row in rows] == [
        ("promoted", "a", "first"),
        ("promoted", "b", ""),
        ("rolled back", "a", ""),
        (f"revoked {'a' * 16}", "n", "slow"),
    ]
    assert cli.run(["list"]) == 0
    assert [line.split("\t")[6] for line in capsys.readouterr().out.splitlines()] == ["revoked", ""]
    assert cli.run(["show", "aaaaaaaa", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["revoked"] == "slow"
    assert cli.run(["history", "stable", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["standing"] is None
    assert len(answer["entries"]) == 4
    assert other.path.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["promote", "dask", "stabel"], "did you mean stable"),
        (["promote", "dusk", "stable"], "did you mean dask"),
        (["rollback", "tseting"], "did you mean testing"),
        (["history", "stabel"], "did you mean stable"),
        (["history", "stable", "--image", "dusk"], "did you mean dask"),
        (["revoke", "dask"], "--reason"),
        (["promote", "/x/image.qcow2", "stable", "--target", "aws"], "this is not an AMI"),
        (["revoke", "/x/image.qcow2", "--target", "aws", "--reason", "x"], "this is not an AMI"),
    ],
)
def test_wrong_words_say_what_is_right(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    made(workspace, "a")
    assert cli.run(arguments) == 2
    assert said in capsys.readouterr().err


entries = st.lists(
    st.builds(
        ChannelEntry,
        channel=st.just("stable"),
        move=st.sampled_from(Move),
        id=st.sampled_from(["", "a", "b", "c"]),
        at=st.just(NOW),
        by=st.just("me"),
    )
)


@given(entries, st.sets(st.sampled_from("abc")))
def test_whatever_the_record(moves: list[ChannelEntry], revoked: set[str]) -> None:
    found = stack(moves, revoked)
    assert not revoked & set(found)
    assert "" not in found
    assert set(found) <= {entry.id for entry in moves}
    assert all(one != before for one, before in zip(found[1:], found, strict=False))
    if moves and moves[-1].id and moves[-1].id not in revoked:
        assert found[-1] == moves[-1].id
