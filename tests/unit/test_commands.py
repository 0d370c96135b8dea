"""The command line: results on stdout, errors on stderr with what to do, documented exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ami_builder import __version__
from ami_builder.build import build as build_module
from ami_builder.cli import app as cli
from ami_builder.config.schema import Image
from ami_builder.core.errors import BuildFailed, Interrupted
from ami_builder.core.options import Arch
from ami_builder.core.records import Outcome
from ami_builder.qemu import target
from ami_builder.qemu.hardware import Accelerator
from ami_builder.state.workspace import Workspace
from ami_builder.system import processes
from tests.stored_images import stored

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bild"], "build"),
        (["build", "--forse"], "--force"),
        (["build", "dusk"], "dask"),
        (["build", "--set", "arch=arm64"], "before the command: ami-builder --set … build"),
        (["build", "--all", "dask"], "use --all, or names"),
        (["--set", "memory.reserv=5%", "build"], "reserve"),
        (["--set", "memory.reserve", "build"], "KEY=VALUE"),
        (["--set", "memory.reserve=lots", "build"], "memory.reserve"),
        (["--config", "nowhere.toml", "build"], "nowhere.toml"),
        (["verify", "./no-such.qcow2"], "no-such.qcow2"),
        (["verify", "--datasource", "azure"], "ec2"),
        (["verify", "--memory", "2GB"], "2GiB"),
        (["verify"], "has not been built yet"),
        (["run", "--user-data", "nowhere.yaml"], "nowhere.yaml"),
        (["render", "--output", "/"], "already exists"),
        (["render", "--output", "/dev/null/files"], "/dev/null"),
        (["--config", f"/tmp/{'x' * 300}.toml", "config", "show"], "File name too long"),
        (["build", ""], "is empty"),
        (["verify", ""], "is empty"),
        (["nightly", ""], "is empty"),
        (["promote", "", "testing"], "is empty"),
        (["revoke", "", "--reason", "x"], "is empty"),
        (["certificates", ""], "is empty"),
        (["run", "--instance-store", "x"], "--instance-store x: "),
        (["run", "--instance-store", "1"], "--instance-store 1: expected at least 1MiB"),
    ],
)
def test_wrong_usage_says_what_is_right(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert cli.run(arguments) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("command", ["list", "show", "prune", "promote"])
@pytest.mark.parametrize("damage", ["cut off", "no zone"])
def test_a_damaged_image_is_not_passed_over(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], command: str, damage: str
) -> None:
    """Else another one, perhaps revoked, would be the newest."""
    stored(workspace, "a")
    newest = stored(workspace, "b").path.with_name("artifact.json")
    text = newest.read_text()
    newest.write_text(text[:50] if damage == "cut off" else re.sub(r'("created": ".*)Z"', r'\1"', text))
    assert newest.read_text() != text
    more = {"show": ["dask"], "promote": ["dask", "testing"]}.get(command, [])
    assert cli.run([command, *more]) == 2
    assert f"{newest} is damaged" in capsys.readouterr().err


def test_a_run_whose_record_is_damaged_is_there(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = workspace.runs_dir / "20260101T000000Z-abcdef"
    folder.mkdir()
    (folder / "record.json").write_text("{")
    assert cli.run(["report", folder.name]) == 2
    assert f"{folder} has no record that can be read" in capsys.readouterr().err


@pytest.mark.parametrize("home", ["~nobody-of-this-name", "/dev/null"])
def test_a_home_that_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: str
) -> None:
    monkeypatch.setenv("AMI_BUILDER_HOME", home)
    for command in ("list", "prune"):
        assert cli.run([command]) == 2
        err = capsys.readouterr().err
        assert home in err
        assert "internal error" not in err


def test_help_and_no_command(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "Build and verify" in shown
    assert shown.index("build") < shown.index("verify") < shown.index("nightly") < shown.index("gc")
    assert cli.run([]) == 2


def test_version_needs_no_imports() -> None:
    """Scripts ask for it often: it must not pay for typer, pydantic or rich."""
    program = (
        "import sys; sys.argv = ['ami-builder', '--version']\n"
        "from ami_builder.cli import main; main()\n"
        "heavy = {'typer', 'pydantic', 'rich', 'jinja2', 'pytest'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == f"ami-builder {__version__}\n"


def test_list_shows_verdicts(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == []
    for passed, word in ((None, "not verified"), (True, "passed"), (False, "FAILED")):
        one = stored(workspace, "a", passed=passed)
        assert cli.run(["list"]) == 0
        shown = capsys.readouterr().out
        assert word in shown
        assert str(one.path) in shown


def test_show_tells_of_one_image(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = stored(workspace, "a"), stored(workspace, "b", passed=False)
    assert cli.run(["show", "aaaa"]) == 0
    shown = capsys.readouterr().out
    assert f"where\t{good.path}" in shown
    assert "verdict\tpassed" in shown
    assert cli.run(["show", str(bad.path)]) == 0
    assert "failed on 2 GiB boot\tmemory limit chain: x" in capsys.readouterr().out
    stored(workspace, "d", outcome=Outcome.INCONCLUSIVE)
    assert cli.run(["show", "dddd"]) == 0
    shown = capsys.readouterr().out
    assert "verdict\tinconclusive" in shown
    assert "inconclusive on 2 GiB boot\tmemory limit chain: x" in shown
    assert "fail" not in shown.lower()
    assert cli.run(["list"]) == 0
    assert "\tinconclusive\t" in capsys.readouterr().out
    assert cli.run(["show", "bbbb", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["artifact"]["digest"] == bad.artifact.digest
    assert cli.run(["show", "cccc"]) == 2
    assert "ami-builder list" in capsys.readouterr().err


def test_a_result_is_one_json_object(
    workspace: Workspace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = stored(workspace, "a")
    built = build_module.Built(stored=one, unchanged=True)
    monkeypatch.setattr(build_module, "build", lambda *_: built)
    assert cli.run(["build", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["schema_version"] == 1
    assert answer["unchanged"] is True
    assert answer["artifact"]["location"] == str(one.path)
    assert cli.run(["--quiet", "build"]) == 0
    assert capsys.readouterr().out == f"{one.path}\n"


def test_one_of_several_images_fails(
    workspace: Workspace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "ami-builder.toml"
    file.write_text('[images.dask]\n[images.graviton]\narch = "arm64"\n')
    one = stored(workspace, "a")
    asked: list[tuple[str, str]] = []

    def build(image: Image, *_: object) -> build_module.Built:
        asked.append((image.name, image.arch))
        if image.arch is Arch.ARM64:
            raise BuildFailed("no luck")
        return build_module.Built(stored=one, unchanged=False)

    monkeypatch.setattr(build_module, "build", build)
    for words in (["--all"], ["dask", "graviton", "dask"]):
        assert cli.run(["--quiet", "--config", str(file), "build", *words]) == BuildFailed.exit_code
        printed = capsys.readouterr()
        assert printed.out == f"{one.path}\n"
        assert "no luck" in printed.err
    assert sorted(set(asked)) == [("dask", "amd64"), ("graviton", "arm64")]
    assert len(asked) == 4
    assert cli.run(["--config", str(file), "build", "--json", "--all"]) == BuildFailed.exit_code
    assert [each["unchanged"] for each in json.loads(capsys.readouterr().out)["images"]] == [False]
    assert cli.run(["--config", str(file), "build", "--all", "dask"]) == 2


def test_render_shows_and_writes_the_guest(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["--set", "memory.reserve=64MiB", "render"]) == 0
    assert "reserve_bytes=67108864" in capsys.readouterr().out
    assert cli.run(["render", "--output", str(tmp_path / "guest")]) == 0
    script = tmp_path / "guest" / "usr" / "local" / "sbin" / "start-dask"
    assert script.stat().st_mode & 0o111
    assert str(script) in capsys.readouterr().out


@pytest.mark.needs("packer", "qemu-img")
def test_check_names_what_is_missing(
    workspace: Workspace,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = processes.find

    def find(program: str) -> Path:
        return real("mmdebstrap-that-is-not-there" if program == "mmdebstrap" else program)

    monkeypatch.setattr(processes, "find", find)
    monkeypatch.setattr(processes, "PACKAGES", {"mmdebstrap-that-is-not-there": "mmdebstrap"})
    assert cli.run(["check", "--json"]) == 3
    answer = json.loads(capsys.readouterr().out)
    assert answer["ready"] is False
    missing = next(f for f in answer["findings"] if f["name"] == "mmdebstrap")
    assert missing["state"] == "stops a build"
    assert "apt-get install mmdebstrap" in missing["hint"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["config", "show", "--set", "memory.reserve=5%"], "ami-builder --set … config show"),
        (["show", "dask", "--quiet"], "ami-builder --quiet … show"),
        (["--json", "list"], "write it after the command: ami-builder COMMAND --json"),
        (["--target", "aws", "check"], "write it after the command: ami-builder COMMAND --target"),
        (["--nosuch", "check"], "No such option"),
    ],
)
def test_a_flag_in_the_wrong_place_is_shown_its_own(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert cli.run(arguments) == 2
    assert said in capsys.readouterr().err


def test_check_goes_on_after_a_wrong_accelerator(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMI_BUILDER_ACCELERATOR", "yes")
    assert cli.run(["check", "--json"]) in (2, 3)
    names = {one["name"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
    assert names["accelerator"]["state"] == "stops a build"
    assert "yes" in names["accelerator"]["found"]
    assert "disk space" in names


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (OSError(28, "No space left on device", "/x/y"), 4, "AMI_BUILDER_HOME"),
        (OSError(12, "Cannot allocate memory", "ssh"), 4, "short of memory or processes: Cannot allocate"),
        (OSError(5, "Input/output error"), 1, "internal error"),
        (ZeroDivisionError("division"), 1, "--debug"),
        (Interrupted("stopped by SIGINT"), 130, "stopped by SIGINT"),
    ],
)
def test_whatever_happens_there_is_no_traceback(
    workspace: Workspace,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: int,
    said: str,
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(build_module, "build", broken)
    assert cli.run(["build"]) == status
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(("is_up", "status"), [(True, 0), (False, 130)])
def test_stopping_a_machine_that_runs_is_its_normal_end(
    workspace: Workspace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    is_up: bool,
    status: int,
) -> None:
    stored(workspace, "a")

    def stopped(*_: object, on_ready: Callable[[target.Launched], None], **__: object) -> None:
        if is_up:
            on_ready(target.Launched(ssh="ssh x", tunnel="ssh x -N", console_log=tmp_path))
        raise Interrupted("stopped by SIGINT")

    monkeypatch.setattr(target, "launch", stopped)
    assert cli.run(["run"]) == status
    assert ("error" in capsys.readouterr().err) is not is_up


def test_debug_shows_the_traceback(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(build_module, "build", broken)
    assert cli.run(["--debug", "build"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.needs("packer", "qemu-img")
def test_a_corrupt_base_stops_before_packer(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base.qcow2"
    base.write_bytes(b"QFI\xfb" + b"\0" * 2000)

    def no_trial(*_: object, **__: object) -> tuple[Accelerator, str]:
        raise AssertionError("nothing may boot")

    monkeypatch.setattr("ami_builder.qemu.bake.choose_accelerator", no_trial)
    settings = ["--set", f"base.source={base}", "--set", "base.ssh_user=debian"]
    settings += ["--set", "container.source=registry", "--set", "container.reference=127.0.0.1:1/dask:1"]
    assert cli.run([*settings, "build"]) in {2, 4}
    shown = capsys.readouterr().err
    assert "base.qcow2" in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(("flag", "word"), [("--instance-type", "m6i.large")])
def test_verify_refuses_flags_of_another_target(
    flag: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk.qcow2"
    disk.touch()
    assert cli.run(["verify", str(disk), flag, word]) == 2
    assert f"{flag}: it is for an AMI" in capsys.readouterr().err
