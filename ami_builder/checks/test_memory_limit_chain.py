"""The promise: one chain of equal numbers, from the variable to Dask's workers."""

from __future__ import annotations

import pytest

from ami_builder.checks.context import Context
from ami_builder.checks.machine_state import (
    VARIABLE,
    ContainerState,
    MachineState,
    SchedulerAnswer,
    WorkersAnswer,
    exact_size,
)
from ami_builder.core.options import Role


def test_variable_was_measured(machine: MachineState) -> None:
    """Without exactly one line of integer bytes, `:-0` applies: Dask starts and nothing is limited."""
    content = machine.text["memory.env"].strip() or "nothing"
    assert machine.variable is not None, (
        f"/run/dask/memory.env should be {VARIABLE}=<bytes>, and holds {content!r}"
    )


def test_variable_is_less_than_the_machine_has(machine: MachineState, variable: int) -> None:
    """A limit of all memory, or of none, leaves the system to the kernel's out-of-memory killer."""
    total = machine.meminfo["MemTotal"]
    assert 0 < variable < total, f"{VARIABLE} is {exact_size(variable)}, MemTotal {exact_size(total)}"


def test_variable_is_whole_pages(machine: MachineState, variable: int) -> None:
    """The kernel rounds a limit down to a page and Docker does not: only whole pages stay equal."""
    over = variable % machine.page
    assert over == 0, f"{VARIABLE} is {variable} bytes, {over} more than whole pages of {machine.page}"


def test_container_has_a_limit(machine: MachineState, container: ContainerState) -> None:
    """No limit is the silent failure that this project exists to catch."""
    maximum = machine.levels[0].get("max") if machine.levels else "missing"
    assert maximum.isdigit(), (
        f"container {container.name} runs without a memory limit: memory.max is {maximum}"
    )


def test_docker_has_the_variable(container: ContainerState, variable: int) -> None:
    """Compose must hand the variable on as it is; 0 leaves the limit to the scope's default."""
    assert container.memory in (0, variable), (
        f"docker inspect has Memory {exact_size(container.memory)}, {VARIABLE} is {exact_size(variable)}"
    )


def test_systemd_has_the_variable(machine: MachineState, variable: int) -> None:
    """Whatever starts a container, systemd limits its scope, unless it asks for a limit of its own."""
    assert f"MemoryMax={variable}" in machine.lines("scope"), (
        f"docker-.scope.d/10-dask.conf has {machine.lines('scope') or 'nothing'}, {VARIABLE} is {variable}"
    )


@pytest.mark.first_boot
def test_any_container_has_the_variable(machine: MachineState, variable: int) -> None:
    """`docker run IMAGE` as anybody types it, without a word about memory."""
    found = (machine.lines("plain") or ("nothing",))[0]
    assert found == str(variable), f"a plain `docker run` has memory.max {found}, {VARIABLE} is {variable}"


def test_kernel_enforces_the_variable(
    machine: MachineState, container: ContainerState, variable: int
) -> None:
    """memory.max of the cgroup that the container's processes are in is what really limits them."""
    maximum = machine.levels[0].get("max") if machine.levels else "missing"
    assert maximum == str(variable), (
        f"memory.max of container {container.name} is {maximum}, {VARIABLE} is {variable}"
    )


def test_container_sees_the_variable(machine: MachineState, container: ContainerState, variable: int) -> None:
    """Dask reads /sys/fs/cgroup/memory.max inside; in the host's cgroup namespace there is none."""
    inside = machine.text["inside"].strip() or "missing"
    assert inside == str(variable), (
        f"/sys/fs/cgroup/memory.max inside container {container.name} is {inside}, {VARIABLE} is {variable}"
    )


def test_workers_share_the_variable(context: Context, dask: SchedulerAnswer, variable: int) -> None:
    """The workers' limits must add up to the container's, less the headroom and what rounding takes."""
    if context.role is Role.SCHEDULER:
        pytest.skip("a scheduler has no workers: the chain ends at memory.max")
    limits = [worker.memory_limit for worker in dask.workers]
    share = variable - context.headroom
    less = f", less a headroom of {exact_size(context.headroom)}" if context.headroom else ""
    assert share - max(1, len(limits)) < sum(limits) <= share, (
        f"{len(limits)} workers have {limits} = {exact_size(sum(limits))}, {VARIABLE} is {exact_size(variable)}{less}"
    )


@pytest.mark.first_boot
def test_workers_confirm_what_the_scheduler_lists(dask: SchedulerAnswer, workers: WorkersAnswer) -> None:
    """On later starts only the scheduler is asked: the workers themselves must have the same limits."""
    listed = {worker.address: worker.memory_limit for worker in dask.workers}
    found = {worker.address: worker.memory_limit or 0 for worker in workers.workers}
    assert found == listed, f"the scheduler lists the limits {listed}, the workers answer {found}"
