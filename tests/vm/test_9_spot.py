"""An instance that EC2 interrupts during work: its worker retires in time, and no result is computed again.

One VM is two machines: the scheduler and another worker on it have a network of their own.
"""

from __future__ import annotations

import shlex
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ami_builder.config.schema import Image
    from tests.vm.conftest import Booted

SECONDS = 600
HERE, OTHER = "10.99.0.1", "10.99.0.2"

CLUSTER = f"""
set -eu
docker run -d --name other --network none %s sh -c '
    until [ -e /tmp/connected ]; do sleep 0.2; done
    dask scheduler --host {OTHER} --port 8786 --no-dashboard &
    exec dask worker {OTHER}:8786 --host {OTHER} --nthreads 1 --no-dashboard --local-directory /tmp/spill'
pid=$(docker inspect -f '{{{{.State.Pid}}}}' other)
ip link add to-other type veth peer name other
ip link set other netns "$pid"
ip address add {HERE}/24 dev to-other
ip link set to-other up
nsenter -t "$pid" -n ip address add {OTHER}/24 dev other
nsenter -t "$pid" -n ip link set other up
nsenter -t "$pid" -n ip link set lo up
docker exec other touch /tmp/connected
cp /var/lib/ami-builder/compose.image.yaml /etc/dask/compose.yaml
printf 'DASK_ROLE=worker\\nDASK_SCHEDULER_ADDRESS={OTHER}:8786\\n' >/etc/dask/dask.env
systemctl restart dask
"""

# A result that is computed again has another time.
WORK = f"""
import os, sys, time
from distributed import Client

def step(number):
    return number, time.time_ns(), os.urandom(200_000)

def of(client, host):
    return [worker for worker in client.nthreads() if host in worker]

with Client("{OTHER}:8786") as client:
    client.wait_for_workers(2)
    results = client.map(step, range(20), workers=of(client, "{HERE}"), allow_other_workers=True, pure=False)
    before = client.gather(client.map(lambda result: result[:2], results))
    print("ready", flush=True)
    while of(client, "{HERE}"):
        time.sleep(0.2)
    print("gone", time.time(), flush=True)
    after = client.gather(client.map(lambda result: result[:2], results))
    print("same" if before == after else "computed again", flush=True)
"""


def until(guest: Booted, condition: str) -> None:
    guest.root(f"timeout {SECONDS} sh -c {shlex.quote(f'until {condition}; do sleep 0.5; done')}")


def work(guest: Booted, image: Image) -> None:
    """Start a cluster of two machines, and work whose results are on this one."""
    guest.root(CLUSTER % image.container.reference)
    command = f"docker exec other timeout {SECONDS} python -c {shlex.quote(WORK)}"
    guest.root(f"nohup {command} >/run/work 2>&1 </dev/null &")
    until(guest, "grep -q ready /run/work")


def interrupt(guest: Booted) -> int:
    """Announce an interruption in two minutes, and return its time."""
    at = int(guest.root("date +%s")) + 120
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
    guest.metadata.announce("spot/termination-time", stamp)
    guest.metadata.announce("spot/instance-action", f'{{"action": "terminate", "time": "{stamp}"}}')
    return at


@pytest.mark.whole
def test_no_result_is_computed_again_after_an_interruption(machine: Booted, image: Image) -> None:
    """Three minutes. Lost otherwise: test_results_of_a_container_that_is_killed_are_computed_again."""
    work(machine, image)
    at = interrupt(machine)
    until(machine, "grep -q 'same\\|again\\|Error' /run/work")
    lines = machine.root("cat /run/work").splitlines()
    assert lines[-1] == "same", lines
    gone = next(float(line.split()[1]) for line in lines if line.startswith("gone"))
    assert gone < at
    until(machine, "grep -q retired /run/dask/health")
    until(machine, "systemctl show dask.service -P ActiveState | grep -q inactive")
    assert "EC2 interrupts this spot instance" in machine.root("cat /run/dask/health")
    log = machine.root("journalctl -q -o cat -b -t dask")
    assert "has retired: other workers have its data" in log
    assert "container dask-worker-1 has ended" not in log, "its end is no failure"
    assert machine.root("docker ps -q --filter label=com.docker.compose.project=dask") == ""
    # Dask does not start again in this boot.
    machine.root("systemctl start dask", check=False)
    assert machine.root("head -n 1 /run/dask/health").strip() == "retired"


@pytest.mark.whole
def test_results_of_a_container_that_is_killed_are_computed_again(machine: Booted, image: Image) -> None:
    """Three minutes. What happens to workers that do not retire: the machine's end kills them."""
    machine.root("systemctl stop dask-notices")
    work(machine, image)
    machine.root(
        "docker kill $(docker ps -q --filter label=com.docker.compose.project=dask); systemctl stop dask"
    )
    until(machine, "grep -q 'same\\|again\\|Error' /run/work")
    assert machine.root("tail -n 1 /run/work").strip() == "computed again"
