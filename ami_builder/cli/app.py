"""The commands and their flags; each makes one pipeline call and prints its result."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import typer

from ami_builder import console

# They register their commands.
from ami_builder.cli import (  # noqa: F401
    account,
    channels,
    doctor,
    finished,
    images,
    inspect,
    nightly,
    prune,
    regions,
    report,
)
from ami_builder.cli.shared import app, config_app, shared
from ami_builder.core.errors import AmiBuilderError, BuildFailed, Interrupted, UsageError
from ami_builder.system import processes

__all__ = ["app", "config_app", "run"]

_PANELS = {
    "Bake and prove": ("build", "verify", "run", "check", "render"),
    "Look": ("list", "show", "diff", "report", "doctor"),
    "Channels and nights": ("nightly", "promote", "rollback", "revoke", "history", "prune"),
    "AWS": ("copy", "share", "gc", "iam-policy"),
}
"""How the help groups the commands, and their order."""


def _arrange() -> None:
    place = {name: (panel, number) for panel, names in _PANELS.items() for number, name in enumerate(names)}
    panels = list(_PANELS)
    for command in app.registered_commands:
        assert command.callback is not None
        command.name = command.name or command.callback.__name__
        command.rich_help_panel = place[command.name][0]
    app.registered_commands.sort(key=lambda c: (panels.index(place[str(c.name)][0]), place[str(c.name)][1]))


_arrange()


def _stop(number: int, _: FrameType | None) -> NoReturn:
    # A second signal must not cut the cleaning up short.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Interrupted(f"stopped by {signal.Signals(number).name}; everything that was started has been ended")


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; an error is shown with what to do next."""
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    shared.debug = "--debug" in arguments
    try:
        status = app(list(arguments), prog_name="ami-builder", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except (AmiBuilderError, Interrupted) as failed:
        return _fail(failed)
    except typer.Exit as leaving:
        return leaving.exit_code
    except typer.TyperException as wrong:
        # Without a message there was no command, and the help has been shown instead.
        if not wrong.format_message():
            return UsageError.exit_code
        hint = "`ami-builder --help` shows the commands and their flags"
        return _fail(UsageError(wrong.format_message(), hint=hint))
    except BrokenPipeError:
        # Whoever read our output has seen enough, as in `ami-builder list | head -1`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as broken:
        if broken.errno not in {errno.ENOSPC, errno.EDQUOT}:
            return _defect(broken)
        where = f" ({broken.filename})" if broken.filename else ""
        return _fail(
            BuildFailed(
                f"no space left on the disk{where}; nothing half-made was kept", hint=processes.DISK_FULL
            )
        )
    except Exception as defect:  # the last line of defence: a defect of ours
        return _defect(defect)


def _fail(failed: AmiBuilderError | Interrupted) -> int:
    if shared.debug:
        traceback.print_exception(failed)
    console.error(failed)
    return failed.exit_code


def _defect(defect: Exception) -> int:
    hint = "this is a defect of ami-builder; run the command again with --debug and report what it prints"
    failed = AmiBuilderError(f"{type(defect).__name__}: {defect}", hint=hint)
    failed.__cause__ = defect
    return _fail(failed)
