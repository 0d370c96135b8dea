"""dask.service measured and started Dask, and everything that starts containers sees the value."""

import re

import pytest

from ami_builder.checks.context import Context
from ami_builder.checks.machine_state import (
    CLOCK_SECONDS,
    VARIABLE,
    MachineState,
    SchedulerAnswer,
    WorkersAnswer,
)
from ami_builder.core.options import Role

AFTER = ("docker.service", "multi-user.target", "dask-memory.service")


def test_service_is_active(machine: MachineState) -> None:
    """Dask must have been started by dask.service, which measures first."""
    state, sub, result = (machine.service.get(key) for key in ("ActiveState", "SubState", "Result"))
    last = machine.text["last words"].strip() or machine.text["settled"].strip()
    assert state == "active", f"dask.service is {state} ({sub}, result {result}): {last}"


def test_service_is_enabled(machine: MachineState) -> None:
    """A service that was only started by hand does not start at the next boot."""
    state = machine.service.get("UnitFileState") or "not installed"
    assert state == "enabled", f"dask.service is {state}, not enabled"


def test_service_starts_after_the_system(machine: MachineState) -> None:
    """A service that starts after the measurement uses memory that was measured as Dask's."""
    missing = [unit for unit in AFTER if unit not in machine.service.get("After", "").split()]
    assert not missing, f"dask.service is not ordered after {', '.join(missing)}"


def test_measured_after_the_commands_of_user_data(machine: MachineState) -> None:
    """User data may start agents. No unit order ensures it: a command may be `systemctl restart dask`."""
    final = dict(line.split("=", 1) for line in machine.lines("cloud-final") if "=" in line)
    ended = machine.booted + int(final.get("ExecMainExitTimestampMonotonic") or 0) / 1e6
    assert final.get("ActiveState") != "activating", "cloud-final.service is still running"
    assert machine.measured is not None
    early = ended - machine.measured
    assert early <= CLOCK_SECONDS, f"measured {early:.1f} s before cloud-final.service had ended"


def test_instance_store_is_used(machine: MachineState) -> None:
    """Disks of the instance that can't be formatted or mounted leave Dask on the slower root disk."""
    reasons = machine.lines("spill-notices")
    assert not reasons, f"mount-spill: {'; '.join(reasons)}"


def test_service_started_once(machine: MachineState) -> None:
    """A start that needed several attempts hides a fault that may not always pass."""
    restarts = machine.service.get("NRestarts")
    assert restarts == "0", f"dask.service was restarted {restarts} times"


def test_journal_has_the_value(machine: MachineState, variable: int) -> None:
    """Exactly one line in the journal records what this start measured, for later diagnosis."""
    lines = [
        line for line in machine.lines("journal") if re.search(rf"{VARIABLE}\D{{1,3}}{variable}\b", line)
    ]
    assert len(lines) == 1, (
        f"the journal of this start has {len(lines)} lines with {VARIABLE}={variable}, expected 1"
    )


def test_dask_is_healthy(machine: MachineState) -> None:
    """The scheduler answers /health from outside the container, where dask-health asks."""
    first = (machine.lines("health") or ("nothing",))[0]
    assert re.match(r"HTTP/\S+ 200 ", first + " "), f"http://127.0.0.1:8787/health answers {first!r}"


def test_service_has_the_variable(machine: MachineState, variable: int) -> None:
    """Compose reads the variable from the service's environment; no login shell or sudo passes it on."""
    found = machine.text["service.environment"].strip() or "nothing"
    assert found == f"{VARIABLE}={variable}", (
        f"the environment of dask.service has {found}, expected {variable}"
    )


@pytest.mark.parametrize("shell", ["sudo -i", "bash -l", "sh -l"])
def test_login_shell_has_the_variable(machine: MachineState, variable: int, shell: str) -> None:
    """A person who runs Compose by hand gets the same limit as the service."""
    found = machine.text[f"shell {shell}"].strip() or "nothing"
    assert found == str(variable), f"`{shell}` has {VARIABLE} {found}, the measured value is {variable}"


def test_variable_is_not_stored(machine: MachineState) -> None:
    """A value in /etc or an .env file is the builder's, and would override the measurement everywhere."""
    lines = machine.lines("stored")
    assert not lines, (
        f"{len(lines)} files have a value of {VARIABLE}: {'; '.join(line[:120] for line in lines[:3])}"
    )


def test_no_unit_failed(machine: MachineState) -> None:
    """A unit that fails on a new machine is a fault of the image."""
    units = [line.split()[0] for line in machine.lines("failed")]
    assert not units, f"failed units: {', '.join(units)}"


def test_the_scheduler_lists_its_workers(machine: MachineState) -> None:
    """The workers' limits are read from the scheduler's list."""
    assert not machine.dask.error, machine.dask.error


@pytest.mark.first_boot
def test_dask_answers_its_client(client: WorkersAnswer) -> None:
    """The workers' thresholds are read through Dask's own client."""
    assert not client.error, f"Dask's client got no answer: {client.error}"


def test_all_workers_are_there(context: Context, dask: SchedulerAnswer) -> None:
    """The share of a worker that did not start is unused."""
    if context.role is Role.SCHEDULER:
        pytest.skip("a scheduler has no workers")
    count = len(dask.workers)
    expected = context.workers or max(1, count)
    assert count == expected, f"{count} workers are registered, expected {expected}"
