"""The whole flow against the loopback EC2 without a VM: real Packer and boto3, no machine to log in to.

Packer launches, stops, registers and tags as ever; only what it would do by ssh is left out of its template.
In verification an instance is really launched and terminated, and then said to have passed.
"""

from __future__ import annotations

import io
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tenacity
from botocore.retries import standard

from ami_builder.aws import bake, images, instances, machine, matrix, network, session
from ami_builder.build import packer
from ami_builder.cli import app as cli
from ami_builder.core.records import CheckResult, Measurement, Outcome
from ami_builder.selftest import run as selftest
from ami_builder.system import processes
from ami_builder.verify.machine import Machine, MachineResult
from tests.packer_plugins import needs_plugin

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path, PurePosixPath

    import pytest

    from ami_builder.build.guest import RenderedFile
    from ami_builder.config.schema import Image

SETTINGS = (
    *("--set", "container.source=registry"),
    *("--set", "container.reference=registry.example/team/dask:1"),
    *("--set", "aws.source_cidrs=127.0.0.1/32"),
    *("--set", "aws.region=us-east-1"),
)


def without_ssh(monkeypatch: pytest.MonkeyPatch, running: Callable[[], object] = lambda: None) -> None:
    """Let Packer's machine do nothing, and verification believe it; `running` is called while it runs."""
    needs_plugin(bake.SOURCE)
    stage = packer.stage

    def staged(
        directory: Path,
        source: packer.Source,
        guest: Mapping[PurePosixPath, RenderedFile],
        variables: Mapping[str, packer.Variable],
        *,
        uploads: Sequence[Path] = (),
    ) -> None:
        stage(directory, source, guest, {**variables, "poll_seconds": 1}, uploads=uploads)
        template = directory / "amazon.pkr.hcl"
        text = template.read_text()
        assert '"ssh"' in text
        text = text.replace('"ssh"', f'"none"\n  max_retries = {PACKER_RETRIES}')
        template.write_text(text)
        (directory / "build.pkr.hcl").write_text(f"build {{\n  {source.in_build()}\n}}\n")

    def verified(image: Image, machine: Machine, *, work: Path, **_: object) -> MachineResult:
        with ExitStack() as stack:
            machine.start(stack, work / machine.name, "#cloud-config\n", "ssh-ed25519 AAAA x")
            running()
            result = CheckResult(
                name="it ran",
                phase="boot",
                machine=machine.name,
                outcome=Outcome.PASSED,
                seconds=0,
                message="",
            )
            one = Measurement(machine=machine.name, phase="boot", total=machine.memory, available=1 << 30)
        return MachineResult(results=(result,), measured=(one,))

    monkeypatch.setattr(packer, "stage", staged)
    monkeypatch.setattr(matrix, "verify_machine", verified)


PACKER_RETRIES = 3
"""As the AWS SDK has it; Packer's own are many, and take minutes."""
READ_SECONDS = 3.0
"""How long an answer is waited for once `in_haste`, which a busy host may need; Packer waits for ever."""


def in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for a moment only where minutes would be waited between attempts."""
    monkeypatch.setattr(standard.ExponentialBackoff, "delay_amount", lambda *_: 0.01)
    monkeypatch.setattr(session, "_READ_SECONDS", READ_SECONDS)
    # It makes no call, and what it looks at is the same in every build.
    monkeypatch.setattr(packer, "validate", lambda *_: None)
    monkeypatch.setattr(bake, "PAUSE", tenacity.wait_fixed(0.01))
    monkeypatch.setattr(bake, "ATTEMPTS", 2)
    monkeypatch.setattr(session, "_LOOK_SECONDS", 0.5)
    monkeypatch.setattr(processes, "STOP_SECONDS", 5.0)
    monkeypatch.setattr(selftest, "PATIENCE", 0.05)
    monkeypatch.setattr(network, "_DELETE_SECONDS", 5.0)
    for module in (machine, images):
        monkeypatch.setattr(module, "_POLL_SECONDS", 0.05)
    for module in (instances, network):
        monkeypatch.setattr(module, "_SEEN_SECONDS", 2.0)


def ami_builder(*arguments: str, settings: Sequence[str] = SETTINGS) -> int:
    """Run one command in this process and return its exit code."""
    return cli.run([*settings, *arguments])


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """How a command ended, and what it showed."""

    status: int
    out: str
    err: str


def captured(*arguments: str, settings: Sequence[str] = SETTINGS) -> Ran:
    """Run one command in this process."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = ami_builder(*arguments, settings=settings)
    return Ran(status=status, out=out.getvalue(), err=err.getvalue())
