"""Exceptions with what the user can do next and an exit code, and suggestions for misspelt words."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar


class AmiBuilderError(Exception):
    """A failure with a message, an optional hint on what to do next, and a log with details."""

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        log: Path | None = None,
        tail: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.log = log
        self.tail = tail


class UsageError(AmiBuilderError):
    """A flag, an argument or the configuration is wrong; nothing was started."""

    exit_code = 2


class MissingTool(AmiBuilderError):
    """A program that is needed is not installed, or is too old."""

    exit_code = 3


class BuildFailed(AmiBuilderError):
    """The base disk, the container, Packer or a booting machine failed."""

    exit_code = 4


class ChecksFailed(AmiBuilderError):
    """The machine booted and the checks ran, but not all of them passed."""

    exit_code = 5


class CloudFailed(AmiBuilderError):
    """A cloud API refused or failed."""

    exit_code = 6


class TimedOut(AmiBuilderError):
    """Something did not happen within its time limit."""

    exit_code = 7


class Locked(AmiBuilderError):
    """Another run holds the lock of this image and target."""

    exit_code = 8


class OnHold(AmiBuilderError):
    """The new image differs too much from the current one: a person decides."""

    exit_code = 9


class Inconclusive(AmiBuilderError):
    """No check failed, but the host was too busy for all of them; the image was kept."""

    exit_code = 10


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM: everything that was started was stopped.

    Not an Exception, because code that retries after errors, such as botocore's, would swallow it.
    """

    exit_code = 130
    hint: str | None = None
    log: Path | None = None
    tail: tuple[str, ...] = ()

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return `; did you mean …?` with the nearest option, or nothing."""
    from difflib import get_close_matches

    plain = {option.lower().replace("-", "_"): option for option in options}
    found = get_close_matches(word.lower().replace("-", "_"), plain, n=1)
    return f"; did you mean {plain[found[0]]}?" if found else ""
