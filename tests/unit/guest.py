"""An Image for the tests of what lands in the guest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ami_builder.model import (
    Aws,
    Bake,
    Base,
    Connect,
    Container,
    Dask,
    Datasource,
    Image,
    Lifecycle,
    Network,
    Nightly,
    Reserve,
    Role,
    Verify,
)

GIB = 1 << 30


def image(
    *,
    role: Role = Role.LOCAL,
    workers: int = 1,
    threads: int | None = None,
    reserve: Reserve | None = None,
    after: tuple[str, ...] = (),
    reference: str = "ami-builder/dask:2026.8.0",
) -> Image:
    """Return an image with the given settings of the guest, and ordinary ones elsewhere."""
    container = Container(
        reference=reference, requirements=Path("requirements.txt"), packages=(), insecure_registry=None
    )
    dask = Dask(role=role, workers=workers, threads=threads, spill_percent=80, after=after)
    return replace(_IMAGE, container=container, dask=dask, reserve=reserve or Reserve())


_IMAGE = Image(
    name="default",
    description="",
    base=Base(
        source=None,
        checksum=None,
        ssh_user="root",
        suite="trixie",
        mirror="",
        packages=(),
        disk_size=8 * GIB,
    ),
    container=Container(reference="", requirements=None, packages=(), insecure_registry=None),
    reserve=Reserve(),
    dask=Dask(role=Role.LOCAL, workers=1, threads=None, spill_percent=80, after=()),
    bake=Bake(memory=2 * GIB, cpus=2, timeout=600.0),
    verify=Verify(
        memory=(2 * GIB,),
        cpus=2,
        disk_size=12 * GIB,
        datasource=Datasource.EC2,
        network=Network.ISOLATED,
        checks=(),
        timeout=600.0,
        instance_types=("m6i.large",),
    ),
    aws=Aws(
        region="",
        source="ami-00000000",
        instance_types=("m6i.large",),
        subnets=(),
        connect=Connect.SSH,
        instance_profile="",
        ssh_port=22,
        source_cidrs=(),
        encrypt=False,
        kms_key="",
        spot=False,
        lifetime=7200.0,
        copy_to=(),
        share_with=(),
    ),
    lifecycle=Lifecycle(
        channels=("testing", "stable"), keep=3, keep_days=14, size=0, most_deletions=10, grace_days=7
    ),
    nightly=Nightly(
        channel="testing",
        memory_drift_percent=3,
        time_drift_percent=50,
        size_drift_percent=20,
        hold_packages=(),
    ),
)
