"""What the first boots of an AMI measured, as a tag's value, so that any machine can compare with it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ami_builder.aws.tags import LONGEST
from ami_builder.core.records import FIRST_BOOT, Measurement

# `m6i.large=8589934592/8143204352/31.2/58.1/12.35/0.235`: memory, what of it was available, seconds to ssh
# and to Dask, CPU seconds of the boot and of the control. The last two may be missing.
_SIZE = r"([1-9][0-9]{0,14})"
_SECONDS = r"([0-9]{1,5}\.[0-9]|-)"
_CPU = r"(?:/([0-9]{1,5}\.[0-9]{2}|-)/([0-9]{1,4}\.[0-9]{3}|-))?"
_ENTRY = re.compile(rf"([a-z0-9][a-z0-9.-]{{0,31}})={_SIZE}/{_SIZE}/{_SECONDS}/{_SECONDS}{_CPU}")


def write(measured: Iterable[Measurement]) -> str:
    """Return the first boots of as many machines as a tag has room for, in their order."""
    value = ""
    for one in measured:
        sizes = f"{one.total}/{one.available}"
        entry = f"{one.machine}={sizes}/{_text(one.ssh_seconds, 1)}/{_text(one.dask_seconds, 1)}"
        if one.cpu_seconds is not None or one.control_seconds is not None:
            entry += f"/{_text(one.cpu_seconds, 2)}/{_text(one.control_seconds, 3)}"
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
            ssh_seconds=_seconds(parts[4]),
            dask_seconds=_seconds(parts[5]),
            cpu_seconds=_seconds(parts[6]),
            control_seconds=_seconds(parts[7]),
        )
        found.setdefault(one.machine, one)
    return tuple(found.values())


def _text(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _seconds(text: str | None) -> float | None:
    return None if text in (None, "-") else float(text)
