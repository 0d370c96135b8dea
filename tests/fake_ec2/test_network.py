"""The network of instances without any VM: who asks from which address gets which metadata."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PROGRAMS

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = ("172.31.0.4", "172.31.16.9")
PROGRAM = f"""
import http.client, json, sys
from pathlib import Path
from ami_builder.qemu import imds
from tests.fake_ec2.network import METADATA, InstanceNetwork, placed
from ami_builder.system import processes

def ask(method, path, source, **headers):
    connection = http.client.HTTPConnection(METADATA, 80, timeout=60, source_address=(source, 0))
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()

def look(address):
    header = "X-aws-ec2-metadata-token"
    status, token = ask("PUT", "/latest/api/token", address, **{{f"{{header}}-ttl-seconds": "60"}})
    if status != 200:
        return status, ""
    return ask("GET", "/latest/meta-data/instance-id", address, **{{header: token}})

found = {{}}
with InstanceNetwork(Path(sys.argv[1])) as network:
    for number, address in enumerate({ADDRESSES!r}):
        about = imds.InstanceMetadata(instance_id=f"i-{{number}}", **placed(address))
        tap = network.connect(imds.MetadataServer(about), address)
        # This machine takes the guest's place.
        processes.output(["ip", "address", "add", f"{{address}}/32", "dev", "lo"])
        found[address] = look(address)
    network.disconnect(tap)
    found["gone"] = look(tap.address)
    found["taps"] = processes.output(["ip", "-brief", "link"]).count("tap")
print(json.dumps(found))
"""


@pytest.mark.needs("unshare", "ip", "dnsmasq")
def test_instances_are_told_apart_by_their_addresses(tmp_path: Path) -> None:
    unshare = ["unshare", "--net", *(["--map-root-user"] if os.geteuid() else []), "--"]
    environment = {**os.environ, "PATH": PROGRAMS, "PYTHONPATH": str(ROOT)}
    probe = "ip link add probe type bridge && ip tuntap add probe0 mode tap"
    if subprocess.run([*unshare, "sh", "-c", probe], env=environment, capture_output=True).returncode:
        pytest.skip("network namespaces with bridges can't be made here")
    done = subprocess.run(
        [*unshare, sys.executable, "-c", PROGRAM, tmp_path / "network"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        ADDRESSES[0]: [200, "i-0"],
        ADDRESSES[1]: [200, "i-1"],
        "gone": [404, ""],
        "taps": 1,
    }
