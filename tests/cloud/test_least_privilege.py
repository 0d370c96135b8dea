"""The commands under exactly the policies that `iam-policy` prints: nothing refused, nothing unused."""

from __future__ import annotations

import json
from contextlib import ExitStack
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from moto.core.utils import utcnow

from ami_builder.aws import matrix
from ami_builder.aws import tags as tagging
from ami_builder.aws.policy import LONGEST, size
from ami_builder.build import plugins
from ami_builder.core.errors import BuildFailed, CloudFailed
from tests.cloud.faulting import BUILD, Place, only_the_ami
from tests.cloud.flow import Ran, captured
from tests.cloud.stopping import POWER_LOSS, stopped
from tests.fake_ec2.api_call import ACCOUNT
from tests.fake_ec2.cloud_state import DEBIAN_PARAMETER
from tests.fake_ec2.server import REGION

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ami_builder.config.schema import Image
    from ami_builder.verify.machine import Machine
    from tests.fake_ec2.guard import Enforced
    from tests.fake_ec2.server import Cloud

KEY = "AKIALEASTPRIVILEGE00"


ABOUT_THE_ACCOUNT = {
    *("ec2:GetEbsEncryptionByDefault", "ec2:GetEbsDefaultKmsKeyId", "ec2:GetImageBlockPublicAccessState"),
    *("ec2:GetInstanceMetadataDefaults", "servicequotas:GetServiceQuota", "iam:SimulatePrincipalPolicy"),
    "iam:GetRole",
}
"""What `check` and `build` may read of the account."""


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
    stopped(cloud, imaging, "SIGINT", tmp_path / "stopped", access_key=KEY, reset=False)
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
    assert held.unused - ABOUT_THE_ACCOUNT == imds_later()
    only_the_ami(cloud)


def test_what_settings_add(cloud: Cloud, places: Sequence[Place], monkeypatch: pytest.MonkeyPatch) -> None:
    cloud.client("iam").create_instance_profile(InstanceProfileName="ours")
    settings = (
        *SPOT,
        *("--set", "aws.instance_profile=ours"),
        *("--set", f"aws.source=ssm:{DEBIAN_PARAMETER}"),
    )
    held = allowed(cloud, monkeypatch, "build", "verify", settings=settings)
    cloud.options.spot_role = False
    built = captured(*settings, *BUILD)
    assert built.status == 0, built.err
    assert held.refused == []
    # What cleans up, what reads the console of a dead machine; and a spot instance is never stopped.
    never = {"ec2:DeleteSnapshot", "ec2:GetConsoleOutput", "ec2:StopInstances"}
    assert held.unused - ABOUT_THE_ACCOUNT == never | imds_later()
    only_the_ami(cloud)


