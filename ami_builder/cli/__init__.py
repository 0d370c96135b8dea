"""The command line: parse flags, make one call, return an exit code.

0 ok, 1 internal error, 2 usage or configuration, 3 a tool is missing, 4 the build failed,
5 checks failed, 6 cloud API, 7 timed out, 8 locked, 9 on hold until a person decides,
10 inconclusive because the host was too busy, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from ami_builder import __version__

INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> None:
    """Run the command line and exit with its documented code."""
    _open_streams()
    # The imports below take most of a second, in which nothing can be left behind.
    watch_signals(_leave)
    if sys.argv[1:] == ["--version"]:
        # Scripts ask for it often, so answer before any import.
        try:
            os.write(1, f"ami-builder {__version__}\n".encode())
        except BrokenPipeError:
            pass
        except OSError as failed:
            os.write(2, f"error: can't write to standard output: {failed.strerror}\n".encode())
            sys.exit(2)
        return
    from ami_builder.cli.app import run
    from ami_builder.core.errors import Interrupted

    try:
        status = run(sys.argv[1:])
        watch_signals(_leave)
    except Interrupted:  # while the end of the command was reported
        status = INTERRUPTED
    sys.exit(status)


def _open_streams() -> None:
    """Let a closed stream be /dev/null, and escape what an encoding does not have."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            setattr(sys, name, os.fdopen(number, "w", closefd=False))
        getattr(sys, name).reconfigure(errors="backslashreplace")


def watch_signals(handler: Callable[[int, FrameType | None], NoReturn]) -> None:
    """Let a handler take the signals that stop a command; nohup has the lost terminal ignored."""
    for each in SIGNALS:
        if each is not signal.SIGHUP or signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, handler)


def _leave(number: int, _: FrameType | None) -> NoReturn:
    """End at once: an exception could come up in the middle of an import, or after everything else."""
    os.write(2, f"\nerror: stopped by {signal.Signals(number).name}\n".encode())
    os._exit(INTERRUPTED)
