"""The checks of memory pressure, seen failing: one machine, made to deserve it in one way after the other."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from ami_builder import proc
from ami_builder.checks.watch import ANSWER
from tests.vm.conftest import DASK_SECONDS, WHOLE, Booted, red

COMPOSE_FILE = "/etc/dask/compose.yaml"
SCOPES = "/etc/systemd/system/docker-.scope.d/kill-all.conf"

_NO_LIMIT = f"sed -i '/mem_limit:/d; /memswap_limit:/d' {COMPOSE_FILE}"
# Where spilling is not what is looked at: less work for it, which else takes most of the time.
_SPILL_LITTLE = rf"sed -i 's|\(MEMORY__MAX_SPILL:\).*|\1 64MiB|' {COMPOSE_FILE}; grep 64MiB {COMPOSE_FILE}"
# A machine without a limit may stand still for many minutes before its kernel kills. With this it kills as
# soon as what was used in the last second does not fit any more (Linux, admin-guide/mm/multigen_lru).
_KILL_SOON = "echo 1000 >/sys/kernel/mm/lru_gen/min_ttl_ms"
_KILL_LATE = "echo 0 >/sys/kernel/mm/lru_gen/min_ttl_ms"
_AGENT = """
systemd-run --quiet --unit=test-agent -p OOMScoreAdjust=1000 -p Restart=always \\
    python3 -c 'import time; held = b"x" * (64 << 20); time.sleep(9999)'
"""
# What should answer logins does not for a while, once the steps have begun.
_MUTE = f"""
rm -f {ANSWER}
systemd-run --quiet --unit=test-mute sh -c 'until [ -e {ANSWER} ]; do sleep 1; done; sleep 5
    pid=$(systemctl show ssh --property MainPID --value); kill -STOP $pid; sleep 15; kill -CONT $pid'
"""
# Without a nanny, the worker that comes after a killed one is told of half the memory.
_SMALLER_NEXT = (
    r"sed -i 's|dask worker \(.*\) --memory-limit 1.0 \(.*\) &$|{ part=1.0; while :; do "
    r"dask worker \1 --no-nanny --memory-limit $$part \2; part=0.5; done; } \&|' "
    rf"{COMPOSE_FILE} && grep part=0.5 {COMPOSE_FILE}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Break:
    """One way to make a machine deserve it, and the checks that must say so."""

    name: str
    script: str
    red: frozenset[str]
    timeout: float = DASK_SECONDS
    """Seconds for it all, of which Dask gets three quarters."""


BREAKS = (
    Break(
        name="no spilling, a smaller worker next, and nobody answers logins",
        script=rf"""
off() {{ sed -i 's|^\( *\)\(DASK.*MEMORY__\)MAX_SPILL:.*|&\n\1\2'"$1"': "False"|' {COMPOSE_FILE}; }}
off TARGET && off SPILL && off PAUSE
grep 'PAUSE: "False"' {COMPOSE_FILE}
{_SMALLER_NEXT}{_MUTE}""",
        red=frozenset(
            {
                "work twice the limit finishes by spilling",
                "the workers are back",
                "ssh answers all the time",
            }
        ),
    ),
    Break(
        name="no nanny, and less told than there is",
        script=f"""
sed -i 's|--memory-limit 1.0|--memory-limit 200MiB --no-nanny|' {COMPOSE_FILE}
grep no-nanny {COMPOSE_FILE}
""",
        red=frozenset({"all steps were gone", "a leak ends as a killed worker"}),
        # It stays paused with what it has leaked.
        timeout=90,
    ),
    Break(
        name="a container that dies as a whole",
        script=f"""
{_SPILL_LITTLE}
mkdir -p $(dirname {SCOPES})
printf '[Scope]\\nOOMPolicy=kill\\n' >{SCOPES}
systemctl daemon-reload
""",
        red=frozenset({"all steps were gone", "the container goes on"}),
    ),
    Break(
        name="no limit, and an agent",
        script=f"{_SPILL_LITTLE}; {_NO_LIMIT}; {_KILL_SOON}{_AGENT}",
        red=frozenset(
            {
                "the leaking worker is restarted",
                "another process dies alone",
                "the kernel kills nobody else",
                "no service is touched",
            }
        ),
    ),
)


_simpler = pytest.mark.skipif(
    WHOLE not in os.environ, reason=f"a minute for the simpler of two cases: {WHOLE}=1 runs it"
)


def pressed(machine: Booted, broken: Break) -> dict[str, str]:
    """Break the machine, start Dask on it, and return what memory pressure shows to be wrong."""
    machine.root(f"set -e\n{broken.script}\nsystemctl restart dask")
    failed = red(machine.check(broken.name.replace(" ", "-"), phase="pressure", timeout=broken.timeout))
    return {name.removeprefix("pressure: "): message for name, message in failed.items()}


@pytest.mark.parametrize("whose", [pytest.param("image", marks=_simpler), "control plane"])
def test_a_cluster_whose_scheduler_is_killed_begins_anew(
    machine: Booted, restore: Callable[[str], None], whose: str
) -> None:
    """Its worker would wait for it for three minutes, and everybody for the worker.

    A control plane's file lets Docker begin the container anew, which Compose stops, and calls success.
    """
    restore(COMPOSE_FILE)
    machine.root("systemctl is-system-running --wait", check=False)
    if whose == "image":
        machine.root(f"cp /var/lib/ami-builder/compose.image.yaml {COMPOSE_FILE}")
    machine.root("systemctl restart dask; until dask-health; do sleep 1; done")
    container = "docker ps --quiet --no-trunc --filter label=com.docker.compose.project=dask"
    before = machine.root(container)
    machine.root("kill -KILL $(pgrep -f '^[^ ]*python[^ ]* [^ ]*dask scheduler')")
    assert proc.wait_until(
        lambda: machine.root(f"dask-health >&2 && {container}", check=False) not in ("", before),
        what="another container that answers",
        timeout=120,
    )
    assert machine.root("systemctl show dask --property NRestarts --value").strip() == "1"


@pytest.mark.parametrize("broken", BREAKS, ids=lambda b: b.name)
def test_a_machine_that_deserves_it_goes_red(
    machine: Booted, restore: Callable[[str], None], broken: Break
) -> None:
    restore(COMPOSE_FILE)
    try:
        failed = pressed(machine, broken)
    finally:
        undo = f"{_KILL_LATE}; rm -f {SCOPES}; systemctl daemon-reload; systemctl stop test-agent test-mute"
        machine.root(undo, check=False)
    assert broken.red <= failed.keys(), failed
