"""Select the tests of a tier, and list at the end what was left out; a workspace for tests of all folders.

There are three tiers. `fast` needs no VM and no emulated EC2: tests/unit is pure, and tests/process starts
programs of this machine. `journey` (scripts/test) adds the emulated EC2 and one build and verification on a
real VM. `all` (scripts/test --all) adds the rest. Bare pytest runs `fast`; a folder or file on the command
line runs whole.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from ami_builder.state.workspace import Workspace

HERE = Path(__file__).parent
FOLDERS = {"vm": "vm", "cloud": "cloud", "fake_ec2": "cloud", "selftest": "cloud"}
"""The marker of all tests in a folder."""
TIERS = {"fast": ("vm", "long", "cloud"), "journey": ("vm", "long"), "all": ()}
"""Which markers a tier leaves out; the first that applies counts."""
PROGRAMS = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
WHOLE = "AMI_BUILDER_TEST_WHOLE"
"""Environment variable: with it, no tier leaves out tests marked `whole`."""
LEFT_OUT = pytest.StashKey[Counter[str]]()
REASONS = {
    "vm": "boot a VM",
    "long": "take half a minute and more each",
    "cloud": "need the emulated EC2, and Packer",
}
"""What the end of a run says of the tests left out by a marker."""

# The time that an example may take depends on how busy the host is.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """An empty workspace, which commands in this process use too, with the committed configuration."""
    monkeypatch.setenv("AMI_BUILDER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AMI_BUILDER_CONFIG", str(HERE.parent / "ami-builder.toml"))
    made = Workspace.open({"AMI_BUILDER_HOME": str(tmp_path / "home")})
    made.ensure()
    return made


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tier", choices=[*TIERS], help="which tests run; see tests/conftest.py")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = Counter()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests by their folder, skip those whose programs are missing, leave out those of other tiers."""
    for item in items:
        if marker := FOLDERS.get(item.path.relative_to(HERE).parts[0]):
            item.add_marker(marker)
        programs = [str(program) for marker in item.iter_markers("needs") for program in marker.args]
        if missing := [program for program in programs if shutil.which(program, path=PROGRAMS) is None]:
            item.add_marker(
                pytest.mark.skip(f"not installed: {', '.join(missing)} (scripts/test installs it)")
            )
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
    """Return whether the command line names tests by path or marker."""
    if config.option.markexpr:
        return True
    # Without an argument: the folder with all of the tests in it.
    here = config.invocation_params.dir
    return any(HERE in (here / argument.split("::")[0]).resolve().parents for argument in config.args)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """With xdist, report the counts to the process that prints."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    left = session.config.stash[LEFT_OUT]
    if output is not None:
        output["left_out"] = dict(left)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take the counts of one of xdist's processes: they are the same in all. One that died has none."""
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
