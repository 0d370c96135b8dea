"""What runs a night by itself: the systemd units, and the GitHub workflow with the steps that it runs."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ami_builder.core import errors
from ami_builder.nightly import webhook
from tests.fake_programs import calls, fake

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "scripts" / "systemd"
SERVICE = UNITS / "ami-builder-nightly@.service"
TIMER = UNITS / "ami-builder-nightly@.timer"
WORKFLOW = ROOT / ".github" / "workflows" / "nightly.yml"
INSTALLED = "/opt/ami-builder"
WORTH_ANOTHER_TRY = {
    errors.CloudFailed.exit_code,
    errors.TimedOut.exit_code,
    errors.Inconclusive.exit_code,
}


class _Unit(configparser.RawConfigParser):
    """A unit file, of whose repeated settings each section keeps all lines."""

    def __init__(self, path: Path) -> None:
        super().__init__(strict=False, interpolation=None, delimiters=("=",))
        self.optionxform = str  # type: ignore[assignment,method-assign]
        self.read(path, encoding="utf-8")
        self.lines = path.read_text(encoding="utf-8").splitlines()

    def all(self, key: str) -> list[str]:
        return [line.partition("=")[2] for line in self.lines if line.startswith(f"{key}=")]


def _codes() -> set[int]:
    return {kind.exit_code for kind in vars(errors).values()
            if isinstance(kind, type) and issubclass(kind, errors.AmiBuilderError)}  # fmt: skip


@pytest.fixture
def verify(tmp_path: Path) -> Any:
    """Check copies of the units with systemd itself, as if this checkout were the installed one."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed (Debian's package systemd)")

    def check(change: tuple[str, str] = ("", "")) -> subprocess.CompletedProcess[str]:
        for unit in (SERVICE, TIMER):
            text = unit.read_text(encoding="utf-8").replace(INSTALLED, str(ROOT))
            assert change[0] in text or unit is TIMER
            (tmp_path / unit.name).write_text(text.replace(*change) if change[0] else text, encoding="utf-8")
        return subprocess.run(
            ["systemd-analyze", "verify", "--man=no", tmp_path / TIMER.name, tmp_path / SERVICE.name],
            capture_output=True,
            text=True,
            check=False,
        )

    return check


def test_systemd_takes_the_units(verify: Any) -> None:
    done = verify()
    assert "ami-builder-nightly" not in done.stderr
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "change",
    [
        ("Restart=on-failure", "Restart=always"),  # not allowed for what ends by itself
        ("scripts/ami-builder nightly", "scripts/no-such nightly"),
        ("SetCredential=webhook:\\n", "SetCredential=webhook:"),
    ],
)
def test_systemd_would_say_if_it_did_not(verify: Any, change: tuple[str, str]) -> None:
    assert "ami-builder-nightly" in verify(change).stderr


def test_the_service_tries_again_what_is_worth_it_and_nothing_else() -> None:
    unit = _Unit(SERVICE)["Service"]
    assert unit["Type"] == "oneshot"
    assert unit["Restart"] == "on-failure"
    final = {int(code) for code in unit["RestartPreventExitStatus"].split()}
    held = 9
    assert final == (_codes() | {held}) - WORTH_ANOTHER_TRY
    # Held is neither hidden as a success nor tried again.
    assert {int(code) for code in unit["SuccessExitStatus"].split()} == {errors.Interrupted.exit_code}


def test_the_service_lets_a_night_clean_up() -> None:
    unit = _Unit(SERVICE)["Service"]
    assert unit["KillSignal"] == "SIGTERM"
    assert unit["KillMode"] == "mixed"
    assert unit["TimeoutStopSec"] == "10min"
    assert unit["OOMPolicy"] == "continue"


