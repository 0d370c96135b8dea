"""Programs that run inside a network namespace: tests.vm.namespace starts them, with JSON in and out.

Each has a `main` that takes keyword arguments, returns what JSON can hold, and ends in `answer(main)`.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def answer(main: Callable[..., Any]) -> None:
    """Call `main` with the arguments from stdin, and write its result to stdout; all else goes to stderr."""
    arguments = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    json.dump(main(**arguments), out)
    out.flush()
