"""Packer's adapter: the staged folder is what this Packer reads, and a failure names its provisioner."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pytest

from ami_builder.build import packer
from ami_builder.build.guest import RenderedFile
from ami_builder.core.errors import BuildFailed, MissingTool
from ami_builder.system import processes
from tests.fake_programs import calls, fake

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.needs("packer")

GUEST = {PurePosixPath("/usr/local/sbin/x"): RenderedFile(content=b"#!/bin/sh\n", mode=0o755)}


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    packer.version.cache_clear()
    yield
    packer.version.cache_clear()


def _variables(folder: Path) -> dict[str, packer.Variable]:
    for name in ("key", "base.qcow2"):
        (folder / name).touch()
    processes.output(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "id"])
    return {
        "image_name": "dask",
        "image_digest": "0" * 64,
        "run_id": "r1",
        "container_reference": "ami-builder/dask:1",
        "records_directory": str(folder),
        "manifest_file": str(folder / "manifest.json"),
        "ssh_username": "root",
        "ssh_private_key_file": str(folder / "id"),
        "base_disk": str(folder / "base.qcow2"),
        "qemu_args": [["-serial", "file:console.log"]],
    }


def test_the_real_packer_takes_the_template(tmp_path: Path) -> None:
    """Both sources validate; `packer fmt` has nothing to change."""
    stage = tmp_path / "stage"
    packer.stage(stage, GUEST, _variables(tmp_path))
    packer.validate(stage, tmp_path / "packer.log")
    processes.output(["packer", "fmt", "-check", "-diff", str(stage)])


@pytest.mark.parametrize("more", [{}, {"spot": True}, {"encrypt": True, "kms_key": "alias/x"}])
def test_the_real_packer_takes_it_for_an_ami(tmp_path: Path, more: dict[str, packer.Variable]) -> None:
    """What only the other source needs is not asked for."""
    variables = {**_variables(tmp_path), "source_ami": "ami-0123456789abcdef0", **more}
    for name in ("base_disk", "qemu_args"):
        del variables[name]
    packer.stage(tmp_path / "stage", GUEST, variables)
    packer.validate(tmp_path / "stage", tmp_path / "packer.log")


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("image_name", "Dask!", "lower-case letters"),
        ("image_digest", "123", "64 hexadecimal digits"),
        ("disk_size", "8GiB", "whole MiB"),
        ("accelerator", "hvf", "kvm or tcg"),
        ("memory_mib", 100, "at least 512"),
        ("source_ami", "x", "AMI id"),
        ("security_group_id", "", "security group"),
        ("ssh_interface", "public_dns", "session_manager"),
        ("uploads", [], "guest.tar"),
    ],
)
def test_the_template_refuses_bad_values(
    tmp_path: Path, name: str, value: packer.Variable, complaint: str
) -> None:
    stage = tmp_path / "stage"
    packer.stage(stage, GUEST, {**_variables(tmp_path), name: value})
    with pytest.raises(BuildFailed, match="packer validate failed"):
        packer.validate(stage, tmp_path / "packer.log")
    assert complaint in (tmp_path / "packer.log").read_text()


@pytest.mark.parametrize(("version", "has_plugins"), [("1.6.6", False), ("1.7.0", True), ("1.14.2", True)])
def test_plugins_are_for_those_who_read_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, has_plugins: bool
) -> None:
    fake(tmp_path / "bin", "packer", f"echo Packer v{version}")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    packer.stage(tmp_path / "stage", GUEST, {})
    assert (tmp_path / "stage" / "plugins.pkr.hcl").exists() is has_plugins
    packer.validate(tmp_path / "stage", tmp_path / "packer.log")
    assert ("init ." in calls(tmp_path / "bin", "packer")) is has_plugins


@pytest.mark.parametrize(
    ("answer", "complaint"), [("Packer v1.5.1", "too old"), ("cracklib", "another program")]
)
def test_a_wrong_packer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, complaint: str
) -> None:
    # Fedora's cracklib brings another program named packer.
    fake(tmp_path / "bin", "packer", f"echo {answer}")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    with pytest.raises(MissingTool, match=complaint):
        packer.version()


def _build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> list[str]:
    fake(tmp_path / "bin", "packer", script)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    shown: list[str] = []
    (tmp_path / "console.log").write_text("GRUB\nKernel panic - no root\n")
    packer.build(
        tmp_path,
        only="qemu.image",
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
        packer.stage(tmp_path / name, GUEST, {"uploads": ["x"]})
    for file in (tmp_path / "a").rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()
    variables = json.loads((tmp_path / "a" / packer.VARIABLES_FILE).read_text())
    assert variables == {"uploads": ["x"]}
