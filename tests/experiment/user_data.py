"""What a control plane sends to a machine of the experiment: the policy is in here, never in the image."""

from __future__ import annotations

import json
from pathlib import Path

from ami_builder.config.schema import Image
from ami_builder.core.units import GIB, MIB
from tests.experiment.cases import NANNY_HEADROOM, PAGE, RESERVE_PERCENT, Policy
from tests.experiment.tasks import MODULE

FOLDER = "/var/lib/ami-builder-experiment"
CONSOLE = "/dev/ttyS0"
TICKER_UNIT = "ami-builder-ticker"

_VARIABLE = "${AVAILABLE_MEMORY_FOR_DASK:-0}"
_COMPUTED = "${EXPERIMENT_LIMIT:?}"
_HERE = Path(__file__).parent

_TOTAL = "total=$(($(sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo) * 1024))"
_WRITE = f'echo "EXPERIMENT_LIMIT=$((limit / {PAGE} * {PAGE}))" >>/etc/dask/dask.env'
UNLIMITED = (
    "cd /etc/systemd/system/docker-.scope.d; printf '[Scope]\\nMemoryMax=infinity\\n' >99-unlimited.conf"
)
"""What leaves a container that asks for no limit without one: of drop-ins the last one counts."""
# What MemTotal is, is known on the machine alone.
_COMPUTE = {
    Policy.NONE: UNLIMITED,
    Policy.DASK_ONLY: UNLIMITED,
    Policy.FRACTION: f"{_TOTAL}; limit=$((total * 95 / 100)); {_WRITE}",
    Policy.GKE: f"""{_TOTAL}
        reserved=0 rest=$total
        take() {{ part=$rest; [ "$part" -le "$1" ] || part=$1
            reserved=$((reserved + part * $2 / 100)); rest=$((rest - part)); }}
        if [ "$total" -lt {GIB} ]; then reserved={255 * MIB}; else
            take {4 * GIB} 25; take {4 * GIB} 20; take {8 * GIB} 10; take {112 * GIB} 6; take "$rest" 2
        fi
        limit=$((total - reserved - {100 * MIB})); {_WRITE}""",
    # As memory.reserve does while baking.
    **{
        policy: "sed -i 's/^reserve_bytes=.*/reserve_bytes=0/; s/^reserve_millipercent=.*/"
        f"reserve_millipercent={percent * 1000}/' /usr/local/sbin/measure-memory"
        for policy, percent in RESERVE_PERCENT.items()
    },
}


def user_data(image: Image, policy: Policy, scheduler: str) -> bytes:
    """Return a cloud-config whose Compose file starts one worker of the scheduler under a policy."""
    watch = f"until [ -e {FOLDER}/ticker.py ]; do sleep 0.2; done; exec python3 {FOLDER}/ticker.py {CONSOLE}"
    # Before Dask measures, so that what the watch itself uses is not counted as available.
    ticker = [
        "systemd-run", "--no-block", f"--unit={TICKER_UNIT}", "--property=Restart=always",
        "--property=RestartSec=100ms", "--property=StartLimitIntervalSec=0", "sh", "-c", watch,
    ]  # fmt: skip
    commands: list[list[str]] = [["mkdir", "-p", "-m", "1777", FOLDER, f"{FOLDER}/seen"], ticker]
    if policy in _COMPUTE:
        commands.append(["sh", "-c", _COMPUTE[policy]])
    files = {
        "/etc/dask/compose.yaml": json.dumps(_compose(image, policy, scheduler), indent=1),
        f"{FOLDER}/{MODULE}.py": (_HERE / "work.py").read_text(encoding="utf-8"),
        f"{FOLDER}/ticker.py": (_HERE / "ticker.py").read_text(encoding="utf-8"),
    }
    written = [{"path": path, "content": content} for path, content in files.items()]
    # JSON is YAML, to cloud-init and to Compose.
    return ("#cloud-config\n" + json.dumps({"bootcmd": commands, "write_files": written})).encode()


def _compose(image: Image, policy: Policy, scheduler: str) -> dict[str, object]:
    limit = {
        Policy.NONE: "0",
        Policy.AVAILABLE: _VARIABLE,
        Policy.HEADROOM_2: _VARIABLE,
        Policy.NANNY: _VARIABLE,
        Policy.HEADROOM: _VARIABLE,
        Policy.FRACTION: _COMPUTED,
        Policy.GKE: _COMPUTED,
        Policy.DASK_ONLY: "0",
    }[policy]
    variable = "${AVAILABLE_MEMORY_FOR_DASK:?}"
    told = {Policy.NANNY: f"$$(({variable} - {NANNY_HEADROOM}))", Policy.DASK_ONLY: variable}
    worker = [
        "dask", "worker", scheduler, "--nworkers", "1", "--memory-limit", told.get(policy, "1.0"),
        "--local-directory", "/spill", "--no-dashboard",
    ]  # fmt: skip
    if policy is Policy.NANNY:  # the container's shell can subtract, and Compose can't
        worker = ["sh", "-c", f"exec {' '.join(worker)}"]
    service = {
        "image": image.container.reference,
        "command": worker,
        "network_mode": "host",
        "init": True,
        "mem_limit": limit,
        "memswap_limit": limit,
        "restart": "no",
        "stop_grace_period": "30s",
        "volumes": ["/var/lib/dask/spill:/spill", f"{FOLDER}:/experiment"],
        "environment": {
            "PYTHONPATH": "/experiment",
            "DASK_DISTRIBUTED__WORKER__MEMORY__MAX_SPILL": "${DASK_MAX_SPILL:-false}",
        },
        "ulimits": {"nofile": 65536},
        "logging": {"driver": "json-file", "options": {"max-size": "10m", "max-file": "3"}},
    }
    return {"services": {"cluster": service}}
