"""What the first boots of an AMI measured, as a tag's value, so that any machine can compare with it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ami_builder.model import FIRST_BOOT, Measurement

from .tags import LONGEST

# `m6i.large=8589934592/8143204352/31.2/58.1`: memory, what of it was available, seconds to ssh and to Dask.
_SIZE = r"([1-9][0-9]{0,14})"
_SECONDS = r"([0-9]{1,5}\.[0-9]|-)"
_ENTRY = re.compile(rf"([a-z0-9][a-z0-9.-]{{0,31}})={_SIZE}/{_SIZE}/{_SECONDS}/{_SECONDS}")


def write(measured: Iterable[Measurement]) -> str:
    """Return the first boots of as many machines as a tag has room for, in their order."""
    value = ""
    for one in measured:
        sizes = f"{one.total}/{one.available}"
        entry = f"{one.machine}={sizes}/{_seconds(one.ssh_seconds)}/{_seconds(one.dask_seconds)}"
        longer = f"{value} {entry}".lstrip()
        if one.phase == FIRST_BOOT and _ENTRY.fullmatch(entry) and len(longer) <= LONGEST:
            value = longer
    return value


def read(value: str) -> tuple[Measurement, ...]:
    """Return what `write` wrote; what anybody else may have put there is passed over."""
    found: dict[str, Measurement] = {}
    for entry in value.split(" "):
        parts = _ENTRY.fullmatch(entry)
        if parts is None or int(parts[3]) > int(parts[2]):
            continue
        one = Measurement(
            machine=parts[1],
            phase=FIRST_BOOT,
            total=int(parts[2]),
            available=int(parts[3]),
            ssh_seconds=None if parts[4] == "-" else float(parts[4]),
            dask_seconds=None if parts[5] == "-" else float(parts[5]),
        )
        found.setdefault(one.machine, one)
    return tuple(found.values())


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
