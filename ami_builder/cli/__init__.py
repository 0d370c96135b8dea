"""The command line: parse flags, make one call, return an exit code.

0 ok, 1 internal error, 2 usage or configuration, 3 a tool is missing, 4 the build failed,
5 checks failed, 6 cloud API, 7 timed out, 8 locked, 9 on hold until a person decides,
10 inconclusive because the host was too busy, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from ami_builder import __version__

INTERRUPTED = 130


def main() -> None:
    """Run the command line and exit with its documented code."""
    # The imports below take most of a second, in which nothing can be left behind.
    signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGTERM, _leave)
    if sys.argv[1:] == ["--version"]:
        # Scripts ask for it often, so answer before any import.
        sys.stdout.write(f"ami-builder {__version__}\n")
        return
    from ami_builder.cli.app import run
    from ami_builder.core.errors import Interrupted

    try:
        status = run(sys.argv[1:])
        signal.signal(signal.SIGINT, _leave)
        signal.signal(signal.SIGTERM, _leave)
    except Interrupted:  # while the end of the command was reported
        status = INTERRUPTED
    sys.exit(status)


def _leave(number: int, _: FrameType | None) -> NoReturn:
    """End at once: an exception could come up in the middle of an import, or after everything else."""
    os.write(2, f"\nerror: stopped by {signal.Signals(number).name}\n".encode())
    os._exit(INTERRUPTED)
