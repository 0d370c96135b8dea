"""What is stopped in the middle leaves nothing behind, and the next build is a normal one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ami_builder.core.records import RunRecord, RunStatus
from ami_builder.state.workspace import Workspace, load
from ami_builder.system import processes
from tests.vm.conftest import HOME, ROOT, ami_builder, environment

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# Another image than the one that the other tests share, from the same base and container.
OTHER = ("--set", "memory.reserve=1MiB")


def _ours() -> set[int]:
    """Return the processes that work in the tests' workspace."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
            except OSError:
                continue
            if str(HOME).encode() in command:
                found.add(int(entry.name))
    return found


@contextmanager
def _building(log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a build in a session of its own, as a terminal would."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "ami_builder", *OTHER, "build", *arguments],
            env=environment(),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def _wait_for_packer(workspace: Workspace, known: set[Path], log: Path) -> None:
    """Wait until a run that is not among the `known` ones has a machine that boots."""

    def booting() -> bool:
        logs = [run / "logs" / "packer.log" for run in set(workspace.runs_dir.iterdir()) - known]
        return any(p.exists() and "Waiting for SSH" in p.read_text(errors="replace") for p in logs)

    processes.wait_until(booting, what="a baking machine", timeout=900, interval=0.2, log=log)


def _newest(workspace: Workspace) -> tuple[Path, RunRecord]:
    run = max(workspace.runs_dir.iterdir())
    record = load(RunRecord, run / "record.json")
    assert record is not None
    return run, record


@pytest.mark.parametrize(
    "number",
    # Both go one way: tests/process/test_start_up.py and test_processes.py.
    [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.whole)],
)
def test_a_signal_while_baking_leaves_nothing(
    built: Mapping[str, Any], workspace: Workspace, tmp_path: Path, number: signal.Signals
) -> None:
    before, images, runs = _ours(), workspace.images(), set(workspace.runs_dir.iterdir())
    with _building(tmp_path / "log") as process:
        _wait_for_packer(workspace, runs, tmp_path / "log")
        process.send_signal(number)
        assert process.wait(600) == 130
    processes.wait_until(lambda: _ours() <= before, what="the end of all processes", timeout=120)
    run, record = _newest(workspace)
    assert record.status is RunStatus.INTERRUPTED
    assert not (run / "work").exists()
    assert workspace.images() == images
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_second_build_is_refused_and_kill_9_leaves_no_machine(
    built: Mapping[str, Any], workspace: Workspace, tmp_path: Path
) -> None:
    before, images, runs = _ours(), workspace.images(), set(workspace.runs_dir.iterdir())
    with _building(tmp_path / "log") as process:
        _wait_for_packer(workspace, runs, tmp_path / "log")
        second = ami_builder(*OTHER, "build")
        assert second.status == 8
        assert f"(process {process.pid}, " in second.stderr
        assert process.poll() is None, "it was not waited for"
        process.kill()
        process.wait()
    # Packer and QEMU are told of their parent's death by the kernel.
    processes.wait_until(lambda: _ours() <= before, what="the end of all processes", timeout=120)
    run, record = _newest(workspace)
    assert record.status is RunStatus.RUNNING
    assert workspace.images() == images
    # The next command that makes anything cleans up; that it can is enough here, a whole build comes later.
    assert run.name in workspace.sweep()
    assert not (run / "work").exists()
