"""The user data that an unmodified EC2Cluster of dask-cloudprovider sends to its instances."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from tests.vm.conftest import HOME

if TYPE_CHECKING:
    from collections.abc import Mapping

HERE = Path(__file__).parent
LOCK = HERE / "ec2cluster.txt"
PACKAGES = HOME / "ec2cluster"
"""Where the package and what it needs are installed, apart from the tests' own packages."""


def user_data(image_reference: str, scheduler_address: str | None) -> str:
    """Return the user data of a worker of the scheduler at that address; with None, the scheduler's own."""
    _install()
    arguments = [image_reference, *([scheduler_address] if scheduler_address else [])]
    # -S and -P leave out the tests' packages and modules. The package writes a configuration of Dask into
    # HOME, and sends along the one that it finds there: that must not be the user's.
    environment = {"PYTHONPATH": str(PACKAGES), "HOME": str(PACKAGES)}
    program = HERE / "ec2cluster_render.py"
    return _output(
        "rendering the user data", sys.executable, "-S", "-P", program, *arguments, env=environment
    )


def _install() -> None:
    """Install what the lock pins, unless it is there already."""
    HOME.mkdir(parents=True, exist_ok=True)
    installed = PACKAGES / ".lock"
    wanted = f"# {sys.implementation.cache_tag}\n{LOCK.read_text()}"
    with FileLock(HOME / "ec2cluster.lock"):
        if installed.exists() and installed.read_text() == wanted:
            return
        shutil.rmtree(PACKAGES, ignore_errors=True)
        pip = [sys.executable, "-I", "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        # The lock is complete. Without --no-deps pip compares it with the tests' own packages.
        pip += ["--no-compile", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
        _output("installing dask-cloudprovider", *pip, "--target", PACKAGES, "-r", LOCK)
        installed.write_text(wanted)


def _output(what: str, *argv: str | Path, env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{what} failed:\n{done.stderr}"
    return done.stdout
