"""`ami-builder build` from nothing, then the same again; the image is what the docs promise."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest

from ami_builder.qemu import traces
from ami_builder.qemu.traces import search
from ami_builder.system import processes
from tests.vm.conftest import GIB, ami_builder

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ami_builder.state.workspace import Workspace

pytestmark = pytest.mark.journey

MEGABYTE = 1000**2


def test_the_build_is_verified_on_every_start(built: Mapping[str, Any]) -> None:
    verdict = built["verdict"]
    assert {r["outcome"] for r in verdict["results"]} <= {"passed", "skipped"}
    phases = {r["phase"] for r in verdict["results"]}
    assert phases == {"boot", "restart", "reboot", "pressure"}
    assert verdict["digest"] == built["artifact"]["digest"]
    measured = verdict["measured"]
    assert [(m["machine"], m["phase"]) for m in measured] == [
        ("2 GiB", "boot"),
        ("2 GiB", "restart"),
        ("2 GiB", "reboot"),
    ]
    assert all(GIB < m["available"] < m["total"] == 2 * GIB for m in measured)


def test_the_image_is_small_and_sound(built: Mapping[str, Any]) -> None:
    disk = Path(built["artifact"]["location"])
    assert disk.stat().st_size == built["artifact"]["size"] < 700 * MEGABYTE
    subprocess.run(["qemu-img", "check", "-q", disk], check=True)
    packages = (disk.parent / "packages.txt").read_text()
    for name in ("docker.io=", "cloud-init=", "linux-image-cloud-amd64="):
        assert f"\n{name}" in packages


def test_the_run_keeps_its_records(built: Mapping[str, Any], workspace: Workspace) -> None:
    run = workspace.runs_dir / built["artifact"]["run_id"]
    record = json.loads((run / "record.json").read_text())
    assert record["status"] == "passed"
    assert not (run / "work").exists()
    assert json.loads((run / "manifest.json").read_text())["builds"][0]["custom_data"]["image"] == "dask"
    assert (run / "packer" / "run.auto.pkrvars.json").exists()
    for phase in ("boot", "restart", "reboot"):
        # A machine that got stuck under emulation was booted again, beside the first one's records.
        newest = max((run / "machines").glob(f"2GiB*/junit-{phase}.xml"))
        junit = ElementTree.parse(newest)
        suite = junit.getroot().find("testsuite")
        assert suite is not None
        assert int(suite.attrib["tests"]) > 10
    everything = "".join(p.read_text(errors="replace") for p in run.rglob("*") if p.is_file())
    # A key, not a program that handles keys: the guest's files are in the records.
    assert not re.search(r"PRIVATE KEY-----\s+[A-Za-z0-9+/]{40}", everything)


def test_an_unchanged_build_is_answered_from_the_verified_image(
    built: Mapping[str, Any], workspace: Workspace
) -> None:
    runs = sorted(workspace.runs_dir.iterdir())
    answer = ami_builder("build")
    assert answer.status == 0
    assert built["artifact"]["location"] in answer.stdout
    assert sorted(workspace.runs_dir.iterdir()) == runs
    assert ami_builder("build", "--json").json["unchanged"] is True


def test_list_and_check_know_it(built: Mapping[str, Any]) -> None:
    (listed,) = (
        i for i in ami_builder("list", "--json").json["images"]
        if i["artifact"]["location"] == built["artifact"]["location"]
    )  # fmt: skip
    assert listed["artifact"] == built["artifact"]
    ready = ami_builder("check", "--json")
    assert (ready.status, ready.json["ready"]) == (0, True)


def test_a_corrupt_image_stops_before_anything_boots(built: Mapping[str, Any], tmp_path: Path) -> None:
    broken = tmp_path / "broken.qcow2"
    shutil.copy(built["artifact"]["location"], broken)
    broken.chmod(0o644)
    with broken.open("r+b") as file:
        file.write(b"\0" * 512)
    answer = ami_builder("verify", broken)
    assert answer.status in {2, 4}
    assert "broken.qcow2" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_no_secret_is_in_the_raw_disk(built: Mapping[str, Any], workspace: Workspace, tmp_path: Path) -> None:
    """Nor are deleted ones. What is no secret of the bake is found: the search sees what is there."""
    disk = Path(built["artifact"]["location"])
    identity = (workspace.runs_dir / built["artifact"]["run_id"] / traces.IDENTITY_FILE).read_text()
    assert "ssh-ed25519 " in identity
    assert traces.require_clean(disk, identity, tmp_path) >= 6
    variable, key = b"AVAILABLE_MEMORY_FOR_DASK", b"-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk"
    assert {found.content for found in search(disk, [variable, key], tmp_path)} == {variable}


def test_the_disk_holds_no_trace_of_the_builder(built: Mapping[str, Any]) -> None:
    """What is free was trimmed: the image's data is what its files need, and little more."""
    disk = built["artifact"]["location"]
    mapped = json.loads(processes.output(["qemu-img", "map", "--output=json", disk]))
    data = sum(part["length"] for part in mapped if part["data"])
    assert data < 2 * GIB
