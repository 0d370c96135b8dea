"""`pip install .` gives the same program in any folder: the wheel brings packer/ and scripts/ along."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ami_builder.system import processes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout and installed, without what it depends on."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    install = ["-m", "uv", "pip", "install", "-q", "--no-deps", "--no-index", "--python", sys.executable]
    install += ["--find-links", str(folder), "--target", str(folder / "site"), "ami-builder"]
    for arguments in (build, install):
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
    return folder / "site"


def _run(installed: Path, cwd: Path, *arguments: str) -> str:
    """Run the installed package, and not this checkout, with the dependencies of this environment."""
    program = "import sys; sys.path.insert(0, sys.argv.pop(1)); from ami_builder.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, str(installed), *arguments],
        cwd=cwd,
        env=processes.environment({"AMI_BUILDER_HOME": str(cwd / "home")}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_renders_the_same_guest(installed: Path, tmp_path: Path) -> None:
    ours = _run(ROOT, tmp_path, "render")
    assert _run(installed, tmp_path, "render") == ours
    assert "start-dask 0755" in ours


def test_its_scripts_can_be_run(installed: Path) -> None:
    scripts = installed / "ami_builder" / "_shipped" / "scripts"
    for name in ("base-disk", "container-archive"):
        shown = subprocess.run([scripts / name, "--help"], capture_output=True, text=True, check=True).stdout
        assert shown.startswith(f"usage: {name}")


def test_its_configuration_is_the_shipped_one(installed: Path, tmp_path: Path) -> None:
    shown = _run(installed, tmp_path, "config", "show")
    assert "memory.reserve" in shown
    assert shown == _run(ROOT, tmp_path, "config", "show")


def test_its_page_is_the_same(installed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "state" / "runs" / "20261123T221956Z-100427"
    folder.mkdir(parents=True)
    record: dict[str, object] = {"run_id": folder.name, "command": "build", "image": "dask", "digest": None}
    record |= {"status": "failed", "started": "2026-11-23T22:19:56Z", "steps": [], "error": "no space left"}
    (folder / "record.json").write_text(json.dumps(record))
    page = Path(_run(ROOT, tmp_path, "report").strip())
    ours = page.read_text()
    assert "no space left" in ours
    page.unlink()
    _run(installed, tmp_path, "report")
    assert page.read_text() == ours
