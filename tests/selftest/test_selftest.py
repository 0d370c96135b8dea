"""Whole selftests: the cloud that was recorded, one that differs on purpose, and what ends one early."""

from __future__ import annotations

import json
import os
import re
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ami_builder.aws.tags import RUN, SELFTEST, specifications
from ami_builder.core.errors import ChecksFailed, CloudFailed, UsageError
from ami_builder.selftest import compare, probes
from ami_builder.selftest.compare import Kind
from ami_builder.selftest.plan import Part
from ami_builder.system.processes import wait_until
from tests.cloud.aws import make_ami
from tests.cloud.faulting import BOUND
from tests.cloud.flow import captured
from tests.cloud.stopping import start
from tests.fake_ec2.faults import Fault
from tests.fake_ec2.server import ACCESS_KEY
from tests.selftest.record import COPY_REGION, recordings, run

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ami_builder.selftest.compare import Comparison
    from ami_builder.selftest.recording import Recording
    from ami_builder.selftest.run import Result
    from tests.fake_ec2.server import Cloud

APPLY = ("selftest", "--target", "aws", "--copy-region", COPY_REGION, "--apply")
OF_THE_ACCOUNT = {
    "id": r"\b(ami|snap|i|sg|sgr|vol|vpc|subnet|lt|eni|r)-[0-9a-f]{8,}",
    "account": r"\b[0-9]{12}\b",
    "ARN": r"\barn:",
    "address": r"\b[0-9]{1,3}(\.[0-9]{1,3}){3}\b",
    "endpoint": r"https?:|localhost|amazonaws",
    "credentials": r"\bAKIA",
    "digest": r"\b[0-9a-f]{32,}\b",
    "region": r"\b(us-east|eu-west)-[0-9]",
    "image": r"selftest-[0-9a-f]{8}",
}
"""What must not be in anything that a user sends us."""


def _compared(result: Result) -> Comparison:
    return compare.compare(result.recording, compare.recorded(), result.steps, result.unfinished)


def _nothing_left(cloud: Cloud) -> bool:
    ssm = [
        cloud.client("ssm", region=region).get_parameters_by_path(Path="/ami-builder", Recursive=True)
        for region in ("us-east-1", COPY_REGION)
    ]
    return not any([cloud.left(), cloud.left(COPY_REGION), *(one["Parameters"] for one in ssm)])


def _private(text: str) -> Iterator[str]:
    for name, pattern in OF_THE_ACCOUNT.items():
        if found := re.search(pattern, text):
            yield f"{name}: {found[0]}"


def _stable(recorded: Mapping[str, Recording]) -> object:
    """Return what does not depend on how busy this host is: how often something was asked does."""
    whole = json.loads(compare.dump(recorded))
    fields = whole.pop("fields")
    for kind in whole.values():
        for one in kind:
            if one["call"].partition(":")[2].startswith(("Describe", "Get")):
                one["outcomes"] = sorted(one["outcomes"])
    return fields, whole


@pytest.mark.long
def test_the_shipped_recording_is_what_the_cloud_does(running_cloud: Cloud) -> None:
    made = recordings(running_cloud)
    assert _stable(made) == _stable(compare.recorded()), "run `python -m tests.selftest.record`"
    every = {one.step for each in made.values() for one in each.behaviours}
    assert every >= {name for one in (*probes.WITHOUT_AMI, *probes.WITH_AMI) for name in one.steps()}
    assert "NotImitated" not in compare.dump(made)
    assert list(_private(compare.dump(made))) == []


def test_a_plan_says_what_and_how_much_and_makes_nothing(cloud: Cloud) -> None:
    ran = captured("selftest", "--copy-region", COPY_REGION, "--json")
    assert ran.status == 0, ran.err
    told = json.loads(ran.out)
    assert [one["step"] for one in told["plan"]] == list(Part)
    assert 0 < told["most_usd"] == pytest.approx(sum(one["most_usd"] for one in told["plan"]), abs=1e-3)
    assert {call.action for call in cloud.calls} <= {"DescribeImages", "GetProducts"}


