"""How two images differ, by what is recorded about each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum


class Quantity(StrEnum):
    """What was measured."""

    SIZE = "size"
    """Of the image, in bytes."""
    AVAILABLE = "available memory at boot"
    """AVAILABLE_MEMORY_FOR_DASK of the first boot, in bytes, for each machine."""
    BOOT = "CPU time to boot"
    """Of the first boot until a worker was registered, for each machine, in multiples of the control: a fixed
    piece of work on the same machine."""
    SSH = "seconds to ssh"
    """Of the first boot, for each machine."""
    DASK = "seconds to Dask"
    """Of the first boot, for each machine."""
    TIME = "time"
    """Of each step of its run, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What is recorded about one image."""

    packages: Mapping[str, str] | None
    """Name -> version, with the container. None if no list was kept."""
    measured: Mapping[Quantity, Mapping[str, float]]
    """Quantity -> machine, step or nothing -> value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageChange:
    """A package whose version differs; None if it is not there."""

    name: str
    before: str | None
    after: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantityChange:
    """One quantity of both images; None if it was not measured."""

    quantity: Quantity
    name: str
    """The machine or the step; empty for the size."""
    before: float | None
    after: float | None

    @property
    def change(self) -> float | None:
        """The relative change: 0.01 for one percent more; None if unknown."""
        if self.before is None or self.after is None or not self.before:
            return None
        return self.after / self.before - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The packages that differ between two images, and every quantity of either."""

    packages: tuple[PackageChange, ...] | None
    """None if either image has no list."""
    measured: tuple[QuantityChange, ...]


def compare(before: Side, after: Side) -> Difference:
    """Return how one image differs from another."""
    packages = None
    if before.packages is not None and after.packages is not None:
        packages = tuple(
            PackageChange(name=name, before=before.packages.get(name), after=after.packages.get(name))
            for name in sorted({*before.packages, *after.packages})
            if before.packages.get(name) != after.packages.get(name)
        )
    measured = []
    for quantity in Quantity:
        old, new = before.measured.get(quantity, {}), after.measured.get(quantity, {})
        measured += [
            QuantityChange(quantity=quantity, name=name, before=old.get(name), after=new.get(name))
            for name in dict.fromkeys([*old, *new])
        ]
    return Difference(packages=packages, measured=tuple(measured))


def read_packages(lines: Iterable[str]) -> dict[str, str]:
    """Return name -> version from lines `name=version`; several versions of a name are joined."""
    found: dict[str, set[str]] = {}
    for line in lines:
        name, equals, version = line.strip().rpartition("=")
        if equals:
            found.setdefault(name, set()).add(version)
    return {name: ", ".join(sorted(versions)) for name, versions in found.items()}


def multiple(value: float) -> str:
    """Return multiples of the control as `51.33 x control`."""
    return f"{value:.2f} x control"
