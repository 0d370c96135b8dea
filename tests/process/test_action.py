"""The composite action, step by step, as a job in somebody else's repository runs it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fake_programs import calls, fake

ACTION = Path(__file__).parents[2] / "action.yml"
_BUILT = {
    "artifact": {"location": "ami-0123"},
    "verdict": {"results": [{"outcome": "passed"}, {"outcome": "failed"}, {"outcome": "passed"}]},
}

pytestmark = pytest.mark.needs("jq")


def _steps() -> dict[str, dict[str, Any]]:
    steps = yaml.safe_load(ACTION.read_text(encoding="utf-8"))["runs"]["steps"]
    return {step.get("name", step.get("uses")): step for step in steps}


class Job:
    """A job on a GitHub runner as far as the steps of the action see it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output, self.summary = folder / "output", folder / "summary"
        for file in (self.output, self.summary):
            file.touch()

    def ami_builder(self, script: str) -> None:
        fake(self.folder / "scripts", "ami-builder", script)

    def run(self, step: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", _steps()[step]["run"]],
            cwd=self.folder,
            env={
                "PATH": os.environ["PATH"],
                "GITHUB_ACTION_PATH": str(self.folder),
                "GITHUB_OUTPUT": str(self.output),
                "GITHUB_STEP_SUMMARY": str(self.summary),
                "RUNNER_TEMP": str(self.folder),
                **env,
            },
            capture_output=True,
            text=True,
            check=False,
        )

    def build(self, *, image: str = "", arguments: str = "") -> subprocess.CompletedProcess[str]:
        return self.run("Build and verify", TARGET="aws", IMAGE=image, ARGUMENTS=arguments)

    @property
    def outputs(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.output.read_text().splitlines())


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_the_outputs_name_the_artifact_and_its_verdict(job: Job) -> None:
    job.ami_builder(f"echo '{json.dumps(_BUILT)}'")
    done = job.build()
    assert done.returncode == 0, done.stderr
    assert job.outputs["artifact"] == "ami-0123"
    assert json.loads(Path(job.outputs["result"]).read_text()) == _BUILT
    assert job.summary.read_text() == "ami-builder: `ami-0123`, checks: 1 failed, 2 passed\n"


def test_an_image_without_a_verdict(job: Job) -> None:
    job.ami_builder(f"echo '{json.dumps({**_BUILT, 'verdict': None})}'")
    assert job.build(arguments="--no-verify").returncode == 0
    assert job.summary.read_text() == "ami-builder: `ami-0123`, checks: none ran\n"


def test_several_images_are_all_named(job: Job) -> None:
    other = {"artifact": {"location": "ami-4567"}, "verdict": None}
    job.ami_builder(f"echo '{json.dumps({'images': [_BUILT, other]})}'")
    assert job.build(arguments="--all\n--refresh\n").returncode == 0
    assert calls(job.folder / "scripts", "ami-builder") == ["build --target aws --json --all --refresh"]
    assert job.outputs["artifact"] == "ami-0123 ami-4567"
    assert job.summary.read_text() == "ami-builder: `ami-0123 ami-4567`, checks: 1 failed, 2 passed\n"


def test_inputs_are_words_and_never_commands(job: Job) -> None:
    job.ami_builder(f"echo '{json.dumps(_BUILT)}'")
    job.build(image="$(touch hacked)", arguments="--refresh ; touch hacked")
    assert calls(job.folder / "scripts", "ami-builder") == [
        "build --target aws --json --refresh ; touch hacked $(touch hacked)"
    ]
    assert not (job.folder / "hacked").exists()


def test_a_failed_build_fails_the_job_and_is_reported(job: Job) -> None:
    job.ami_builder("exit 5")
    assert job.build().returncode == 5
    run = job.folder / "run"
    (run / "logs").mkdir(parents=True)
    for file in ("report.html", "record.json", "logs/packer.log"):
        (run / file).touch()
    job.ami_builder(f"echo {run}/report.html")
    done = job.run("Report", FOLDER=job.outputs["folder"])
    assert done.returncode == 0, done.stderr
    kept = {file.name for file in Path(job.outputs["folder"]).rglob("*")}
    assert kept == {"result.json", "report.html", "record.json", "logs", "packer.log"}


def test_a_build_that_recorded_nothing_has_no_report(job: Job) -> None:
    job.ami_builder("exit 2")
    assert job.build().returncode == 2
    assert job.run("Report", FOLDER=job.outputs["folder"]).returncode == 0


def test_every_input_reaches_a_step_through_its_environment() -> None:
    """An expression inside a script would be code of whoever sets the input."""
    assert not [name for name, step in _steps().items() if "${{" in step.get("run", "")]
