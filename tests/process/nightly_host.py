"""Nights without machines: a site whose images are a few bytes and whose machines say what they are told.

What is real: the configuration, the pipeline, the journals, the channels, the workspace, pruning. What is not
imitated: Packer, QEMU, and what the checks find out; tests/vm has a real night.

`begin` runs one night in a process of its own the way `ami-builder nightly` does; it can be killed after the
Nth entry that it makes in its journal.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import time_machine

from ami_builder.build.inputs import Inputs
from ami_builder.cli import app as cli
from ami_builder.cli import nightly as command
from ami_builder.core.errors import BuildFailed
from ami_builder.core.records import Artifact, CheckResult, Measurement, Outcome, TargetKind
from ami_builder.qemu.target import QemuTarget
from ami_builder.state.journal import NightlyJournal
from ami_builder.state.workspace import Run, StoredImage, Workspace
from ami_builder.verify.machine import MachineResult

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.context import ForkServerProcess

    from ami_builder.config.schema import Image
    from ami_builder.console import Step

GIB = 1 << 30
WORLD = "world.json"
SECONDS = 300.0
"""How long a night may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What a night meets; stands in FOLDER/world.json."""

    inputs: str = "one"
    """What the image is made of: another text is another digest."""
    archive: bool = True
    """Whether the package archive answers."""
    bakes: bool = True
    """Whether Packer succeeds."""
    passes: bool = True
    """Whether the checks pass."""
    busy: bool = False
    """Whether the host is too busy to judge an image."""
    available: int = 1_780_000_000
    """What is left to Dask on the machine."""
    packages: tuple[str, ...] = ("systemd=257",)
    webhook: str = ""
    """Who is told of a night that runs in a process of its own."""


def told(folder: Path) -> World:
    """Return the world as it stands in a folder."""
    values = json.loads((folder / WORLD).read_text())
    return World(**values | {"packages": tuple(values["packages"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeTarget(QemuTarget):
    """This host, but baking writes some bytes and notes that it did in FOLDER/bakes; no machine is booted."""

    folder: Path

    def gather(self, image: Image, *, refresh: bool) -> Inputs:
        """Digest what the world says, as the archive would be asked."""
        world = told(self.folder)
        if not world.archive:
            raise BuildFailed("the package archive does not answer")
        digest = hashlib.sha256(f"{image.name} {world.inputs}".encode()).hexdigest()
        return Inputs(image=image, guest={}, base_digest="b", container_digest="c", digest=digest)

    def bake(
        self, inputs: Inputs, run: Run, step: Step, *, again: bool, on_boot: Callable[[float], None]
    ) -> StoredImage:
        """Write a disk of a few bytes."""
        world = told(self.folder)
        with (self.folder / "bakes").open("a") as file:
            file.write(f"{inputs.digest}\n")
        if not world.bakes:
            raise BuildFailed("provisioner 10-guest.sh failed")
        disk = run.work / "image.qcow2"
        disk.write_bytes(inputs.digest.encode())
        packages = run.directory / "packages.txt"
        packages.write_text("\n".join(world.packages) + "\n")
        artifact = Artifact(
            image=inputs.image.name,
            target=self.kind,
            location="",
            digest=inputs.digest,
            created=datetime.now(UTC),
            run_id=run.record.run_id,
            size=0,
        )
        return self.workspace.store(artifact, disk, packages)

    def verify(
        self, image: Image, stored: StoredImage, run: Run, step: Step, evidence: Path
    ) -> Sequence[MachineResult]:
        """Say what the world says of a machine of each configured size."""
        world = told(self.folder)
        outcome = Outcome.PASSED if world.passes else Outcome.FAILED
        if world.busy:
            outcome = Outcome.INCONCLUSIVE
        results = []
        for memory in image.verify.memory:
            machine = f"{memory // GIB} GiB"
            result = CheckResult(
                name="the chain is equal",
                phase="boot",
                machine=machine,
                outcome=outcome,
                seconds=0,
                message="x",
            )
            one = Measurement(machine=machine, phase="boot", total=memory, available=world.available)
            results.append(MachineResult(results=(result,), measured=(one,)))
        return results


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `ami-builder nightly` in this process meet the world in `folder`."""

    def opened(image: Image, kind: TargetKind, **_: object) -> FakeTarget:
        return FakeTarget(folder=folder, workspace=Workspace.open(os.environ))

    monkeypatch.setattr(command, "open_target", opened)
    monkeypatch.setenv("AMI_BUILDER_HOME", str(folder / "home"))
    monkeypatch.setenv("AMI_BUILDER_CONFIG", str(folder / "ami-builder.toml"))


def die_after(entries: int, monkeypatch: pytest.MonkeyPatch, *, unnoted: bool = False) -> None:
    """Let this process be killed, as by kill -9, once it has made so many entries in its journal.

    `unnoted`: just before it makes the last of them, when what this would tell of has been done.
    """
    # Threads note side by side, each of them a number of its own.
    made = itertools.count(1)
    note = NightlyJournal.note

    def noted(self: NightlyJournal, *args: Any, **told: Any) -> None:
        number = next(made)
        if number < entries or not unnoted:
            note(self, *args, **told)
        if number == entries:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(NightlyJournal, "note", noted)


def begin(
    folder: Path,
    *,
    dies_after: int = 0,
    unnoted: bool = False,
    at: datetime | None = None,
    drawn: bool = True,
) -> ForkServerProcess:
    """Begin a night whose output goes to FOLDER/out; if told, at another time than now, or without a page."""
    context = multiprocessing.get_context("forkserver")
    # So that each night need not import all of this again.
    context.set_forkserver_preload([__name__, "ami_builder.nightly.run", "ami_builder.qemu.cleanup"])
    process = context.Process(target=_night, args=(folder, dies_after, unnoted, at, drawn))
    process.start()
    return process


def ended(process: ForkServerProcess) -> int:
    """Return how a night ended: its exit code, or the negative number of a signal."""
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"a night did not end within {SECONDS:.0f} s")
    return process.exitcode


def _night(folder: Path, dies_after: int, unnoted: bool, at: datetime | None, drawn: bool) -> None:
    with (folder / "out").open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with pytest.MonkeyPatch.context() as monkeypatch, ExitStack() as stack:
        install(folder, monkeypatch)
        monkeypatch.setenv("AMI_BUILDER_WEBHOOK", told(folder).webhook)
        if not drawn:
            monkeypatch.setattr("ami_builder.report.collect.write_page", lambda *_: None)
        if dies_after:
            die_after(dies_after, monkeypatch, unnoted=unnoted)
        if at is not None:
            stack.enter_context(time_machine.travel(at, tick=True))
        status = cli.run(["nightly"])
    sys.exit(status)
