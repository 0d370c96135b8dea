"""An unmodified EC2Cluster on instances that are real machines: its call, its work, its end."""

from __future__ import annotations

import base64
import json
import shutil
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ami_builder.core.oom import Constraint, kills
from ami_builder.core.units import GIB, MIB
from ami_builder.system import processes
from tests.experiment import work as experiment_work
from tests.experiment.cases import TWO_PERCENT, Case, Work
from tests.experiment.tasks import Memory, tasks
from tests.fake_ec2.server import REGION
from tests.vm import ec2cluster
from tests.vm.clusters import WORK, doctor, interrupt, is_refused, kernel_log, limits, spill_folder
from tests.vm.conftest import DASK_SECONDS
from tests.vm.instances import KEY_NAME, Instances, instances
from tests.vm.scenarios import answer

if TYPE_CHECKING:
    from tests.vm.ec2cluster import User

SCHEDULER, WORKER = "t3.micro", "t3.small"
PARAMETER = "/ami-builder/dask/current"
PATIENCE = {
    # Emulated machines take minutes where others take seconds.
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "600s",
    # A scheduler's machine may end before it has answered that it ends: then the client waits for so long.
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "120s",
    "DASK_DISTRIBUTED__DEPLOY__LOST_WORKER_TIMEOUT": "600s",
}
_LAYER = "docker ps -q | xargs docker inspect --size -f '{{.SizeRw}}'"
_CONTAINER = """
id=$(docker ps -q --no-trunc | head -n 1)
df -B1 --output=size / | tail -n 1
lsblk --bytes --nodeps --noheadings --output SIZE | sort -n | tail -n 1
docker inspect --size -f '{{.SizeRw}}' "$id"
sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo
docker inspect -f '{{.Id}} {{.RestartCount}}' "$id"
"""


def main(
    disk: str, directory: str, image: str, workers: int, whole: bool, memory: int = GIB, filesystem: int = 40
) -> dict[str, Any]:
    """Start a cluster, and either try what one worker does (spill, leak, close), or W1 and W3 on all of them.

    `memory` is that of each worker in bytes, `filesystem` the GB of the root that EC2Cluster asks for.
    """
    here = Path(directory)
    sizes = {SCHEDULER: GIB // MIB, WORKER: memory // MIB}
    with ExitStack() as stack:
        there = stack.enter_context(instances(Path(disk), here, memory=sizes))
        group = _security_group(there)
        ssm = there.cloud.client("ssm")
        ssm.put_parameter(Name=PARAMETER, Value=there.ami, Type="String", DataType="aws:ec2:image")
        before = there.cloud.left()
        # Dask's default, 3, is for one machine: a task has its spike once on each.
        failures = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": str(3 * workers if whole else 0)}
        environment = {**there.cloud.environment(), **PATIENCE, **failures}
        user = stack.enter_context(ec2cluster.using(here / "user", environment))
        upload = here / f"{WORK}.py"
        shutil.copy(experiment_work.__file__, upload)
        call: dict[str, Any] = {
            "region": REGION,
            "ami": f"resolve:ssm:{PARAMETER}",
            "bootstrap": False,
            "security_groups": [group],
            "docker_image": image,
            "scheduler_instance_type": SCHEDULER,
            "worker_instance_type": WORKER,
            "n_workers": workers,
            "filesystem_size": filesystem,
            "key_name": KEY_NAME,
            "docker_args": "--oom-score-adj 500 --volume /var/lib/dask/spill:/spill "
            "--volume /usr/local/lib/dask/tls_errors.py:/tls_errors.py:ro",
            "env_vars": {
                "DASK_DISTRIBUTED__SCHEDULER__PRELOAD": "/tls_errors.py",
                "DASK_DISTRIBUTED__WORKER__PRELOAD": "/tls_errors.py",
            },
            "worker_options": {"local_directory": "/spill"},
        }
        if whole:
            # Where work.py remembers on a machine that a task has had its spike.
            call["docker_args"] += f" --volume /var/tmp:{Path(experiment_work.SEEN).parent}"
        began = user.ask("start", call=call, upload=str(upload))
        found: dict[str, Any] = {
            "scheduler": began["scheduler"],
            "refused": is_refused(began["scheduler"]),
            "user_data": _user_data_sizes(there),
            "machines": _machines(there, began["workers"]),
        }
        user.ask("certificates", folder=str(here / "certificates"))
        found["doctor"] = doctor(began["scheduler"], "--tls", str(here / "certificates"))
        found["spilled"] = _spilled(there, user, found["machines"][0])
        if whole:
            found["work"] = _both_works(user, found["machines"])
        else:
            found["leak"] = _leaked(user, found["machines"][0])
        found["after"] = _machines(there, user.ask("info")["workers"])
        found["kills"] = [_kills(there, one) for one in there.running()]
        if whole:
            found["spot"] = _interrupted(there, user, found["after"][0])
        # What comes next may fail, after the longest part.
        print(json.dumps(found), file=sys.stderr)
        user.ask("close")
        # Of the kinds that an instance has; what was there before is there still.
        found["left"] = processes.wait_until(
            lambda: there.cloud.left() == before, what="the end of all instances", timeout=1800, interval=2
        )
        return found


def _security_group(there: Instances) -> str:
    """Return a group as EC2Cluster's documentation asks for one."""
    ec2 = there.cloud.client()
    group = str(ec2.create_security_group(GroupName="dask", Description="for Dask")["GroupId"])
    ports: list[dict[str, Any]] = [
        {"IpProtocol": "tcp", "FromPort": first, "ToPort": last, "IpRanges": [{"CidrIp": "172.31.0.0/16"}]}
        for first, last in ((22, 22), (8786, 8787))
    ]
    among = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[*ports, among])
    return group


