"""Packer's adapter: the staged folder is what this Packer reads, and a failure names its provisioner."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pytest

from ami_builder.aws.bake import SOURCE as AMAZON
from ami_builder.build import packer, plugins
from ami_builder.build.guest import RenderedFile
from ami_builder.core.errors import BuildFailed, MissingTool
from ami_builder.qemu.bake import SOURCE as QEMU
from ami_builder.system import processes
from tests.fake_programs import fake
from tests.packer_plugins import needs_plugin

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.needs("packer")

GUEST = {PurePosixPath("/usr/local/sbin/x"): RenderedFile(content=b"#!/bin/sh\n", mode=0o755)}


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    plugins.version.cache_clear()
    yield
    plugins.version.cache_clear()


@pytest.fixture(params=[QEMU, AMAZON], ids=["qemu", "amazon"])
def source(request: pytest.FixtureRequest) -> packer.Source:
    """Each target's source; the test is skipped if its plugin is missing."""
    wanted: packer.Source = request.param
    needs_plugin(wanted)
    return wanted


def _variables(folder: Path, source: packer.Source) -> dict[str, packer.Variable]:
    (folder / "base.qcow2").touch()
    processes.output(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "id"])
    shared: dict[str, packer.Variable] = {
        "image_name": "dask",
        "image_digest": "0" * 64,
        "run_id": "r1",
        "container_reference": "ami-builder/dask:1",
        "records_directory": str(folder),
        "manifest_file": str(folder / "manifest.json"),
        "ssh_username": "root",
        "ssh_private_key_file": str(folder / "id"),
    }
    own: dict[str, dict[str, packer.Variable]] = {
        "qemu": {
            "base_disk": str(folder / "base.qcow2"),
            "qemu_args": [["-serial", "file:console.log"]],
        },
        "amazon-ebs": {
            "region": "us-east-1",
            "ami_name": "dask-1",
            "source_ami": "ami-0123456789abcdef0",
            "security_group_id": "sg-0123456789abcdef0",
        },
    }
    return shared | own[source.type]


def test_packer_accepts_the_template(tmp_path: Path, source: packer.Source) -> None:
    """`packer validate` passes with no other plugin than the target's; `packer fmt` has nothing to change."""
    stage = tmp_path / "stage"
    packer.stage(stage, source, GUEST, _variables(tmp_path, source))
    packer.validate(stage, tmp_path / "packer.log")
    processes.output(["packer", "fmt", "-check", "-diff", str(stage)], env=plugins.environment())


@pytest.mark.parametrize(
    "more",
    [{"spot": True}, {"encrypt": True, "kms_key": "alias/x"}, {"container_recipe": "/var/tmp/recipe.tar"}],
)
def test_packer_accepts_what_an_ami_can_have(tmp_path: Path, more: dict[str, packer.Variable]) -> None:
    needs_plugin(AMAZON)
    packer.stage(tmp_path / "stage", AMAZON, GUEST, {**_variables(tmp_path, AMAZON), **more})
    packer.validate(tmp_path / "stage", tmp_path / "packer.log")


@pytest.mark.parametrize(
    ("source", "name", "value", "complaint"),
    [
        (QEMU, "image_name", "Dask!", "lower-case letters"),
        (QEMU, "image_digest", "123", "64 hexadecimal digits"),
        (QEMU, "disk_size", "8GiB", "whole MiB"),
        (QEMU, "accelerator", "hvf", "kvm or tcg"),
        (QEMU, "memory_mib", 100, "at least 512"),
        (QEMU, "uploads", [], "guest.tar"),
        (AMAZON, "source_ami", "x", "AMI id"),
        (AMAZON, "security_group_id", "", "security group"),
        (AMAZON, "ssh_interface", "public_dns", "session_manager"),
    ],
    indirect=["source"],
    ids=lambda value: value.type if isinstance(value, packer.Source) else None,
)
def test_the_template_refuses_bad_values(
    tmp_path: Path, source: packer.Source, name: str, value: packer.Variable, complaint: str
) -> None:
    stage = tmp_path / "stage"
    packer.stage(stage, source, GUEST, {**_variables(tmp_path, source), name: value})
    with pytest.raises(BuildFailed, match="packer validate failed"):
        packer.validate(stage, tmp_path / "packer.log")
    # Packer wraps its messages at the width of a terminal.
    assert complaint in " ".join((tmp_path / "packer.log").read_text().split())


