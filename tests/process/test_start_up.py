"""Ctrl-C at any moment of start-up: the exit code says so, and there is no traceback."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

# As an installed program begins; Python itself has no handler of ours yet before that.
PROGRAM = """\
import sys
from ami_builder.cli import main
print("begun", flush=True)
sys.exit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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
