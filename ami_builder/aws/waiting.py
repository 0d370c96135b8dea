"""Waiting for EC2 while cleaning up, which goes on after Ctrl-C has ended everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryError, Retrying, retry_if_result, stop_after_delay, wait_exponential

_LOOK_SECONDS = 15.0
_FIRST_PAUSE = 0.25
_LONGEST_PAUSE = 10.0

Found = TypeVar("Found")


def settle(done: Callable[[], bool], *, seconds: float) -> bool:
    """Call `done` until it holds, and tell whether it did within `seconds`; nothing interrupts it."""
    retrying = Retrying(
        retry=retry_if_result(lambda held: not held),
        stop=stop_after_delay(seconds),
        wait=wait_exponential(multiplier=_FIRST_PAUSE, exp_base=1.5, max=_LONGEST_PAUSE),
    )
    try:
        return retrying(done)
    except RetryError:
        return False


def look_for(find: Callable[[], Found | None]) -> Found | None:
    """Return what EC2 may have made though no answer came, and may show a little later; else None."""
    found: list[Found] = []

    def seen() -> bool:
        if (one := find()) is not None:
            found.append(one)
        return bool(found)

    settle(seen, seconds=_LOOK_SECONDS)
    return found[0] if found else None
