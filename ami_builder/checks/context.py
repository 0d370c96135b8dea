"""What the checks need to know about the machine; pytest gets it as a JSON file."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from ami_builder.core.options import Datasource, Role
from ami_builder.core.records import FIRST_BOOT
from ami_builder.core.units import Reserve

ENVIRONMENT = "AMI_BUILDER_CHECKS_CONTEXT"
"""The environment variable that names the JSON file."""

HOST = "guard: this host can run the checks"
"""The result that is inconclusive when it can't."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What the machine was booted with; the checks compare it with what they find. Sizes are bytes."""

    nonce: str
    """The content of /var/lib/ami-builder/nonce on this machine alone."""
    machine: str
    """Its name in results: its memory (`2 GiB`), or its instance type."""
    machine_memory: int
    disk: int
    reserve: Reserve
    headroom: int | None
    """By how much the sum of the workers' limits is below the container's limit; None: as much as needed."""
    datasource: Datasource
    role: Role
    workers: int
    """Workers that the Dask container starts; 0 if the number is not known."""
    user: str
    """The login user."""
    public_key: str
    """The only key that may be in an authorized_keys file."""
    timeout: float
    """How many seconds Dask and its workers get to start, and to complete the phase `pressure`."""
    emulator: int = 0
    """The pid of the process on this host that runs the VM; 0 if there is none."""
    phase: str = FIRST_BOOT
    """`boot`, `restart`, `reboot` or `pressure`."""
    tls: bool = False
    """Whether the machine has certificates now, so that its Dask must use TLS."""

    def write(self, path: Path) -> None:
        """Write the context as JSON; only its owner can read the file."""
        path.touch(mode=0o600)
        path.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a context; raises OSError, ValueError, KeyError or TypeError if the file is not one."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["reserve"] = Reserve(**fields["reserve"])
        fields["datasource"] = Datasource(fields["datasource"])
        fields["role"] = Role(fields["role"])
        return cls(**fields)
