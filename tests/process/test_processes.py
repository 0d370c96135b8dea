"""The one place that starts processes: nothing outlives it, and failures say what happened."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from ami_builder.core.errors import BuildFailed, Interrupted, MissingTool, TimedOut
from ami_builder.system import processes
from ami_builder.verify.executor import ask_side_by_side, side_by_side
from tests.fake_programs import fake


def _alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_a_missing_tool_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(processes, "PACKAGES", {"no-such-tool": "the-package"})
    with pytest.raises(MissingTool) as error:
        processes.find("no-such-tool")
    assert "the-package" in (error.value.hint or "")
    assert error.value.exit_code == 3


@pytest.mark.parametrize(
    ("program", "apt", "hint"),
    [
        ("mcopy", True, "run apt-get install mtools; in a clone, scripts/ami-builder check"),
        (
            "qemu-system-x86_64",
            True,
            "run apt-get install qemu-system-x86; in a clone, scripts/ami-builder check",
        ),
        ("qemu-system-aarch64", True, "run apt-get install qemu-system-arm"),
        ("mcopy", False, "install mtools (its name in Debian and Ubuntu)"),
        ("packer", True, "developer.hashicorp.com/packer/install"),
    ],
)
def test_the_hint_fits_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, apt: bool, hint: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    if apt:
        fake(tmp_path, "apt-get", "")
    with pytest.raises(MissingTool) as missing:
        processes.find(program)
    assert hint in str(missing.value.hint)
    # Set-up installs no emulator of another architecture.
    assert ("scripts" in str(missing.value.hint)) == ("scripts" in hint or program == "packer")


def test_credentials_are_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("GITHUB_TOKEN", "secret")
    assert "secret" not in processes.output(["env"])


def test_output_shows_the_error(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed) as error:
        processes.output(["sh", "-c", "echo the reason >&2; exit 3"], what="a tool")
    assert error.value.message == "a tool failed (exit status 3)"
    assert error.value.tail == ("the reason",)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM, errno.EFAULT])
def test_a_host_that_refuses_a_process_for_a_moment_is_asked_again(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_START_AGAIN_SECONDS", (0.0, 0.0))
    real, answers = subprocess.Popen.__init__, [OSError(number, os.strerror(number))] * 2

    def refusing(*args: object, **kwargs: object) -> None:
        if answers:
            raise answers.pop()
        real(*args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess.Popen, "__init__", refusing)
    assert processes.output(["echo", "1"]) == "1\n"
    answers += [OSError(number, os.strerror(number))] * 2
    assert processes.capture(["echo", "2"], what="echo").stdout == "2\n"
    answers += [OSError(number, os.strerror(number))] * 3
    with pytest.raises(OSError, match=os.strerror(number)):
        processes.output(["echo", "3"])


def test_what_cannot_start_at_all_is_reported_at_once() -> None:
    with pytest.raises(OSError, match="Argument list too long"):
        processes.output(["echo", "x" * (1 << 20)])


def test_stream_writes_a_log_and_calls_back(tmp_path: Path) -> None:
    lines: list[str] = []
    log = tmp_path / "x.log"
    processes.stream(
        ["sh", "-c", "echo one; echo two >&2"], log=log, what="x", timeout=10, on_line=lines.append
    )
    assert lines == ["one", "two"]
    assert log.read_text() == "one\ntwo\n"


def test_stream_can_keep_stderr_apart(tmp_path: Path) -> None:
    lines: list[str] = []
    log = tmp_path / "x.log"
    processes.stream(
        ["sh", "-c", "echo one; echo two >&2"],
        log=log,
        what="x",
        timeout=10,
        on_line=lines.append,
        merge=False,
    )
    assert lines == ["one"]
    assert sorted(log.read_text().splitlines()) == ["one", "two"]


def test_stream_stops_what_takes_too_long_with_its_children(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with pytest.raises(TimedOut, match="slow took longer than 3 s"):
        processes.stream(
            ["sh", "-c", f"sleep 100 & echo $! >{pid_file}; wait"],
            log=tmp_path / "x.log",
            what="slow",
            timeout=3,
        )
    child = int(pid_file.read_text())
    # It was told to end; on a busy machine that takes a moment.
    processes.wait_until(lambda: not _alive(child), what="the child's end", timeout=60, interval=0.05)


def test_nothing_outlives_the_block(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), processes.running(["sleep", "100"]) as process:
        raise RuntimeError("boom")
    assert process.returncode is not None


def test_a_stubborn_process_is_killed() -> None:
    with processes.running(
        ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done"], stdout=-1
    ) as p:
        assert p.stdout is not None
        p.stdout.readline()
        processes.stop(p, seconds=0.3)
        assert p.returncode == -signal.SIGKILL


def test_kill_9_leaves_no_child(tmp_path: Path) -> None:
    program = (
        "from ami_builder.system import processes\n"
        "with processes.running(['sleep', '100']) as child:\n"
        "    print(child.pid, flush=True)\n"
        "    child.wait()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        child = int(parent.stdout.readline())
    # Between its fork and its first system calls nobody has asked the kernel yet.
    asked = Path(f"/proc/{child}/comm")
    processes.wait_until(lambda: asked.read_text() == "sleep\n", what="the child", timeout=60, interval=0.01)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    processes.wait_until(lambda: not _alive(child), what="the child's end", timeout=60, interval=0.05)


@pytest.mark.parametrize("setpriv", [None, "busybox"])
def test_a_child_runs_where_nothing_can_end_it_with_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setpriv: str | None
) -> None:
    (tmp_path / "sh").symlink_to("/bin/sh")
    if setpriv:
        # Its setpriv knows no --pdeathsig.
        fake(tmp_path, setpriv, "exit 1")
        (tmp_path / "setpriv").symlink_to(tmp_path / setpriv)
    monkeypatch.setenv("PATH", str(tmp_path))
    done = processes.capture(["sh", "-c", "echo here"], what="a child")
    assert (done.status, done.stdout) == (0, "here\n")


def test_wait_until_is_bounded() -> None:
    with pytest.raises(TimedOut, match="the moon did not happen within 0 s"):
        processes.wait_until(lambda: None, what="the moon", timeout=0.1, interval=0.02)


def test_side_by_side_keeps_order() -> None:
    assert side_by_side([lambda: 1, lambda: 2, lambda: 3], workers=2) == [1, 2, 3]


def test_the_first_failure_ends_the_others(tmp_path: Path) -> None:
    started = threading.Event()

    def slow() -> None:
        started.set()
        processes.stream(["sleep", "100"], log=tmp_path / "slow.log", what="slow", timeout=100)

    def failing() -> None:
        started.wait(60)
        raise BuildFailed("the other one broke")

    with pytest.raises(BuildFailed, match="the other one broke"):
        side_by_side([slow, failing])
    # And work can go on afterwards.
    processes.stream(["true"], log=tmp_path / "after.log", what="true", timeout=60)


def test_what_only_asks_is_not_waited_for() -> None:
    """As of a cloud that does not answer."""
    silent = threading.Event()

    def failing() -> bool:
        raise BuildFailed("the other one broke")

    try:
        with pytest.raises(BuildFailed, match="the other one broke"):
            ask_side_by_side([silent.wait, failing])
        with processes.scope() as scope:
            threading.Timer(0.2, scope.cancel).start()
            with pytest.raises(Interrupted):
                ask_side_by_side([silent.wait, silent.wait])
        assert ask_side_by_side([lambda: 1, lambda: 2, lambda: 3]) == [1, 2, 3]
    finally:
        silent.set()


def test_what_ignores_a_failure_beside_it_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STOP_SECONDS", 0.2)

    def deaf() -> None:
        script = f"trap '' TERM; touch {tmp_path}/begun; while :; do sleep 0.05; done"
        processes.stream(["sh", "-c", script], log=tmp_path / "log", what="the deaf", timeout=3600)

    def failing() -> None:
        processes.wait_until((tmp_path / "begun").exists, what="the deaf", timeout=60, interval=0.01)
        raise BuildFailed("the other one broke")

    with pytest.raises(BuildFailed, match="the other one broke"):
        side_by_side([deaf, failing])


def test_a_failure_ends_no_process_of_work_beside_it(tmp_path: Path) -> None:
    """As of two images that are built at once, and of which one has parts that run side by side."""
    failed = threading.Event()

    def other() -> str:
        script = f"touch {tmp_path}/begun; until [ -e {tmp_path}/failed ]; do sleep 0.05; done"
        processes.stream(["sh", "-c", script], log=tmp_path / "log", what="the other", timeout=60)
        processes.wait_until(failed.is_set, what="the failure", timeout=60)
        return "done"

    def breaking() -> None:
        processes.wait_until((tmp_path / "begun").exists, what="the other", timeout=60, interval=0.01)
        raise BuildFailed("a part broke")

    def one() -> str:
        with pytest.raises(BuildFailed, match="a part broke"):
            side_by_side([breaking])
        (tmp_path / "failed").touch()
        failed.set()
        return "failed"

    assert side_by_side([one, other]) == ["failed", "done"]


def test_what_is_started_while_everything_is_cancelled_ends_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, begun = subprocess.Popen, list[subprocess.Popen[str]]()

    with processes.scope() as scope:

        def late(*argv: Any, **more: Any) -> Any:
            begun.append(real(*argv, **more))
            # Whoever cancels now does not see it yet.
            scope.cancel()
            return begun[0]

        monkeypatch.setattr(subprocess, "Popen", late)
        with pytest.raises(Interrupted):
            processes.stream(["sleep", "100"], log=tmp_path / "log", what="sleep", timeout=100)
    assert begun[0].returncode == -signal.SIGTERM


def test_a_wait_ends_when_everything_is_cancelled() -> None:
    with processes.scope() as outer, processes.scope():
        outer.cancel()
        with pytest.raises(Interrupted):
            processes.wait_until(lambda: None, what="x", timeout=100, interval=0.01)
        with pytest.raises(Interrupted), processes.running(["true"]):
            pass
        with processes.scope(), pytest.raises(Interrupted), processes.running(["true"]):
            pass
        assert processes.output(["echo", "cleaning up"]) == "cleaning up\n"


def test_a_time_limit_may_grow(tmp_path: Path) -> None:
    limit = 0.5
    with pytest.raises(TimedOut, match="took longer than 2 s"):
        processes.stream(
            ["sh", "-c", "echo more; exec sleep 60"],
            log=tmp_path / "log",
            what="sleep",
            timeout=lambda: 2.0 if (tmp_path / "log").read_text() else limit,
        )