def test_the_service_can_write_its_state_alone_and_use_user_namespaces() -> None:
    unit = _Unit(SERVICE)
    service = unit["Service"]
    assert service["ProtectSystem"] == "strict"
    assert service["User"] == "ami-builder"
    assert f"AMI_BUILDER_HOME=/var/lib/{service['StateDirectory']}" in unit.all("Environment")
    assert service["DevicePolicy"] == "closed"
    assert service["DeviceAllow"] == "/dev/kvm rw"
    # Each of these implies NoNewPrivileges, with which newuidmap fails, and so mmdebstrap.
    forbidden = {
        "NoNewPrivileges", "DynamicUser", "LockPersonality", "MemoryDenyWriteExecute", "PrivateDevices",
        "ProtectClock", "ProtectHostname", "ProtectKernelLogs", "ProtectKernelModules",
        "ProtectKernelTunables", "RestrictAddressFamilies", "RestrictNamespaces", "RestrictRealtime",
        "RestrictSUIDSGID", "SystemCallArchitectures", "SystemCallFilter", "SystemCallLog",
    }  # fmt: skip
    assert not forbidden & set(service)
    assert {"CAP_SETUID", "CAP_SETGID", "CAP_DAC_OVERRIDE", "CAP_SYS_ADMIN"} <= set(
        service["CapabilityBoundingSet"].split()
    )


def test_the_webhook_is_a_credential_and_stands_in_no_file_of_ours() -> None:
    unit = _Unit(SERVICE)
    assert unit.all("LoadCredential") == ["webhook:/etc/ami-builder/webhook"]
    assert f"{webhook.FILE_VARIABLE}=%d/webhook" in unit.all("Environment")
    secret = "${{ secrets.AMI_BUILDER_WEBHOOK }}"
    (step,) = [step for step in _steps() if secret in str(step)]
    assert step["env"][webhook.VARIABLE] == secret
    for text in (SERVICE.read_text(), TIMER.read_text(), WORKFLOW.read_text()):
        assert f"{webhook.VARIABLE}=" not in text
        assert "hooks." not in text


def test_without_a_file_the_credential_tells_nobody(tmp_path: Path) -> None:
    """What stands in for it is a line's end."""
    assert _Unit(SERVICE).all("SetCredential") == ["webhook:\\n"]
    (tmp_path / "webhook").write_text("\n")
    assert webhook.notify_if_set({webhook.FILE_VARIABLE: str(tmp_path / "webhook")}, "text") == ""


def test_the_timer_makes_up_for_a_night() -> None:
    timer = _Unit(TIMER)["Timer"]
    assert timer["Persistent"] == "true"
    assert timer["RandomizedDelaySec"] == "1h"
    assert _Unit(TIMER)["Install"]["WantedBy"] == "timers.target"
    assert TIMER.stem == SERVICE.stem


def _workflow() -> dict[Any, Any]:
    loaded: dict[Any, Any] = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    return loaded


def _steps() -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = _workflow()["jobs"]["nightly"]["steps"]
    return steps


def _step(part: str) -> dict[str, Any]:
    (step,) = [step for step in _steps() if part in step.get("name", "") or part in step.get("uses", "")]
    return step


def test_the_workflow_asks_for_no_more_than_it_needs() -> None:
    workflow = _workflow()
    # YAML 1.1 takes the key `on` for true.
    assert set(workflow[True]) == {"schedule", "workflow_dispatch"}
    assert workflow["permissions"] == {"contents": "read", "id-token": "write"}
    assert workflow["concurrency"]["cancel-in-progress"] is False
    assert workflow["jobs"]["nightly"]["if"] == "vars.AMI_BUILDER_ROLE != ''"
    assert _step("configure-aws-credentials")["with"]["role-to-assume"] == "${{ vars.AMI_BUILDER_ROLE }}"
    assert "aws-access-key-id" not in WORKFLOW.read_text()


def test_workflows_pin_each_action_to_a_commit() -> None:
    for workflow in (*WORKFLOW.parent.glob("*.yml"), ROOT / "action.yml"):
        used = re.findall(r"^[^#\n]*uses: (.*)", workflow.read_text(), re.MULTILINE)
        assert used, workflow
        assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}   # v\d+\.\d+\.\d+", one) for one in used), used


def test_the_night_ends_before_its_credentials_and_its_job() -> None:
    """With the time to clean up, and to keep what the next night goes on from."""
    within = re.search(r"--kill-after=(\d+)m (\d+)m", _step("Nightly run")["run"])
    assert within is not None
    longest = int(within[1]) + int(within[2])
    assert longest < _workflow()["jobs"]["nightly"]["timeout-minutes"]
    assert longest * 60 < _step("configure-aws-credentials")["with"]["role-duration-seconds"]


