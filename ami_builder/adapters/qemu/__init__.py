"""QEMU: disk images, and machines that boot one the way EC2 would."""

from .accelerator import choose_accelerator, known_accelerator
from .again import boot_again
from .images import ImageInfo, check_image, create_overlay, image_info
from .machine import (
    DEFAULT_INSTANCE,
    DEFAULT_MAC,
    THIS_MACHINE,
    Accelerator,
    Bus,
    GuestStuck,
    Machine,
    MachineDied,
    firmware,
)
from .raw import Found, search

__all__ = [
    "DEFAULT_INSTANCE",
    "DEFAULT_MAC",
    "THIS_MACHINE",
    "Accelerator",
    "Bus",
    "Found",
    "GuestStuck",
    "ImageInfo",
    "Machine",
    "MachineDied",
    "boot_again",
    "check_image",
    "choose_accelerator",
    "create_overlay",
    "firmware",
    "image_info",
    "known_accelerator",
    "search",
]
