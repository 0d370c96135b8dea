"""`ami-builder doctor`: whether the limits of a running cluster's workers are right."""

from __future__ import annotations

from ami_builder.console import Progress
from ami_builder.doctor.client import read_cluster
from ami_builder.doctor.rules import Diagnosis, Health, diagnose


def examine(address: str, seconds: float, progress: Progress) -> tuple[Diagnosis, ...]:
    """Return what is said of every worker of the scheduler at `address`, asked for at most `seconds`.

    Raises UsageError, MissingTool and TimedOut.
    """
    with progress.step("ask the workers", address) as step:
        workers = read_cluster(address, seconds)
        answered = sum(not worker.silent for worker in workers)
        step.done(f"{answered} of {len(workers)} answered")
    return tuple(sorted(diagnose(workers), key=_worst_first))


def _worst_first(diagnosis: Diagnosis) -> tuple[bool, str, str]:
    return diagnosis.health is Health.RIGHT, diagnosis.worker.name, diagnosis.worker.address


def summary(diagnoses: tuple[Diagnosis, ...]) -> str:
    """Return the verdict in one line: how many limits are right, and what the others are."""
    if not diagnoses:
        return "the scheduler has no workers"
    counts = {health: sum(d.health is health for d in diagnoses) for health in Health}
    right, total = counts.pop(Health.RIGHT), len(diagnoses)
    others = ", ".join(f"{count} {health}" for health, count in counts.items() if count)
    verb = "has" if 1 in (right, total) else "have"
    first = f"{right} of {total} worker{'s' if total > 1 else ''} {verb} a right limit"
    return f"{first}: {others}" if others else first
