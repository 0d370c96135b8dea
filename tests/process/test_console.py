"""The console in a process of its own: signals, readers that end early, imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_signal_ends_a_step_that_waits() -> None:
    code = """
import os, signal, sys, threading
from ami_builder import console
def stop(number, frame):
    raise KeyboardInterrupt
signal.signal(signal.SIGINT, stop)
class Out:
    def write(self, text):
        if threading.current_thread() is not threading.main_thread():
            os.kill(os.getpid(), signal.SIGINT)
    def flush(self):
        pass
clock = iter(range(0, 10**9, 10))
try:
    with console.open_progress(
        console.Mode.PLAIN, stream=Out(), clock=lambda: next(clock), beat_seconds=0.001
    ) as progress, progress.step("x"):
        threading.Event().wait()
except KeyboardInterrupt:
    print(len(threading.enumerate()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("1\n", "")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} -c '{code}' | head -n 1"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_reader_that_leaves_early_is_no_failure() -> None:
    done = python("from ami_builder import console; [console.result([str(n)] * 9999) for n in range(50)]")
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_nothing_is_drawn_with_where_nothing_is_drawn() -> None:
    code = """
import sys
from ami_builder import console
from ami_builder.core.errors import UsageError
with console.open_progress(console.Mode.PLAIN) as progress, progress.step("x"):
    pass
console.error(UsageError("x"))
print([m for m in sys.modules if m.startswith("rich")])
"""
    assert python(code).stdout == "[]\n"
