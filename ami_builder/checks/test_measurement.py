"""The measured value is of this start, was taken before Dask ran, and is what was available then."""

from ami_builder.checks.context import Context
from ami_builder.checks.machine_state import CLOCK_SECONDS, VARIABLE, ContainerState, MachineState, exact_size
from ami_builder.core.units import MIB


def available_now(machine: MachineState, context: Context) -> int:
    """Return what a measurement without the Dask container would give now; bytes."""
    available = machine.meminfo["MemAvailable"] + machine.unreclaimable
    programs = int(machine.text.get("programs", "").strip() or 0)
    return available - context.reserve.of(available) - programs


def noise(machine: MachineState) -> int:
    """Return by how many bytes two readings on one idle machine can differ: 0.1 % of MemTotal.

    MemAvailable leaves out the free pages that processors keep for themselves, by default about as many as
    the low watermark (Linux, mm/page_alloc.c, zone_highsize), and vm.watermark_scale_factor makes the steps
    between watermarks 0.1 % of memory. A difference of 0.1 % does not matter to Dask's thresholds.
    """
    return machine.meminfo["MemTotal"] // 1000


def test_measured_at_this_start(machine: MachineState, variable: int) -> None:
    """A value of an earlier start, or of the build, is stale: the machine may have another size now."""
    assert machine.measured is not None
    early = machine.service_started - machine.measured
    assert early <= CLOCK_SECONDS, (
        f"{VARIABLE}={variable} is {early:.1f} s older than this start of dask.service"
    )


def test_container_was_made_after_the_measurement(
    machine: MachineState, container: ContainerState, variable: int
) -> None:
    """An older container keeps an older limit, and its memory is missing from the measurement."""
    assert machine.measured is not None
    early = machine.measured - container.created
    assert early <= 0, (
        f"container {container.name} was made {early:.3f} s before {VARIABLE}={variable} was measured"
    )


def test_variable_is_not_less_than_was_available(
    machine: MachineState, context: Context, variable: int
) -> None:
    """A value measured while Dask runs is too small by what Dask itself uses.

    What is available now, plus what the container's end would free, should be less than at the measurement:
    containerd-shim, Compose and our login came later (4 to 22 MiB less on Debian 13 with 2 GiB). An idle
    scheduler, nanny and worker use 120 MiB and more, and a value measured beside them is 80 to 110 MiB too
    small. The bound of 48 MiB lies between, and leaves room for programs of the boot that end after the
    measurement. From about 64 GiB on, an idle Dask is smaller than the noise of 0.1 %; there, only the order
    of events, checked above, finds this fault.
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
    """A limit above what the system leaves free is never reached: the kernel kills before Dask spills.

    After the measurement, containerd-shim (15 MB), Compose (40 MB), Docker's growth (20 MB) and our login
    with sudo (15 MB) took memory: the bound of 128 MiB covers them. A measurement before Docker and
    containerd ran (157 MB), or of MemTotal in place of MemAvailable (230 MB), exceeds it.
    """
    now = available_now(machine, context)
    bound = 128 * MIB + noise(machine)
    assert variable - now <= bound, (
        f"{VARIABLE} is {exact_size(variable)}, but without Dask only {exact_size(now)} would be available: "
        f"{exact_size(variable - now)} more, where {exact_size(bound)} is the most"
    )


def test_machine_has_the_memory_it_was_booted_with(machine: MachineState, context: Context) -> None:
    """A result counts for the size that was asked for; firmware and kernel keep a part of the memory."""
    total = machine.meminfo["MemTotal"]
    least = int(context.machine_memory * 0.9) - 96 * MIB
    assert least <= total <= context.machine_memory, (
        f"MemTotal is {exact_size(total)}, the machine was booted with {exact_size(context.machine_memory)}"
    )
