"""Waits for a machine under pressure by logging in again and again, and keeps when it answered."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ami_builder import proc
from ami_builder.errors import TimedOut

ANSWER = "/run/ami-builder-pressure"
"""Where press.sh writes what happened; its last line is `end`."""

ANEW = ("-o", "ControlPath=none")
"""What makes ssh log in: one more command over a connection that is there needs no sshd, and tells less."""
EVERY_SECONDS = 3.0
"""From the end of a login to the next; each takes an emulated machine some 0.7 s of a processor."""
_LOGIN_SECONDS = 60.0


@dataclass(slots=True, kw_only=True)
class Watched:
    """When the machine answered, in seconds of the clock here; the first and last are those of the watch."""

    times: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """What ssh said each time that it failed, or that there was no answer within a minute."""
    ended: bool = False
    """Whether press.sh came to its end."""


def watch(ssh: Sequence[str], seconds: float) -> Watched:
    """Log in with the command line `ssh` again and again, until press.sh has ended or time is up."""
    watched = Watched(times=[time.monotonic()])

    def answered() -> bool:
        try:
            done = proc.capture([*ssh, f"tail -c 4 {ANSWER}"], what="a login", timeout=_LOGIN_SECONDS)
        except TimedOut as silent:
            watched.failed.append(str(silent))
            return False
        if done.status:
            watched.failed.append(done.stderr.strip() or f"exit status {done.status}")
            return False
        watched.times.append(time.monotonic())
        watched.ended = done.stdout.strip() == "end"
        return watched.ended

    try:
        proc.wait_until(answered, what="the end", timeout=seconds, interval=EVERY_SECONDS)
    except TimedOut:
        watched.times.append(time.monotonic())
    return watched
