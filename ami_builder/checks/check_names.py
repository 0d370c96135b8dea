"""The name and message of a check, from pytest's reports."""

from pathlib import Path
from typing import Any

import pytest

NOTE = "note"
"""The property of a passed check that holds its text."""


def readable(nodeid: str) -> str:
    """Return a check's name for people: `test_container.py::test_not_killed` is `container: not killed`."""
    path, _, function = nodeid.partition("::")
    stem = Path(path).stem.removeprefix("test_").replace("_", " ")
    name, _, parameters = function.rstrip("]").partition("[")
    words = " ".join(part.removeprefix("test_") for part in name.split("::")).replace("_", " ")
    return f"{stem}: {words} ({parameters})" if parameters else f"{stem}: {words}"


def name_of(report: pytest.TestReport) -> str:
    """Return the name of the check that a report is about."""
    # The node id of a file outside pytest's root has no path.
    return readable(f"{report.location[0]}::{report.nodeid.partition('::')[2]}")


def message_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return the first line of a failure, the reason of a skip, or the text of a passed check."""
    if isinstance(report, pytest.TestReport) and report.passed and not hasattr(report, "wasxfail"):
        return "; ".join(str(value) for key, value in report.user_properties if key == NOTE)
    longrepr: Any = report.longrepr
    if isinstance(longrepr, tuple):  # a skip: path, line, reason
        return str(longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(longrepr)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    # The last line about a file that can't be imported is the error.
    first = lines[0] if crash is not None else lines[-1].removeprefix("E").strip()
    return first.removeprefix("AssertionError: ").removeprefix("Failed: ")