def test_without_another_region_nothing_is_copied_and_nothing_differs(cloud: Cloud, tmp_path: Path) -> None:
    ran = captured("selftest", "--json")
    assert Part.COPY not in [one["step"] for one in json.loads(ran.out)["plan"]]
    assert "--copy-region" in ran.err
    result = run(tmp_path, copy_region="")
    assert result.error is None
    assert _compared(result).matters == ()
    assert _nothing_left(cloud)


def test_the_command_finds_no_difference_and_leaves_nothing(cloud: Cloud, tmp_path: Path) -> None:
    foreign = make_ami(cloud, "somebody's")
    ran = captured(*APPLY, "--spend", "2", "--json")
    assert ran.status == 0, ran.err
    told = json.loads(ran.out)
    assert told["completed"] == list(Part)
    assert told["left"] == 0
    assert 0 < told["most_usd"] <= 2
    assert not any(one["matters"] for row in told["calls"] for one in row["differences"])
    assert list(_private(ran.out)) == []
    # It touches nothing of others', and its AMIs are not in the user's list.
    owned = cloud.client().describe_images(Owners=["self"])["Images"]
    assert [one["ImageId"] for one in owned] == [foreign]
    assert captured("list").out == ""
    assert {one.name for one in (tmp_path / "home/state/images").iterdir()} == set()


def _fill(cloud: Cloud, region: str) -> None:
    """Put things of somebody else's into a region, of the kinds that `prune` and `gc` look through."""
    ec2, ssm = cloud.client(region=region), cloud.client("ssm", region=region)
    scaling = cloud.client("autoscaling", region=region)
    ami = cloud.base_ami(region)
    for number in range(3):
        data = {"ImageId": f"resolve:ssm:/theirs/{number}:9", "InstanceType": "t3.small"}
        ec2.create_launch_template(LaunchTemplateName=f"theirs-{number}", LaunchTemplateData=data)
    scaling.create_launch_configuration(
        LaunchConfigurationName="theirs", ImageId=ami, InstanceType="t3.small"
    )
    for number in range(60):
        ssm.put_parameter(Name=f"/theirs/{number}", Value=ami, Type="String", DataType="aws:ec2:image")
    ssm.label_parameter_version(Name="/theirs/1", ParameterVersion=1, Labels=["blue"])
    ec2.request_spot_instances(LaunchSpecification={"ImageId": ami, "InstanceType": "t3.small"})
    of_a_run = specifications({RUN: "20260101T000000Z-aaaa"}, "security-group", "volume")
    ec2.create_security_group(GroupName="theirs", Description="x", TagSpecifications=of_a_run[:1])
    ec2.create_volume(AvailabilityZone=f"{region}a", Size=1, TagSpecifications=of_a_run[1:])


def test_an_account_in_use_whose_organization_denies_regions_does_not_differ(
    cloud: Cloud, tmp_path: Path
) -> None:
    regions = ["us-east-1", COPY_REGION]
    for region in regions:
        _fill(cloud, region)
    version, anything = {"Version": "2012-10-17"}, {"Action": "*", "Resource": "*"}
    outside = {"StringNotEquals": {"aws:RequestedRegion": regions}}
    cloud.enforce(
        {**version, "Statement": [{"Effect": "Allow", **anything}]},
        ACCESS_KEY,
        controls=[{**version, "Statement": [{"Effect": "Deny", **anything, "Condition": outside}]}],
    )
    result = run(tmp_path)
    assert result.error is None, result.error
    assert _compared(result).matters == ()


def test_everything_has_its_tag_from_the_call_that_makes_it(cloud: Cloud, tmp_path: Path) -> None:
    assert run(tmp_path).error is None
    makers = ("CopyImage", "CreateSecurityGroup", "RunInstances")
    made = [call for call in cloud.calls if call.action in makers and call.outcome == "ok"]
    assert {call.action for call in made} == set(makers)
    for call in made:
        for each in call.params["TagSpecifications"]:
            assert SELFTEST in {tag["Key"] for tag in each["Tags"]}, call


