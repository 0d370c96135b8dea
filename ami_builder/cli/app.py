"""Assemble the commands, run one, and turn any error into a message and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

import typer
import typer.core

from ami_builder import console

# Importing them registers their commands.
from ami_builder.cli import (  # noqa: F401
    aws,
    certificates,
    channels,
    cleanup,
    doctor,
    images,
    inspect,
    launch_template,
    nightly,
    report,
    selftest,
)
from ami_builder.cli.options import app, config_app, shared
from ami_builder.core.errors import AmiBuilderError, BuildFailed, Interrupted, UsageError
from ami_builder.system import processes

__all__ = ["app", "config_app", "run"]

_PANELS = {
    "Build and verify": ("build", "verify", "run", "check", "render"),
    "Inspect": ("list", "show", "diff", "report"),
    "Clusters": ("certificates", "doctor"),
    "Channels and nightly runs": ("nightly", "promote", "rollback", "revoke", "history"),
    "Clean up": ("prune", "gc"),
    "AWS": ("copy", "share", "launch-template", "iam-policy", "selftest"),
}
"""The groups of commands in the help, in this order."""


def _plain_flags(parameters: list[Any]) -> list[Any]:
    """Leave out the type of a flag that takes no value, which typer's help prints as `<bool>`."""
    for each in parameters:
        if getattr(each, "is_flag", False):
            each.metavar = ""
    return parameters


class _Command(typer.core.TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        return _plain_flags(super().get_params(ctx))


class _Group(typer.core.TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        return _plain_flags(super().get_params(ctx))


app.info.cls = config_app.info.cls = _Group
for _command in [*app.registered_commands, *config_app.registered_commands]:
    _command.cls = _Command
_panel_of = {name: panel for panel, names in _PANELS.items() for name in names}
for _command in app.registered_commands:
    assert _command.callback is not None
    _command.name = _command.name or _command.callback.__name__
    _command.rich_help_panel = _panel_of[_command.name]
app.registered_commands.sort(key=lambda command: list(_panel_of).index(str(command.name)))


def _stop(number: int, _: FrameType | None) -> NoReturn:
    # A second signal must not cut cleanup short.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Interrupted(
        f"stopped by {signal.Signals(number).name}; everything that was started has been stopped"
    )


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code. Print an error together with what to do next."""
    shared.debug = "--debug" in arguments
    try:
        signal.signal(signal.SIGINT, _stop)
        signal.signal(signal.SIGTERM, _stop)
        status = app(list(arguments), prog_name="ami-builder", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except (AmiBuilderError, Interrupted) as failed:
        return _fail(failed)
    except typer.Exit as leaving:
        return leaving.exit_code
    except typer.TyperException as wrong:
        # No message means no command was given, and the help has been printed instead.
        if not (message := wrong.format_message().replace("Value error, ", "")):
            return UsageError.exit_code
        return _fail(_misused(wrong, message))
    except BrokenPipeError:
        # The reader of our output has closed the pipe, as in `ami-builder list | head -1`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as broken:
        if broken.errno not in {errno.ENOSPC, errno.EDQUOT}:
            return _internal_error(broken)
        where = f" ({broken.filename})" if broken.filename else ""
        return _fail(
            BuildFailed(
                f"no space left on the disk{where}; no incomplete file was kept", hint=processes.DISK_FULL
            )
        )
    except Exception as unexpected:
        return _internal_error(unexpected)


def _misused(wrong: typer.TyperException, message: str) -> UsageError:
    """Return a wrong use of the command line as an error that says what to do."""
    context, option = getattr(wrong, "ctx", None), getattr(wrong, "option_name", None)
    if context is None:
        return UsageError(message, hint="see `ami-builder --help`")
    if any(option in parameter.opts for parameter in context.find_root().command.params):
        return UsageError(
            f"{option} is an option of ami-builder, not of {context.info_name}",
            hint=f"write it before the command: ami-builder {option} … {context.info_name}",
        )
    return UsageError(message, hint=f"see `{context.command_path} --help`")


def _fail(failed: AmiBuilderError | Interrupted) -> int:
    if shared.debug:
        traceback.print_exception(failed)
    console.error(failed)
    return failed.exit_code


def _internal_error(unexpected: Exception) -> int:
    hint = "this is an internal error; run the command again with --debug and report its output"
    failed = AmiBuilderError(f"{type(unexpected).__name__}: {unexpected}", hint=hint)
    failed.__cause__ = unexpected
    return _fail(failed)
