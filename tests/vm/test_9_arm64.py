"""An image for arm64, from nothing to a verdict: on another host all of it is emulated, for half an hour."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from ami_builder.build.preflight import programs
from ami_builder.core.errors import MissingTool
from ami_builder.core.options import Arch
from ami_builder.core.records import State
from ami_builder.qemu.hardware import firmware
from tests.vm.conftest import ami_builder

pytestmark = [pytest.mark.whole, pytest.mark.needs("qemu-system-aarch64")]


def _missing() -> str:
    try:
        firmware(Arch.ARM64)
    except MissingTool as missing:
        return missing.message
    return "; ".join(one.found for one in programs(Arch.ARM64) if one.state is State.STOPS)


@pytest.mark.skipif(bool(_missing()), reason=_missing())
def test_an_arm64_image_is_verified_on_every_start() -> None:
    of = ("--set", "arch=arm64", "--set", "bake.timeout=1h", "--set", "verify.timeout=1h")
    answer = ami_builder(*of, "build", "--json", timeout=2 * 3600)
    assert answer.status == 0, answer.stderr
    artifact, verdict = answer.json["artifact"], answer.json["verdict"]
    assert artifact["arch"] == "arm64"
    assert {r["phase"] for r in verdict["results"]} == {"boot", "restart", "reboot", "pressure"}
    packages = (Path(artifact["location"]).parent / "packages.txt").read_text()
    assert "\nlinux-image-cloud-arm64=" in packages
    if platform.machine() == "x86_64":
        assert "KVM can't run arm64" in answer.stderr
