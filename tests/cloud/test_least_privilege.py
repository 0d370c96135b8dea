"""The commands under exactly the policies that `iam-policy` prints: nothing refused, nothing unused."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from ami_builder.aws import matrix
from ami_builder.aws import tags as tagging
from ami_builder.build import plugins
from ami_builder.core.errors import BuildFailed
from tests.cloud.faulting import BUILD, Place, only_the_ami
from tests.cloud.flow import captured
from tests.cloud.stopping import POWER_LOSS, stopped
from tests.fake_ec2.cloud_state import DEBIAN_PARAMETER

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ami_builder.config.schema import Image
    from ami_builder.verify.machine import Machine
    from tests.fake_ec2.guard import Enforced
    from tests.fake_ec2.server import Cloud

KEY = "AKIALEASTPRIVILEGE00"


def imds_later() -> set[str]:
    """Return what only Packer 1.6.6 needs, which can't launch with IMDSv2 alone."""
    return {"ec2:ModifyInstanceMetadataOptions"} if plugins.has_plugins() else set()


SPOT = ("--set", "aws.spot=true")
_FLEET = Place(step="Packer", action="CreateFleet", nth=1)


def _made(places: Sequence[Place]) -> int:
    """Return which call makes the AMI."""
    return next(number for number, place in enumerate(places) if place.action == "CreateImage")


def allowed(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, *sections: str, settings: Sequence[str] = ()
) -> Enforced:
    """Allow these credentials what `iam-policy` prints for some parts of the work, and no more."""
    statements: list[Any] = []
    for section in sections:
        printed = captured(*settings, "iam-policy", section)
        assert printed.status == 0, printed.err
        statements += json.loads(printed.out)["Statement"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    return cloud.enforce({"Version": "2012-10-17", "Statement": statements}, KEY)


def _lost(image: Image, machine: Machine, *, work: Path, **_: object) -> NoReturn:
    with ExitStack() as stack:
        machine.start(stack, work / "lost", "#cloud-config\n", "ssh-ed25519 AAAA x")
        raise BuildFailed("it never answered")


def test_build_and_verify(
    cloud: Cloud, places: Sequence[Place], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cloud.reset()
    monkeypatch.setenv("AMI_BUILDER_HOME", str(tmp_path / "home"))
    held = allowed(cloud, monkeypatch, "build", "verify")
    imaging = places[_made(places) + 1]
    stopped(cloud, imaging, "SIGINT", tmp_path / "stopped", access_key=KEY, anew=False)
    assert cloud.left() == {}
    # Packer may try it too, before anybody has tagged the AMI; then ours claims it for the run.
    assert {action for action, _ in held.refused} <= {"ec2:DeregisterImage"}
    held.refused.clear()
    built = captured(*BUILD)
    assert built.status == 0, built.err
    ami = built.out.splitlines()[-1]
    made = cloud.count("RunInstances")
    assert captured(*BUILD).out.splitlines()[-1] == ami
    assert cloud.count("RunInstances") == made, "unchanged"
    verified = captured("verify", ami)
    assert verified.status == 0, verified.err
    monkeypatch.setattr(matrix, "verify_machine", _lost)
    assert captured("verify", ami).status == BuildFailed.exit_code
    assert held.refused == []
    assert held.unused == imds_later()
    only_the_ami(cloud)


def test_what_settings_add(cloud: Cloud, places: Sequence[Place], monkeypatch: pytest.MonkeyPatch) -> None:
    cloud.client("iam").create_instance_profile(InstanceProfileName="ours")
    settings = (
        *SPOT,
        *("--set", "aws.instance_profile=ours"),
        *("--set", f"aws.source=ssm:{DEBIAN_PARAMETER}"),
    )
    held = allowed(cloud, monkeypatch, "build", "verify", settings=settings)
    built = captured(*settings, *BUILD)
    assert built.status == 0, built.err
    assert held.refused == []
    # What cleans up, what reads the console of a dead machine; and a spot instance is never stopped.
    never = {"ec2:DeregisterImage", "ec2:DeleteSnapshot", "ec2:GetConsoleOutput", "ec2:StopInstances"}
    assert held.unused == never | imds_later()
    only_the_ami(cloud)


def test_collecting(
    cloud: Cloud, places: Sequence[Place], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Before Packer 1.6.6 could tag the instance, and before any version reports it.
    stopped(cloud, _FLEET, POWER_LOSS, tmp_path, *SPOT)
    stopped(cloud, places[_made(places) + 1], POWER_LOSS, tmp_path, anew=False)
    ec2 = cloud.client()
    (group, *_) = ec2.describe_security_groups(Filters=[{"Name": "tag-key", "Values": [tagging.RUN]}])[
        "SecurityGroups"
    ]
    lost = tagging.specifications(tagging.as_dict(group["Tags"]), "volume")
    ec2.create_volume(AvailabilityZone="us-east-1a", Size=1, TagSpecifications=lost)
    left = cloud.left()
    assert left.keys() == {"instance", "launch-template", "volume", "image", "snapshot", "security-group"}
    assert len(left["instance"]) == 2
    held = allowed(cloud, monkeypatch, "lifecycle", settings=SPOT)
    collected = captured("gc", "--apply")
    assert collected.status == 0, collected.err
    assert cloud.left() == {}
    assert held.refused == []
    # Plugins tag the instance and the AMI at their creation: `gc` need not claim them.
    assert held.unused == ({"ec2:CreateTags"} if plugins.has_plugins() else set())


@pytest.mark.xfail(reason="check tries calls on ids that nobody has", strict=True)
def test_checking(cloud: Cloud, places: Sequence[Place], monkeypatch: pytest.MonkeyPatch) -> None:
    held = allowed(cloud, monkeypatch, "all")
    before = cloud.left()
    told = json.loads(captured("check", "--target", "aws", "--json").out)
    found = {one["name"]: one["state"] for one in told["findings"]}
    assert found["permissions"] == "ok", told
    assert held.refused == []
    assert cloud.left() == before