def _is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    fake(tmp_path / "bin", "packer", script)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("version", "newer"), [("1.6.6", False), ("1.9.0", True), ("1.14.3", True), ("1.16.0", True)]
)
def test_a_stage_has_what_this_packer_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, newer: bool
) -> None:
    _is(tmp_path, monkeypatch, f"echo Packer v{version}")
    for source, other in ((AMAZON, QEMU), (QEMU, AMAZON)):
        stage = tmp_path / source.type
        packer.stage(stage, source, GUEST, {})
        text = "".join(file.read_text() for file in stage.glob("*.pkr.hcl"))
        assert f'source "source.{source.name}"' in text
        assert other.type not in text, "its plugin may be missing"
        assert (f'version = "{source.plugin.versions}"' in text) is newer
        assert ("metadata_options" in text) is (newer and source is AMAZON)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ("Packer v1.5.1", "too old"),
        ("Packer v1.7.0", "is not supported"),
        ("Packer v1.8.7", "is not supported"),
        ("cracklib", "another program"),
    ],
)
def test_a_wrong_packer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, complaint: str
) -> None:
    # Fedora's cracklib brings another program named packer.
    _is(tmp_path, monkeypatch, f"echo {answer}")
    with pytest.raises(MissingTool, match=complaint) as error:
        plugins.version()
    assert "install Packer 1.14 or later" in (error.value.hint or "")


def _build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> list[str]:
    _is(tmp_path, monkeypatch, script)
    shown: list[str] = []
    (tmp_path / "console.log").write_text("GRUB\nKernel panic - no root\n")
    packer.build(
        tmp_path,
        log=tmp_path / "packer.log",
        console_log=tmp_path / "console.log",
        timeout=30,
        on_progress=shown.append,
    )
    return shown


def test_a_failing_provisioner_is_named_with_its_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "echo '2026-01-01T00:00:00Z: ==> qemu.image: Provisioning with shell script: a/10-guest.sh'\n"
        "echo '2026-01-01T00:00:01Z:     qemu.image: fine'\n"
        "echo '2026-01-01T00:00:02Z: ==> qemu.image: Provisioning with shell script: a/20-container.sh'\n"
        "echo '2026-01-01T00:00:03Z: ==> qemu.image: no such image'\n"
        "echo 'Build qemu.image errored: Script exited with non-zero exit status: 1.'\n"
        "exit 1"
    )
    with pytest.raises(BuildFailed, match=r"provisioner 20-container\.sh failed") as error:
        _build(tmp_path, monkeypatch, script)
    assert any("no such image" in line for line in error.value.tail)
    assert not any("fine" in line for line in error.value.tail)
    assert error.value.log == tmp_path / "packer.log"


def test_without_ssh_the_console_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BuildFailed, match="never answered by ssh") as error:
        _build(tmp_path, monkeypatch, "echo '==> qemu.image: Timeout waiting for SSH.'; exit 1")
    assert error.value.tail == ("GRUB", "Kernel panic - no root")


def test_a_full_disk_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BuildFailed) as error:
        _build(tmp_path, monkeypatch, "echo 'qemu-img: write: No space left on device'; exit 1")
    assert error.value.hint == processes.DISK_FULL


def test_progress_tells_the_provisioner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "echo '==> qemu.image: Provisioning with shell script: x/90-clean.sh'"
    assert _build(tmp_path, monkeypatch, script) == ["90-clean.sh"]


def test_progress_tells_what_a_provisioner_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "echo '2026-11-28T06:26:48Z: ==> qemu.image: Provisioning with shell script: /tmp/packer-shell114'\n"
        "echo '2026-11-28T06:26:51Z: ==> qemu.image: Provisioning with shell script: ./x/10-guest.sh'\n"
        "echo '2026-11-28T06:26:52Z:     qemu.image: Setting up htop (3.4.1) ...'\n"
        "echo '2026-11-28T06:26:53Z:     qemu.image: '"
    )
    assert _build(tmp_path, monkeypatch, script) == ["prepare", "10-guest.sh", "Setting up htop (3.4.1) ..."]


def test_progress_tells_that_the_machine_has_booted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "echo '2026-11-28T06:26:48Z: ==> qemu.image: Connected to SSH!'"
    assert _build(tmp_path, monkeypatch, script) == [packer.CONNECTED]


def test_a_staged_folder_does_not_depend_on_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        packer.stage(tmp_path / name, QEMU, GUEST, {"uploads": ["x"]})
    for file in (tmp_path / "a").rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()
    variables = json.loads((tmp_path / "a" / packer.VARIABLES_FILE).read_text())
    assert variables == {"uploads": ["x"]}
