"""The chain of equal numbers: the variable, Docker, the kernel and Dask's workers have the same limit."""

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
from ami_builder.core import oom
from ami_builder.core.options import Role


def test_variable_was_measured(machine: MachineState) -> None:
    """Without one line of integer bytes, Compose's `:-0` applies: Dask starts without a limit."""
    content = machine.text["memory.env"].strip() or "nothing"
    assert machine.variable is not None, (
        f"/run/dask/memory.env should be {VARIABLE}=<bytes>, but is {content!r}"
    )


def test_variable_is_less_than_the_machine_has(machine: MachineState, variable: int) -> None:
    """With a limit of all memory, or with none, the kernel's OOM killer acts before Dask does."""
    total = machine.meminfo["MemTotal"]
    assert 0 < variable < total, f"{VARIABLE} is {exact_size(variable)}, MemTotal {exact_size(total)}"


def test_variable_is_whole_pages(machine: MachineState, variable: int) -> None:
    """The kernel rounds a limit down to a page, Docker does not: they agree on whole pages only."""
    over = variable % machine.page
    assert over == 0, (
        f"{VARIABLE} is {variable} bytes, {over} more than a multiple of the page size {machine.page}"
    )


def test_container_has_a_limit(machine: MachineState, container: ContainerState) -> None:
    """A container without a limit looks healthy until memory runs out."""
    maximum = machine.own("max") or "missing"
    assert maximum.isdigit(), (
        f"container {container.name} runs without a memory limit: memory.max is {maximum}"
    )


def test_docker_has_the_variable(container: ContainerState, variable: int) -> None:
    """Compose must pass the variable on unchanged; with 0, the default of systemd's scope applies."""
    assert container.memory in (0, variable), (
        f"HostConfig.Memory is {exact_size(container.memory)}, {VARIABLE} is {exact_size(variable)}"
    )


def test_systemd_has_the_variable(machine: MachineState, variable: int) -> None:
    """systemd limits every container that does not ask for a limit itself, however it was started."""
    assert f"MemoryMax={variable}" in machine.lines("scope"), (
        f"docker-.scope.d/10-dask.conf has {machine.lines('scope') or 'nothing'}, {VARIABLE} is {variable}"
    )


@pytest.mark.first_boot
def test_any_container_has_the_variable(machine: MachineState, variable: int) -> None:
    """A plain `docker run IMAGE`, without a memory option, gets the limit too."""
    found = (machine.lines("plain") or ("nothing",))[0]
    assert found == str(variable), f"a plain `docker run` gets memory.max {found}, {VARIABLE} is {variable}"


def test_kernel_enforces_the_variable(
    machine: MachineState, container: ContainerState, variable: int
) -> None:
    """The kernel enforces memory.max of the cgroup that the container's processes are in."""
    maximum = machine.own("max") or "missing"
    assert maximum == str(variable), (
        f"memory.max of container {container.name} is {maximum}, {VARIABLE} is {variable}"
    )


def test_container_sees_the_variable(machine: MachineState, container: ContainerState, variable: int) -> None:
    """Dask reads /sys/fs/cgroup/memory.max inside; it is missing in the host's cgroup namespace."""
    inside = machine.text["inside"].strip() or "missing"
    assert inside == str(variable), (
        f"/sys/fs/cgroup/memory.max inside container {container.name} is {inside}, {VARIABLE} is {variable}"
    )


def test_workers_share_the_variable(context: Context, dask: SchedulerAnswer, variable: int) -> None:
    """The workers' limits add up to the container's, less the headroom and a byte of rounding each."""
    if context.role is Role.SCHEDULER:
        pytest.skip("a scheduler has no workers: the chain ends at memory.max")
    limits = [worker.memory_limit for worker in dask.workers]
    headroom = oom.nanny_headroom(context.headroom, limit=variable, role=context.role)
    share = variable - headroom
    less = f", less a headroom of {exact_size(headroom)}" if headroom else ""
    assert share - max(1, len(limits)) < sum(limits) <= share, (
        f"the limits of {len(limits)} workers, {limits}, add up to {exact_size(sum(limits))};"
        f" {VARIABLE} is {exact_size(variable)}{less}"
    )


@pytest.mark.first_boot
def test_workers_confirm_what_the_scheduler_lists(dask: SchedulerAnswer, workers: WorkersAnswer) -> None:
    """Later starts ask only the scheduler, so its list must agree with the workers themselves."""
    listed = {worker.address: worker.memory_limit for worker in dask.workers}
    found = {worker.address: worker.memory_limit or 0 for worker in workers.workers}
    assert found == listed, f"the scheduler lists the limits {listed}, the workers report {found}"
