"""Each check of the chain, seen failing: every test has a VM of its own, which it breaks in one way.

Every break is one that a person could make, and the checks must name it. A VM has a real systemd for the
units of `nightly`, too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ami_builder.system import processes
from tests.experiment.user_data import UNLIMITED
from tests.vm.conftest import ROOT, Booted, ami_builder, red

if TYPE_CHECKING:
    from collections.abc import Mapping

START_DASK = "/usr/local/sbin/start-dask"
MEASURE_MEMORY = "/usr/local/sbin/measure-memory"
COMPOSE_FILE = "/etc/dask/compose.yaml"
OWN_COMPOSE_FILE = f"cp /var/lib/ami-builder/compose.image.yaml {COMPOSE_FILE}"
"""What makes the image's own Compose file count again, in place of the control plane's."""
UNIT = "/etc/systemd/system/dask.service"
NIGHTLY = "ami-builder-nightly@qemu.service"


def _value(expression: str) -> str:
    """Return a script that makes start-dask export and record something else than was measured."""
    return f"""
cat >/run/break.sed <<'SED'
/^export_memory$/a\\
kb() {{ while read -r name value _; do [ "$name" != "$1:" ] || echo "$value"; done </proc/meminfo; }}\\
export AVAILABLE_MEMORY_FOR_DASK="{expression}"\\
echo "AVAILABLE_MEMORY_FOR_DASK=$AVAILABLE_MEMORY_FOR_DASK" >"$state/memory.env"
SED
sed -i -f /run/break.sed {START_DASK}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Break:
    """One way to break an image: what is done to it, and the checks that must name it."""

    name: str
    file: str
    script: str
    red: frozenset[str]
    doctor: str = ""
    """What `doctor` must say of the worker that runs with it."""
    settled: str = "true"
    """What shows that the restarted service has got as far as it will, where a healthy Dask doesn't."""
    elsewhere: str = ""
    """What shows the same in CI, if this one is left to the whole tests."""


BREAKS = (
    Break(
        name="the published snippet, whose sed strips nothing",
        file=START_DASK,
        script=_value(r"$(grep -i memavailable /proc/meminfo | sed 's/[a-zA-Z]+:\\s+//')"),
        red=frozenset({"memory limit chain: variable was measured", "container: one container runs"}),
    ),
    Break(
        name="the value as kB text",
        file=START_DASK,
        script=_value("$(kb MemAvailable) kB"),
        red=frozenset({"memory limit chain: variable was measured"}),
        elsewhere="the published snippet, and tests/unit/test_checks.py",
    ),
    Break(
        name="measured after Dask has started",
        file=START_DASK,
        script=rf"""
cat >/run/break.sed <<'SED'
/^export_memory$/i\
export COMPOSE_PROJECT_NAME=dask COMPOSE_PROFILES="$DASK_ROLE"\
docker compose --project-directory /etc/dask --file "$compose_file" up --detach --quiet-pull\
until curl -s http://127.0.0.1:8787/json/counts.json | grep -q '"workers": 1'; do sleep 1; done
SED
sed -i -f /run/break.sed {START_DASK}
""",
        red=frozenset({"measurement: variable is not less than was available"}),
        # The first Dask answers while nothing has been measured yet; Compose then makes another one.
        settled=(
            "until docker ps -q | xargs -r docker inspect -f '{{.HostConfig.Memory}}' | grep [1-9];"
            " do sleep 1; done"
        ),
    ),
    Break(
        name="more than is available: 95 % of all memory",
        file=START_DASK,
        script=_value("$(($(kb MemTotal) * 1024 / 100 * 95 / 4096 * 4096))"),
        red=frozenset({"measurement: variable is not more than was available"}),
    ),
    Break(
        name="memory that can't be measured",
        file=MEASURE_MEMORY,
        script=f"sed -i 's|^meminfo=.*|meminfo=/nowhere|' {MEASURE_MEMORY}",
        red=frozenset({"memory limit chain: variable was measured"}),
        elsewhere="tests/process/test_start_dask.py, and tests/unit/test_checks.py",
    ),
    Break(
        name="a Compose file without the line, and no default",
        file=COMPOSE_FILE,
        script=f"sed -i '/mem_limit:/d; /memswap_limit:/d' {COMPOSE_FILE}; {UNLIMITED}",
        red=frozenset(
            {"memory limit chain: container has a limit", "memory limit chain: kernel enforces the variable"}
        ),
        doctor="too high",
    ),
    Break(
        name="a Compose file that bends the limit, and no layers of defence",
        file=COMPOSE_FILE,
        script=rf"""
sed -i '/memswap_limit:/d
    s|mem_limit: .*|&\n  mem_reservation: 1g\n  tmpfs: [/scratch]|
    s|disable: true|test: [CMD, "true"]|
    s|restart: "no"|restart: always|
    s|--local-directory /spill|--local-directory /scratch|
    s|--memory-limit [^ ]*|--memory-limit 0.5|' {COMPOSE_FILE}
echo n >/sys/kernel/mm/lru_gen/enabled
echo '#!/bin/sh' >/usr/local/sbin/lower-watermark
sysctl --quiet vm.min_free_kbytes=90112
sed -i 's/^oom_score=.*/oom_score=0/' {START_DASK}
""",
        red=frozenset(
            {
                "protection: the kernel does not let the machine thrash",
                "protection: the kernel keeps no more free than it needs",
                "protection: dask goes before the system",
                "memory limit chain: workers share the variable",
                "container: no memory low",
                "container: no swap by docker",
                "container: no health check inside",
                "container: restart policy starts nothing at boot",
                "container: spill is on disk",
            }
        ),
        doctor="needlessly low",
    ),
    Break(
        name="a unit that never starts",
        file=UNIT,
        script=f"sed -i 's|^ExecStart=.*|ExecStart=/bin/false|' {UNIT} && systemctl daemon-reload",
        red=frozenset({"service: service is active", "container: one container runs"}),
        elsewhere="test_verify_is_red_on_a_broken_disk, and tests/unit/test_checks.py",
    ),
)


