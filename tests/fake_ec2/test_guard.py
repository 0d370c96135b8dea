"""Whose policies decide, what the simulator says of them, and what EC2 does in the name of its callers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import pytest
import urllib3
from botocore.exceptions import ClientError

from tests.fake_ec2 import arns, authorization
from tests.fake_ec2.requests import RUN, launch, refused, tagged
from tests.fake_ec2.server import ACCESS_KEY, REGION
from tests.fake_ec2.touched_resources import EC2

if TYPE_CHECKING:
    from tests.fake_ec2.server import Cloud

KEY = "AKIALIMITEDLIMITED00"
EVERYTHING: dict[str, Any] = {"Statement": {"Effect": "Allow", "Action": "*", "Resource": "*"}}
OWNED: dict[str, Any] = {
    "Statement": {
        "Effect": "Deny",
        "Action": "ec2:RunInstances",
        "Resource": "arn:aws:ec2:*:*:instance/*",
        "Condition": {"Null": {"aws:RequestTag/Owner": "true"}},
    }
}


def message(error: pytest.ExceptionInfo[ClientError]) -> str:
    return str(error.value.response["Error"]["Message"])


def test_a_control_policy_demands_a_tag(cloud: Cloud) -> None:
    cloud.enforce(EVERYTHING, KEY, controls=[OWNED])
    limited = cloud.client(access_key=KEY)
    with pytest.raises(ClientError, match="UnauthorizedOperation") as caught:
        launch(cloud, limited, TagSpecifications=tagged("instance"))
    assert message(caught).endswith("with an explicit deny in a service control policy")
    launch(cloud, limited, TagSpecifications=tagged("instance", tags=RUN | {"Owner": "us"}))


@pytest.mark.parametrize(
    ("policies", "ending"),
    [
        ({"boundary": "Allow"}, "because no permissions boundary allows the ec2:CreateSecurityGroup action"),
        ({"boundary": "Deny"}, "with an explicit deny in a permissions boundary"),
        ({"control": "Allow"}, "because no service control policy allows the ec2:CreateSecurityGroup action"),
        ({"control": "Deny"}, "with an explicit deny in a service control policy"),
        ({"identity": "Deny"}, "with an explicit deny in an identity-based policy"),
        ({"identity": "Allow"}, "because no identity-based policy allows the ec2:CreateSecurityGroup action"),
    ],
)
def test_the_message_says_which_policy_denied(cloud: Cloud, policies: dict[str, str], ending: str) -> None:
    def document(effect: str) -> dict[str, Any]:
        # One that allows allows something else only.
        action = "ec2:Describe*" if effect == "Allow" else "ec2:CreateSecurityGroup"
        denial = {"Effect": effect, "Action": action, "Resource": "*"}
        return {"Statement": [denial, *([EVERYTHING["Statement"]] if effect == "Deny" else [])]}

    cloud.enforce(
        document(policies["identity"]) if "identity" in policies else EVERYTHING,
        KEY,
        boundary=document(policies["boundary"]) if "boundary" in policies else None,
        controls=[document(policies["control"])] if "control" in policies else (),
    )
    limited = cloud.client(access_key=KEY)
    limited.describe_images()
    with pytest.raises(ClientError, match="UnauthorizedOperation") as caught:
        limited.create_security_group(GroupName="g", Description="d")
    assert message(caught).endswith(ending)
    assert f"User: arn:aws:iam::123456789012:user/{KEY} is not authorized" in message(caught)


@pytest.mark.parametrize("region", ["us-gov-west-1", "cn-north-1", "eusc-de-east-1", "us-iso-east-1"])
def test_arns_are_of_the_regions_partition(cloud: Cloud, region: str) -> None:
    partition = arns.partition(region)
    assert partition != "aws"

    def allow(of: str) -> None:
        arn = f"arn:{of}:ssm:*:*:parameter/*"
        cloud.enforce({"Statement": {"Effect": "Allow", "Action": "ssm:*", "Resource": arn}}, KEY)

    limited = cloud.client("ssm", access_key=KEY, region=region)
    allow("aws")
    with refused("AccessDeniedException"):
        limited.get_parameter(Name="/a")
    allow(partition)
    with refused("ParameterNotFound"):
        limited.get_parameter(Name="/a")
    assert (
        cloud.client("sts", access_key=KEY, region=region)
        .get_caller_identity()["Arn"]
        .startswith(f"arn:{partition}:iam::")
    )


def test_a_tag_of_the_source_is_no_condition_of_a_copy(cloud: Cloud) -> None:
    free = cloud.client()
    source = free.create_image(
        InstanceId=launch(cloud, free), Name="image", TagSpecifications=tagged("image", "snapshot")
    )["ImageId"]
    free.create_tags(Resources=[source], Tags=[{"Key": "ami-builder:run", "Value": "r1"}])
    other = "eu-west-1"

    def copy() -> object:
        return cloud.client(access_key=KEY, region=other).copy_image(
            Name="copy",
            SourceImageId=source,
            SourceRegion=REGION,
            TagSpecifications=tagged("image", "snapshot"),
        )

    made = {
        "Effect": "Allow",
        "Action": ["ec2:CopyImage", "ec2:CreateTags"],
        "Resource": ["arn:aws:ec2:*::image/*", "arn:aws:ec2:*::snapshot/*"],
        "Condition": {"Null": {"aws:RequestTag/ami-builder:run": "false"}},
    }
    tags = {"Null": {"aws:ResourceTag/ami-builder:run": "false"}}
    source_of = {"Effect": "Allow", "Action": "ec2:CopyImage", "Resource": "arn:aws:ec2:*::image/ami-*"}
    cloud.enforce({"Statement": [made, source_of | {"Condition": tags}]}, KEY)
    with refused("UnauthorizedOperation"):
        copy()
    cloud.enforce({"Statement": [made, source_of]}, KEY)
    copy()


def test_the_table_of_what_is_touched_agrees_with_the_reference() -> None:
    kinds_of = {
        "ImageId": "image", "SubnetId": "subnet", "SecurityGroupIds": "security-group",
        "GroupId": "security-group", "KeyName": "key-pair", "KeyPairId": "key-pair", "InstanceId": "instance",
        "InstanceIds": "instance", "VolumeId": "volume", "SnapshotId": "snapshot", "VpcId": "vpc",
        "LaunchTemplateId": "launch-template", "LaunchTemplateName": "launch-template",
    }  # fmt: skip
    implied = {"CreateFleet": {"image", "subnet", "launch-template"}}
    for action, (makes, names) in EC2.items():
        kinds = authorization.kinds(f"ec2:{action}")
        mine = {
            *makes,
            *(kinds_of[name] for name in names if name != "Resources"),
            *implied.get(action, set()),
        }
        assert mine <= kinds.keys(), action
        required = {name for name, kind in kinds.items() if kind.required}
        assert required <= mine, action


def simulated(cloud: Cloud, source: str, *actions: str, **more: Any) -> dict[str, Any]:
    answer = cloud.client("iam", access_key=KEY).simulate_principal_policy(
        PolicySourceArn=source, ActionNames=list(actions), **more
    )
    return {one["EvalActionName"]: one for one in answer["EvaluationResults"]}


def context(**tags: str) -> list[dict[str, Any]]:
    return [
        {"ContextKeyName": f"aws:ResourceTag/{key}", "ContextKeyType": "string", "ContextKeyValues": [value]}
        for key, value in tags.items()
    ]


def test_policies_are_simulated(cloud: Cloud) -> None:
    instances = "arn:aws:ec2:*:*:instance/*"
    statements = [
        {"Effect": "Allow", "Action": ["iam:SimulatePrincipalPolicy", "ec2:Describe*"], "Resource": "*"},
        {
            "Effect": "Allow",
            "Action": "ec2:TerminateInstances",
            "Resource": instances,
            "Condition": {"StringEquals": {"aws:ResourceTag/team": "ours"}},
        },
        {"Effect": "Deny", "Action": "ec2:StopInstances", "Resource": "*"},
    ]
    cloud.enforce({"Statement": statements}, KEY, controls=[OWNED])
    user = f"arn:aws:iam::123456789012:user/{KEY}"
    found = simulated(cloud, user, "ec2:DescribeImages", "ec2:StopInstances", "ec2:CreateVolume")
    assert {name: one["EvalDecision"] for name, one in found.items()} == {
        "ec2:DescribeImages": "allowed",
        "ec2:StopInstances": "explicitDeny",
        "ec2:CreateVolume": "implicitDeny",
    }
    one, two = (f"arn:aws:ec2:us-east-1:123456789012:instance/i-{n}" for n in "12")
    bare = simulated(cloud, user, "ec2:TerminateInstances", ResourceArns=[one, two])["ec2:TerminateInstances"]
    assert bare["EvalDecision"] == "implicitDeny"
    assert bare["MissingContextValues"] == ["aws:ResourceTag/team"]
    result = simulated(
        cloud, user, "ec2:TerminateInstances", ResourceArns=[one, two], ContextEntries=context(team="ours")
    )["ec2:TerminateInstances"]
    assert result["EvalDecision"] == "allowed"
    assert [each["EvalResourceDecision"] for each in result["ResourceSpecificResults"]] == ["allowed"] * 2
    assert result["OrganizationsDecisionDetail"] == {"AllowedByOrganizations": True}
    denied = simulated(cloud, user, "ec2:RunInstances", ResourceArns=[one])["ec2:RunInstances"]
    assert denied["EvalDecision"] == "explicitDeny"
    assert denied["OrganizationsDecisionDetail"] == {"AllowedByOrganizations": False}


def test_an_assumed_role_is_simulated_as_its_role(cloud: Cloud) -> None:
    cloud.enforce(EVERYTHING, KEY, boundary=EVERYTHING)
    session = "arn:aws:sts::123456789012:assumed-role/builder/session"
    cloud.identify(KEY, session, path="aws-reserved/")
    assert cloud.client("sts", access_key=KEY).get_caller_identity()["Arn"] == session
    role = "arn:aws:iam::123456789012:role/aws-reserved/builder"
    found = simulated(cloud, role, "ec2:RunInstances")["ec2:RunInstances"]
    assert found["EvalDecision"] == "allowed"
    assert found["PermissionsBoundaryDecisionDetail"] == {"AllowedByPermissionsBoundary": True}
    with refused("NoSuchEntity", 404):
        simulated(cloud, "arn:aws:iam::123456789012:role/builder", "ec2:RunInstances")
    with refused("InvalidInput"):
        simulated(cloud, session, "ec2:RunInstances")
    cloud.enforce({"Statement": {"Effect": "Allow", "Action": "ec2:*", "Resource": "*"}}, KEY)
    with refused("AccessDenied", 403):
        simulated(cloud, role, "ec2:RunInstances")


def spot_fleet(cloud: Cloud, key: str, **template: Any) -> dict[str, Any]:
    data = {"ImageId": cloud.base_ami(), "InstanceType": "t3.small"} | template
    made = cloud.client().create_launch_template(LaunchTemplateName="t", LaunchTemplateData=data)
    specification = {"LaunchTemplateId": made["LaunchTemplate"]["LaunchTemplateId"], "Version": "1"}
    answer = cloud.client(access_key=key).create_fleet(
        Type="instant",
        LaunchTemplateConfigs=[{"LaunchTemplateSpecification": specification}],
        TargetCapacitySpecification={"TotalTargetCapacity": 1, "DefaultTargetCapacityType": "spot"},
    )
    return dict(answer)


def test_a_first_spot_request_makes_its_role(cloud: Cloud) -> None:
    cloud.options.spot_role = False
    everything_else = {"Effect": "Deny", "Action": "iam:CreateServiceLinkedRole", "Resource": "*"}
    cloud.enforce({"Statement": [EVERYTHING["Statement"], everything_else]}, KEY)
    (error,) = spot_fleet(cloud, KEY)["Errors"]
    assert error["ErrorCode"] == "AuthFailure.ServiceLinkedRoleCreationNotPermitted"
    with refused("AuthFailure.ServiceLinkedRoleCreationNotPermitted", 403):
        launch(cloud, cloud.client(access_key=KEY), InstanceMarketOptions={"MarketType": "spot"})
    launch(cloud, cloud.client(), InstanceMarketOptions={"MarketType": "spot"})
    assert cloud.options.spot_role
    launch(cloud, cloud.client(access_key=KEY), InstanceMarketOptions={"MarketType": "spot"})


def test_what_a_fleet_may_not_launch_is_an_error_in_its_answer(cloud: Cloud) -> None:
    cloud.enforce(EVERYTHING, KEY, controls=[OWNED])
    answer = spot_fleet(cloud, KEY)
    assert answer["Instances"] == []
    (error,) = answer["Errors"]
    assert error["ErrorCode"] == "UnauthorizedOperation"
    assert "ec2:RunInstances" in error["ErrorMessage"]
    assert "service control policy" in error["ErrorMessage"]


def test_the_tags_of_a_fleets_template_need_create_tags(cloud: Cloud) -> None:
    statements = [
        EVERYTHING["Statement"],
        {"Effect": "Deny", "Action": "ec2:CreateTags", "Resource": "arn:aws:ec2:*:*:instance/*"},
    ]
    cloud.enforce({"Statement": statements}, KEY)
    (error,) = spot_fleet(cloud, KEY, TagSpecifications=tagged("instance"))["Errors"]
    assert "ec2:CreateTags" in error["ErrorMessage"]


@pytest.mark.parametrize(
    ("call", "parameters", "code"),
    [
        ("DescribeImages", {"Colour": "red"}, "UnknownParameter"),
        ("DescribeInstanceTypes", {"MaxResults": "1000"}, "InvalidParameterValue"),
        ("DescribeImages", {"Owner.1": "self", "Owner.1.Name": "x"}, "UnknownParameter"),
        ("RunInstances", {"ImageId": "ami-1", "MinCount": "1"}, "MissingParameter"),
        (
            "ModifyInstanceMetadataOptions",
            {"InstanceId": "i-1", "HttpTokens": "always"},
            "InvalidParameterValue",
        ),
        ("DescribeImage", {}, "InvalidAction"),
    ],
)
def test_parameters_are_held_to_the_model(
    cloud: Cloud, call: str, parameters: dict[str, str], code: str
) -> None:
    signed = f"AWS4-HMAC-SHA256 Credential={ACCESS_KEY}/20260101/{REGION}/ec2/aws4_request, Signature=x"
    form = {"Action": call, "Version": "2016-11-15", **parameters}
    headers = {"Authorization": signed, "Content-Type": "application/x-www-form-urlencoded"}
    answer = urllib3.request("POST", cloud.url, body=urlencode(form), headers=headers)
    assert f"<Code>{code}</Code>" in answer.data.decode()
    assert answer.status == 400