def test_a_first_spot_request_needs_its_role(
    cloud: Cloud, places: Sequence[Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud.options.spot_role = False
    held = allowed(cloud, monkeypatch, "build", "verify", settings=SPOT)
    statements = [s for s in held.identity.statements if s["Sid"] != "MakeSpotRole"]
    held = cloud.enforce({"Version": "2012-10-17", "Statement": statements}, KEY)
    built = captured(*SPOT, *BUILD)
    assert built.status == CloudFailed.exit_code
    assert "permission to create the service-linked role" in built.err
    assert {action for action, _ in held.refused} == {"iam:CreateServiceLinkedRole"}
    assert cloud.left() == {}


def test_collecting(
    cloud: Cloud, places: Sequence[Place], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Before Packer 1.6.6 could tag the instance, and before any version reports it.
    stopped(cloud, _FLEET, POWER_LOSS, tmp_path, *SPOT)
    stopped(cloud, places[_made(places) + 1], POWER_LOSS, tmp_path, reset=False)
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


def test_checking(cloud: Cloud, places: Sequence[Place], monkeypatch: pytest.MonkeyPatch) -> None:
    held = allowed(cloud, monkeypatch, "all")
    before = cloud.left()
    told = json.loads(captured("check", "--target", "aws", "--json").out)
    found = {one["name"]: one["state"] for one in told["findings"]}
    assert found["permissions"] == "ok", told
    # The dry run of a launch is in the VPC's own group.
    assert {action for action, _ in held.refused} <= {"ec2:RunInstances"}
    assert cloud.left() == before


THERE = "eu-west-1"
SHARED = "210987654321"
WHOLE = (
    *("--set", f"aws.copy_to={THERE}"),
    *("--set", f"aws.share_with={SHARED}"),
    *("--set", "aws.tags=Owner=us"),
    *("--set", "lifecycle.keep=0"),
    *("--set", "lifecycle.keep_days=10"),
    *("--set", "lifecycle.shared_days=30"),
)
OWNED = {
    "Statement": [
        {
            "Effect": "Deny",
            "Action": action,
            "Resource": [f"arn:aws:ec2:*:*:{kind}/*" for kind in kinds],
            "Condition": {"Null": {"aws:RequestTag/Owner": "true"}},
        }
        for action, kinds in (
            ("ec2:RunInstances", ("instance", "volume")),
            ("ec2:CreateSecurityGroup", ("security-group",)),
        )
    ]
}
"""A control policy of an organization that demands a tag on what costs money."""


def aged(cloud: Cloud, days: float) -> None:
    """Let all AMIs of the account and their snapshots look old."""
    for region in (REGION, THERE):
        backend = cloud.backend(region)
        for image in backend.amis.values():
            if image.owner_id == ACCOUNT:
                image.creation_date = utcnow() - timedelta(days=days)
                if image.deprecation_time is not None:
                    image.deprecation_time = image.creation_date.strftime("%Y-%m-%dT%H:%M:%S.000Z")
        for snapshot in backend.snapshots.values():
            snapshot.start_time = utcnow() - timedelta(days=days)


@pytest.mark.parametrize("spot", [False, True], ids=["on demand", "spot"])
def test_the_whole_flow(
    cloud: Cloud, places: Sequence[Place], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spot: bool
) -> None:
    settings = (*WHOLE, *(SPOT if spot else ()))
    cloud.options.spot_role = False

    def run(*arguments: str) -> Ran:
        ran = captured(*settings, *arguments)
        assert ran.status == 0, f"{arguments}: {ran.err}"
        # A copy's launch is tried with the VPC's default group, into which the policy lets nobody launch.
        assert {action for action, arn in held.refused if not arn.endswith("/sg-default")} == set(), arguments
        return ran

    directory = tmp_path / "policies"
    written = captured(*settings, "iam-policy", "--directory", str(directory))
    policies = [json.loads(path.read_text()) for path in sorted(directory.iterdir())]
    assert [str(path) for path in sorted(directory.iterdir())] == written.out.splitlines()
    assert all(size(one) <= LONGEST for one in policies)
    statements = [statement for one in policies for statement in one["Statement"]]
    controls = () if spot else (OWNED,)
    held = cloud.enforce({"Version": "2012-10-17", "Statement": statements}, KEY, controls=controls)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)

    # What a killed build leaves.
    killed_at = _FLEET if spot else places[_made(places) + 1]
    stopped(cloud, killed_at, POWER_LOSS, tmp_path / "home", *settings, access_key=KEY, reset=False)
    collected = run("gc", "--apply")
    assert cloud.left() == {}, collected.err

    run("check", "--target", "aws")
    first = run(*BUILD).out.splitlines()[-1]
    run("copy", first)
    run("share", first)
    run("verify", first, "--region", REGION, "--region", THERE)
    run("promote", first, "testing")
    second = run("--set", "memory.reserve=64MiB", *BUILD).out.splitlines()[-1]
    run("copy", second)
    for channel in ("testing", "stable"):
        run("promote", second, channel)
    for more in ((), ("--disk", "50GiB"), ("--delete", "--apply")):
        run("launch-template", "stable", "--scheduler", "10.0.0.7", *more)
    run("rollback", "testing", "--target", "aws")
    run("revoke", second, "--reason", "it is bad")
    for _ in range(2):
        # Deprecated first, deleted by the next.
        aged(cloud, 100)
        run("prune", "--target", "aws", "--apply")
    assert cloud.left()["image"] == [first]
    assert len(cloud.left(THERE)["image"]) == 1

    # Nightly runs that make an image each, and delete the one that has become neither current nor previous.
    for reserve in ("32MiB", "16MiB", "16MiB"):
        aged(cloud, 100)
        run("--set", f"memory.reserve={reserve}", "nightly", "--target", "aws")
    assert first not in cloud.left()["image"]
    assert all(len(cloud.left(region)["image"]) == 2 for region in (REGION, THERE))
    assert all(cloud.left(region).keys() == {"image", "snapshot"} for region in (REGION, THERE))
    assert held.unused <= never(spot=spot)


def never(*, spot: bool) -> set[str]:
    """Return what the whole flow has no cause to do."""
    other_kind = "ec2:StopInstances" if spot else "ec2:DeleteLaunchTemplate"
    # Volumes go with their instances; consoles are read of those that don't answer.
    found = {other_kind, "ec2:DeleteVolume", "ec2:GetConsoleOutput"} | imds_later()
    if plugins.has_plugins():
        # Only 1.6.6 has to know whether the account enforces IMDSv2.
        found.add("ec2:GetInstanceMetadataDefaults")
    # Asked where a role calls, where EBS encrypts by default, and where an AMI is to be public.
    return found | {"iam:GetRole", "ec2:GetEbsDefaultKmsKeyId", "ec2:GetImageBlockPublicAccessState"}
