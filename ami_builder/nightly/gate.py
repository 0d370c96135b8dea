"""What puts a promotion on hold: how much a new image can differ from the current one."""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ami_builder.config.schema import NightlySettings
from ami_builder.console import amount
from ami_builder.core.diff import Difference, PackageChange, Quantity, QuantityChange
from ami_builder.core.errors import OnHold

MOST_PACKAGES = 12
"""How many of the changed packages are named; the rest is counted."""

# Wall time depends on the host as much as on the image, so it is not compared.
_JUDGED = frozenset({Quantity.SIZE, Quantity.AVAILABLE, Quantity.BOOT})
# Packages that take memory and time at boot are the likely cause of a drift, so they are named first.
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
    """One reason to put a promotion on hold."""

    quantity: Quantity | None
    """What was measured; None for a package."""
    name: str
    """The machine, or the package; empty for the image's size."""
    text: str
    """One line with both values, the change and the bound."""


def judge(difference: Difference, bounds: NightlySettings) -> tuple[Drift, ...]:
    """Return why to put the promotion on hold: a quantity past its bound, a missing machine, a package."""
    drifts = [drift for one in difference.measured if (drift := _drift(one, bounds)) is not None]
    for package in difference.packages or ():
        if (pattern := _pattern(package.name, bounds)) is not None:
            text = f"{_change(package)}, matched by nightly.hold_packages ({pattern})"
            drifts.append(Drift(quantity=None, name=package.name, text=text))
    return tuple(drifts)


def not_compared(difference: Difference) -> tuple[str, ...]:
    """Return what could not be compared, one line each; that does not put a promotion on hold."""
    memory = [one for one in difference.measured if one.quantity is Quantity.AVAILABLE]
    sizes = [one for one in difference.measured if one.quantity is Quantity.SIZE]
    notes = [
        f"{_what(one)} can't be compared: {_format(one, one.before)} before, {_format(one, one.after)} now"
        for one in (*sizes, *memory, *_boots(difference))
        if _values(one) is None and not _is_missing(one)
    ]
    if not memory:
        notes.append("available memory at boot is not compared: neither image was measured here")
    if difference.packages is None:
        notes.append("packages are not compared: one of the images has no list here")
    return tuple(notes)


def _boots(difference: Difference) -> Iterator[QuantityChange]:
    """Yield the boot of each machine that both images ran on, with or without its CPU time."""
    found = {one.name: one for one in difference.measured if one.quantity is Quantity.BOOT}
    for one in difference.measured:
        if one.quantity is Quantity.AVAILABLE and one.before is not None and one.after is not None:
            unknown = QuantityChange(quantity=Quantity.BOOT, name=one.name, before=None, after=None)
            yield found.get(one.name, unknown)


def moved(difference: Difference, bounds: NightlySettings, most: int = MOST_PACKAGES) -> tuple[str, ...]:
    """Return the packages and containers that differ, one line each, the most relevant first."""
    packages = sorted(difference.packages or (), key=lambda package: _rank(package, bounds))
    lines = [_change(package) for package in packages[:most]]
    if len(packages) > most:
        lines.append(f"and {len(packages) - most} more packages")
    return tuple(lines)


def require_close(difference: Difference, bounds: NightlySettings) -> None:
    """Raise OnHold if there is a reason to, with every reason and the changed packages."""
    drifts = judge(difference, bounds)
    if not drifts:
        return
    named = {drift.name for drift in drifts if drift.quantity is None}
    rest = tuple(package for package in difference.packages or () if package.name not in named)
    lines = [drift.text for drift in drifts]
    if any(drift.quantity is not None for drift in drifts):
        lines += moved(Difference(packages=rest, measured=()), bounds)
    raise OnHold(
        "the new image differs too much from the current one: a person decides",
        tail=tuple(lines),
        hint="`ami-builder promote` promotes it anyway; the bounds are nightly.* in ami-builder.toml",
    )


def _drift(one: QuantityChange, bounds: NightlySettings) -> Drift | None:
    """Return the drift of one quantity, if it is for the worse and past its bound."""
    if _is_missing(one):
        text = f"{one.name} was measured before ({_format(one, one.before)} available at boot) but not now"
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
    first, last = _format(one, before), _format(one, after)
    if first == last:
        first, last = f"{before:,}", f"{after:,}"
    verb = "fell" if one.quantity is Quantity.AVAILABLE else "rose"
    change = f"{100 * (after / before - 1):+.1f} %, bound {bound} %"
    text = f"{_what(one)} {verb} from {first} to {last} ({change})"
    return Drift(quantity=one.quantity, name=one.name, text=text)


def _values(one: QuantityChange) -> tuple[float, float] | None:
    """Return both values, if a change can be calculated."""
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
    """Return whether a machine was measured before but not now."""
    return one.quantity is Quantity.AVAILABLE and one.before is not None and one.after is None


def _what(one: QuantityChange) -> str:
    if one.quantity is Quantity.SIZE:
        return "the image's size"
    return f"{one.quantity} on {one.name}"


def _format(one: QuantityChange, value: float | None) -> str:
    return "not measured" if value is None else amount(one.quantity, value)


def _pattern(name: str, bounds: NightlySettings) -> str | None:
    return next((pattern for pattern in bounds.hold_packages if fnmatchcase(name, pattern)), None)


def _change(package: PackageChange) -> str:
    if package.before is None:
        return f"{package.name} {package.after} is new"
    if package.after is None:
        return f"{package.name} {package.before} was removed"
    return f"{package.name} changed from {package.before} to {package.after}"


def _rank(package: PackageChange, bounds: NightlySettings) -> tuple[bool, int, str]:
    return (_pattern(package.name, bounds) is None, next(_ranks(package.name)), package.name)


def _ranks(name: str) -> Iterator[int]:
    yield from (rank for rank, pattern in enumerate(_RELEVANT) if fnmatchcase(name, pattern))
    yield len(_RELEVANT)
