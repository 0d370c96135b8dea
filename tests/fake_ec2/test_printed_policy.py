"""The printed policies against the Service Authorization Reference: all of them can grant what they say."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ami_builder import aws as aws_package
from ami_builder.aws import tags
from ami_builder.aws.policy import Section, document
from ami_builder.cli import app as cli
from ami_builder.config.schema import AwsSettings
from ami_builder.config.types import Destination, Tag
from ami_builder.core.options import Connect
from tests.fake_ec2 import authorization
from tests.fake_ec2.policy import Policy, like
from tests.fake_ec2.requests import refused

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.fake_ec2.server import Cloud

EVERYTHING = replace(
    AwsSettings(),
    region="us-east-1",
    source="ssm:/aws/service/debian/release/13/latest/amd64",
    instance_profile="ours",
    connect=Connect.SESSION_MANAGER,
    encrypt=True,
    kms_key="alias/ours",
    spot=True,
    tags=(Tag(key="Owner", value="us"),),
    copy_to=(Destination(region="eu-west-1", kms_key="alias/theirs"), Destination(region="us-west-2")),
)


def mistakes(statement: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a statement says in vain: actions, resources and condition keys that can never apply."""
    keys = [key for operator in statement.get("Condition", {}).values() for key in operator]
    for pattern in statement["Action"]:
        if not (actions := authorization.actions(pattern)):
            yield f"{pattern} does not exist"
        for action in actions:
            kinds = authorization.kinds(action).values()
            takes = {kind.name for kind in kinds if kind.name}
            named = [k for k in kinds if k.name and any(k.has(arn) for arn in statement["Resource"])]
            if takes and not named and statement["Resource"] != ["*"]:
                yield f"{action} takes none of {statement['Resource']}"
            if not takes and statement["Resource"] != ["*"]:
                yield f"{action} takes no resource at all"
            for key in keys:
                if not any(authorization.can_hold(key, kind) for kind in named or kinds):
                    yield f"{action} never has {key}"
    for arn in statement["Resource"]:
        every = [action for pattern in statement["Action"] for action in authorization.actions(pattern)]
        if arn != "*" and not any(
            kind.name and kind.has(arn) for action in every for kind in authorization.kinds(action).values()
        ):
            yield f"no action takes {arn}"


