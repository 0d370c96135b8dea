"""Least privilege (first cut): calls are logged, nothing is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .calls import Call


class Enforced:
    """One access key's policy."""


class Guard:
    """All policies in force."""

    def clear(self) -> None:
        """Allow everything again."""

    def enforce(self, document: Mapping[str, Any], access_key: str) -> Enforced:
        """Allow an access key only what a policy allows."""
        raise NotImplementedError

    def judge(self, call: Call, backend: Any) -> None:
        """Raise Refused when the call is not allowed."""
