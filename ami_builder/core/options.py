"""The options of settings that take one of a few values."""

from __future__ import annotations

from enum import StrEnum


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

    ARCHIVE = "archive"
    REGISTRY = "registry"


class Connect(StrEnum):
    """How ssh reaches an instance."""

    SSH = "ssh"
    SESSION_MANAGER = "session-manager"
