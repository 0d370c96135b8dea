"""The user data for a VM of the experiment. It contains the policy: the image is the same in all runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import yaml

from ami_builder.build.guest import guest
from ami_builder.core.units import GIB, MIB
from tests.experiment import layers
from tests.experiment.cases import HEADROOM, PAGE, RESERVE_PERCENT, LimitPolicy
from tests.experiment.tasks import MODULE

if TYPE_CHECKING:
    from ami_builder.config.schema import Image

FOLDER = "/var/lib/ami-builder-experiment"
CONSOLE = "/dev/ttyS0"
TICKER_UNIT = "ami-builder-ticker"
LAYERS_UNIT = "ami-builder-layers"

_VARIABLE = "${AVAILABLE_MEMORY_FOR_DASK:-0}"
_COMPUTED = "${EXPERIMENT_LIMIT:?}"
_HERE = Path(__file__).parent

_TOTAL = "total=$(($(sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo) * 1024))"
_WRITE = f'echo "EXPERIMENT_LIMIT=$((limit / {PAGE} * {PAGE}))" >>/etc/dask/dask.env'
UNLIMITED = (
    "cd /etc/systemd/system/docker-.scope.d; printf '[Scope]\\nMemoryMax=infinity\\n' >99-unlimited.conf"
)
"""Removes the limit that the image sets for all containers: the last drop-in wins."""
_NO_UNITS = "; s/^units=.*/units=/"
"""Whose programs measure-memory reserves memory for."""
_FOLLOWS = (LimitPolicy.FOLLOW, LimitPolicy.FOLLOW_1)
_WITH_PROGRAMS = (LimitPolicy.PROGRAMS, LimitPolicy.PROGRAMS_1, LimitPolicy.DEFAULT_2, *_FOLLOWS)
_OWN_FILE = (LimitPolicy.DEFAULT, LimitPolicy.DEFAULT_2, *_FOLLOWS)
"""Policies that use the image's Compose file."""
_MORE_LAYERS = {LimitPolicy.MEASURED: ("measured",), **dict.fromkeys(_FOLLOWS, ("follow",))}
# MemTotal is known on the VM only.
_COMPUTE = {
    LimitPolicy.NONE: UNLIMITED,
    LimitPolicy.DASK_ONLY: UNLIMITED,
    LimitPolicy.FRACTION: f"{_TOTAL}; limit=$((total * 95 / 100)); {_WRITE}",
    LimitPolicy.GKE: f"""{_TOTAL}
        reserved=0 rest=$total
        take() {{ part=$rest; [ "$part" -le "$1" ] || part=$1
            reserved=$((reserved + part * $2 / 100)); rest=$((rest - part)); }}
        if [ "$total" -lt {GIB} ]; then reserved={255 * MIB}; else
            take {4 * GIB} 25; take {4 * GIB} 20; take {8 * GIB} 10; take {112 * GIB} 6; take "$rest" 2
        fi
        limit=$((total - reserved - {100 * MIB})); {_WRITE}""",
    # As memory.reserve does while baking.
    **{
        policy: "sed -i 's/^reserve_bytes=.*/reserve_bytes=0/; s/^reserve_capped=.*/reserve_capped=/; "
        f"s/^reserve_millipercent=.*/reserve_millipercent={percent * 1000}/"
        f"{'' if policy in _WITH_PROGRAMS else _NO_UNITS}' /usr/local/sbin/measure-memory"
        for policy, percent in RESERVE_PERCENT.items()
    },
}


