"""Signals and streams at start-up: the exit code is right, and there is no traceback."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# As an installed program begins; Python itself has no handler of ours yet before that.
PROGRAM = """\
import sys
from ami_builder.cli import main
print("begun", flush=True)
sys.exit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_start_up_ends_without_a_traceback(number: signal.Signals, tmp_path: Path) -> None:
    for seconds in (0.01, random.uniform(0.02, 0.3), random.uniform(0.3, 0.8)):
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "list"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
            cwd=tmp_path,
        ) as started:
            assert started.stdout is not None
            assert started.stdout.readline() == "begun\n"
            time.sleep(seconds)
            started.send_signal(number)
            _, err = started.communicate()
        assert "Traceback" not in err, seconds
        # The command may have ended by itself, or Python may be on its way out, where it has no handlers.
        assert started.returncode in (130, 0, -number), (seconds, err)
        if started.returncode == 130:
            assert f"stopped by {number.name}" in err


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ("list >&-", 0, ""),
        ("--version >&-", 0, ""),
        ("show nope 2>&-", 2, ""),
        ("--help | head -n 1", 0, ""),
        ("config schema | head -n 1", 0, ""),
        ("show nope 2>&1 | true", 2, ""),
        ("config schema >/dev/full", 2, "can't write to standard output: No space left on device"),
        ("--version >/dev/full", 2, "can't write to standard output: No space left on device"),
        ("config example >/dev/null", 0, ""),
    ],
)
def test_closed_and_narrow_streams(command: str, status: int, said: str, tmp_path: Path) -> None:
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from ami_builder.cli import main; main()"
    before, _, after = command.partition(" |")
    done = subprocess.run(
        [
            "bash",
            "-c",
            f'"$PYTHON" -c "$PROGRAM" {before}{" |" + after if after else ""}; exit ${{PIPESTATUS[0]}}',
        ],
        capture_output=True,
        text=True,
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "PYTHON": sys.executable,
            "PROGRAM": program,
            "PYTHONIOENCODING": "ascii",
            "GITHUB_ACTIONS": "",
        },
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
    assert said in done.stderr


def test_a_lost_terminal_stops_a_command_unless_nohup_ignores_it(tmp_path: Path) -> None:
    program = f"""\
import signal, sys, time; sys.path.insert(0, {str(ROOT)!r})
from ami_builder.cli import inspect, main
def wait(*_):
    print("waiting", flush=True)
    time.sleep(2)
inspect.open_workspace = wait
signal.signal(signal.SIGHUP, getattr(signal, sys.argv.pop()))
main()
"""
    for ignored in (False, True):
        with subprocess.Popen(
            [sys.executable, "-c", program, "list", "SIG_IGN" if ignored else "SIG_DFL"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        ) as started:
            assert started.stdout is not None
            assert started.stdout.readline() == "waiting\n"
            started.send_signal(signal.SIGHUP)
            _, err = started.communicate()
        assert ("stopped by SIGHUP" in err, started.returncode == 130) == (not ignored, not ignored), err
