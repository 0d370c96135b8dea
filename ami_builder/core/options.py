"""The options of settings that take one of a few values."""

from __future__ import annotations

import platform
from enum import StrEnum


class Arch(StrEnum):
    """The architecture of a machine's processor, by the name that Debian and Docker use."""

    AMD64 = "amd64"
    ARM64 = "arm64"

    @property
    def kernel(self) -> str:
        """The name that kernels and programs use, as in `uname -m`."""
        return {Arch.AMD64: "x86_64", Arch.ARM64: "aarch64"}[self]

    @property
    def ec2(self) -> str:
        """The name that EC2 uses."""
        return {Arch.AMD64: "x86_64", Arch.ARM64: "arm64"}[self]

    @classmethod
    def named(cls, word: str) -> Arch | None:
        """Return the architecture that a word means, such as arm64 or aarch64; None if it is no known one."""
        word = word.lower().replace("-", "_")
        return next((one for one in cls if word in (one.value, one.kernel, one.ec2)), None)

    @property
    def is_native(self) -> bool:
        """Whether this host's processor is of this architecture."""
        return Arch.named(platform.machine()) is self


class Role(StrEnum):
    """What the one Dask container of a machine does."""

    LOCAL = "local"
    WORKER = "worker"
    SCHEDULER = "scheduler"
    NONE = "none"
    """dask.service starts nothing: user data brings its own Dask."""


class Listen(StrEnum):
    """Where the scheduler of a whole cluster in one container listens."""

    MACHINE = "127.0.0.1"
    NETWORK = "0.0.0.0"  # noqa: S104 - by the user's own choice


class Datasource(StrEnum):
    """How a test machine's cloud-init gets its key and user data."""

    EC2 = "ec2"
    NOCLOUD = "nocloud"


class Network(StrEnum):
    """What a test machine can reach besides this process."""

    ISOLATED = "isolated"
    NAT = "nat"


class ContainerNetwork(StrEnum):
    """What Docker sets up at boot for the network of containers."""

    HOST = "host"
    """Nothing: containers use the machine's own network."""
    BRIDGE = "bridge"
    """Its own bridge and firewall rules, which take most of its time to start."""


class ContainerSource(StrEnum):
    """The origin of the Dask container."""

    AUTO = "auto"
    """ARCHIVE for disk images of this host, MACHINE for AMIs."""
    ARCHIVE = "archive"
    """Built on this host."""
    MACHINE = "machine"
    """Built on the machine that Packer bakes on."""
    REGISTRY = "registry"
    """Pulled on the machine that Packer bakes on."""


class Connect(StrEnum):
    """How ssh reaches an instance."""

    SSH = "ssh"
    SESSION_MANAGER = "session-manager"
