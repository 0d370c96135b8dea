"""Nothing in the container's settings raises, lowers or bypasses the limit."""

import pytest

from ami_builder.checks.machine_state import (
    PROJECT,
    ContainerState,
    MachineState,
    SchedulerAnswer,
    WorkersAnswer,
)

IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"}
UNBOUNDED = {"json-file"}


def test_one_container_runs(machine: MachineState) -> None:
    """Two containers with the whole limit each may use twice the memory; without one, there is no Dask."""
    names = [c.name for c in machine.containers if c.project == PROJECT and c.running]
    why = machine.text["settled"].strip()
    assert len(names) == 1, f"{len(names)} containers of project {PROJECT} run: {names or 'none'} ({why})"


def test_no_soft_limit(machine: MachineState, container: ContainerState) -> None:
    """Above memory.high the kernel slows a container down, and Dask takes memory.high for its limit."""
    assert machine.own("high") == "max", f"memory.high of {container.name} is {machine.own('high')}, not max"


def test_no_memory_low(machine: MachineState, container: ContainerState) -> None:
    """Dask takes memory.low (Docker's memory reservation) for its limit."""
    low = machine.own("low")
    assert low == "0", f"memory.low of {container.name} is {low}, not 0 (reservation {container.reservation})"


def test_no_memory_min(machine: MachineState, container: ContainerState) -> None:
    """The system cannot reclaim memory that is reserved for the container."""
    assert machine.own("min") == "0", f"memory.min of {container.name} is {machine.own('min')}, not 0"


def test_no_swap_by_docker(container: ContainerState) -> None:
    """mem_limit alone lets a container swap as much again, and workers swap where they should spill."""
    assert container.memory_swap == container.memory, (
        f"HostConfig.MemorySwap is {container.memory_swap}, Memory is {container.memory}: set memswap_limit"
    )


def test_no_swap_by_the_kernel(machine: MachineState, container: ContainerState) -> None:
    """The kernel enforces memory.swap.max; a kernel without swap has no such file."""
    assert machine.own("swap.max") in ("0", ""), (
        f"memory.swap.max of {container.name} is {machine.own('swap.max')}, not 0"
    )


def test_cgroup_namespace_is_private(machine: MachineState, container: ContainerState) -> None:
    """In the host's cgroup namespace Dask reads the host's files, which have no limit."""
    names = machine.lines("namespaces")
    private = container.cgroup_namespace == "private" and len(set(names)) == 2
    assert private, (
        f"{container.name} has CgroupnsMode {container.cgroup_namespace!r}, namespaces {', '.join(names)}"
    )


def test_not_privileged(container: ContainerState) -> None:
    """A privileged container can change its own limit."""
    assert not container.privileged, f"{container.name} is privileged"


def test_no_parent_has_a_lower_limit(machine: MachineState, container: ContainerState) -> None:
    """A lower limit of a parent slice applies, but Dask does not see it and spills too late."""
    limit = int(machine.own("max")) if machine.own("max").isdigit() else float("inf")
    lower = [
        f"memory.{file} of {level.path} is {level.get(file)}"
        for level in machine.levels[1:]
        for file in ("max", "high")
        if level.get(file).isdigit() and int(level.get(file)) < limit
    ]
    assert not lower, f"{', '.join(lower)}, below {limit} of {container.name}"


def test_oom_killer_is_on(container: ContainerState) -> None:
    """Without the OOM killer a container at its limit hangs for ever."""
    assert not container.oom_kill_disable, f"{container.name} has OomKillDisable"


def test_no_resource_limits(machine: MachineState, container: ContainerState) -> None:
    """RLIMIT_RSS changes the limit that Dask finds; RLIMIT_AS makes allocations fail before Dask spills."""
    lines = machine.lines("limits")
    limited = sorted({" ".join(line.split()) for line in lines if line.split().count("unlimited") != 2})
    assert lines, f"no process of {container.name} could be read"
    assert not limited, f"in {container.name}: {'; '.join(limited)}"


def test_restart_policy_starts_nothing_at_boot(container: ContainerState) -> None:
    """`always` and `unless-stopped` start the container at boot, before the measurement."""
    assert container.restart_policy in ("no", "on-failure"), (
        f"{container.name} has restart policy {container.restart_policy!r}; use no, or on-failure"
    )


def test_not_killed(container: ContainerState) -> None:
    """If an idle Dask reaches its limit or restarts, the limit is too small to work with."""
    unharmed = not container.oom_killed and container.restart_count == 0
    assert unharmed, (
        f"{container.name}: OOMKilled {container.oom_killed}, RestartCount {container.restart_count}"
    )


def test_no_health_check_inside(container: ContainerState) -> None:
    """A health check by exec runs in the container's cgroup, and near the limit it causes a kill."""
    tests = container.health_check
    assert not tests or tests[0] == "NONE", f"{container.name} has the health check {' '.join(tests)}"


def test_logs_are_bounded(container: ContainerState) -> None:
    """Logs of json-file grow without bound, and Dask cannot spill to a full disk."""
    bounded = container.log_driver not in UNBOUNDED or container.log_options.get("max-size", "-1") != "-1"
    assert bounded, (
        f"{container.name} uses log driver {container.log_driver}"
        f" with {dict(container.log_options) or 'no options'}: "
        "set max-size and max-file"
    )


def test_spill_is_on_disk(machine: MachineState, dask: SchedulerAnswer) -> None:
    """Data spilled to tmpfs still counts as the container's memory, so spilling frees nothing."""
    mounts = {worker.directory: machine.mount_of(worker.directory) for worker in dask.workers}
    bad = [
        f"{path} on {m.type if m else 'nothing'}"
        for path, m in mounts.items()
        if not m or m.type in IN_MEMORY
    ]
    assert not bad, f"workers spill to {', '.join(bad)}"


def test_spill_is_outside_the_container(machine: MachineState, dask: SchedulerAnswer) -> None:
    """The container's own layer is slower, has no bound, and is not emptied at each start."""
    mounts = {worker.directory: machine.mount_of(worker.directory) for worker in dask.workers}
    bad = [f"{path} on {m.point} ({m.type})" for path, m in mounts.items() if m and str(m.point) == "/"]
    assert not bad, f"workers spill into the container's own layer: {', '.join(bad)}"


def test_workers_manage_memory(dask: SchedulerAnswer) -> None:
    """A limit of 0 turns Dask's memory management off: no worker spills or pauses."""
    off = [worker.address for worker in dask.workers if not worker.memory_limit]
    assert not off, f"workers without a memory limit: {', '.join(off)}"


@pytest.mark.first_boot
def test_workers_spill_before_they_are_restarted(workers: WorkersAnswer) -> None:
    """With a threshold off or out of order, the kernel acts before Dask does."""
    for worker in workers.workers:
        fractions = [worker.target, worker.spill, worker.pause, worker.terminate]
        steps = [float(f) for f in fractions if f is not False and f is not None]
        thresholds = f"target, spill, pause, terminate of {worker.address} are {fractions}"
        assert worker.terminate is not None, f"{thresholds}: there is no nanny"
        assert len(steps) == len(fractions), f"{thresholds}: one is off"
        assert 0 < steps[0] <= steps[1] <= steps[2] <= steps[3] < 1, f"{thresholds}: not in order below 1"
