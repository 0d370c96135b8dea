"""What holds an image back from a channel: drift past a bound from the image that stands there; pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ami_builder.config.schema import NightlySettings
from ami_builder.core.diff import Difference, PackageChange, Quantity, QuantityChange, Unit, multiple
from ami_builder.core.errors import OnHold
from ami_builder.core.units import GIB

MOST_PACKAGES = 12
"""How many of the packages that moved are named; the rest is counted."""

# Wall time says as much about the host as about the image, so it holds nothing.
_JUDGED = frozenset({Quantity.SIZE, Quantity.AVAILABLE, Quantity.BOOT})
# What takes memory and time at boot, so what is likely behind a drift; anything else comes after.
_RELEVANT = (
    "container:*",
    "linux-image-*",
    "docker*",
    "containerd*",
    "runc",
    "systemd*",
    "cloud-init*",
    "python3*",
    "openssh-*",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """One reason to hold a promotion."""

    quantity: Quantity | None
    """What was measured; None for a package."""
    name: str
    """The machine, or the package; empty for the image's size."""
    text: str
    """One line with both values, the change and the bound."""


def judge(difference: Difference, bounds: NightlySettings) -> tuple[Drift, ...]:
    """Return what holds the promotion: harm past its bound, a machine that is missing, a package to hold."""
    drifts = [drift for one in difference.measured if (drift := _drift(one, bounds)) is not None]
    for package in difference.packages or ():
        if (pattern := _pattern(package.name, bounds)) is not None:
            text = f"{_moved(package)}, which nightly.hold_packages ({pattern}) leaves to a person"
            drifts.append(Drift(quantity=None, name=package.name, text=text))
    return tuple(drifts)


def not_compared(difference: Difference) -> tuple[str, ...]:
    """Return what the gate could not look at, one line each; that holds nothing."""
    memory = [one for one in difference.measured if one.quantity is Quantity.AVAILABLE]
    sizes = [one for one in difference.measured if one.quantity is Quantity.SIZE]
    notes = [
        f"{_what(one)} can't be compared: {_shown(one, one.before)} before, {_shown(one, one.after)} now"
        for one in (*sizes, *memory, *_boots(difference))
        if _values(one) is None and not _is_missing(one)
    ]
    if not memory:
        notes.append("available memory at boot is not compared: neither image has a measurement here")
    if difference.packages is None:
        notes.append("packages are not compared: of one of the images no list was kept here")
    return tuple(notes)


def _boots(difference: Difference) -> Iterator[QuantityChange]:
    """Yield the boot of each machine that both images ran on, with or without its CPU time."""
    found = {one.name: one for one in difference.measured if one.quantity is Quantity.BOOT}
    for one in difference.measured:
        if one.quantity is Quantity.AVAILABLE and one.before is not None and one.after is not None:
            unknown = QuantityChange(quantity=Quantity.BOOT, name=one.name, before=None, after=None)
            yield found.get(one.name, unknown)


def moved(difference: Difference, bounds: NightlySettings, most: int = MOST_PACKAGES) -> tuple[str, ...]:
    """Return the packages and containers that differ, one line each, what most likely matters first."""
    packages = sorted(difference.packages or (), key=lambda package: _rank(package, bounds))
    lines = [_moved(package) for package in packages[:most]]
    if len(packages) > most:
        lines.append(f"and {len(packages) - most} more packages")
    return tuple(lines)


def require_close(difference: Difference, bounds: NightlySettings) -> None:
    """Raise Held when anything holds the promotion, with each reason and what moved."""
    drifts = judge(difference, bounds)
    if not drifts:
        return
    named = {drift.name for drift in drifts if drift.quantity is None}
    rest = tuple(package for package in difference.packages or () if package.name not in named)
    lines = [drift.text for drift in drifts]
    if any(drift.quantity is not None for drift in drifts):
        lines += moved(Difference(packages=rest, measured=()), bounds)
    raise OnHold(
        "this image drifted too far from the promoted one: a person decides",
        tail=tuple(lines),
        hint="`ami-builder promote` promotes it all the same; the bounds are nightly.* in ami-builder.toml",
    )


def _drift(one: QuantityChange, bounds: NightlySettings) -> Drift | None:
    """Return the harm that one quantity has come to, when that is past its bound."""
    if _is_missing(one):
        text = f"{one.name} was measured before ({_shown(one, one.before)} available at boot), and is not now"
        return Drift(quantity=one.quantity, name=one.name, text=text)
    values = _values(one)
    if values is None or one.quantity not in _JUDGED:
        return None
    before, after = values
    bound = _bound(one.quantity, bounds)
    harm = before - after if one.quantity is Quantity.AVAILABLE else after - before
    # Multiplied, so that sizes are compared to the byte.
    if harm * 100 <= bound * before:
        return None
    first, last = _shown(one, before), _shown(one, after)
    if first == last:
        first, last = f"{before:,}", f"{after:,}"
    verb = "fell" if one.quantity is Quantity.AVAILABLE else "rose"
    change = f"{100 * (after / before - 1):+.1f} %, bound {bound} %"
    text = f"{_what(one)} {verb} from {first} to {last} ({change})"
    return Drift(quantity=one.quantity, name=one.name, text=text)


def _values(one: QuantityChange) -> tuple[float, float] | None:
    """Return both values where a change can be told."""
    if one.before is None or one.after is None or one.before <= 0:
        return None
    return one.before, one.after


def _bound(quantity: Quantity, bounds: NightlySettings) -> int:
    match quantity:
        case Quantity.AVAILABLE:
            return bounds.memory_drift_percent
        case Quantity.SIZE:
            return bounds.size_drift_percent
        case _:
            return bounds.time_drift_percent


def _is_missing(one: QuantityChange) -> bool:
    """Tell whether a machine was measured before and is not any more."""
    return one.quantity is Quantity.AVAILABLE and one.before is not None and one.after is None


def _what(one: QuantityChange) -> str:
    if one.quantity is Quantity.SIZE:
        return "the image's size"
    return f"{one.quantity} on {one.name}"


def _shown(one: QuantityChange, value: float | None) -> str:
    if value is None:
        return "not measured"
    match one.quantity.unit:
        case Unit.BYTES:
            return f"{value / GIB:.2f} GiB"
        case Unit.CONTROLS:
            return multiple(value)
        case Unit.SECONDS:
            return f"{value:.1f} s"


def _pattern(name: str, bounds: NightlySettings) -> str | None:
    return next((pattern for pattern in bounds.hold_packages if fnmatchcase(name, pattern)), None)


def _moved(package: PackageChange) -> str:
    if package.before is None:
        return f"{package.name} {package.after} is new"
    if package.after is None:
        return f"{package.name} {package.before} is gone"
    return f"{package.name} moved from {package.before} to {package.after}"


def _rank(package: PackageChange, bounds: NightlySettings) -> tuple[bool, int, str]:
    return (_pattern(package.name, bounds) is None, next(_places(package.name)), package.name)


def _places(name: str) -> Iterator[int]:
    yield from (place for place, pattern in enumerate(_RELEVANT) if fnmatchcase(name, pattern))
    yield len(_RELEVANT)
