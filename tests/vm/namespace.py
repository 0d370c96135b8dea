"""Runs scenarios in a network namespace of their own, where instances reach each other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PROGRAMS
from tests.vm.conftest import HOME, ROOT, environment

_PROBE = "ip link add probe type bridge && ip tuntap add probe0 mode tap && ip link set probe0 master probe"


def require() -> None:
    """Skip the test where a network of instances can't be made."""
    programs = ("unshare", "ip", "dnsmasq")
    if missing := [name for name in programs if shutil.which(name, path=PROGRAMS) is None]:
        pytest.skip(f"not installed: {', '.join(missing)} (scripts/test installs it)")
    if not Path("/dev/net/tun").exists():
        pytest.skip("there is no /dev/net/tun, so VMs can't share a network")
    probe = subprocess.run(
        [*_unshare(), "sh", "-c", _PROBE], env=_environment(), capture_output=True, text=True, check=False
    )
    if probe.returncode != 0:
        pytest.skip(f"network namespaces with bridges can't be made here: {probe.stderr.strip()}")


def scenario(name: str, *, timeout: float, **arguments: Any) -> Any:
    """Run tests/vm/scenarios/NAME.py in a namespace and return its result; skips where that is impossible."""
    require()
    argv = [*_unshare(), sys.executable, "-m", f"tests.vm.scenarios.{name}"]
    done = subprocess.run(
        argv,
        env=_environment(),
        cwd=ROOT,
        input=json.dumps(arguments, default=str),
        stdout=subprocess.PIPE,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"the scenario {name} failed with status {done.returncode}"
    return json.loads(done.stdout)


def _unshare() -> list[str]:
    return ["unshare", "--net", *(["--map-root-user"] if os.geteuid() else []), "--"]


def _environment() -> dict[str, str]:
    return environment(PATH=PROGRAMS, AMI_BUILDER_TEST_HOME=str(HOME))
