"""How long logins to a machine take, at rest and under memory pressure.

This module uses `system`, where the other checks use `core` alone: it starts ssh itself, because a login has
to be timed together with the CPU time that the host gives the VM.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from ami_builder.core.errors import TimedOut
from ami_builder.core.oom import Wait
from ami_builder.system import host_load, processes

ANSWER = "/run/ami-builder-pressure"
"""Where memory_pressure.sh writes its results; the last line is `end`."""
PROGRESS = f"{ANSWER}.progress"
"""Where memory_pressure.sh writes its progress, in one line."""

NEW_CONNECTION = ("-o", "ControlPath=none", "-o", "ConnectTimeout=600")
"""Makes ssh log in: a command over the shared connection would not need sshd to start a session."""
AT_REST = 3
"""How many logins are timed before the pressure."""

# Uses only the shell's own commands: each other process takes an emulated VM a tenth of a second.
_ASK = f"""
end=$(tail -c 4 {ANSWER} 2>/dev/null)
read -r _ user nice system idle iowait irq softirq steal _ </proc/stat
line=; [ ! -r {PROGRESS} ] || read -r line <{PROGRESS}
echo "$steal $((user + nice + system + idle + iowait + irq + softirq + steal)) $end"
echo "$line"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoginAttempt:
    """One attempt to log in; times are seconds."""

    began: float
    """By the host's monotonic clock."""
    seconds: float
    denied: float = 0.0
    """CPU steal: for how much of that time the host did not run the machine."""
    failed: str = ""
    """Why it failed; empty for a successful login."""


@dataclass(slots=True, kw_only=True)
class LoginTimes:
    """Every login, first at rest, then under memory pressure; the last one may have failed."""

    rest: list[LoginAttempt] = field(default_factory=list)
    logins: list[LoginAttempt] = field(default_factory=list)
    ended: bool = False
    """Whether memory_pressure.sh has ended."""
    busy: float = 0.0
    """The part of the time under pressure in which some process of the host waited for a CPU, 0 to 1."""


def waits(logins: Sequence[LoginAttempt]) -> list[Wait]:
    """Return how long each login took, with the failed attempts before it."""
    found: list[Wait] = []
    began, denied = None, 0.0
    for number, login in enumerate(logins):
        began = login.began if began is None else began
        denied += login.denied
        if not login.failed or number == len(logins) - 1:
            found.append(Wait(seconds=login.began + login.seconds - began, denied=denied))
            began, denied = None, 0.0
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class LoginTiming:
    """How often to log in, and how long to wait for a login; in seconds."""

    every: float = 3.0
    """From the end of a login to the next; each uses about 0.7 s of CPU time of an emulated VM."""
    pause_at_rest: float = 0.5
    """The same at rest."""
    patience: float = 60.0
    """The least time that a login gets."""
    times_at_rest: float = 20.0
    """Under pressure a login gets this many times the longest login at rest, if that is more."""


class LoginMonitor:
    """Logs in repeatedly by ssh; `emulator` is the pid of the process that runs the VM here, or 0."""

    def __init__(
        self,
        ssh: Sequence[str],
        emulator: int,
        on_progress: Callable[[str], None],
        timing: LoginTiming = LoginTiming(),
    ) -> None:
        self._ssh, self._emulator, self._on_progress, self._timing = ssh, emulator, on_progress, timing
        self._patience = timing.patience
        self._steal: tuple[int, int] | None = None
        self.watched = LoginTimes()

    def at_rest(self) -> None:
        """Time some logins at rest, which those under pressure are compared with."""
        rest = self.watched.rest

        def enough() -> bool:
            rest.append(self._log_in())
            return len(rest) >= AT_REST

        with suppress(TimedOut):
            most = AT_REST * self._timing.patience
            processes.wait_until(enough, what="logins", timeout=most, interval=self._timing.pause_at_rest)
        longest = max(login.seconds for login in self.watched.rest)
        self._patience = max(self._timing.patience, self._timing.times_at_rest * longest)

    def until_end(self, seconds: float) -> None:
        """Log in repeatedly until memory_pressure.sh has ended or the time is over."""
        began, before = time.monotonic(), host_load.load(self._emulator)

        def ended() -> bool:
            self.watched.logins.append(self._log_in())
            return self.watched.ended

        with suppress(TimedOut):
            processes.wait_until(ended, what="the end", timeout=seconds, interval=self._timing.every)
        after = host_load.load(self._emulator)
        self.watched.busy = (after.pressure - before.pressure) / max(1.0, time.monotonic() - began)

    def _log_in(self) -> LoginAttempt:
        began, before = time.monotonic(), host_load.load(self._emulator)
        failed, share = "", 0.0
        try:
            done = processes.capture([*self._ssh, _ASK], what="a login", timeout=self._patience)
            if done.status:
                failed = done.stderr.strip() or f"exit status {done.status}"
            else:
                share = self._read(done.stdout)
        except TimedOut as late:
            failed = str(late)
        except ValueError:
            failed = f"the answer can't be read: {done.stdout.strip()!r}"
        seconds = time.monotonic() - began
        denied = host_load.cpu_steal(before, host_load.load(self._emulator)) + share * seconds
        return LoginAttempt(began=began, seconds=seconds, denied=min(denied, seconds), failed=failed)

    def _read(self, answer: str) -> float:
        """Read the output of a login; return the part of the time since the last one that was CPU steal."""
        first, _, rest = answer.partition("\n")
        steal, total, *end = first.split()
        self.watched.ended = end == ["end"]
        if rest.strip():
            self._on_progress(rest.strip())
        now, before = (int(steal), int(total)), self._steal
        self._steal = now
        return (now[0] - before[0]) / (now[1] - before[1]) if before and now[1] > before[1] else 0.0
