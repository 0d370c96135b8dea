"""What making an image needs on this host: programs of another architecture, and Debian's keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from ami_builder.build.preflight import debian_keys, programs
from ami_builder.core.options import Arch
from ami_builder.core.records import State

# A handler as Debian registers it, and one whose emulator a chroot lacks.
READY = "enabled\ninterpreter /usr/libexec/qemu-binfmt/aarch64-binfmt-P\nflags: POF\noffset 0\nmagic 7f45\n"
NOT_FIXED = READY.replace("POF", "PO")


@pytest.fixture(autouse=True)
def _host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


def test_programs_of_this_host_need_nothing(tmp_path: Path) -> None:
    assert list(programs(Arch.AMD64, tmp_path)) == []


@pytest.mark.parametrize("text", ["", NOT_FIXED, READY.replace("enabled", "disabled")])
def test_without_an_emulator_nothing_can_be_built(tmp_path: Path, text: str) -> None:
    if text:
        (tmp_path / "qemu-aarch64").write_text(text)
    (finding,) = programs(Arch.ARM64, tmp_path)
    assert (finding.state, finding.exit_code) == (State.STOPS, 3)
    assert "apt-get install qemu-user-static" in finding.hint


def test_the_emulator_is_reported(tmp_path: Path) -> None:
    (tmp_path / "qemu-aarch64").write_text(READY)
    (finding,) = programs(Arch.ARM64, tmp_path)
    assert finding.state is State.NOTE


@pytest.mark.parametrize(
    ("mirror", "state"), [("", State.STOPS), ("http://mirror.internal/debian", State.NOTE)]
)
def test_without_debians_keys_only_a_mirror_helps(tmp_path: Path, mirror: str, state: State) -> None:
    keyring = tmp_path / "keyring.gpg"
    (finding,) = debian_keys(mirror, keyring)
    assert (finding.state, finding.exit_code) == (state, 3 if state is State.STOPS else 0)
    assert "debian-archive-keyring" in finding.hint
    keyring.touch()
    assert [one.state for one in debian_keys(mirror, keyring)] == [State.OK]
