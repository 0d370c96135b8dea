"""Which Packer and plugins are there, what installs a missing one, and what `check` says of it."""

from __future__ import annotations

import json
import os
import pwd
import socket
import threading
from typing import TYPE_CHECKING, cast

import pytest

from ami_builder.aws.bake import bake_ami
from ami_builder.build import packer, plugins
from ami_builder.build.inputs import Inputs
from ami_builder.cli import app as cli
from ami_builder.console.progress import Progress, Renderer
from ami_builder.core.errors import MissingTool, TimedOut
from ami_builder.core.records import State, TargetKind
from ami_builder.qemu.bake import SOURCE, bake
from ami_builder.system import processes
from tests.fake_programs import calls, fake
from tests.sample_image import image

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ami_builder.aws.session import Account
    from ami_builder.aws.source_ami import BaseAmi
    from ami_builder.console import Step
    from ami_builder.state.workspace import Run, Workspace

QEMU = SOURCE.plugin
FILE = "packer-plugin-qemu_v{version}_x5.0_linux_amd64"
PACKER = """
case "$1" in
    version) echo "Packer v{version}" ;;
    plugins) for file in "$PACKER_PLUGIN_PATH"/*; do [ ! -f "$file" ] || echo "$file"; done ;;
    init) env >"$0.env"; {init} ;;
    validate) env >"$0.validate" ;;
esac
"""
INSTALLS = 'touch "$PACKER_PLUGIN_PATH/' + FILE.format(version="1.1.4") + '"'


class Host:
    """A fake Packer, and a folder with its plugins."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.plugins = folder / "plugins"
        self.plugins.mkdir()
        self.log = folder / "packer.log"
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
        monkeypatch.setenv("PACKER_PLUGIN_PATH", str(self.plugins))
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        self.has("1.16.0")

    def has(self, version: str, *, init: str = INSTALLS) -> None:
        """Install a Packer whose `init` does this."""
        fake(self.folder / "bin", "packer", PACKER.format(version=version, init=init))
        plugins.version.cache_clear()

    def add(self, version: str) -> Path:
        """Install a version of the plugin."""
        file = self.plugins / FILE.format(version=version)
        file.touch()
        return file

    def offline(self) -> None:
        """Let the network be a proxy that nobody runs."""
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        self.behind(port)

    def behind(self, port: int) -> None:
        """Let the network be a proxy."""
        self.monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        self.monkeypatch.setenv("no_proxy", "")

    def require(self) -> None:
        """Do what each build begins with."""
        plugins.require(QEMU, self.folder, self.log)

    @property
    def inits(self) -> int:
        """How often Packer was asked to install plugins."""
        return calls(self.folder / "bin", "packer").count("init plugin.pkr.hcl")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    yield Host(tmp_path, monkeypatch)
    plugins.version.cache_clear()


@pytest.fixture
def proxy(host: Host) -> Iterator[int]:
    """A proxy that can be reached."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host.behind(listener.getsockname()[1])
        yield 0


def test_a_plugin_that_is_there_needs_no_network(host: Host) -> None:
    host.add("1.1.4")
    host.offline()
    host.require()
    assert host.inits == 0


def test_packer_1_6_6_needs_no_plugin(host: Host) -> None:
    host.has("1.6.6")
    host.offline()
    host.require()
    assert calls(host.folder / "bin", "packer") == ["version"]


@pytest.mark.parametrize("version", ["1.0.9", "2.0.0"])
def test_a_missing_plugin_is_installed(host: Host, proxy: int, version: str) -> None:
    host.add(version)
    host.require()
    assert host.inits == 1
    host.require()
    assert host.inits == 1