def user_data(image: Image, policy: LimitPolicy, scheduler: str, which: str = layers.OFF) -> bytes:
    """Return a cloud-config that sets layers, and whose Compose file starts one worker under a policy."""
    watch = f"until [ -e {FOLDER}/ticker.py ]; do sleep 0.2; done; exec python3 {FOLDER}/ticker.py {CONSOLE}"
    # It starts before memory is measured, so that its own memory does not count as available.
    ticker = [
        "systemd-run", "--no-block", f"--unit={TICKER_UNIT}", "--property=Restart=always",
        "--property=RestartSec=100ms", "--property=StartLimitIntervalSec=0", "sh", "-c", watch,
    ]  # fmt: skip
    commands: list[list[str]] = [["mkdir", "-p", "-m", "1777", FOLDER, f"{FOLDER}/seen"], ticker]
    if policy in _COMPUTE:
        commands.append(["sh", "-c", _COMPUTE[policy]])
    if policy in _OWN_FILE:
        set_role = f"s|^DASK_ROLE=.*|DASK_ROLE=worker|; s|^DASK_SCHEDULER_ADDRESS=.*|&{scheduler}|"
        commands.append(["sh", "-c", f"sed -i '{set_role}' /etc/dask/dask.env"])
    set_layers = [*layers.arguments(which), *_MORE_LAYERS.get(policy, ())]
    # What the system uses is measured just before Dask's memory is.
    properties = (
        "Type=oneshot", "RemainAfterExit=yes", "After=multi-user.target", "After=docker.service",
        "Before=dask-memory.service", "Before=dask.service",
    )  # fmt: skip
    run = ["systemd-run", "--no-block", f"--unit={LAYERS_UNIT}", *(f"--property={p}" for p in properties)]
    commands.append([*run, "sh", f"{FOLDER}/layers.sh", *set_layers])
    files = {
        "/etc/dask/compose.yaml": json.dumps(_compose(image, policy, scheduler, which), indent=1),
        f"{FOLDER}/layers.sh": (_HERE / "layers.sh").read_text(encoding="utf-8"),
        f"{FOLDER}/{MODULE}.py": (_HERE / "work.py").read_text(encoding="utf-8"),
        f"{FOLDER}/ticker.py": (_HERE / "ticker.py").read_text(encoding="utf-8"),
    }
    written = [{"path": path, "content": content} for path, content in files.items()]
    # JSON is YAML, to cloud-init and to Compose.
    return ("#cloud-config\n" + json.dumps({"bootcmd": commands, "write_files": written})).encode()


def _compose(image: Image, policy: LimitPolicy, scheduler: str, which: str) -> dict[str, object]:
    if policy in _FOLLOWS:
        image = replace(image, memory=replace(image.memory, follow=True))
    if policy in _OWN_FILE:
        service = _default_service(image, scheduler)
    else:
        service = _service(image, policy, scheduler)
    if layers.OOM_SCORE in which.split("+"):
        service["oom_score_adj"] = layers.OOM_SCORE_ADJ
    return {"services": {"cluster": service}}


def _default_service(image: Image, scheduler: str) -> dict[str, Any]:
    """Return the service `worker` of the image's own Compose file, which can run the experiment's tasks."""
    content = guest(image)[PurePosixPath("/etc/dask/compose.yaml")].content
    own = yaml.safe_load(content)["services"]["worker"]
    service = {key: value for key, value in own.items() if key != "profiles"}
    service["command"] = own["command"].replace("${DASK_SCHEDULER_ADDRESS:-}", scheduler)
    service["volumes"] = [*own["volumes"], f"{FOLDER}:/experiment"]
    service["environment"] = own["environment"] | {"PYTHONPATH": "/experiment"}
    return service


def _service(image: Image, policy: LimitPolicy, scheduler: str) -> dict[str, Any]:
    limit = {
        LimitPolicy.NONE: "0",
        LimitPolicy.FRACTION: _COMPUTED,
        LimitPolicy.GKE: _COMPUTED,
        LimitPolicy.DASK_ONLY: "0",
    }.get(policy, _VARIABLE)
    variable = "${AVAILABLE_MEMORY_FOR_DASK:?}"
    own_limit = variable if policy is LimitPolicy.DASK_ONLY else "1.0"
    if policy in HEADROOM:
        own_limit = f"$$(({variable} - {HEADROOM[policy]}))"
    worker = [
        "dask", "worker", scheduler, "--nworkers", "1", "--memory-limit", own_limit,
        "--local-directory", "/spill", "--no-dashboard",
    ]  # fmt: skip
    if policy in HEADROOM:  # Compose can't subtract, but the container's shell can
        worker = ["sh", "-c", f"exec {' '.join(worker)}"]
    return {
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