def test_a_cloud_that_differs_is_said_to(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "MANY_MORE", 2)  # a busy host asks slowly
    cloud.options.other_codes = {"InvalidVolume.NotFound": "InvalidVolume.Gone"}
    cloud.options.left_out = {"hypervisor"}
    cloud.options.image_seconds = 6.0
    ran = captured(*APPLY)
    assert ran.status == ChecksFailed.exit_code, ran.err
    rows = {tuple(row[:2]): row[2:] for line in ran.out.splitlines() if len(row := line.split("\t")) > 4}
    aws, known, *_, differs = rows["probe: describe a missing volume 1", "ec2:DescribeVolumes"]
    assert (aws, known, differs) == ("InvalidVolume.Gone", "InvalidVolume.NotFound", Kind.OUTCOME)
    assert Kind.POLLS in rows["second AMI", "ec2:DescribeImages"][-1]
    assert (
        f"ec2:DescribeImages: {Kind.MISSING}: AWS nothing / test cloud Images[].Hypervisor: string" in ran.out
    )
    assert rows["probe: describe a missing AMI 1", "ec2:DescribeImages"][-1] == "same"
    assert list(_private(ran.out)) == []
    assert _nothing_left(cloud)


def test_other_states_are_said(cloud: Cloud, tmp_path: Path) -> None:
    cloud.options.image_describes = 0
    result = run(tmp_path)
    found = {(one.step, one.call): one.kind for one in _compared(result).differences}
    assert found[Part.SECOND, "ec2:DescribeImages"] is Kind.STATES


def test_what_check_finds_stops_it_before_anything_is_made(cloud: Cloud) -> None:
    ran = captured("--set", "aws.instance_types=m99.large", *APPLY, "--assume-hourly", "0.1")
    assert ran.status == UsageError.exit_code, ran.err
    assert "m99.large" in ran.err
    assert not [call for call in cloud.calls if call.outcome == "ok" and call.action.startswith("Create")]


@pytest.mark.parametrize("verdict", ["simulated", "dry run"])
def test_a_verdict_on_permissions_does_not_stop_it(cloud: Cloud, tmp_path: Path, verdict: str) -> None:
    """The simulator or a dry run refuses what the bake needs, which may be right or wrong."""
    if verdict == "simulated":
        acts = {"Allow": "*", "Deny": "ec2:StopInstances"}
        statements = [{"Effect": effect, "Action": one, "Resource": "*"} for effect, one in acts.items()]
        cloud.enforce({"Version": "2012-10-17", "Statement": statements}, ACCESS_KEY)
    else:
        cloud.options.other_codes = {"DryRunOperation": "UnauthorizedOperation"}
    result = run(tmp_path, spend=0.01)
    assert isinstance(result.error, UsageError), result.error
    assert "can cost" in result.error.message
    assert Part.CHECK in result.parts


def test_it_is_not_copied_to_where_it_is_baked(cloud: Cloud) -> None:
    ran = captured("selftest", "--copy-region", "us-east-1")
    assert ran.status == UsageError.exit_code
    assert "us-east-1 is where the AMI is baked" in ran.err
    assert not cloud.calls


def test_a_budget_that_is_too_small_starts_nothing(cloud: Cloud) -> None:
    ran = captured(*APPLY, "--spend", "0.01")
    assert ran.status == UsageError.exit_code
    assert "bake can cost" in ran.err
    assert {call.action for call in cloud.calls} <= {"DescribeImages", "GetProducts"}


