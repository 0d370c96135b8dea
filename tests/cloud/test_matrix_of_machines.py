"""An AMI verified over regions and instance types, by threads and by a real Dask cluster of processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ami_builder.core.records import RunStatus
from ami_builder.state.workspace import Workspace
from ami_builder.system.processes import wait_until
from ami_builder.verify import executor as cluster
from tests.cloud.faulting import BUILD, collect, only_the_ami
from tests.cloud.flow import captured, in_haste, without_ssh
from tests.cloud.preload import GO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.fake_ec2.server import Cloud

ROOT = Path(__file__).parents[2]
TYPES = ("m5.large", "m6i.large", "m7i.large")
FLAGS = [part for each in TYPES for part in ("--instance-type", each)]
OTHER = "eu-west-1"
BOUND = 120.0


@dataclass(slots=True, kw_only=True)
class Crew:
    """A scheduler and its workers, each a process."""

    address: str
    go: Path
    """Machines that workers verify run until this is there."""
    environment: dict[str, str]
    folder: Path
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def muster(self, count: int) -> None:
        """Start workers until so many are there."""
        from distributed import Client

        while sum(each.poll() is None for each in self.workers) < count:
            self._add_worker()
        with Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(count, timeout=BOUND)

    def wait_for_calls(self, *, wanted: int) -> None:
        """Wait until so many calls are wanted; with none, until workers only end what they have begun."""
        from distributed import Client

        def of_scheduler(dask_scheduler: Any) -> int:
            return len(dask_scheduler.tasks)

        def of_worker(dask_worker: Any) -> int:
            return sum(each.state in ("ready", "waiting") for each in dask_worker.state.tasks.values())

        with Client(self.address, set_as_default=False) as client:
            wait_until(
                lambda: (
                    client.run_on_scheduler(of_scheduler) == wanted
                    and (wanted or not any(client.run(of_worker).values()))
                ),
                what=f"{wanted} calls",
                timeout=BOUND,
                interval=0.05,
            )

    def _add_worker(self) -> None:
        flags = ("--no-nanny", "--nthreads", "1", "--no-dashboard", "--preload", "tests.cloud.preload")
        place = ("--local-directory", str(self.folder), "--death-timeout", "60")
        self.workers.append(_dask(self.environment, self.folder, "worker", self.address, *flags, *place))


def _dask(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    with (folder / f"{arguments[0]}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "dask", *arguments], cwd=ROOT, env=environment, stdout=log, stderr=log
        )


@pytest.fixture(scope="module")
def crew(running_cloud: Cloud, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    """A cluster without any worker yet; its processes' home is that of the tests."""
    folder = tmp_path_factory.mktemp("dask")
    go = folder / "go"
    environment = {
        **os.environ,
        **running_cloud.environment(),
        **{"PYTHONPATH": str(ROOT), "AMI_BUILDER_HOME": str(folder / "home"), GO: str(go)},
    }
    told = folder / "scheduler.json"
    where = ("--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(told), "--no-dashboard")
    workers: list[subprocess.Popen[bytes]] = []
    scheduler = _dask(environment, folder, "scheduler", *where)
    try:
        wait_until(lambda: told.exists() and told.read_text(), what="a scheduler", timeout=BOUND)
        address = json.loads(told.read_text())["address"]
        yield Crew(address=address, go=go, environment=environment, folder=folder, workers=workers)
    finally:
        for process in (*workers, scheduler):
            process.kill()
            process.wait()


@pytest.fixture(autouse=True)
def _home(crew: Crew, cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMI_BUILDER_HOME", crew.environment["AMI_BUILDER_HOME"])
    monkeypatch.delenv("AMI_BUILDER_CONFIG", raising=False)
    without_ssh(monkeypatch)
    in_haste(monkeypatch)
    crew.go.unlink(missing_ok=True)


def built() -> str:
    """Bake an AMI and return its id; nothing is verified."""
    ran = captured(*BUILD, "--no-verify", "--force")
    assert ran.status == 0, ran.err
    return ran.out.splitlines()[-1]


def copied(cloud: Cloud, ami: str) -> str:
    """Copy an AMI to the other region, with its tags."""
    (image,) = cloud.client().describe_images(ImageIds=[ami])["Images"]
    there = cloud.client(region=OTHER)
    copy: str = there.copy_image(Name=image["Name"], SourceImageId=ami, SourceRegion="us-east-1")["ImageId"]
    there.create_tags(Resources=[copy], Tags=image["Tags"])
    return copy


def verdict_tag(cloud: Cloud, ami: str, region: str) -> str:
    (image,) = cloud.client(region=region).describe_images(ImageIds=[ami])["Images"]
    tags: dict[str, str] = {tag["Key"]: tag["Value"] for tag in image["Tags"]}
    return tags.get("ami-builder:verdict", "none").partition(" ")[0]


def meanwhile(act: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def launches(cloud: Cloud) -> list[str]:
    """Return the types that verification launched; a call repeated for a late answer counts once."""
    asked = {
        call.params["ClientToken"]: call.params["InstanceType"]
        for call in cloud.calls
        if call.action == "RunInstances" and not call.packer
    }
    return list(asked.values())


def launched(cloud: Cloud, count: int) -> None:
    wait_until(lambda: len(launches(cloud)) >= count, what="the launches", timeout=BOUND, interval=0.05)


def answer(*arguments: str) -> Any:
    ran = captured(*arguments, "--json")
    assert ran.status == 0, ran.err
    return json.loads(ran.out)


def test_threads_verify_every_type_in_every_region(cloud: Cloud, crew: Crew) -> None:
    ami = built()
    copy = copied(cloud, ami)
    told = answer("verify", "--target", "aws", *FLAGS, "--region", OTHER, "--region", "us-east-1")
    assert told["passed"]
    assert [(one["region"], one["ami"]) for one in told["amis"]] == [(OTHER, copy), ("us-east-1", ami)]
    for one in told["amis"]:
        assert [each["machine"] for each in one["verdict"]["measured"]] == list(TYPES)
    machines = [each["machine"] for each in told["verdict"]["results"]]
    assert machines == [f"{kind} in {region}" for region in (OTHER, "us-east-1") for kind in TYPES]
    assert verdict_tag(cloud, ami, "us-east-1") == verdict_tag(cloud, copy, OTHER) == "passed"
    only_the_ami(cloud)
    assert cloud.left(OTHER).keys() == {"image", "snapshot"}


def test_a_region_without_the_ami_is_named(cloud: Cloud, crew: Crew) -> None:
    built()
    ran = captured("verify", "--target", "aws", "--region", "us-east-1", "--region", OTHER)
    assert ran.status == 2
    assert f"--region {OTHER}" in ran.err


def test_without_a_region_an_ami_is_verified_where_it_is(cloud: Cloud, crew: Crew) -> None:
    """Not where images are baked now: the setting may have changed since."""
    ami = built()
    told = answer("--set", f"aws.region={OTHER}", "verify", "--target", "aws", *FLAGS)
    assert [(one["region"], one["ami"]) for one in told["amis"]] == [("us-east-1", ami)]
    assert verdict_tag(cloud, ami, "us-east-1") == "passed"


def test_one_type_without_capacity_does_not_hide_the_others(cloud: Cloud, crew: Crew) -> None:
    ami = built()
    cloud.options.no_capacity = {("m5.large", "*")}
    ran = captured("verify", ami, *FLAGS)
    assert ran.status == 6, ran.err
    assert "1 of 3 machines could not be verified: EC2 has no capacity in us-east-1" in ran.err
    assert "m5.large in us-east-1 (on " in ran.err
    ended = {
        instance
        for call in cloud.calls
        if call.action == "TerminateInstances"
        for instance in call.params["InstanceIds"]
    }
    assert len(ended) == 1 + 2, "Packer's, and the others were verified to their end"
    assert verdict_tag(cloud, ami, "us-east-1") == "none"
    only_the_ami(cloud)


def test_a_cluster_without_workers_is_told_at_once(cloud: Cloud, crew: Crew) -> None:
    built()
    ran = captured("verify", "--target", "aws", "--dask-scheduler", crew.address)
    assert ran.status == 2
    assert "the cluster has no workers" in ran.err
    assert launches(cloud) == []


def test_a_killed_worker_s_job_is_verified_by_another(cloud: Cloud, crew: Crew) -> None:
    ami = built()
    crew.muster(2)
    killed = crew.workers[-1]

    def kill() -> None:
        launched(cloud, 2)
        wait_until(lambda: len(cloud.left()["instance"]) == 2, what="both", timeout=BOUND, interval=0.05)
        os.kill(killed.pid, signal.SIGKILL)
        crew.go.touch()

    killer = meanwhile(kill)
    told = answer("verify", ami, *FLAGS, "--dask-scheduler", crew.address)
    killer.join(BOUND)
    assert killed.wait(BOUND) == -signal.SIGKILL
    assert [each["machine"] for each in told["verdict"]["measured"]] == list(TYPES)
    assert len(launches(cloud)) == len(TYPES) + 1
    assert verdict_tag(cloud, ami, "us-east-1") == "passed"
    left = cloud.left()
    assert len(left["instance"]) == len(left["security-group"]) == 1
    collect()
    only_the_ami(cloud)


def test_ctrl_c_leaves_remote_machines_to_their_workers(cloud: Cloud, crew: Crew) -> None:
    crew.muster(1)
    ami = built()

    def stop() -> None:
        launched(cloud, 1)
        crew.wait_for_calls(wanted=len(TYPES))
        os.kill(os.getpid(), signal.SIGINT)

    was = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stopper = meanwhile(stop)
    try:
        ran = captured("verify", ami, *FLAGS, "--dask-scheduler", crew.address)
    finally:
        signal.signal(signal.SIGINT, was[0])
        signal.signal(signal.SIGTERM, was[1])
    stopper.join(BOUND)
    assert ran.status == 130, ran.err
    assert "workers finish and clean up" in ran.err
    crew.wait_for_calls(wanted=0)
    crew.go.touch()
    wait_until(lambda: cloud.left().keys() == {"image", "snapshot"}, what="the worker's end", timeout=BOUND)
    assert len(launches(cloud)) == 1, "the other jobs were cancelled"


def test_workers_with_another_version_are_refused(
    cloud: Cloud, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    crew.muster(1)
    monkeypatch.setattr(cluster, "__version__", "99")
    ran = captured("build", "--target", "aws", "--dask-scheduler", crew.address)
    assert ran.status == 3
    assert "1 of 1 workers don't have ami-builder 99" in ran.err
    assert cloud.count("RunInstances") == 0, "before anything is baked"


def test_the_records_of_jobs_stand_beside_that_of_their_run(cloud: Cloud, crew: Crew) -> None:
    crew.muster(1)
    crew.go.touch()
    ami = built()
    told = answer("verify", ami, "--instance-type", TYPES[0], "--dask-scheduler", crew.address)
    assert told["passed"]
    workspace = Workspace.open({"AMI_BUILDER_HOME": crew.environment["AMI_BUILDER_HOME"]})
    (job,) = sorted(workspace.runs_dir.glob("*.*"))[-1:]
    run = workspace.runs_dir / job.name.partition(".")[0]
    record = json.loads((run / "machines" / TYPES[0] / "record.json").read_text())
    assert record["run_id"] == job.name
    assert record["status"] == RunStatus.PASSED
    assert record["steps"][0]["name"] == f"{TYPES[0]} in us-east-1"
