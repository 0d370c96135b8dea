"""The whole flow against the loopback EC2 without a VM: real Packer and boto3, no machine to log in to.

Packer launches, stops, registers and tags as ever; only what it would do by ssh is left out of its template.
In verification an instance is really launched and terminated, and then said to have passed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath

import pytest

from ami_builder import commands
from ami_builder.adapters import packer
from ami_builder.console import Step
from ami_builder.model import CheckResult, Image, Measurement, Outcome
from ami_builder.pipeline import verify
from ami_builder.pipeline.prove import Proof
from ami_builder.pipeline.target import Machine
from ami_builder.render import RenderedFile
from ami_builder.workspace import Run

NO_SSH = """
build {
  sources = ["source.amazon-ebs.image"]
}
"""
SETTINGS = (
    *("--set", "container.source=registry"),
    *("--set", "container.reference=registry.example/team/dask:1"),
    *("--set", "aws.source_cidrs=127.0.0.1/32"),
    *("--set", "aws.region=us-east-1"),
)


def without_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Packer's machine do nothing, and verification believe the machine."""
    stage = packer.stage

    def staged(
        directory: Path,
        guest: Mapping[PurePosixPath, RenderedFile],
        variables: Mapping[str, packer.Variable],
        *,
        uploads: Sequence[Path] = (),
    ) -> None:
        stage(directory, guest, {**variables, "poll_seconds": 1}, uploads=uploads)
        template = directory / "amazon.pkr.hcl"
        text = template.read_text()
        assert '"ssh"' in text
        template.write_text(text.replace('"ssh"', '"none"'))
        (directory / "build.pkr.hcl").write_text(NO_SSH)

    def proved(image: Image, machine: Machine, run: Run, step: Step) -> Proof:
        with step.step(f"machine of {machine.name}"), ExitStack() as stack:
            machine.start(stack, run.work / machine.name, "#cloud-config\n", "ssh-ed25519 AAAA x")
            result = CheckResult(
                name="it ran",
                phase="boot",
                machine=machine.name,
                outcome=Outcome.PASSED,
                seconds=0,
                message="",
            )
            one = Measurement(machine=machine.name, phase="boot", total=machine.memory, available=1 << 30)
        return Proof(results=(result,), measured=(one,))

    monkeypatch.setattr(packer, "stage", staged)
    monkeypatch.setattr(verify, "prove", proved)


def ami_builder(*arguments: str) -> int:
    """Run one command in this process and return its exit code."""
    return commands.run([*SETTINGS, *arguments])
