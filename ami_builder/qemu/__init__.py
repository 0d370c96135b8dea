"""QEMU: disk images, and machines that boot one the way EC2 would."""

from ami_builder.qemu.accelerator import choose_accelerator, known_accelerator
from ami_builder.qemu.again import boot_again
from ami_builder.qemu.disks import ImageInfo, check_image, create_overlay, image_info
from ami_builder.qemu.machine import (
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
from ami_builder.qemu.raw import Found, search

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
