"""Least privilege on the loopback EC2: what a policy allows, what it refuses, and what was never used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError

from tests.fake_ec2.requests import RUN, launch, refused, tagged

if TYPE_CHECKING:
    from tests.fake_ec2.server import Cloud

KEY = "AKIALIMITEDLIMITED00"
OURS = {"StringLike": {"aws:RequestTag/ami-builder:run": "*"}}
HAS = {"StringLike": {"aws:ResourceTag/ami-builder:run": "*"}}
POLICY: dict[str, Any] = {
    "Version": "2012-10-17",
    "Statement": [
        {"Effect": "Allow", "Action": ["ec2:Describe*", "sts:GetCallerIdentity"], "Resource": "*"},
        {
            "Effect": "Allow",
            "Action": "ec2:RunInstances",
            "Resource": [f"arn:aws:ec2:*:*:{kind}/*" for kind in ("instance", "volume")],
            "Condition": OURS,
        },
        {
            "Effect": "Allow",
            "Action": "ec2:RunInstances",
            "Resource": [
                "arn:aws:ec2:*::image/*",
                *(f"arn:aws:ec2:*:*:{kind}/*" for kind in ("network-interface", "subnet", "security-group")),
            ],
        },
        {
            "Effect": "Allow",
            "Action": "ec2:CreateTags",
            "Resource": "arn:aws:ec2:*:*:*/*",
            "Condition": {
                "StringEquals": {"ec2:CreateAction": ["RunInstances", "CreateImage"]},
                "ForAllValues:StringEquals": {"aws:TagKeys": ["ami-builder:run"]},
            },
        },
        {
            "Effect": "Allow",
            "Action": ["ec2:TerminateInstances", "ec2:CreateImage"],
            "Resource": "arn:aws:ec2:*:*:instance/*",
            "Condition": HAS,
        },
        {
            "Effect": "Allow",
            "Action": "ec2:CreateImage",
            "Resource": ["arn:aws:ec2:*::image/*", "arn:aws:ec2:*::snapshot/*"],
            "Condition": OURS,
        },
        {
            "Effect": "Allow",
            "Action": ["ssm:GetParameter"],
            "Resource": "arn:aws:ssm:*::parameter/aws/service/debian/*",
        },
        {
            "Effect": "Deny",
            "Action": "ec2:*",
            "Resource": "*",
            "Condition": {"StringNotEquals": {"aws:RequestedRegion": "us-east-1"}},
        },
    ],
}


def test_what_the_policy_allows_and_refuses(cloud: Cloud) -> None:
    enforced = cloud.enforce(POLICY, KEY)
    limited, free = cloud.client(access_key=KEY), cloud.client()
    both = tagged("instance", "volume")
    ours = launch(cloud, limited, TagSpecifications=both)
    for wrong in (
        [],
        tagged("instance"),
        tagged("instance", "volume", tags={"other": "r1"}),
        tagged("instance", "volume", tags=RUN | {"other": "r1"}),
    ):
        with refused("UnauthorizedOperation", 403):
            launch(cloud, limited, TagSpecifications=wrong)
    theirs = launch(cloud, free)
    for instance in (theirs, ours):
        with refused("UnauthorizedOperation", 403):
            limited.stop_instances(InstanceIds=[instance])
    with refused("UnauthorizedOperation", 403):
        limited.terminate_instances(InstanceIds=[theirs])
    with refused("UnauthorizedOperation", 403):
        limited.terminate_instances(InstanceIds=[ours, theirs])
    with refused("UnauthorizedOperation", 403):
        limited.create_tags(Resources=[ours], Tags=[{"Key": "ami-builder:run", "Value": "r2"}])
    # Nobody knows of this id, so it has no tag either.
    with refused("UnauthorizedOperation", 403):
        limited.terminate_instances(InstanceIds=["i-0123456789abcdef0"])
    with refused("InvalidInstanceID.NotFound"):
        free.terminate_instances(InstanceIds=["i-0123456789abcdef0"])
    with refused("UnauthorizedOperation", 403):
        cloud.client(access_key=KEY, region="eu-west-1").describe_images()
    limited.create_image(InstanceId=ours, Name="image", TagSpecifications=tagged("image", "snapshot"))
    limited.terminate_instances(InstanceIds=[ours])
    assert ("ec2:StopInstances", f"arn:aws:ec2:us-east-1:123456789012:instance/{ours}") in enforced.refused
    assert [c.action for c in cloud.calls if not c.authorised].count("RunInstances") == 4


def test_what_was_never_used_is_known(cloud: Cloud) -> None:
    enforced = cloud.enforce(POLICY, KEY)
    limited = cloud.client(access_key=KEY)
    assert enforced.unused == {
        "ec2:Describe*", "sts:GetCallerIdentity", "ssm:GetParameter",
        "ec2:RunInstances", "ec2:CreateTags", "ec2:TerminateInstances", "ec2:CreateImage",
    }  # fmt: skip
    limited.describe_images()
    with refused("DryRunOperation"):
        launch(cloud, limited, TagSpecifications=tagged("instance", "volume"), DryRun=True)
    with refused("UnauthorizedOperation"):
        launch(cloud, limited, DryRun=True)
    cloud.client("ssm", access_key=KEY).get_parameter(Name="/aws/service/debian/release/13/latest/amd64")
    with refused("AccessDeniedException"):
        cloud.client("ssm", access_key=KEY).get_parameter(Name="/mine")
    assert enforced.unused == {
        "sts:GetCallerIdentity",
        "ec2:RunInstances", "ec2:CreateTags", "ec2:TerminateInstances", "ec2:CreateImage",
    }  # fmt: skip


def test_a_role_must_be_passed(cloud: Cloud) -> None:
    iam = cloud.client("iam")
    iam.create_instance_profile(InstanceProfileName="builder")
    statement = [{"Effect": "Allow", "Action": "ec2:*", "Resource": "*"}]
    cloud.enforce({"Statement": statement}, KEY)
    limited = cloud.client(access_key=KEY)
    with pytest.raises(ClientError, match="iam:PassRole"):
        launch(cloud, limited, IamInstanceProfile={"Name": "builder"})
    passing = {
        "Effect": "Allow",
        "Action": "iam:PassRole",
        "Resource": "arn:aws:iam::*:role/builder",
        "Condition": {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}},
    }
    cloud.enforce({"Statement": [*statement, passing]}, KEY)
    launch(cloud, limited, IamInstanceProfile={"Name": "builder"})


@pytest.mark.parametrize(
    "statement",
    [
        {"Condition": {"DateLessThan": {"aws:CurrentTime": "2030-01-01T00:00:00Z"}}},
        {"Condition": {"StringEquals": {"aws:SourceVpc": "vpc-1"}}},
        {"Condition": {"StringEquals": {"aws:RequestTag/owner": "${aws:username}"}}},
        {"NotAction": "ec2:*"},
        {"Principal": "*"},
        {"Effect": "Maybe"},
    ],
)
def test_what_is_not_understood_is_refused(cloud: Cloud, statement: dict[str, Any]) -> None:
    whole = {"Effect": "Allow", "Action": "ec2:*", "Resource": "*"} | statement
    with pytest.raises(ValueError, match=r"understood|effect"):
        cloud.enforce({"Statement": [whole]}, KEY)
    enforced = cloud.enforce({"Statement": {"Effect": "Allow", "Action": "ec2:*", "Resource": "*"}}, KEY)
    with refused("NotImitated"):
        cloud.client(access_key=KEY).create_vpc(CidrBlock="10.0.0.0/16")
    assert enforced.used == set()


@pytest.mark.parametrize(
    ("condition", "allowed"),
    [
        ({"Null": {"aws:RequestTag/ami-builder:run": "false"}}, True),
        ({"Null": {"aws:RequestTag/ami-builder:run": "true"}}, False),
        ({"StringEqualsIfExists": {"aws:RequestTag/other": "x"}}, True),
        ({"StringEquals": {"aws:RequestTag/other": "x"}}, False),
        ({"StringNotLike": {"aws:RequestTag/ami-builder:run": ["r*"]}}, False),
        ({"ForAnyValue:StringLike": {"aws:TagKeys": ["*:run"]}}, True),
        ({"ForAllValues:StringLike": {"aws:TagKeys": ["ami:*"]}}, False),
        ({"Bool": {"ec2:Public": "true"}}, False),
    ],
)
def test_conditions(cloud: Cloud, condition: dict[str, Any], allowed: bool) -> None:
    statement = {"Effect": "Allow", "Action": "ec2:Create*", "Resource": "arn:aws:ec2:*:*:security-group/*"}
    rest = {"Effect": "Allow", "Action": "ec2:Create*", "Resource": ["arn:aws:ec2:*:*:vpc/*"]}
    tags = {"Effect": "Allow", "Action": "ec2:CreateTags", "Resource": "*"}
    cloud.enforce({"Statement": [statement | {"Condition": condition}, rest, tags]}, KEY)
    settings = {"GroupName": "group", "Description": "test", "TagSpecifications": tagged("security-group")}
    limited = cloud.client(access_key=KEY)
    if allowed:
        limited.create_security_group(**settings)
    else:
        with refused("UnauthorizedOperation"):
            limited.create_security_group(**settings)
