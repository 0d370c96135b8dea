"""`--target aws` on a host that takes itself for a Mac, with Packer, ssh and ssh-keygen alone on PATH."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ami_builder.aws.bake import SOURCE
from tests.packer_plugins import needs_plugin
from tests.process.test_wheel import installed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.fake_ec2.server import Cloud

__all__ = ["installed"]

ROOT = Path(__file__).resolve().parents[2]
BARE = Path(__file__).parent / "bare"
PROGRAMS = ("packer", "ssh", "ssh-keygen")
SETTINGS = ("--set", "aws.source_cidrs=127.0.0.1/32")
AWS = ("--target", "aws")
PLUGINS = ("PACKER_PLUGIN_PATH", "PACKER_CONFIG_DIR", "PACKER_CONFIG", "XDG_CONFIG_HOME", "HOME")


@pytest.fixture(params=["checkout", "wheel"])
def run(request: pytest.FixtureRequest, cloud: Cloud, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """What runs commands of this checkout, or of its wheel, in one process on such a host."""
    needs_plugin(SOURCE)
    package = ROOT if request.param == "checkout" else request.getfixturevalue("installed")
    path = tmp_path / "bin"
    path.mkdir()
    for name in PROGRAMS:
        found = shutil.which(name)
        assert found is not None, f"{name} is missing; scripts/test installs it"
        (path / name).symlink_to(found)
    (path / "python3").symlink_to(sys.executable)
    environment = {name: os.environ[name] for name in PLUGINS if name in os.environ}
    environment |= cloud.environment() | {
        "PATH": str(path),
        "PYTHONPATH": f"{BARE}:{package}:{ROOT}",
        # A Mac's folder for this has a space.
        "AMI_BUILDER_HOME": str(tmp_path / "Application Support" / "ami-builder"),
    }

    def run(*commands: Sequence[str]) -> list[dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, "-m", "tests.cloud.bare_host"],
            input=json.dumps([[*SETTINGS, *command] for command in commands]),
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert answer["platform"] == "darwin"
        assert Path(answer["package"]).is_relative_to(package)
        last = answer["results"][-1]
        assert last["status"] == 0, f"{commands[len(answer['results']) - 1]}: {last['err']}"
        results: list[dict[str, Any]] = answer["results"]
        return results

    return run


def test_an_image_goes_all_its_way(run: Callable[..., list[dict[str, Any]]], cloud: Cloud) -> None:
    checked, first, *_, second = run(
        ("check", *AWS, "--json"),
        ("build", *AWS, "--json"),
        ("promote", "dask", "testing", *AWS),
        ("--set", "memory.reserve=5%", "build", *AWS, "--json"),
    )
    tools = {one["name"] for one in json.loads(checked["out"])["findings"]}
    assert {"packer", "ssh", "ssh-keygen"} <= tools
    assert not tools & {"setpriv", "mmdebstrap", "session-manager-plugin", "disk space"}
    old, new = (json.loads(one["out"])["artifact"]["location"] for one in (first, second))
    run(
        ("verify", new),
        ("list",),
        ("show", new),
        ("report",),
        ("diff", old, new),
        ("promote", new, "testing", *AWS),
        ("rollback", "testing", *AWS),
        ("history", "testing", *AWS),
        ("copy", new, "--region", "eu-west-1"),
        ("--set", "aws.share_with=123456789013", "share", new),
        ("revoke", new, *AWS, "--reason", "too old"),
        ("nightly", *AWS),
        ("gc", "--apply"),
        ("prune", *AWS, "--apply"),
        ("render",),
        ("iam-policy",),
    )
    assert not cloud.left().keys() - {"image", "snapshot", "parameter"}
