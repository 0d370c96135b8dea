"""The host that a benchmark runs on: what it is, how fast it is, and whether it does anything else."""

from __future__ import annotations

import os
import platform
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ami_builder.qemu.accelerator import known_accelerator
from ami_builder.system import processes
from tests.vm.conftest import HOME

LOAD_PER_CPU = 0.5
"""The load average per CPU above which other work would spoil a measurement."""

_REFERENCE = "for i in range(20_000_000): x = i * i"
_REFERENCE_TIMES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What belongs beside every figure."""

    cpus: int
    model: str
    reference_seconds: float
    """CPU seconds for twenty million squarings in a Python loop, the least of three."""
    accelerator: str
    qemu: str
    kernel: str
    python: str

    def __str__(self) -> str:
        return (
            f"{self.cpus} CPUs ({self.model}), {self.accelerator}, {self.qemu}, Linux {self.kernel}; twenty"
            f" million squarings in a Python loop take {self.reference_seconds:.1f} s (Python {self.python})"
        )


def describe(accelerator: Path = HOME / "cache" / "accelerator.json") -> Host:
    """Measure the host and read what it is; takes a few seconds.

    `accelerator` is where a workspace keeps whether VMs run under KVM.
    """
    return Host(
        cpus=os.cpu_count() or 1,
        model=_model(),
        reference_seconds=round(min(_reference_seconds() for _ in range(_REFERENCE_TIMES)), 3),
        accelerator=_accelerator(accelerator),
        qemu=_qemu(),
        kernel=platform.release(),
        python=platform.python_version(),
    )


def load() -> float:
    """Return the load average of the last minute."""
    return os.getloadavg()[0]


def refuse_when_busy() -> None:
    """End the program when other work keeps the CPUs busy."""
    bound = LOAD_PER_CPU * (os.cpu_count() or 1)
    if load() > bound:
        sys.exit(
            f"the load average is {load():.2f}, more than {bound:g}: other work would spoil the figures."
            " Wait until it ends, or measure all the same with --busy."
        )


def minutes(seconds: float) -> str:
    """Format a duration: seconds below two minutes, else minutes and seconds."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{round(seconds) // 60}:{round(seconds) % 60:02} min"


def _reference_seconds() -> float:
    # As a program's own top level, whose variables are in a dictionary.
    code = compile(_REFERENCE, "reference", "exec")
    started = time.process_time()
    exec(code, {})
    return time.process_time() - started


def _model() -> str:
    with suppress(OSError, IndexError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.machine()


def _qemu() -> str:
    version = processes.output(["qemu-system-x86_64", "--version"]).splitlines()[0]
    return version.replace(" emulator version", "")


def _accelerator(cache: Path) -> str:
    known = known_accelerator(cache)
    return "KVM or TCG (a build finds out)" if known is None else known[0].upper()
