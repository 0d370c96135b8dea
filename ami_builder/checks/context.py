"""What the checks are told about the machine that they look at; it crosses to pytest as a JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ami_builder.core.options import Datasource, Role
from ami_builder.core.records import FIRST_BOOT
from ami_builder.core.units import Reserve

ENVIRONMENT = "AMI_BUILDER_CHECKS_CONTEXT"
"""Names the JSON file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What the machine was booted with, so what it is held against; sizes are bytes."""

    nonce: str
    """What this machine alone has in /var/lib/ami-builder/nonce."""
    machine: str
    """What people call it: its memory (`2 GiB`), or its instance type."""
    machine_memory: int
    disk: int
    reserve: Reserve
    headroom: int
    """How much less than the container's limit the workers' own limits must add up to."""
    datasource: Datasource
    role: Role
    workers: int
    """Workers that the Dask container starts; 0 when that is not known."""
    user: str
    """Who logs in by ssh and by hand."""
    public_key: str
    """The one key that may be in an authorized_keys."""
    timeout: float
    """Seconds that Dask and its workers get to come up, and to go through the phase `pressure`."""
    emulator: int = 0
    """The process on this host that runs the machine; 0 when none does."""
    phase: str = FIRST_BOOT
    """`boot`, `restart`, `reboot` or `pressure`."""

    def write(self, path: Path) -> None:
        """Write it as JSON, readable by its owner alone."""
        path.touch(mode=0o600)
        path.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Context:
        """Read it back; raises OSError, ValueError, KeyError or TypeError when it is not a context."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["reserve"] = Reserve(**fields["reserve"])
        fields["datasource"] = Datasource(fields["datasource"])
        fields["role"] = Role(fields["role"])
        return cls(**fields)
