"""Faults on purpose: at the nth call of an action, the network or the service fails in one of six ways."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


class Fault(StrEnum):
    """What goes wrong with a call."""

    THROTTLE = "throttle"
    """Refused with RequestLimitExceeded (HTTP 503), not performed."""
    HTTP500 = "http500"
    """Refused with InternalError (HTTP 500), not performed."""
    RESET = "reset"
    """Not performed, and the connection is closed without an answer."""
    SLOW = "slow"
    """Performed and answered, after a while."""
    LOST_RESPONSE = "lost_response"
    """Performed, and the connection is closed without an answer."""
    DUPLICATED = "duplicated"
    """Performed twice, as if the network had repeated the request; the first answer arrives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Which calls meet which fault: the `nth` of `action` since the rule was made, and `times - 1` more."""

    action: str
    """As in `RunInstances`; `*` for every call."""
    fault: Fault
    nth: int = 1
    times: int | None = 1
    """None: from then on, every time."""
    seconds: float = 2.0
    """How late a slow answer is."""
    region: str = ""
    """Where; empty: in every region."""
    packer: bool | None = None
    """Only Packer's calls, or only others'; None: all."""

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Rule:
        """Return the rule that a JSON object describes; or raise ValueError, TypeError, KeyError."""
        return cls(**{**fields, "fault": Fault(fields["fault"])})


class Faults:
    """The rules in force, and how many calls each has seen."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rules: list[tuple[Rule, list[int]]] = []
        self._cleared = threading.Event()

    def add(
        self,
        action: str,
        fault: Fault | str,
        *,
        nth: int = 1,
        times: int | None = 1,
        seconds: float = 2.0,
        region: str = "",
        packer: bool | None = None,
    ) -> None:
        """Put a fault at the nth call of an action, counted from now; botocore's own retries count too."""
        self.add_rule(
            Rule(
                action=action,
                fault=Fault(fault),
                nth=nth,
                times=times,
                seconds=seconds,
                region=region,
                packer=packer,
            )
        )

    def add_rule(self, rule: Rule) -> None:
        """Put a rule in force."""
        with self._lock:
            self._rules.append((rule, [0]))

    def clear(self) -> None:
        """Let everything go well from now on; what is held is answered at once."""
        with self._lock:
            self._rules.clear()
            self._cleared.set()
            self._cleared = threading.Event()

    def hold(self, seconds: float) -> None:
        """Return after a while, or once all is cleared."""
        with self._lock:
            cleared = self._cleared
        cleared.wait(seconds)

    def meet(self, action: str, region: str = "", *, packer: bool = False) -> Rule | None:
        """Count one call of `action` in a region, and return the first rule that it meets."""
        met: Rule | None = None
        with self._lock:
            for rule, seen in self._rules:
                if rule.action not in (action, "*") or rule.region not in (region, ""):
                    continue
                if rule.packer not in (packer, None):
                    continue
                seen[0] += 1
                last = None if rule.times is None else rule.nth + rule.times - 1
                if met is None and rule.nth <= seen[0] and (last is None or seen[0] <= last):
                    met = rule
        return met