def test_verify_is_red_on_a_broken_disk(built: Mapping[str, Any], tmp_path: Path) -> None:
    """The whole command, on a disk whose start-dask was broken before it ever booted: exit 5, with names."""
    raw, disk = tmp_path / "broken.raw", tmp_path / "broken.qcow2"
    processes.output(["qemu-img", "convert", "-O", "raw", built["artifact"]["location"], raw], timeout=300)
    table = json.loads(processes.output(["sfdisk", "--json", raw]))["partitiontable"]
    (start,) = (p["start"] for p in table["partitions"] if p.get("name") == "root")
    root = f"{raw}?offset={start * table['sectorsize']}"
    (tmp_path / "start-dask").write_text("#!/bin/sh\necho start-dask: broken on purpose\nexit 1\n")
    for request in (f"rm {START_DASK}", f"write {tmp_path / 'start-dask'} {START_DASK}",
                    f"set_inode_field {START_DASK} mode 0100755"):  # fmt: skip
        processes.output(["debugfs", "-w", "-R", request, root])
    # To read a raw disk's empty gigabytes for their digest takes as long as half a boot.
    processes.output(["qemu-img", "convert", "-O", "qcow2", raw, disk], timeout=300)
    raw.unlink()
    answer = ami_builder("verify", disk)
    assert answer.status == 5, answer.stderr
    # Between two attempts the service may be active for a moment.
    for name in ("service: service started once", "container: one container runs"):
        assert name in answer.stderr
    folder = next(Path(w) for w in answer.stderr.split() if w.rstrip(".").endswith("/machines"))
    # A machine that got stuck under emulation was booted again, beside the first one's records.
    evidence = max(folder.glob("2GiB*"))
    assert "broken on purpose" in (evidence / "journal.txt").read_text()
    assert (evidence / "console.log").stat().st_size > 0
    assert (evidence / "docker-inspect.json").exists()


def doctor(machine: Booted) -> tuple[int, list[str]]:
    """Return the exit status of `ami-builder doctor`, and what it says of each worker of the machine."""
    with machine.forwarded(8786) as port:
        answer = ami_builder("doctor", f"tcp://127.0.0.1:{port}", "--timeout", "2min", "--json")
    assert answer.stdout, answer.stderr
    return answer.status, [worker["health"] for worker in answer.json["workers"]]


def test_an_unbroken_machine_is_healthy(machine: Booted) -> None:
    """What follows means something only when nothing is red to begin with."""
    machine.root(f"{OWN_COMPOSE_FILE}; systemctl restart dask")
    assert red(machine.check("healthy")) == {}
    assert doctor(machine) == (0, ["right"])
    # The image's own cluster: nobody reaches it from outside.
    sockets = [line.split()[3] for line in machine.root("ss -Hltn").splitlines()]
    assert {socket for socket in sockets if not socket.startswith("127.")} == {"0.0.0.0:22", "[::]:22"}


