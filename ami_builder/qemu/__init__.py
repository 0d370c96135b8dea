"""This host: images baked and booted with QEMU, the way EC2 boots them."""

from ami_builder.qemu.accelerator import choose_accelerator, known_accelerator
from ami_builder.qemu.disks import ImageInfo, check_image, create_overlay, image_info
from ami_builder.qemu.hardware import (
    DEFAULT_INSTANCE,
    DEFAULT_MAC,
    HOST_ADDRESS,
    Accelerator,
    Bus,
    firmware,
)
from ami_builder.qemu.machine import GuestStuck, MachineDied, VirtualMachine, boot_again
from ami_builder.qemu.traces import Match, search

__all__ = [
    "DEFAULT_INSTANCE",
    "DEFAULT_MAC",
    "HOST_ADDRESS",
    "Accelerator",
    "Bus",
    "GuestStuck",
    "ImageInfo",
    "MachineDied",
    "Match",
    "VirtualMachine",
    "boot_again",
    "check_image",
    "choose_accelerator",
    "create_overlay",
    "firmware",
    "image_info",
    "known_accelerator",
    "search",
]
