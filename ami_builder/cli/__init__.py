"""The command line: parse flags, make one call, return an exit code.

0 ok, 1 internal error, 2 usage or configuration, 3 a tool is missing, 4 the build failed,
5 checks failed, 6 cloud API, 7 timed out, 8 locked, 9 on hold until a person decides,
10 inconclusive because the host was too busy, 130 interrupted.
"""

from __future__ import annotations

import sys

from ami_builder import __version__


def main() -> None:
    """Run the command line and exit with its documented code."""
    if sys.argv[1:] == ["--version"]:
        # Scripts ask for it often, so answer before any import.
        sys.stdout.write(f"ami-builder {__version__}\n")
        return
    from ami_builder.cli.app import run

    sys.exit(run(sys.argv[1:]))