def _user_data_sizes(there: Instances) -> list[int]:
    """Return how many bytes of user data each instance was launched with."""
    ec2 = there.cloud.client()
    sent = [
        ec2.describe_instance_attribute(InstanceId=one, Attribute="userData")["UserData"]["Value"]
        for one in there.running()
    ]
    return sorted(len(base64.b64decode(one)) for one in sent)


def _machines(there: Instances, workers: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what each worker's machine has, beside what the scheduler knows of the worker."""
    by_address = {one["PrivateIpAddress"]: key for key, one in there.running().items()}
    found = []
    for address, worker in sorted(workers.items()):
        instance = by_address[address.rpartition("/")[2].rpartition(":")[0]]
        with there.session(instance) as session:
            lines = session.run(_CONTAINER, sudo=True, timeout=DASK_SECONDS).stdout.splitlines()
            found.append(
                {
                    "instance": instance,
                    "address": address,
                    "worker": worker["memory_limit"],
                    "spills_to": worker["local_directory"],
                    **limits(session),
                    "root": int(lines[0]),
                    "disk": int(lines[1]),
                    "layer": int(lines[2]),
                    "total": int(lines[3]) * 1024,
                    "container": lines[4],
                    "devices": session.run("lsblk -ndo NAME").stdout.split(),
                }
            )
    return found


def _spilled(there: Instances, user: User, machine: dict[str, Any]) -> dict[str, Any]:
    """Let one worker hold nearly as much as its limit, and return where the rest is."""
    size = 8 * MIB
    count = machine["worker"] * 9 // 10 // size
    held = user.ask("hold", worker=machine["address"], count=count, size=size)
    with there.session(machine["instance"]) as session:
        spill = spill_folder(session)
        layer = session.run(_LAYER, sudo=True, timeout=DASK_SECONDS).stdout
    user.ask("release")
    return {"held": held * size, "layer": int(layer), **spill}


def _leaked(user: User, machine: dict[str, Any]) -> dict[str, Any]:
    """Let a task leak until its worker is ended, and see that another task is done afterwards."""
    start, target = machine["worker"] * 85 // 100, machine["total"]
    leak = user.ask("call", function="leak", arguments=[start, target, 32 * MIB, 0.02])
    return {"leak": leak, "next": user.ask("call", function="ordinary", arguments=[MIB, 0.1])}


def _both_works(user: User, machines: list[dict[str, Any]]) -> dict[str, Any]:
    """W1 by the sum of all machines: 2.5 times what the cluster has. W3 by one of them: a spike is on one."""
    one = Memory(total=machines[0]["total"], available=machines[0]["variable"])
    every = Memory(
        total=sum(each["total"] for each in machines), available=sum(each["variable"] for each in machines)
    )
    found = {}
    for work, memory in ((Work.ARRAY, every), (Work.SPIKES, one)):
        case = Case(memory=memory.total, cpus=2, policy=TWO_PERCENT, work=work, repeat=1, seed=1)
        wanted = [asdict(task) for task in tasks(case, memory)]
        found[work.value] = user.ask("work", tasks=wanted, timeout=3600)
    return found


def _interrupted(there: Instances, user: User, machine: dict[str, Any]) -> dict[str, Any]:
    """Announce the end of a machine that holds results; it ends by itself once its worker has retired."""
    count = 20
    user.ask("hold", worker=machine["address"], count=count, size=MIB)
    seconds = interrupt(there, machine["instance"])
    return {"seconds": seconds, "of": count, **user.ask("gathered")}


def _kills(there: Instances, instance: str) -> dict[str, Any]:
    """Return what the kernel of a machine has killed: by limits of containers, and system-wide."""
    with there.session(instance) as session:
        found = kills(kernel_log(session))
    system = [one.task for one in found if one.constraint is Constraint.GLOBAL]
    return {"instance": instance, "cgroup": len(found) - len(system), "system": len(system)}


if __name__ == "__main__":
    answer(main)
