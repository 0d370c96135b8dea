"""Two instances of an image come up with the address, the metadata and the key that are theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.vm.instances import KEY_NAME, instances
from tests.vm.scenarios import answer


def main(disk: str, directory: str) -> dict[str, Any]:
    """Return what each instance finds out about itself, and whether it reaches the other one."""
    with instances(Path(disk), Path(directory), memory={"t3.small": 1024}) as there:
        ec2 = there.cloud.client()
        ec2.run_instances(
            ImageId=there.ami, MinCount=2, MaxCount=2, InstanceType="t3.small", KeyName=KEY_NAME,
            UserData="#cloud-config\nwrite_files: [{path: /etc/dask/dask.env, content: DASK_ROLE=none}]\n",
        )  # fmt: skip
        listed = there.running()
        addresses = {key: one["PrivateIpAddress"] for key, one in listed.items()}
        found = {}
        for key, address in addresses.items():
            other = next(each for each in addresses.values() if each != address)
            with there.session(key) as session:
                found[key] = {
                    "address": address,
                    "public": listed[key].get("PublicIpAddress"),
                    "has": session.run("hostname -I").stdout.split(),
                    "cloud": session.run("cloud-id").stdout.strip(),
                    "id": session.run("cat /var/lib/cloud/data/instance-id").stdout.strip(),
                    "other": session.run(
                        f"timeout 60 bash -c 'read -r x </dev/tcp/{other}/22; echo $x'"
                    ).stdout,
                    "name": session.run(f"getent hosts ip-{other.replace('.', '-')}.ec2.internal").stdout,
                }
        ec2.terminate_instances(InstanceIds=list(addresses))
        return found


if __name__ == "__main__":
    answer(main)
