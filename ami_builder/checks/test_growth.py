"""The machine notices when its system has outgrown the reserve, and the limit is no longer right."""

import json
from collections.abc import Callable

import pytest

from ami_builder.checks.machine_state import MachineState
from ami_builder.core.units import MIB

GROWER = "ami-builder-grows.service"


def test_growth_is_compared(machine: MachineState, note: Callable[[str], None]) -> None:
    """When agents have grown, Dask's thresholds are too high. How far is no fault of the image, so a note."""
    text = machine.text["growth"].strip()
    try:
        found = json.loads(text)
        growth, excess = int(found["growth"]), int(found["excess"])
        by = ", ".join(f"{one['cgroup']} +{int(one['bytes']) / MIB:.0f} MiB" for one in found["grown"])
    except (ValueError, KeyError, TypeError):
        pytest.fail(f"/run/dask/public/memory.json should be a comparison, but is {text[:200]!r}")
    beyond = f", {excess / MIB:.0f} MiB more than its reserve" if excess > 0 else ""
    amount = f"{abs(growth) / MIB:.0f} MiB {'less' if growth < 0 else 'more'}"
    note(f"the system uses {amount} than when Dask started{beyond}{f': {by}' if by else ''}")


@pytest.mark.first_boot
def test_who_has_grown_is_reported(machine: MachineState) -> None:
    """Growth that nobody notices ends in a machine that stalls. Here a process outgrows the reserve."""
    lines = machine.lines("growth.grown")
    assert any(f"{GROWER} +" in line for line in lines), (
        f"{GROWER} took more than the reserve, but /run/dask/health has {' / '.join(lines) or 'nothing'};"
        f" it was compared: {machine.text.get('growth.measured', '').strip() or 'no answer'}"
    )


@pytest.mark.first_boot
def test_growth_that_has_ended_is_no_longer_reported(machine: MachineState) -> None:
    """A report that stays for ever is soon ignored."""
    lines = machine.lines("growth.ended")
    assert lines, "/run/dask/health is empty"
    assert not any(GROWER in line for line in lines), f"{GROWER} has ended, but /run/dask/health still has it"