def test_two_builds_install_it_once(host: Host, proxy: int) -> None:
    host.has("1.16.0", init=f"sleep 0.5; {INSTALLS}")
    threads = [threading.Thread(target=host.require) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert host.inits == 1


@pytest.mark.parametrize(
    ("version", "site", "command"),
    [
        ("1.16.0", "releases.hashicorp.com", "packer plugins install --path FILE github.com/hashicorp/qemu"),
        ("1.11.0", "api.github.com", "packer plugins install --path FILE github.com/hashicorp/qemu"),
        ("1.9.5", "api.github.com", "put it with its _SHA256SUM into the folder github.com/hashicorp/qemu"),
    ],
)
def test_offline_the_error_is_quick_and_says_what_to_do(
    host: Host, version: str, site: str, command: str
) -> None:
    host.has(version)
    host.offline()
    with pytest.raises(MissingTool, match=f"{site} can't be reached through the proxy") as error:
        host.require()
    assert host.inits == 0, "it would wait for minutes"
    hint = error.value.hint or ""
    assert 'packer plugins install github.com/hashicorp/qemu ">= 1.1.0, < 2.0.0"' in hint
    assert command in hint


@pytest.mark.parametrize("target", list(TargetKind))
@pytest.mark.parametrize(("version", "problem"), [("1.16.0", "has no plugin"), ("1.8.7", "is not supported")])
def test_a_build_that_packer_would_stop_makes_nothing_first(
    host: Host, workspace: Workspace, target: TargetKind, version: str, problem: str
) -> None:
    host.has(version)
    host.offline()
    inputs = Inputs(image=image(), guest={}, base_digest="b", container_digest="c", digest="d" * 64)
    progress = Progress(Renderer())

    def build(run: Run, step: Step) -> object:
        if target is TargetKind.QEMU:
            return bake(inputs, workspace, run, step)
        return bake_ami(
            inputs, cast("BaseAmi", None), cast("Account", None), workspace, run, step, public=False
        )

    with (
        workspace.run("build", "dask") as run,
        progress.step("build") as step,
        pytest.raises(MissingTool, match=problem),
    ):
        build(run, step)
    assert [one.name for one in progress.steps] == ["build"]
    assert host.inits == 0


def test_an_installation_that_fails_shows_why(host: Host, proxy: int) -> None:
    host.has("1.16.0", init="echo 'no release version found'; exit 1")
    with pytest.raises(MissingTool, match="installing it failed") as error:
        host.require()
    assert "no release version found" in error.value.tail
    assert error.value.log == host.log


def test_an_installation_on_a_full_disk_asks_for_space(host: Host, proxy: int) -> None:
    host.has("1.16.0", init="echo 'write: No space left on device'; exit 1")
    with pytest.raises(MissingTool) as error:
        host.require()
    assert error.value.hint == processes.DISK_FULL


def test_an_installation_that_takes_too_long_has_timed_out(host: Host, proxy: int) -> None:
    host.has("1.16.0", init="exec sleep 60")
    host.monkeypatch.setattr(plugins, "_INIT_SECONDS", 0.2)
    with pytest.raises(TimedOut, match="packer init"):
        host.require()


def test_packer_gets_its_own_settings_and_only_init_the_token(host: Host, proxy: int) -> None:
    settings = {
        "PACKER_CONFIG": "/a",
        "PACKER_CONFIG_DIR": "/b",
        "XDG_CONFIG_HOME": "/c",
        "SSL_CERT_DIR": "/d",
        "PACKER_PLUGIN_PATH": str(host.plugins),
    }
    for name, value in {**settings, "PACKER_GITHUB_API_TOKEN": "token-77", "PACKER_LOG": "1"}.items():
        host.monkeypatch.setenv(name, value)
    host.require()
    packer.validate(host.folder, host.log)
    for command in ("env", "validate"):
        given = (host.folder / "bin" / f"packer.{command}").read_text().splitlines()
        assert {f"{name}={value}" for name, value in settings.items()} <= set(given)
        assert ("PACKER_GITHUB_API_TOKEN=token-77" in given) is (command == "env")
        # With it, a log would have credentials.
        assert "PACKER_LOG=1" not in given
    assert f"PACKER_CACHE_DIR={host.folder / 'packer_cache'}" in given
    assert "token-77" not in host.log.read_text()


def test_without_home_packer_gets_the_users(host: Host) -> None:
    host.monkeypatch.delenv("HOME")
    assert plugins.environment()["HOME"] == pwd.getpwuid(os.getuid()).pw_dir


def test_a_user_without_a_home_folder_is_told(host: Host) -> None:
    host.monkeypatch.delenv("HOME")

    def unknown(_: int) -> object:
        raise KeyError

    host.monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(MissingTool, match="HOME is not set"):
        plugins.environment()


def test_what_packer_says_of_its_settings_is_shown(host: Host) -> None:
    fake(
        host.folder / "bin",
        "packer",
        "echo ' Error loading configuration: '; echo; echo Multiple paths; exit 1",
    )
    with pytest.raises(MissingTool, match="Error loading configuration: Multiple paths"):
        plugins.version()


def test_check_names_packer_and_plugin(host: Host) -> None:
    host.add("1.1.0")
    newest = host.add("1.1.4")
    packer_, plugin = plugins.findings(QEMU)
    assert (packer_.state, packer_.found) == (State.OK, f"1.16.0 ({host.folder / 'bin' / 'packer'})")
    assert (plugin.state, plugin.found) == (State.OK, f"1.1.4 ({newest})")
    host.has("1.6.6")
    assert [one.state for one in plugins.findings(QEMU)] == [State.OK, State.OK]


def test_check_says_what_a_build_will_install(host: Host, proxy: int) -> None:
    _, plugin = plugins.findings(QEMU)
    assert plugin.state is State.NOTE
    assert "a build installs it" in plugin.hint


def test_check_fails_without_plugin_and_network(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.offline()
    assert cli.run(["check", "--json"]) == MissingTool.exit_code
    findings = {one["name"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
    plugin = findings["packer plugin qemu"]
    assert plugin["state"] == "stops a build"
    assert "Packer 1.16.0 has no plugin qemu >= 1.1.0, < 2.0.0" in plugin["found"]
    assert "packer plugins install" in plugin["hint"]