def test_state_and_report_are_kept_however_a_night_ends() -> None:
    restored, saved = _step("actions/cache/restore"), _step("actions/cache/save")
    assert restored["with"]["path"] == saved["with"]["path"] == "${{ env.AMI_BUILDER_HOME }}/state"
    assert restored["with"]["key"] == saved["with"]["key"]
    assert saved["with"]["key"].startswith(restored["with"]["restore-keys"])
    for kept in (saved, _step("upload-artifact"), _step("Collect the report")):
        assert kept["if"] == "always()"
    assert _step("upload-artifact")["with"]["path"] == "report/"


class Runner:
    """A GitHub runner as far as the steps of the workflow see it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.summary = folder / "summary"
        self.output = folder / "output"
        for file in (self.summary, self.output):
            file.touch()

    def ends(self, code: int, script: str = "") -> None:
        """Let the night do what `script` says, and end with a code."""
        fake(self.folder / "scripts", "ami-builder", f"{script}\nexit {code}")

    def run(self, step: str, images: str = "") -> subprocess.CompletedProcess[str]:
        """Run a step as GitHub does with `shell: bash`."""
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", _step(step)["run"]],
            cwd=self.folder,
            env={
                "PATH": os.environ["PATH"],
                "IMAGES": images,
                "AMI_BUILDER_HOME": str(self.home),
                "GITHUB_OUTPUT": str(self.output),
                "GITHUB_STEP_SUMMARY": str(self.summary),
            },
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


@pytest.mark.parametrize(
    ("code", "ends", "said"),
    [
        (0, 0, ""),
        (4, 4, ""),
        (6, 6, ""),
        (9, 0, "::warning title=ami-builder::on hold: a person must decide, see the summary\n"),
        (
            10,
            10,
            "::warning title=ami-builder::inconclusive: the host was too busy, the next run verifies again\n",
        ),
        (
            124,
            124,
            "::error title=ami-builder::stopped after 210 minutes; the next run continues\n",
        ),
    ],
)
def test_the_job_ends_as_the_night_did_and_a_held_one_shows(
    runner: Runner, code: int, ends: int, said: str
) -> None:
    runner.ends(code)
    done = runner.run("Nightly run")
    assert (done.returncode, done.stdout) == (ends, said), done.stderr
    assert runner.output.read_text() == f"code={code}\n"
    assert calls(runner.folder / "scripts", "ami-builder") == ["nightly --target aws"]


def test_images_are_words_and_never_commands(runner: Runner) -> None:
    runner.ends(0)
    runner.run("Nightly run", images='dask "$(touch hacked)" ; touch hacked')
    assert calls(runner.folder / "scripts", "ami-builder") == [
        'nightly --target aws dask "$(touch hacked)" ; touch hacked'
    ]
    assert not (runner.folder / "hacked").exists()


def _night(state: Path, name: str, text: str) -> str:
    """Return the shell script of a night that leaves what the real one does."""
    folder = state / "nights" / name / text
    return (
        # A file's time is the clock's at its last tick, and a real night takes longer than that.
        f"sleep 0.05 && mkdir -p {folder} && echo '{{}}' >{folder}/journal.jsonl"
        f" && echo '# {text}' >{folder}/summary.md"
        f" && ln -sfn {text} {folder.parent}/latest"
    )


def test_the_report_is_that_of_this_night(runner: Runner) -> None:
    state = runner.home / "state"
    subprocess.run(["sh", "-c", _night(state, "old.aws", "years-ago")], check=True)
    for file in (state / "nights" / "old.aws" / "years-ago").iterdir():
        os.utime(file, (1, 1))
    log = state / "runs" / "run-1"
    runner.ends(
        6, f"{_night(state, 'dask.aws', 'tonight')}; mkdir -p {log}/logs; echo {{}} >{log}/record.json"
    )
    assert runner.run("Nightly run").returncode == 6
    assert runner.run("Collect the report").returncode == 0
    assert runner.summary.read_text() == "# tonight\n"
    report = runner.folder / "report"
    assert (report / "dask.aws" / "journal.jsonl").is_file()
    assert (report / "runs" / "run-1" / "record.json").is_file()
    assert not (report / "old.aws").exists()


def test_a_night_that_never_began_leaves_a_report_too(runner: Runner) -> None:
    done = runner.run("Collect the report")
    assert (done.returncode, done.stderr) == (0, "")
    assert (runner.folder / "report").is_dir()
