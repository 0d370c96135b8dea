"""Assemble the commands, run one, and turn any error into a message and an exit code."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from inspect import cleandoc
from types import FrameType
from typing import Any, NoReturn

import typer
import typer.core

from ami_builder import console

# Importing the modules registers their commands.
from ami_builder.cli import (  # noqa: F401
    SIGNALS,
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
    watch_signals,
)
from ami_builder.cli.options import app, config_app, shared
from ami_builder.core.errors import AmiBuilderError, BuildFailed, Interrupted, UsageError
from ami_builder.system import processes

__all__ = ["app", "config_app", "run"]

_PATHS = {
    errno.EACCES,
    errno.EEXIST,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}
"""What is wrong with a path that somebody chose, and not with the program."""
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

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse an empty argument, such as that of an unset variable of the shell: it names no default."""
        given, _, _ = self.make_parser(ctx).parse_args(list(args))
        for each in self.get_params(ctx):
            value = given.get(each.name)
            if each.param_type_name == "argument" and "" in (
                value if isinstance(value, list | tuple) else [value]
            ):
                raise UsageError(
                    f"{each.metavar or each.name.upper()} is empty",
                    hint="give a value" if each.required else "leave it out, or give a value",
                )
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as broken:
            # Typer would end without a word. Where our own output goes is handled where it is written.
            raise AmiBuilderError(f"a pipe or a connection was closed: {broken}") from broken


class _Group(typer.core.TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        return _plain_flags(super().get_params(ctx))


app.info.cls = config_app.info.cls = _Group
for _command in [*app.registered_commands, *config_app.registered_commands]:
    _command.cls = _Command
    # Typer would keep the line breaks of a docstring, which are not those of the terminal.
    _command.help = re.sub(r"(?<!\n)\n(?!\n)", " ", cleandoc(_command.callback.__doc__ or ""))
_panel_of = {name: panel for panel, names in _PANELS.items() for name in names}
for _command in app.registered_commands:
    assert _command.callback is not None
    _command.name = _command.name or _command.callback.__name__
    _command.rich_help_panel = _panel_of[_command.name]
app.registered_commands.sort(key=lambda command: list(_panel_of).index(str(command.name)))


def _stop(number: int, _: FrameType | None) -> NoReturn:
    # A second signal must not cut cleanup short.
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise Interrupted(
        f"stopped by {signal.Signals(number).name}; everything that was started has been stopped"
    )


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code. Print an error together with what to do next."""
    shared.debug = "--debug" in arguments
    try:
        watch_signals(_stop)
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
    except SystemExit as left:
        # The reader of the help has closed the pipe, as in `ami-builder --help | head -1`.
        if not isinstance(left.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as broken:
        return _fail(_of_system(broken))
    except Exception as unexpected:
        return _fail(_unexpected(unexpected))


def _of_system(broken: OSError) -> AmiBuilderError:
    """Return an error of the operating system that no command has expected."""
    failed: AmiBuilderError
    where = f" ({broken.filename})" if broken.filename else ""
    if broken.errno in {errno.ENOSPC, errno.EDQUOT}:
        failed = BuildFailed(f"no space left on the disk{where}", hint=processes.DISK_FULL)
    elif broken.errno in processes.EXHAUSTED:
        failed = BuildFailed(
            f"this host is short of memory or processes: {broken.strerror}{where}",
            hint="end some programs, or raise the host's limits; then run the command again",
        )
    elif broken.errno in _PATHS and broken.filename:
        failed = UsageError(
            f"{broken.filename}: {broken.strerror}",
            hint="check the path and its permissions; AMI_BUILDER_HOME and the flags name other paths",
        )
    elif isinstance(broken, FileNotFoundError) and not _has_folder():
        failed = UsageError("the current folder was deleted", hint="cd to a folder that exists")
    else:
        return _unexpected(broken)
    failed.__cause__ = broken
    return failed


def _has_folder() -> bool:
    try:
        os.getcwd()  # noqa: PTH109 - Path.cwd would raise the same
    except FileNotFoundError:
        return False
    return True


def _misused(wrong: typer.TyperException, message: str) -> UsageError:
    """Return a wrong use of the command line as an error that says what to do."""
    context, option = getattr(wrong, "ctx", None), getattr(wrong, "option_name", None)
    if context is None:
        return UsageError(message, hint="see `ami-builder --help`")
    if any(option in parameter.opts for parameter in context.find_root().command.params):
        return UsageError(
            f"{option} is an option of ami-builder, not of {_command_of(context)}",
            hint=f"write it before the command: ami-builder {option} … {_command_of(context)}",
        )
    if context.parent is None and any(option in parameter.opts for parameter in _of_commands(context)):
        return UsageError(
            f"{option} is an option of a command, not of ami-builder",
            hint=f"write it after the command: ami-builder COMMAND {option} …",
        )
    return UsageError(message, hint=f"see `{context.command_path} --help`")


def _command_of(context: Any) -> str:
    return str(context.command_path).removeprefix("ami-builder ")


def _of_commands(context: Any) -> Iterator[Any]:
    """Yield the parameters of all commands."""
    groups = [context.command]
    while groups:
        for command in groups.pop().commands.values():
            yield from command.params
            groups += [command] if hasattr(command, "commands") else []


def _fail(failed: AmiBuilderError | Interrupted) -> int:
    if shared.debug:
        traceback.print_exception(failed)
    console.error(failed)
    return failed.exit_code


def _unexpected(wrong: Exception) -> AmiBuilderError:
    hint = "this is an internal error; run the command again with --debug and report its output"
    failed = AmiBuilderError(f"{type(wrong).__name__}: {wrong}", hint=hint)
    failed.__cause__ = wrong
    return failed
