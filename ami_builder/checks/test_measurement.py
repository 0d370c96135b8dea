"""The measurement: taken anew at this start, before Dask, and of what was really available."""

from __future__ import annotations

from ami_builder.checks.context import Context
from ami_builder.checks.machine_state import CLOCK_SECONDS, VARIABLE, ContainerState, MachineState, exact_size

MIB = 1 << 20


def available_now(machine: MachineState, context: Context) -> int:
    """Return what a measurement would give now if the Dask container were gone, less the reserve; bytes."""
    available = machine.meminfo["MemAvailable"] + machine.unreclaimable
    return int(available * (1 - context.reserve.percent / 100)) - context.reserve.bytes


def noise(machine: MachineState) -> int:
    """Return how far two readings of one idle machine differ, in bytes: 0.1 % of MemTotal.

    MemAvailable leaves out the free pages that processors keep for themselves, by default about as many as
    the low watermark (Linux, mm/page_alloc.c, zone_highsize), and vm.watermark_scale_factor makes the steps
    between watermarks 0.1 % of memory. Besides, 0.1 % are nothing that Dask's thresholds would notice.
    """
    return machine.meminfo["MemTotal"] // 1000


def test_measured_at_this_start(machine: MachineState, variable: int) -> None:
    """A value from an earlier start or from the builder is stale: the machine may have been resized since."""
    assert machine.measured is not None
    early = machine.service_started - machine.measured
    assert early <= CLOCK_SECONDS, (
        f"{VARIABLE}={variable} is {early:.1f} s older than this start of dask.service"
    )


def test_container_was_made_after_the_measurement(
    machine: MachineState, container: ContainerState, variable: int
) -> None:
    """A container that is older keeps an older limit, and what it uses is missing from the measurement."""
    assert machine.measured is not None
    early = machine.measured - container.created
    assert early <= 0, (
        f"container {container.name} was made {early:.3f} s before {VARIABLE}={variable} was measured"
    )


def test_variable_is_not_less_than_was_available(
    machine: MachineState, context: Context, variable: int
) -> None:
    """Measured while Dask runs, the value lacks what Dask itself uses, for nothing.

    What is available now, with all counted back in that only the container's end would give back, should be
    less than at the measurement: containerd-shim, Compose and our login came later (4 to 22 MiB less on
    Debian 13 with 2 GiB). An idle scheduler, nanny and worker hold 120 MiB and more, and measured beside them
    the value comes out 80 to 110 MiB below. 48 MiB lie between: they leave room for programs of the boot that
    end after the measurement. From about 64 GiB on one idle Dask hides in the noise of 0.1 %, and it is the
    order of events, checked above, that tells.
    """
    now = available_now(machine, context)
    bound = 48 * MIB + noise(machine)
    assert now - variable <= bound, (
        f"{VARIABLE} is {exact_size(variable)}, but without Dask {exact_size(now)} would be available: "
        f"{exact_size(now - variable)} less, where {exact_size(bound)} is the most"
    )


def test_variable_is_not_more_than_was_available(
    machine: MachineState, context: Context, variable: int
) -> None:
    """A limit above what the system leaves is reached too late: the kernel steps in before Dask does.

    Since the measurement came containerd-shim (15 MB), Compose (40 MB), Docker's own growth (20 MB), our
    login with sudo (15 MB): 128 MiB cover them. Docker and containerd (157 MB), had they not been up yet, or
    MemTotal in place of MemAvailable (230 MB), come on top of those, and so do not fit.
    """
    now = available_now(machine, context)
    bound = 128 * MIB + noise(machine)
    assert variable - now <= bound, (
        f"{VARIABLE} is {exact_size(variable)}, but without Dask only {exact_size(now)} would be available: "
        f"{exact_size(variable - now)} more, where {exact_size(bound)} is the most"
    )


def test_machine_has_the_memory_it_was_booted_with(machine: MachineState, context: Context) -> None:
    """A proof for 2 GiB on another machine proves nothing; firmware and kernel keep a part of it."""
    total = machine.meminfo["MemTotal"]
    least = int(context.machine_memory * 0.9) - 96 * MIB
    assert least <= total <= context.machine_memory, (
        f"MemTotal is {exact_size(total)}, the machine was booted with {exact_size(context.machine_memory)}"
    )
