"""What an unmodified EC2Cluster sends, and what its containers and all others are limited to."""

from __future__ import annotations

import json
import re
import shlex
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from distributed import Client

from ami_builder.core.options import Network
from ami_builder.qemu.disks import create_overlay
from ami_builder.qemu.hardware import HOST_ADDRESS
from ami_builder.system.processes import wait_until
from tests.real_dask import scheduler
from tests.vm.conftest import HOME, ROOT, Booted, Instance, accelerator, running
from tests.vm.ec2cluster import user_data

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ami_builder.config.schema import Image

IMAGE = "ami-builder/dask:1"
DOCKER = ["docker", "run", "--net=host", IMAGE, "env"]


def commands(text: str) -> list[str]:
    assert text.startswith("#cloud-config\n")
    run: list[str] = yaml.safe_load(text).pop("runcmd")
    return run


def test_the_scheduler_and_then_its_end() -> None:
    docker, end = commands(user_data(IMAGE, None))
    *words, config, _, _, module = shlex.split(docker)
    assert (words, module) == (DOCKER, "distributed.cli.dask_scheduler")
    assert config == "DASK_INTERNAL_INHERIT_CONFIG=e30=", "a configuration of this machine was sent along"
    assert end == "shutdown -h now"


def test_a_worker_of_that_scheduler_and_then_its_end() -> None:
    docker, end = commands(user_data(IMAGE, "tcp://192.0.2.1:8786"))
    *words, _, _, _, module, address, _, spec = shlex.split(docker)
    assert (words, module) == (DOCKER, "distributed.cli.dask_spec")
    assert address == "tcp://192.0.2.1:8786"
    worker = json.loads(spec)
    assert worker["cls"] == "dask.distributed.Nanny"
    assert worker["opts"].keys() == {"name"}, "a limit of its own would hide the image's"
    assert re.fullmatch(r"dask-\w+-worker-\w+", worker["opts"]["name"])
    assert end == "shutdown -h now"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to start a container, and the limits that came of it, in bytes; None where there is none."""

    started_by: str
    boot: str
    variable: int
    docker: int
    memory_max: int
    worker: int | None


SCHEDULER, WORKER = "EC2Cluster's scheduler", "EC2Cluster's worker"
PLAIN, WITH, WITHOUT = "`docker run`", "Compose with `mem_limit`", "Compose without `mem_limit`"
FIRST, AGAIN = "first", "after a reboot"
DOC = ROOT / "docs" / "explanation" / "limits.md"


@pytest.mark.whole
def test_each_way_to_start_a_container_has_the_limit(
    built: Mapping[str, Any], image: Image, tmp_path: Path
) -> None:
    """One disk, booted as two instances of EC2Cluster, whose user data is as it comes; the first one twice.

    cloud-init runs the command once for an instance. After the reboot it is typed by hand.
    """
    source, disk = Path(built["artifact"]["location"]), tmp_path / "disk.qcow2"
    create_overlay(source, disk, image.verify.disk_size)
    rows: list[Row] = []
    with scheduler(tmp_path) as address, Client(address) as client:
        ours = address.replace("127.0.0.1", HOST_ADDRESS)
        sent = {
            name: user_data(image.container.reference, at) for name, at in ((SCHEDULER, None), (WORKER, ours))
        }
        instances = {name: Instance.new(image, folder(tmp_path, name), sent[name].encode()) for name in sent}
        for name, boot in ((SCHEDULER, FIRST), (SCHEDULER, AGAIN), (WORKER, FIRST)):
            with started(image, instances[name], disk, folder(tmp_path, name, boot), source) as machine:
                machine.root("until systemctl is-active dask | grep -x inactive; do sleep 1; done")
                assert machine.root("head -n 1 /run/dask/health").strip() == "off"
                if boot == FIRST:
                    ids = {name: container(machine)}
                else:
                    by_hand = {how: f"{commands(text)[0]} >/dev/null 2>&1 &" for how, text in sent.items()}
                    ids = {how: container(machine, command) for how, command in by_hand.items()}
                if name == SCHEDULER:
                    ids |= others(machine, image, ours)
                limits = wait_until(
                    lambda: workers(client, len(ids) - (SCHEDULER in ids)),  # noqa: B023
                    what="the workers",
                    timeout=600,
                    interval=1,
                )
                rows += [row(machine, how, boot, id, limits) for how, id in ids.items()]
                machine.root("sync")
            wait_until(lambda: not client.scheduler_info()["workers"], what="their end", timeout=600)
    text = table(rows)
    (HOME / "limits.md").write_text(text)
    assert {r.memory_max for r in rows} == {r.variable for r in rows}
    for found in rows:
        assert found.variable == found.memory_max, found
        assert found.docker in (0, found.variable), found
        assert found.worker in (None, found.variable), found
    assert names(text) == names(DOC.read_text()), (
        f"docs/explanation/limits.md has other rows; this run's: {text}"
    )


@contextmanager
def started(image: Image, instance: Instance, disk: Path, directory: Path, source: Path) -> Iterator[Booted]:
    more: dict[str, Any] = {"accelerator": accelerator(source, directory), "network": Network.NAT}
    with running(image, instance, disk, directory, writable=True, **more) as machine:
        # EC2Cluster's command keeps the boot from ending.
        machine.root("until systemctl is-active dask-memory; do sleep 1; done")
        yield machine


def folder(path: Path, *names: str) -> Path:
    """Return a folder of a boot, made for it."""
    found = path / "-".join(name.split()[-1] for name in names)
    found.mkdir()
    return found


def container(machine: Booted, start: str = "") -> str:
    """Return the id of the container that a command starts, or that user data has started."""
    count = int(machine.root("docker ps -q | wc -l")) if start else 0
    # The newest comes first.
    return machine.root(
        f"{start}\nuntil [ $(docker ps -q | wc -l) -gt {count} ]; do sleep 1; done; docker ps -q --no-trunc"
    ).split()[0]


def others(machine: Booted, image: Image, address: str) -> dict[str, str]:
    """Start a worker in each of the other ways, as a person would by hand, and return the containers' ids."""
    words = ["dask", "worker", address, "--nworkers", "1", "--no-dashboard"]
    service = {"image": image.container.reference, "network_mode": "host", "init": True}
    limited = {"mem_limit": "${AVAILABLE_MEMORY_FOR_DASK:-0}"}
    found: dict[str, str] = {}
    # Compose would start those of an earlier boot again.
    machine.root("docker container prune --force")
    for how, more in ((WITH, limited), (WITHOUT, {})):
        name = f"by-hand-{len(found)}"
        file = {"name": name, "services": {"worker": service | more | {"command": [*words, "--name", how]}}}
        machine.session.run(f"cat >/root/{name}.yaml", sudo=True, stdin=json.dumps(file))
        # Through a login shell, which has the variable.
        found[how] = container(
            machine, f"bash -lc 'docker compose --file /root/{name}.yaml up --detach' >/dev/null 2>&1"
        )
    command = shlex.join([*words, "--name", PLAIN])
    run = f"docker run --network host {image.container.reference} {command} >/dev/null 2>&1 &"
    return found | {PLAIN: container(machine, run)}


