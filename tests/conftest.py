"""Which tests run, and at the end what was left out.

Three tiers: `fast` needs no VM, no EC2 on loopback and no Packer; `journey` (scripts/test) adds that EC2 and
one journey of a real VM; `all` (scripts/test --all) is all that CI has time for. Bare pytest runs `fast`, or
`all` of a folder or file that is named to it.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
TIERS = {"fast": ("vm", "long", "cloud"), "journey": ("vm", "long"), "all": ()}
"""Which markers a tier leaves out; the first that applies counts."""
WHOLE = "AMI_BUILDER_TEST_WHOLE"
"""With this in the environment, no tier leaves out what is marked `whole`."""
LEFT_OUT = pytest.StashKey[Counter[str]]()
REASONS = {
    "vm": "boot a VM",
    "long": "take half a minute and more each",
    "cloud": "need an EC2 on loopback, and Packer",
}
"""How the end of a run calls what is left out by its marker."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tier", choices=[*TIERS], help="which tests run; see tests/conftest.py")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = Counter()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests by their folder, and leave out those of other tiers."""
    for item in items:
        folder = item.path.relative_to(HERE).parts[0]
        if folder in ("vm", "cloud"):
            item.add_marker(folder)
    tier = config.getoption("tier") or ("all" if _named(config) else "fast")
    without = (*(() if WHOLE in os.environ else ("whole",)), *TIERS[tier])
    kept, left = [], []
    for item in items:
        reason = next((name for name in without if item.get_closest_marker(name)), None)
        if reason is None or (tier == "journey" and item.get_closest_marker("journey")):
            kept.append(item)
        else:
            left.append(item)
            config.stash[LEFT_OUT][reason] += 1
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def _named(config: pytest.Config) -> bool:
    """Tell whether the command line names tests by path or marker."""
    if config.option.markexpr:
        return True
    # Without an argument: the folder with all of the tests in it.
    here = config.invocation_params.dir
    return any(HERE in (here / argument.split("::")[0]).resolve().parents for argument in config.args)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """With xdist, let the process that prints know."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    left = session.config.stash[LEFT_OUT]
    if output is not None:
        output["left_out"] = dict(left)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take it from one of xdist's processes: all have left out the same. One that died tells nothing."""
    node.config.stash[LEFT_OUT] = Counter(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counted = terminalreporter.config.stash[LEFT_OUT]
    parts = [f"{counted[name]} that {reason}" for name, reason in REASONS.items() if counted[name]]
    if parts:
        text = ", ".join(parts).replace(" that ", " tests that ", 1)
        terminalreporter.write_line(f"left out: {text}; scripts/test --all runs them")
    if count := counted["whole"]:
        text = f"left out: {count} tests that take minutes each; {WHOLE}=1 scripts/test --all runs them too"
        terminalreporter.write_line(text)
