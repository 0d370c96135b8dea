"""An unmodified EC2Cluster of dask-cloudprovider: what it sends to its instances, and a user of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from ami_builder.system import processes
from tests.vm.conftest import HOME

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

HERE = Path(__file__).parent
LOCK = HERE / "ec2cluster.txt"
PACKAGES = HOME / "ec2cluster"
"""Where the package and what it needs are installed, apart from the tests' own packages."""


def user_data(image_reference: str, scheduler_address: str | None) -> str:
    """Return the user data of a worker of the scheduler at that address; with None, the scheduler's own."""
    install()
    arguments = [image_reference, *([scheduler_address] if scheduler_address else [])]
    # -S and -P leave out the tests' packages and modules. The package writes a configuration of Dask into
    # HOME, and sends along the one that it finds there: that must not be the user's.
    environment = {"PYTHONPATH": str(PACKAGES), "HOME": str(PACKAGES)}
    program = HERE / "ec2cluster_render.py"
    return _output(
        "rendering the user data", sys.executable, "-S", "-P", program, *arguments, env=environment
    )


def install() -> None:
    """Install what the lock pins, unless it is there already; a scenario's namespace leads to no index."""
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


class User:
    """What a person does by EC2Cluster, in a process of its own: see ec2cluster_client.py."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self._log = process, log

    def ask(self, do: str, **arguments: Any) -> Any:
        """Let the process do one thing, and return its result; raises AssertionError when it has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"{do} failed:\n{self._log.read_text()[-4000:]}"
        return json.loads(line)["result"]


@contextmanager
def using(directory: Path, environment: Mapping[str, str]) -> Iterator[User]:
    """Run a process that uses EC2Cluster, with the variables that point it at its cloud."""
    install()
    home, log = directory / "home", directory / "ec2cluster.log"
    home.mkdir(parents=True)
    argv: list[str | Path] = [sys.executable, "-S", "-P", HERE / "ec2cluster_client.py"]
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PACKAGES), "HOME": str(home), **environment}
    with (
        log.open("w") as err,
        processes.running(
            argv, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err.fileno()
        ) as process,
    ):
        yield User(process, log)