def workers(client: Client, count: int) -> dict[str, int] | None:
    """Return the memory limit of each worker by its name once there are so many."""
    found = client.scheduler_info(n_workers=-1)["workers"].values()
    return {str(w["name"]): int(w["memory_limit"]) for w in found} if len(found) == count else None


def row(machine: Booted, how: str, boot: str, id: str, limits: Mapping[str, int]) -> Row:
    scope = f"/sys/fs/cgroup/system.slice/docker-{id}.scope/memory.max"
    variable = machine.root("sed -n s/^AVAILABLE_MEMORY_FOR_DASK=//p /run/dask/memory.env")
    of_ec2 = next((limit for name, limit in limits.items() if "-worker-" in name), None)
    return Row(
        started_by=how,
        boot=boot,
        variable=int(variable),
        docker=int(machine.root(f"docker inspect -f '{{{{.HostConfig.Memory}}}}' {id}")),
        memory_max=int(machine.root(f"cat {scope}").replace("max", "-1")),
        worker=of_ec2 if how == WORKER else limits.get(how),
    )


def table(rows: list[Row]) -> str:
    lines = [
        "| started by | boot | `memory.env` | asked of Docker | `memory.max` | worker's `memory_limit` |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        numbers = (
            r.variable,
            r.docker or "nothing",
            r.memory_max,
            "none, a scheduler" if r.worker is None else r.worker,
        )
        lines.append(f"| {' | '.join(map(str, (r.started_by, r.boot, *numbers)))} |")
    return "\n".join(lines) + "\n"


def names(text: str) -> list[tuple[str, str]]:
    """Return which rows the table in a text has."""
    _, _, table = text.partition("| started by |")
    rows = [line.split("|") for line in table.splitlines()[2:] if line.startswith("|")]
    return [(cells[1].strip(), cells[2].strip()) for cells in rows if len(cells) == 8]