@pytest.mark.parametrize("aws", [AwsSettings(), EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("section", list(Section))
def test_every_statement_can_hold(section: Section, aws: AwsSettings) -> None:
    policy = document(section, aws)
    found = {s["Sid"]: list(mistakes(s)) for s in policy["Statement"]}
    assert {sid: wrong for sid, wrong in found.items() if wrong} == {}
    Policy.of(policy)


@pytest.mark.parametrize(
    ("statement", "wrong"),
    [
        ({"Action": ["ec2:DescribeImage"], "Resource": ["*"]}, "does not exist"),
        ({"Action": ["ec2:DeregisterImage"], "Resource": ["arn:aws:ec2:*:*:instance/*"]}, "takes none of"),
        ({"Action": ["ec2:DescribeImages"], "Resource": ["arn:aws:ec2:*::image/*"]}, "takes no resource"),
        (
            {
                "Action": ["ec2:CopyImage"],
                "Resource": ["arn:aws:ec2:*::image/*"],
                "Condition": {"Null": {"aws:ResourceTag/x": "false"}},
            },
            "never has aws:ResourceTag/x",
        ),
        (
            {
                "Action": ["ec2:CreateFleet"],
                "Resource": ["arn:aws:ec2:*:*:fleet/*", "arn:aws:ec2:*:*:network-interface/*"],
            },
            "no action takes arn:aws:ec2:*:*:network-interface/*",
        ),
    ],
)
def test_a_statement_that_says_something_in_vain_is_found(statement: dict[str, Any], wrong: str) -> None:
    assert wrong in "; ".join(mistakes(statement))


@pytest.mark.parametrize(
    ("region", "partition"),
    [
        ("eu-west-1", "aws"),
        ("cn-north-1", "aws-cn"),
        ("us-gov-west-1", "aws-us-gov"),
        ("eusc-de-east-1", "aws-eusc"),
        ("us-iso-east-1", "aws-iso"),
        ("us-isob-east-1", "aws-iso-b"),
    ],
)
def test_a_region_has_its_partition(region: str, partition: str) -> None:
    policy = document(Section.ALL, replace(EVERYTHING, region=region, copy_to=()))
    arns = [arn for one in policy["Statement"] for arn in one["Resource"] if arn != "*"]
    assert {arn.split(":")[1] for arn in arns} == {partition}


def test_a_region_of_the_environment_counts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AMI_BUILDER_CONFIG", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)

    def make(*flags: str) -> dict[str, Any]:
        assert cli.run([*flags, "iam-policy"]) == 0
        statements = json.loads(capsys.readouterr().out)["Statement"]
        return dict(next(one for one in statements if one["Sid"] == "Make"))

    assert "aws:RequestedRegion" not in str(make()["Condition"])
    monkeypatch.setenv("AWS_DEFAULT_REGION", "cn-north-1")
    assert make()["Resource"][0] == "arn:aws-cn:ec2:*:*:instance/*"
    monkeypatch.setenv("AWS_REGION", "us-gov-west-1")
    assert make()["Resource"][0] == "arn:aws-us-gov:ec2:*:*:instance/*"
    assert make()["Condition"]["StringEquals"]["aws:RequestedRegion"] == ["us-gov-west-1"]
    in_settings = make("--set", "aws.region=eu-west-1")
    assert in_settings["Resource"][0] == "arn:aws:ec2:*:*:instance/*"
    assert in_settings["Condition"]["StringEquals"]["aws:RequestedRegion"] == ["eu-west-1"]


def test_a_copy_needs_the_key_of_its_source() -> None:
    aws = replace(AwsSettings(), region="us-east-1", encrypt=True, kms_key="alias/ours")
    policy = document(Section.COPY, replace(aws, copy_to=(Destination(region="eu-west-1"),)))
    keys = next(one for one in policy["Statement"] if one["Sid"] == "UseKey")
    assert keys["Resource"] == ["arn:aws:kms:us-east-1:*:key/*"]
    assert "kms:Decrypt" in keys["Action"]


def test_the_users_own_tags_may_be_set() -> None:
    tagging = next(
        one for one in document(Section.BUILD, EVERYTHING)["Statement"] if one["Sid"] == "TagWhatIsMade"
    )
    assert "Owner" in tagging["Condition"]["ForAllValues:StringLike"]["aws:TagKeys"]


@pytest.mark.parametrize("region", ["us-gov-west-1", "cn-north-1"])
def test_a_launch_with_a_role_is_allowed_in_other_partitions(cloud: Cloud, region: str) -> None:
    iam = cloud.client("iam", region=region)
    iam.create_role(RoleName="r", Path="/team/", AssumeRolePolicyDocument='{"Statement": []}')
    iam.create_instance_profile(InstanceProfileName="ours")
    iam.add_role_to_instance_profile(InstanceProfileName="ours", RoleName="r")
    key = "AKIALIMITEDLIMITED00"
    limited = cloud.client(access_key=key, region=region)
    tagged = tags.specifications({tags.RUN: "r1", tags.PURPOSE: "verify"}, "security-group")
    placed = tags.specifications({tags.RUN: "r1", tags.PURPOSE: "verify"}, "instance", "volume")

    def launched() -> None:
        group = limited.create_security_group(GroupName="g", Description="d", TagSpecifications=tagged)
        limited.run_instances(
            ImageId=cloud.base_ami(region),
            InstanceType="m6i.large",
            MinCount=1,
            MaxCount=1,
            SecurityGroupIds=[group["GroupId"]],
            IamInstanceProfile={"Name": "ours"},
            TagSpecifications=placed,
        )

    aws = replace(AwsSettings(), instance_profile="ours")
    cloud.enforce(document(Section.VERIFY, replace(aws, region="eu-west-1")), key)
    with refused("UnauthorizedOperation"):
        launched()
    held = cloud.enforce(document(Section.VERIFY, replace(aws, region=region)), key)
    launched()
    assert {"iam:PassRole", "ec2:RunInstances", "ec2:CreateTags"} <= held.used


_CALLS = (
    (re.compile(r"\.ec2(?:_once)?\.([a-z]\w+)\("), lambda found: ("ec2", found[1])),
    (re.compile(r'client\("([\w-]+)"[^)]*\)\.([a-z]\w+)\('), lambda found: (found[1], found[2])),
    (re.compile(r'\.(?:listed|matching)\(\s*"(describe_\w+)"'), lambda found: ("ec2", found[1])),
)


def test_every_call_in_the_code_is_in_the_policy() -> None:
    policy = Policy.of(document(Section.ALL, EVERYTHING))
    called = {
        make(found)
        for path in sorted(Path(aws_package.__file__).parent.glob("*.py"))
        for pattern, make in _CALLS
        for found in pattern.finditer(path.read_text())
    }
    actions = {
        f"{service}:{pascal}"
        for service, name in called
        if (pascal := "".join(word.capitalize() for word in name.split("_"))) != "GetCallerIdentity"
        and not any(name.startswith(no) for no in ("get_paginator", "get_waiter", "meta"))
    }
    assert len(actions) > 30
    assert sorted(a for a in actions if not any(like(a, each) for each in policy.actions)) == []
