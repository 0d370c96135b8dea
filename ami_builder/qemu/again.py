"""Booting again what got stuck through the emulator's fault, and not the image's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ami_builder.qemu.machine import GuestStuck

# A multi-threaded TCG boot now and then panics in the guest's kernel, or hangs before it.
_BOOTS = 3

T = TypeVar("T")


def boot_again(boot: Callable[[int], T], again: Callable[[], bool]) -> T:
    """Call `boot` with 1, and once more with 2 and 3 where the machine got stuck as emulated ones do.

    `again` is called in between. When it returns False, or after the third time, what `boot` raised is
    raised.
    """
    for number in range(1, _BOOTS):
        try:
            return boot(number)
        except GuestStuck as stuck:
            if not (stuck.boot_again and again()):
                raise
    return boot(_BOOTS)
