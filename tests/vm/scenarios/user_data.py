"""A scheduler and two workers, launched with the user data that `ami-builder certificates` makes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed import Client, Security

from ami_builder.build import certificates
from ami_builder.system import processes
from tests.vm import clusters
from tests.vm.instances import KEY_NAME, Instances, instances
from tests.vm.scenarios import answer

if TYPE_CHECKING:
    from collections.abc import Mapping

SCHEDULER, WORKER = "t3.small", "m5d.large"
MIB = 1 << 20


def main(disk: str, directory: str) -> dict[str, Any]:
    """Return what was found of limits, TLS, spilling and an interruption; see test_a_launchers.py."""
    folder = Path(directory)
    memory = {SCHEDULER: 1024, WORKER: 1280}
    with instances(Path(disk), folder, memory=memory) as there:
        before = there.cloud.left()
        made = certificates.make(folder / "certificates", days=30)
        scheduler = _launch(there, SCHEDULER, made, "scheduler")
        address = f"{there.running()[scheduler]['PrivateIpAddress']}:8786"
        made = certificates.make(folder / "certificates", days=30, scheduler=address)
        machines = [_launch(there, WORKER, made, "worker") for _ in range(2)]
        client = made.folder / "client"
        security = Security(
            tls_ca_file=str(client / "ca.pem"),
            tls_client_cert=str(client / "cert.pem"),
            tls_client_key=str(client / "key.pem"),
            require_encryption=True,
        )
        with there.session(machines[0]), _connected(f"tls://{address}", security) as connected:
            clusters.workers(connected, len(machines))
            doctor = clusters.doctor(address, "--tls", str(made.folder))
            refused = clusters.is_refused(address)
            found = {**_look(there, connected, machines), "doctor": doctor, "refused": refused}
        there.cloud.client().terminate_instances(InstanceIds=[scheduler, *machines])
        return {**found, "replaced": "by nothing", "left": clusters.left(there, before)}


def _launch(there: Instances, kind: str, made: certificates.Folder, role: str) -> str:
    data = next(one.user_data for one in made.issued if one.role == role)
    assert data is not None
    launched = there.cloud.client().run_instances(
        ImageId=there.ami,
        MinCount=1,
        MaxCount=1,
        InstanceType=kind,
        KeyName=KEY_NAME,
        UserData=data.read_text(),
    )
    return str(launched["Instances"][0]["InstanceId"])


def _connected(address: str, security: Security) -> Client:
    return Client(address, security=security, timeout="1800s", set_as_default=False)


def _look(there: Instances, client: Client, machines: list[str]) -> dict[str, Any]:
    registered = clusters.workers(client, len(machines))
    host = {key: one["PrivateIpAddress"] for key, one in there.running().items()}
    of = {key: next(a for a in registered if f"//{host[key]}:" in a) for key in machines}
    found: dict[str, Any] = {"workers": list(registered), "limits": []}
    for key in machines:
        with there.session(key) as session:
            limit = int(registered[of[key]]["memory_limit"])
            found["limits"].append({**clusters.limits(session), "worker": limit})
    module = clusters.load_work(client)
    found["spill"] = clusters.spill(there, client, machines[0], of[machines[0]], module)
    found["spot"] = _interrupt(there, client, machines[0], of, module)
    return found


def _interrupt(
    there: Instances, client: Client, machine: str, of: Mapping[str, str], module: Any
) -> dict[str, Any]:
    """Announce the end of a machine that holds results, and count what is computed again."""
    worker, others = of[machine], [address for key, address in of.items() if key != machine]
    held = [client.submit(module.combine, n, key=f"held-{n}", workers=[worker]) for n in range(20)]
    client.gather(held)
    client.get_task_stream()  # the scheduler records tasks from now on
    running = [
        client.submit(module.ordinary, MIB, 2.0, key=f"running-{n}", workers=list(of.values()))
        for n in range(8)
    ]
    began = time.monotonic()
    clusters.announce_interruption(there, machine)
    processes.wait_until(
        lambda: worker not in client.scheduler_info(n_workers=-1)["workers"],
        what="the end of the worker", timeout=600, interval=1,
    )  # fmt: skip
    seconds = time.monotonic() - began
    results = client.gather(held) == [n & 0xFFFFFFFF for n in range(20)]
    client.gather(running)
    again = [one["key"] for one in client.get_task_stream() if str(one["key"]).startswith("held-")]
    with there.session(machine) as session:
        state = processes.wait_until(
            lambda: (lines := clusters.health(session)) and lines[0] == "retired" and lines,
            what="the health of the retired machine", timeout=300, interval=2,
        )  # fmt: skip
        journal = session.run(
            "journalctl -b -o cat --no-pager -t dask -u dask-notices | tail -n 20", sudo=True
        )
    left = list(client.scheduler_info(n_workers=-1)["workers"])
    return {
        "seconds": round(seconds, 1),
        "health": state,
        "journal": journal.stdout.splitlines()[-12:],
        "of": len(held),
        "results": results,
        "computed_again": again,
        "left": left == others,
    }


if __name__ == "__main__":
    answer(main)
