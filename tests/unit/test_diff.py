"""How two images differ: packages by version, quantities side by side, and nothing made up."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ami_builder.cli import app as cli
from ami_builder.core.diff import PackageChange, Quantity, QuantityChange, Side, compare, read_packages
from ami_builder.core.records import (
    Artifact,
    CheckResult,
    Measurement,
    Outcome,
    RunStatus,
    StepRecord,
    TargetKind,
    Verdict,
)
from ami_builder.state.workspace import StoredImage, Workspace

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30


def test_packages_that_moved() -> None:
    before = Side(packages={"apt": "1", "bash": "5", "old": "2"}, measured={Quantity.SIZE: {"": 100}})
    after = Side(packages={"apt": "2", "bash": "5", "new": "3"}, measured={Quantity.SIZE: {"": 110}})
    found = compare(before, after)
    assert found.packages == (
        PackageChange(name="apt", before="1", after="2"),
        PackageChange(name="new", before=None, after="3"),
        PackageChange(name="old", before="2", after=None),
    )
    (size,) = found.measured
    assert size.change == pytest.approx(0.1)


def test_what_is_not_known_is_not_made_up() -> None:
    known = Side(
        packages={},
        measured={
            Quantity.SIZE: {"": 0},
            Quantity.AVAILABLE: {"2 GiB": GIB},
            Quantity.TIME: {"build": 2.0},
        },
    )
    unknown = Side(packages=None, measured={Quantity.SIZE: {"": 10}})
    found = compare(known, unknown)
    assert found.packages is None
    assert [one.change for one in found.measured] == [None, None, None]
    assert found.measured[1] == QuantityChange(
        quantity=Quantity.AVAILABLE, name="2 GiB", before=GIB, after=None
    )


def test_a_list_of_packages_is_read() -> None:
    lines = [
        "apt=3.0.4\n",
        "kernel=1\n",
        "kernel=2\n",
        "",
        "nonsense",
        "container:host:5000/dask:1=sha256:ab",
    ]
    assert read_packages(lines) == {
        "apt": "3.0.4",
        "kernel": "1, 2",
        "container:host:5000/dask:1": "sha256:ab",
    }


names = st.text("abc+-.", min_size=1, max_size=3)
versions = st.text("0123:~+-.", min_size=1, max_size=4)


@given(st.dictionaries(names, versions), st.dictionaries(names, versions))
def test_applying_what_moved_gives_the_other(before: dict[str, str], after: dict[str, str]) -> None:
    lines = [f"{name}={version}" for name, version in before.items()]
    assert read_packages(lines) == before
    found = compare(Side(packages=before, measured={}), Side(packages=after, measured={})).packages
    assert found is not None
    applied = {**before, **{one.name: one.after for one in found}}
    assert {name: version for name, version in applied.items() if version is not None} == after
    assert all(one.before != one.after for one in found)


def stored(
    workspace: Workspace,
    letter: str,
    packages: str,
    available: int,
    seconds: float,
    cpu: float | None = 200.0,
) -> StoredImage:
    with workspace.run("build", "dask", letter * 64) as run:
        (run.work / "disk").write_bytes(letter.encode() * 1024)
        if packages:
            (run.work / "packages.txt").write_text(packages)
        artifact = Artifact(
            image="dask",
            target=TargetKind.QEMU,
            location="",
            digest=letter * 64,
            created=datetime(2026, 1, 2, tzinfo=UTC) + timedelta(hours=ord(letter)),
            run_id=run.record.run_id,
            size=0,
        )
        stored = workspace.store(artifact, run.work / "disk", run.work / "packages.txt")
        steps = [
            StepRecord(name=name, seconds=seconds, status=RunStatus.PASSED)
            for name in ("resolve inputs", "build dask", "build dask > bake with Packer", "build dask-gpu")
        ]
        run.update(steps=tuple(steps))
    result = CheckResult(
        name="x", phase="boot", machine="2 GiB", outcome=Outcome.PASSED, seconds=1, message=""
    )
    measured = tuple(
        Measurement(
            machine="2 GiB",
            phase=phase,
            total=2 * GIB,
            available=available - at,
            ssh_seconds=seconds - 40 if phase == "boot" else None,
            dask_seconds=seconds + 20,
            cpu_seconds=cpu,
            control_seconds=4.0,
        )
        for at, phase in enumerate(("boot", "restart"))
    )
    return workspace.store_verdict(
        stored, Verdict(digest=letter * 64, checks_digest="c", results=(result,), measured=measured)
    )


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setenv("AMI_BUILDER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AMI_BUILDER_CONFIG", str(ROOT / "ami-builder.toml"))
    return Workspace.open({"AMI_BUILDER_HOME": str(tmp_path / "home")})


def test_the_command(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    stored(workspace, "a", "apt=1\nbash=5\n", GIB, 100.0)
    stored(workspace, "b", "apt=2\nbash=5\n", GIB + GIB // 100, 50.0, cpu=250.0)
    assert cli.run(["diff", "aaaa", "dask"]) == 0
    shown = capsys.readouterr()
    assert [line.split("\t") for line in shown.out.splitlines()] == [
        ["size", "1 KiB", "1 KiB", "+0.0%"],
        ["available memory at boot 2 GiB", "1 GiB", "1.01 GiB", "+1.0%"],
        ["CPU time to boot 2 GiB", "50.00 x control", "62.50 x control", "+25.0%"],
        ["seconds to ssh 2 GiB", "1:00 min", "10 s", "-83.3%"],
        ["seconds to Dask 2 GiB", "2:00 min", "1:10 min", "-41.7%"],
        ["time build", "1:40 min", "50 s", "-50.0%"],
        ["time build > bake with Packer", "1:40 min", "50 s", "-50.0%"],
        ["package apt", "1", "2", ""],
    ]
    assert "packages that differ: 1" in shown.err
    assert cli.run(["diff", "aaaa", "bbbb", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["packages"] == [{"name": "apt", "before": "1", "after": "2"}]
    assert answer["measured"][1]["after"] == GIB + GIB // 100
    assert answer["measured"][2]["quantity"] == "CPU time to boot"
    assert (answer["measured"][2]["before"], answer["measured"][2]["change"]) == (50.0, 0.25)
    assert answer["measured"][5]["change"] == -0.5
    assert answer["before"]["digest"] == "a" * 64


def test_without_a_list_packages_are_not_compared(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    stored(workspace, "a", "", GIB, 1.0)
    stored(workspace, "b", "apt=2\n", GIB, 1.0)
    assert cli.run(["diff", "aaaa", "bbbb"]) == 0
    assert "packages are not compared" in capsys.readouterr().err
    assert cli.run(["diff", "aaab", "bbbb"]) == 2
    assert "did you mean aaaa" in capsys.readouterr().err
