"""An Image for the tests of what lands in the guest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ami_builder.config.schema import Image, ImageSettings, MemorySettings
from ami_builder.core.options import ContainerNetwork, Role
from ami_builder.core.units import Reserve

GIB = 1 << 30


def image(
    *,
    role: Role = Role.LOCAL,
    workers: int = 1,
    threads: int | None = None,
    reserve: Reserve | None = None,
    headroom: int | None = 0,
    follow: bool = False,
    after: tuple[str, ...] = (),
    reference: str = "ami-builder/dask:2026.8.0",
    network: ContainerNetwork = ContainerNetwork.HOST,
    retire_on_rebalance: bool = False,
) -> Image:
    """Return an image with the given settings of the guest, and the defaults elsewhere."""
    default = ImageSettings().image("default")
    return replace(
        default,
        container=replace(
            default.container, reference=reference, requirements=Path("requirements.txt"), network=network
        ),
        dask=replace(
            default.dask,
            role=role,
            workers=workers,
            threads=threads,
            after=after,
            retire_on_rebalance=retire_on_rebalance,
        ),
        memory=MemorySettings(reserve=reserve or Reserve(), nanny_headroom=headroom, follow=follow),
    )