@pytest.mark.parametrize(
    "broken",
    [pytest.param(one, marks=[pytest.mark.whole] if one.elsewhere else [], id=one.name) for one in BREAKS],
)
def test_a_broken_image_goes_red(machine: Booted, broken: Break) -> None:
    machine.root(
        f"{OWN_COMPOSE_FILE}; cp {broken.file} /run/unbroken\n{broken.script}\n"
        f"cmp {broken.file} /run/unbroken && exit 9\n"
        "rm -f /run/dask/memory.env; systemctl restart dask; exit 0"
    )
    machine.root(broken.settled)
    failed = red(machine.check(broken.name.replace(" ", "-")))
    assert broken.red <= failed.keys(), failed
    assert not any(name.startswith("guard:") for name in failed), failed
    if broken.doctor:
        assert doctor(machine) == (5, [broken.doctor])


# Stands in for scripts/ami-builder: says how it was started, and ends as the test wants.
NIGHT = """#!/bin/sh
{ id -un; echo "$@"; cat "$AMI_BUILDER_WEBHOOK_FILE"; touch /etc/mine 2>/dev/null && echo "wrote to /etc"; } \
    >/var/lib/ami-builder/told
trap 'exit 130' TERM
[ ! -e /etc/ami-builder/wait ] || { sleep 600 & wait; }
exit "$(cat /etc/ami-builder/status)"
"""


def test_the_units_of_nightly_under_a_real_systemd(machine: Booted) -> None:
    """The set-up of docs/how-to/nightly.md, with a program that only reports how it was called."""
    units = ROOT / "scripts" / "systemd"
    files = {f"/etc/systemd/system/{unit.name}": unit.read_text() for unit in sorted(units.iterdir())}
    files |= {
        "/opt/ami-builder/scripts/ami-builder": NIGHT,
        "/etc/ami-builder/nightly.env": "OPTIONS=--no-prune dask\n",
        "/etc/ami-builder/webhook": "https://hooks.example.com/secret\n",
    }
    for path, content in files.items():
        script = f"mkdir -p {Path(path).parent} && cat >{path} && chmod 600 {path}"
        machine.session.run(script, sudo=True, stdin=content)
    machine.root(
        "useradd --system --home-dir /var/lib/ami-builder ami-builder; chmod 755 /opt/ami-builder/scripts/*;"
        " systemctl daemon-reload; systemctl enable --now ami-builder-nightly@qemu.timer"
    )

    begin = (
        f"rm -f /var/lib/ami-builder/told; systemctl start --no-block {NIGHTLY};"
        " until [ -s /var/lib/ami-builder/told ]; do sleep 1; done"
    )

    def night(status: int) -> dict[str, str]:
        machine.root(
            f"systemctl reset-failed {NIGHTLY} 2>/dev/null; echo {status} >/etc/ami-builder/status; {begin};"
            f" while systemctl show -p SubState {NIGHTLY} | grep -q =start; do sleep 1; done"
        )
        return shown()

    def shown() -> dict[str, str]:
        told = machine.root(f"systemctl show {NIGHTLY} -p ActiveState -p SubState -p Result")
        return dict(line.split("=", 1) for line in told.split())

    assert night(0) == {"ActiveState": "inactive", "SubState": "dead", "Result": "success"}
    assert machine.root("cat /var/lib/ami-builder/told").splitlines() == [
        "ami-builder",
        "nightly --target qemu --no-prune dask",
        "https://hooks.example.com/secret",
    ]
    assert night(9) == {"ActiveState": "failed", "SubState": "failed", "Result": "exit-code"}
    assert night(6)["SubState"] == "auto-restart"
    machine.root(f"systemctl stop {NIGHTLY}; touch /etc/ami-builder/wait")
    machine.root(begin)
    assert shown()["ActiveState"] == "activating"
    machine.root(f"systemctl stop {NIGHTLY}")
    assert shown() == {"ActiveState": "inactive", "SubState": "dead", "Result": "success"}
    assert "ami-builder-nightly@qemu.service" in machine.root("systemctl list-timers --no-pager")