def test_a_budget_that_ends_stops_before_the_step(cloud: Cloud, tmp_path: Path) -> None:
    result = run(tmp_path, spend=0.10)
    assert isinstance(result.error, ChecksFailed)
    assert result.parts[-1] is Part.VERIFY or Part.COPY not in result.parts
    assert Part.COPY not in result.parts
    assert result.spent <= 0.10
    assert cloud.count("CopyImage") == 0 or Part.SECOND in result.parts
    assert not [call for call in cloud.calls if call.region == COPY_REGION and call.action == "CopyImage"]
    assert _nothing_left(cloud)


def test_an_unknown_price_is_refused_unless_one_is_given(cloud: Cloud) -> None:
    cloud.options.region_prices = {}
    ran = captured("selftest")
    assert ran.status == UsageError.exit_code
    assert "--assume-hourly" in ran.err
    told = captured("selftest", "--assume-hourly", "0.50", "--json")
    assert told.status == 0, told.err
    assert json.loads(told.out)["most_usd"] > 0.5


def test_a_step_that_fails_ends_it_and_leaves_nothing(cloud: Cloud, tmp_path: Path) -> None:
    cloud.faults.add("LabelParameterVersion", Fault.HTTP500, nth=2, times=None)
    result = run(tmp_path)
    assert isinstance(result.error, CloudFailed)
    assert result.parts[-1] is Part.COPY
    comparison = _compared(result)
    # What it did of the step is in the table; what it did not come to is no difference.
    failed = [one for one in comparison.differences if one.step == Part.PROMOTE]
    assert {one.call for one in failed if one.kind.matters} == {"ssm:LabelParameterVersion"}
    assert _nothing_left(cloud)


def test_what_can_not_be_removed_is_listed_and_fails_it(cloud: Cloud) -> None:
    cloud.faults.add("DeregisterImage", Fault.HTTP500, times=None, region=COPY_REGION)
    ran = captured(*APPLY)
    assert ran.status == ChecksFailed.exit_code, ran.err
    (ami,) = cloud.client(region=COPY_REGION).describe_images(Owners=["self"])["Images"]
    assert f"left in {COPY_REGION}: image {ami['ImageId']}" in ran.err
    assert list(_private(ran.out)) == []


@pytest.mark.parametrize(
    ("action", "least"), [("CreateImage", 1), ("CopyImage", 2), ("PutParameter", 6)], ids=str
)
def test_ctrl_c_leaves_nothing(cloud: Cloud, tmp_path: Path, action: str, least: int) -> None:
    """While Packer makes the AMI (`check` tries that call first), in a probe, and while promoting."""
    home = tmp_path / "stopped"
    process = start(home, cloud.environment(), *APPLY)

    def called() -> bool:
        assert process.exitcode is None, (home / "out").read_text()
        return cloud.count(action) >= least

    wait_until(called, what=action, timeout=BOUND, interval=0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(BOUND)
    assert process.exitcode == 130, (home / "out").read_text()
    assert "Traceback" not in (home / "out").read_text()
    assert _nothing_left(cloud)


def test_what_a_killed_selftest_left_long_ago_goes_too(cloud: Cloud, tmp_path: Path) -> None:
    old, young, foreign = (
        make_ami(cloud, name, **({SELFTEST: name} if name != "somebody's" else {}))
        for name in ("selftest-old", "selftest-young", "somebody's")
    )
    named = make_ami(cloud, "named", **{SELFTEST: "dask"})
    cloud.client("ssm").put_parameter(Name="/ami-builder/dask/x86_64/stable", Value=named, Type="String")
    amis = cloud.backend().amis
    for ami in (old, foreign, named):
        amis[ami].creation_date = datetime.now(UTC) - timedelta(days=1)
    result = run(tmp_path, spend=0.01)
    assert isinstance(result.error, UsageError)
    owned = cloud.client().describe_images(Owners=["self"])["Images"]
    assert {one["ImageId"] for one in owned} == {young, foreign, named}
    kept = cloud.client("ssm").get_parameters_by_path(Path="/ami-builder/dask/x86_64/")["Parameters"]
    assert [one["Value"] for one in kept] == [named], "the tag's value names nobody else's channels"
