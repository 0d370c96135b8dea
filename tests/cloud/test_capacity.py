"""What EC2 has not, or not yet: capacity, things made a moment ago, images that are pending or fail."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ami_builder.aws import bake
from tests.cloud.faulting import BUILD, Place, collect, fresh, only_the_ami, rebuilt
from tests.cloud.flow import Ran, captured

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.fake_ec2.server import Cloud

BAKE, PROVE = "m7i.large", "m5.large"


@pytest.fixture
def subnets(cloud: Cloud, places: Sequence[Place], tmp_path: Path) -> list[str]:
    """Two subnets of the default VPC in a new account."""
    fresh(cloud, tmp_path / "home")
    return [each["SubnetId"] for each in cloud.client().describe_subnets()["Subnets"][:2]]


def build(**settings: str) -> Ran:
    """Build with some settings of `aws` and `verify`."""
    flags = [
        part for key, value in settings.items() for part in ("--set", f"{key.replace('__', '.')}={value}")
    ]
    return captured(*flags, *BUILD)


def launched(cloud: Cloud) -> list[tuple[str, str]]:
    """Return (instance type, subnet) of every launch that went well."""
    calls = [call for call in cloud.calls if call.action == "RunInstances" and call.outcome == "ok"]
    found = []
    for call in calls:
        interface = (call.params.get("NetworkInterfaces") or [{}])[0]
        subnet = call.params.get("SubnetId") or interface.get("SubnetId", "")
        found.append((call.params["InstanceType"], subnet))
    return found


def test_the_next_type_is_baked_on(cloud: Cloud, subnets: Sequence[str]) -> None:
    cloud.options.no_capacity = {("m6i.large", "*")}
    ran = build(aws__instance_types=f"m6i.large,{BAKE}", verify__instance_types=PROVE)
    assert ran.status == 0, ran.err
    assert [kind for kind, _ in launched(cloud)] == [BAKE, PROVE]
    only_the_ami(cloud)


def test_the_next_subnet_is_baked_and_proved_in(cloud: Cloud, subnets: Sequence[str]) -> None:
    first, second = subnets
    cloud.options.no_capacity = {(BAKE, first), (PROVE, first)}
    ran = build(aws__instance_types=BAKE, verify__instance_types=PROVE, aws__subnets=f"{first},{second}")
    assert ran.status == 0, ran.err
    assert launched(cloud) == [(BAKE, second), (PROVE, second)]
    only_the_ami(cloud)


# Codes and messages of fleets, as in osbuild-composer#4507, packer#8740 and aws-ethereum-miner#23.
@pytest.mark.parametrize(
    "shortage",
    [
        pytest.param(
            (
                "InsufficientInstanceCapacity",
                "There is no Spot capacity available that matches your request.",
            ),
            # Plugins ask eleven times first, for two and a half minutes.
            marks=pytest.mark.long,
        ),
        (
            "UnfulfillableCapacity",
            "Unable to fulfill capacity due to your request configuration. "
            "Please adjust your request and try again.",
        ),
        (
            "InvalidFleetConfiguration",
            "Your requested instance type (m6i.large) is not supported in your requested Availability Zone "
            "(us-east-1a).",
        ),
    ],
    ids=lambda shortage: shortage[0],
)
def test_the_next_type_of_spot_is_baked_on(
    cloud: Cloud, subnets: Sequence[str], shortage: tuple[str, str]
) -> None:
    cloud.options.no_capacity = {("m6i.large", "*")}
    cloud.options.spot_shortage = shortage
    types = ("--set", f"aws.instance_types=m6i.large,{BAKE}", "--set", f"verify.instance_types={PROVE}")
    ran = captured(
        *("--set", "aws.spot=true"), *types, "--set", "bake.timeout=10min", "build", "--target", "aws"
    )
    assert ran.status == 0, ran.err
    assert len(cloud.left()["image"]) == 1
    assert [call.params["InstanceType"] for call in cloud.calls if call.action == "RunInstances"] == [PROVE]
    only_the_ami(cloud)


def test_a_refused_spot_request_leaves_nothing(cloud: Cloud, subnets: Sequence[str]) -> None:
    # Plugin 1.8 crashes on that, and cleans up nothing.
    cloud.faults.add("CreateFleet", "throttle", times=None, packer=True)
    ran = captured("--set", "aws.spot=true", *BUILD)
    assert ran.status == 6, ran.err
    assert "EC2 refused the request for a spot instance" in ran.err or "RequestLimitExceeded" in ran.err
    assert "Traceback" not in ran.err
    assert cloud.left() == {}


def test_no_capacity_anywhere_to_bake(cloud: Cloud, subnets: Sequence[str]) -> None:
    cloud.options.no_capacity = {(BAKE, "*"), ("m6i.large", "*")}
    ran = build(aws__instance_types=f"m6i.large,{BAKE}")
    assert ran.status == 6
    assert "no capacity in us-east-1" in ran.err
    assert "m6i.large: " in ran.err
    assert f"{BAKE}: " in ran.err
    assert cloud.left() == {}


def test_no_capacity_to_prove_keeps_the_ami(cloud: Cloud, subnets: Sequence[str]) -> None:
    cloud.options.no_capacity = {(PROVE, "*")}
    settings = {"aws__instance_types": BAKE, "verify__instance_types": PROVE}
    ran = build(**settings)
    assert ran.status == 6
    assert "no capacity in us-east-1" in ran.err
    collect()
    only_the_ami(cloud)
    cloud.options.no_capacity.clear()
    assert build(**settings).status == 0
    assert [kind for kind, _ in launched(cloud)] == [BAKE, PROVE], "baked once"


@pytest.mark.parametrize("describes", [1, 3])
def test_what_was_made_a_moment_ago_is_not_found_yet(
    cloud: Cloud, subnets: Sequence[str], monkeypatch: pytest.MonkeyPatch, describes: int
) -> None:
    monkeypatch.setattr(bake, "ATTEMPTS", 5)
    cloud.options.hidden_describes = describes
    ran = build()
    assert ran.status == 0, ran.err
    only_the_ami(cloud)


def test_an_image_is_pending_for_a_while(cloud: Cloud, subnets: Sequence[str]) -> None:
    # Plugin 1.8 waits for 15 seconds and more between two looks.
    cloud.options.image_describes = 2
    ran = build()
    assert ran.status == 0, ran.err
    only_the_ami(cloud)


def test_an_image_that_fails_is_told_and_goes(cloud: Cloud, subnets: Sequence[str]) -> None:
    cloud.options.image_failure = "the disk broke"
    cloud.options.image_describes = 1
    ran = build()
    assert ran.status == 4, ran.err
    collect()
    assert cloud.left() == {}
    cloud.options.image_failure = ""
    rebuilt(cloud)
