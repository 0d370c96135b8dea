"""The checks of memory pressure, seen failing: each VM deserves it in another way."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from ami_builder.checks.login_times import ANSWER, NEW_CONNECTION
from ami_builder.system import processes, ssh
from tests.experiment.user_data import UNLIMITED
from tests.vm.conftest import DASK_SECONDS, Booted, red

if TYPE_CHECKING:
    from collections.abc import Callable

COMPOSE_FILE = "/etc/dask/compose.yaml"
SCOPES = "/etc/systemd/system/docker-.scope.d/kill-all.conf"
DEATH_SECONDS = 180.0
"""How long a worker waits for its scheduler, in either Compose file (--death-timeout)."""

_START = "systemctl restart dask; until dask-health; do sleep 1; done"

_NO_LIMIT = f"sed -i '/mem_limit:/d; /memswap_limit:/d' {COMPOSE_FILE}"
# Where spilling is not what is looked at: less work for it, which else takes most of the time.
_SPILL_LITTLE = rf"sed -i 's|\(MEMORY__MAX_SPILL:\).*|\1 64MiB|' {COMPOSE_FILE}; grep 64MiB {COMPOSE_FILE}"
_AGENT = """
systemd-run --quiet --unit=test-agent -p OOMScoreAdjust=1000 -p Restart=always \\
    python3 -c 'import time; held = b"x" * (64 << 20); time.sleep(9999)'
"""
# What should answer logins does not for $mute seconds, once the steps have begun.
_MUTE = f"""
rm -f {ANSWER}
systemd-run --quiet --unit=test-mute sh -c 'until [ -e {ANSWER} ]; do sleep 1; done; sleep 5
    pid=$(systemctl show ssh --property MainPID --value); kill -STOP $pid; sleep '$mute'; kill -CONT $pid'
"""
# Without a nanny, the worker that comes after a killed one is told of half the memory.
_SMALLER_NEXT = (
    r"sed -i 's|\(DASK[^ ]* \)dask worker \(.*\) &$|{ part=1.0; while :; do "
    r"\1dask worker \2 --no-nanny --memory-limit $$part; part=0.5; done; } \&|' "
    rf"{COMPOSE_FILE} && grep part=0.5 {COMPOSE_FILE}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Break:
    """One way to make a machine deserve it, and the checks that must say so."""

    name: str
    script: str
    red: frozenset[str]
    hangs: bool = False
    """Whether Dask does not come to an end: then it is not waited for as long as it may take elsewhere."""
    elsewhere: str = ""
    """What shows the same in CI, if this one is left to the whole tests."""


BREAKS = (
    Break(
        name="no spilling, a smaller worker next, nobody answers logins, and nothing reports kills",
        script=rf"""
systemctl stop watch-kills
off() {{ sed -i 's|^\( *\)\(DASK.*MEMORY__\)MAX_SPILL:.*|&\n\1\2'"$1"': "False"|' {COMPOSE_FILE}; }}
off TARGET && off SPILL && off PAUSE
grep 'PAUSE: "False"' {COMPOSE_FILE}
{_SMALLER_NEXT}{_MUTE}""",
        red=frozenset(
            {
                "work larger than the limit finishes by spilling",
                "each kill is reported at once",
                "each end of a worker has its reason",
                "the workers are back",
                "ssh stays responsive",
            }
        ),
    ),
    Break(
        name="no nanny, and less told than there is",
        script=f"""
sed -i 's|--memory-limit [^ ]*|--memory-limit 200MiB --no-nanny|' {COMPOSE_FILE}
grep no-nanny {COMPOSE_FILE}
""",
        red=frozenset({"all steps completed", "a leak ends as a killed worker"}),
        # It stays paused with what it has leaked.
        hangs=True,
        elsewhere="a container that dies as a whole, and tests/unit/test_checks_memory_pressure.py",
    ),
    Break(
        name="a container that dies as a whole",
        script=f"""
{_SPILL_LITTLE}
mkdir -p $(dirname {SCOPES})
printf '[Scope]\\nOOMPolicy=kill\\n' >{SCOPES}
systemctl daemon-reload
""",
        red=frozenset({"all steps completed", "the container keeps running"}),
    ),
    Break(
        name="no limit, and an agent",
        script=f"{_SPILL_LITTLE}; {_NO_LIMIT}; ({UNLIMITED}){_AGENT}",
        red=frozenset(
            {
                "the leaking worker is restarted",
                "another process is killed alone",
                "no kill outside the container",
                "services keep running",
            }
        ),
    ),
)


def pressed(machine: Booted, broken: Break) -> dict[str, str]:
    """Break the machine, start Dask on it, and return what memory pressure shows to be wrong."""
    login = _seconds(
        lambda: processes.output(["ssh", *NEW_CONNECTION, "-F", machine.session.config, ssh.HOST, "true"])
    )
    # Far longer than a login takes here, which is what the check compares it with.
    script = f"set -e\nmute={15 + 10 * login:.0f}\n{broken.script}\n{_START}"
    start = _seconds(lambda: machine.root(script))
    # All steps before the one that hangs take a few times as long as Dask does to start.
    timeout = max(90.0, 10 * start) if broken.hangs else DASK_SECONDS
    failed = red(machine.check(broken.name.replace(" ", "-"), phase="pressure", timeout=timeout))
    return {name.removeprefix("memory pressure: "): message for name, message in failed.items()}


def _seconds(act: Callable[[], object]) -> float:
    began = time.monotonic()
    act()
    return time.monotonic() - began


@pytest.mark.parametrize(
    "whose",
    # tests/process/test_start_dask.py shows what the service does about the other's end.
    ["image", pytest.param("control plane", marks=pytest.mark.whole)],
)
def test_a_cluster_whose_scheduler_is_killed_begins_again(machine: Booted, whose: str) -> None:
    """Its worker would wait for it for three minutes, and everybody for the worker.

    A control plane's file lets Docker start the container again, which Compose stops, and calls success.
    """
    own = f"cp /var/lib/ami-builder/compose.image.yaml {COMPOSE_FILE}\n" if whose == "image" else ""
    machine.root(own + _START)
    container = "docker ps --quiet --no-trunc --filter label=com.docker.compose.project=dask"
    before = machine.root(container)
    machine.root("kill -KILL $(pgrep -f '^[^ ]*python[^ ]* [^ ]*dask scheduler')")
    assert processes.wait_until(
        lambda: machine.root(container, check=False) != before,
        what="the container's end before the worker gives up",
        timeout=DEATH_SECONDS - 30,
    )
    assert processes.wait_until(
        lambda: machine.root(f"dask-health >&2 && {container}", check=False) not in ("", before),
        what="another container that answers",
        timeout=DASK_SECONDS,
    )
    assert machine.root("systemctl show dask --property NRestarts --value").strip() == "1"


@pytest.mark.parametrize(
    "broken",
    [pytest.param(one, marks=[pytest.mark.whole] if one.elsewhere else [], id=one.name) for one in BREAKS],
)
def test_a_machine_that_deserves_it_goes_red(machine: Booted, broken: Break) -> None:
    failed = pressed(machine, broken)
    assert broken.red <= failed.keys(), failed
