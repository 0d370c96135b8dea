"""The files that travel with the program are found in a checkout and in an installed wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ami_builder.core.errors import AmiBuilderError
from ami_builder.system import resources

PACKAGE = Path(resources.__file__).parents[1]
REPORT = """
from ami_builder.system import resources as r
for path in r.root(), r.packer_dir(), r.scripts_dir(), r.requirements(), r.default_config(), r.checks_dir():
    print(path)
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Return a copy of the package in a folder of its own, with nothing beside it."""
    copy = tmp_path / "site" / "ami_builder"
    for name in ("__init__.py", "core/errors.py", "system/resources.py"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACKAGE / name, copy / name)
    return copy


def reported(package: Path) -> list[Path]:
    done = subprocess.run(
        [sys.executable, "-c", REPORT],
        cwd=package.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return [Path(line) for line in done.stdout.splitlines()]


def test_this_checkout_has_everything() -> None:
    assert resources.root() == PACKAGE.parent
    assert resources.default_config().is_file()
    assert resources.requirements().is_file()
    for folder in (resources.packer_dir(), resources.scripts_dir(), resources.checks_dir()):
        assert folder.is_dir()


@pytest.mark.parametrize("place", ["checkout", "wheel"])
def test_both_places(package: Path, place: str) -> None:
    root = package.parent if place == "checkout" else package / "_shipped"
    (root / "packer").mkdir(parents=True)
    if place == "checkout":
        (root / "pyproject.toml").touch()
    assert reported(package) == [
        root,
        root / "packer",
        root / "scripts",
        root / "scripts" / "container" / "requirements.txt",
        root / "ami-builder.toml",
        package / "checks",
    ]


def test_somebody_elses_folders_beside_an_installed_package_are_not_ours(package: Path) -> None:
    (package.parent / "packer").mkdir()
    (package / "_shipped" / "packer").mkdir(parents=True)
    (package.parent / "pyproject.toml").touch()
    assert reported(package)[0] == package / "_shipped"


def test_an_incomplete_installation_says_so(package: Path) -> None:
    with pytest.raises(AmiBuilderError, match="incomplete") as caught:
        resources.root(package)
    assert "reinstall" in str(caught.value.hint)
