"""Images: moto's, with what EC2 shows beside, and Debian's that every region starts with."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any, Protocol

from moto.core.utils import utcnow
from moto.ec2.models.amis import Ami
from moto.ec2.utils import random_ami_id

DEBIAN_ACCOUNT = "136693071363"
ROOT_DEVICE = "/dev/xvda"
BASE_GIB = 8

_DEBIAN = (
    # Name, architecture, days old: the newest amd64 one is what the parameter names.
    ("debian-13-amd64-20261116-2299", "x86_64", 7),
    ("debian-13-amd64-20261012-2264", "x86_64", 42),
    ("debian-13-arm64-20261117-2300", "arm64", 6),
    # What Debian publishes beside its releases, under names that begin alike.
    ("debian-13-amd64-daily-20261120-2303", "x86_64", 3),
    ("debian-13-backports-amd64-20261116-2299", "x86_64", 7),
    ("debian-12-amd64-20261117-2300", "x86_64", 6),
)


NEWEST = _DEBIAN[0][0]
"""Name of the newest amd64 image of Debian 13."""


_INHERITED = (
    "boot_mode",
    "ena_support",
    "imds_support",
    "sriov_net_support",
    "tpm_support",
    "uefi_data",
)


class Pending(Protocol):
    """How long an image is pending; see CloudOptions."""

    image_describes: int
    image_seconds: float
    image_failure: str


class FakeImage(Ami):
    """moto's image, with what EC2 shows beside."""

    captured: bool = True
    ena_support: bool
    sriov_net_support: str | None = "simple"
    tpm_support: str | None = None
    uefi_data: str | None = None
    imds_support: str | None = None

    def __init__(
        self,
        backend: Any,
        *args: Any,
        mapping: list[dict[str, Any]],
        like: FakeImage | None = None,
        root_device: str = "",
        snapshot: Any = None,
        **kwargs: Any,
    ) -> None:
        """Make an image: as a launch sees it `like` another one, or of a `snapshot` that exists."""
        super().__init__(backend, *args, **kwargs)
        self.root_device_type = "ebs"
        self.root_device_name = root_device or (like.root_device_name if like is not None else ROOT_DEVICE)
        root = next(m for m in mapping if m["DeviceName"] == self.root_device_name)["Ebs"]
        if snapshot is None:
            snapshot = self.ebs_snapshot
            snapshot.volume.size = root["VolumeSize"]
            snapshot.encrypted = bool(root["Encrypted"])
            snapshot.kms_key_id = root.get("KmsKeyId")
        else:
            del backend.snapshots[self.ebs_snapshot.id]
            self.ebs_snapshot = snapshot
        root["SnapshotId"] = snapshot.id
        root.pop("KmsKeyId", None)
        self.mapping = mapping
        self.ena_support = True
        for name in _INHERITED if like is not None else ():
            setattr(self, name, getattr(like, name))
        self.deprecation_time: str | None = None
        self.deregistration_protection = "disabled"
        self.cooling = False
        """Whether its protection was disabled less than 24 hours ago."""
        self.state_reason: dict[str, str] | None = None
        self.platform_details, self.usage_operation = "Linux/UNIX", "RunInstances"
        self.last_describe = 0
        self.available_at = 0.0
        self.failure = ""

    @property
    def block_device_mappings(self) -> list[dict[str, Any]]:
        """The disks that a launch makes."""
        return self.mapping

    @property
    def encrypted(self) -> bool:
        """Whether any of its snapshots is encrypted."""
        return any(m["Ebs"]["Encrypted"] for m in self.mapping)

    def wait(self, options: Pending) -> None:
        """Make it pending for as long as the options say."""
        self.state = "pending"
        self.last_describe = options.image_describes
        self.available_at = time.monotonic() + options.image_seconds
        self.failure = options.image_failure

    def look(self) -> None:
        """Count one describe; afterwards it may be available, or have failed."""
        if self.state != "pending":
            return
        if self.last_describe > 0:
            self.last_describe -= 1
        elif self.captured and time.monotonic() >= self.available_at:
            self.state = "failed" if self.failure else "available"
            if self.failure:
                self.state_reason = {"Code": "Client.InternalError", "Message": self.failure}


def _debian(backend: Any, name: str, architecture: str, days: int) -> FakeImage:
    ebs = {"VolumeSize": BASE_GIB, "VolumeType": "gp3", "Encrypted": False, "DeleteOnTermination": True}
    return FakeImage(
        backend,
        random_ami_id(),
        name=name,
        description=f"Debian {name.split('-')[1]}",
        owner_id=DEBIAN_ACCOUNT,
        public=True,
        virtualization_type="hvm",
        hypervisor="xen",
        architecture=architecture,
        image_location=f"amazon/{name}",
        creation_date=utcnow() - timedelta(days=days),
        region_name=f"{backend.region_name}a",
        mapping=[{"DeviceName": ROOT_DEVICE, "Ebs": ebs}],
    )


def debian(backend: Any) -> list[FakeImage]:
    """Return Debian's images for a region, the newest amd64 one first."""
    return [_debian(backend, *each) for each in _DEBIAN]
