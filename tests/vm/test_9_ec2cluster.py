"""What EC2Cluster sends. No VM is booted for it, but the package is fetched."""

from __future__ import annotations

import json
import re
import shlex

import yaml

from tests.vm.ec2cluster import user_data

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
