"""Auto Scaling groups of launch templates: capacity, health, hooks, and what instances are told."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from ami_builder.aws.policy import of_instances
from ami_builder.config.schema import AwsSettings
from tests.fake_ec2.cloud_state import role_key
from tests.fake_ec2.requests import refused
from tests.fake_ec2.server import Cloud

GROUP = "workers"
PARAMETER = "/ours/current"
STATE = "autoscaling/target-lifecycle-state"


@pytest.fixture
def template(cloud: Cloud) -> str:
    """A template that names its AMI by a parameter."""
    return make_template(cloud)


def make_template(cloud: Cloud) -> str:
    promote(cloud, cloud.base_ami())
    cloud.client("iam").create_role(RoleName="worker", AssumeRolePolicyDocument='{"Statement": []}')
    cloud.client("iam").create_instance_profile(InstanceProfileName="worker")
    cloud.client("iam").add_role_to_instance_profile(InstanceProfileName="worker", RoleName="worker")
    made = cloud.client().create_launch_template(
        LaunchTemplateName="workers",
        LaunchTemplateData={
            "ImageId": f"resolve:ssm:{PARAMETER}",
            "InstanceType": "m6i.large",
            "UserData": base64.b64encode(b"#cloud-config\n").decode(),
            "IamInstanceProfile": {"Name": "worker"},
            "MetadataOptions": {"HttpTokens": "required", "InstanceMetadataTags": "enabled"},
            "TagSpecifications": [
                {"ResourceType": "instance", "Tags": [{"Key": "Owner", "Value": "us"}]},
                {"ResourceType": "volume", "Tags": [{"Key": "Owner", "Value": "us"}]},
            ],
        },
    )
    return str(made["LaunchTemplate"]["LaunchTemplateId"])


def promote(cloud: Cloud, ami: str) -> None:
    cloud.client("ssm").put_parameter(
        Name=PARAMETER, Value=ami, Type="String", DataType="aws:ec2:image", Overwrite=True
    )


def create(cloud: Cloud, template: str, count: int = 2, **more: Any) -> Any:
    scaling = cloud.client("autoscaling")
    subnets = [one["SubnetId"] for one in cloud.client().describe_subnets()["Subnets"][:2]]
    scaling.create_auto_scaling_group(
        AutoScalingGroupName=GROUP,
        LaunchTemplate={"LaunchTemplateId": template},
        MinSize=0,
        MaxSize=3,
        DesiredCapacity=count,
        VPCZoneIdentifier=",".join(subnets),
        Tags=[{"Key": "Team", "Value": "data", "PropagateAtLaunch": True}],
        **more,
    )
    return scaling


def members(scaling: Any) -> dict[str, str]:
    """Return instance id -> its lifecycle state, in the order of their launch."""
    (group,) = scaling.describe_auto_scaling_groups(AutoScalingGroupNames=[GROUP])["AutoScalingGroups"]
    return {one["InstanceId"]: one["LifecycleState"] for one in group["Instances"]}


def state(cloud: Cloud, instance: str) -> str:
    found = cloud.client().describe_instances(InstanceIds=[instance])["Reservations"][0]["Instances"][0]
    return str(found["State"]["Name"])


def test_a_group_launches_what_its_template_says(cloud: Cloud, template: str) -> None:
    scaling = create(cloud, template)
    found = members(scaling)
    assert list(found.values()) == ["InService"] * 2
    reservations = cloud.client().describe_instances(InstanceIds=list(found))["Reservations"]
    instances = [one for each in reservations for one in each["Instances"]]
    assert {one["ImageId"] for one in instances} == {cloud.base_ami()}
    assert len({one["SubnetId"] for one in instances}) == 2
    tags = {tag["Key"]: tag["Value"] for tag in instances[0]["Tags"]}
    assert tags == {
        "Owner": "us",
        "Team": "data",
        "aws:autoscaling:groupName": GROUP,
        "aws:ec2launchtemplate:id": template,
        "aws:ec2launchtemplate:version": "1",
    }
    told = cloud.metadata(instances[0]["InstanceId"])
    assert told["tags/instance/aws:autoscaling:groupName"] == GROUP
    assert told[STATE] == "InService"
    assert json.loads(told["iam/security-credentials/worker"])["AccessKeyId"] == role_key("worker")


def test_the_next_launch_takes_what_is_current_then(cloud: Cloud, template: str) -> None:
    scaling = create(cloud, template, 1)
    (first,) = members(scaling)
    other = cloud.client().create_image(InstanceId=first, Name="other")["ImageId"]
    promote(cloud, other)
    scaling.set_desired_capacity(AutoScalingGroupName=GROUP, DesiredCapacity=2)
    second = list(members(scaling))[1]
    found = cloud.client().describe_instances(InstanceIds=[second])["Reservations"][0]["Instances"][0]
    assert found["ImageId"] == other
    with refused("ValidationError"):
        scaling.set_desired_capacity(AutoScalingGroupName=GROUP, DesiredCapacity=4)


def test_a_propagated_tag_that_metadata_can_not_have_ends_every_launch(cloud: Cloud, template: str) -> None:
    scaling = create(cloud, template, 0)
    for key in ("Cost Center", "team/name", "_index"):
        tag = {"ResourceId": GROUP, "ResourceType": "auto-scaling-group", "Key": key}
        scaling.create_or_update_tags(Tags=[tag | {"Value": "1", "PropagateAtLaunch": True}])
        scaling.set_desired_capacity(AutoScalingGroupName=GROUP, DesiredCapacity=1)
        assert members(scaling) == {}
        scaling.set_desired_capacity(AutoScalingGroupName=GROUP, DesiredCapacity=0)
        scaling.create_or_update_tags(Tags=[tag | {"Value": "1", "PropagateAtLaunch": False}])
    scaling.set_desired_capacity(AutoScalingGroupName=GROUP, DesiredCapacity=1)
    assert len(members(scaling)) == 1


def test_a_former_cloud_of_the_process_does_not_keep_the_groups(cloud: Cloud) -> None:
    with Cloud() as former:
        former.client("autoscaling").describe_auto_scaling_groups()
    cloud.reset()
    assert list(members(create(cloud, make_template(cloud))).values()) == ["InService"] * 2


def test_an_unhealthy_instance_is_replaced_once_its_grace_is_over(cloud: Cloud, template: str) -> None:
    scaling = create(cloud, template, 1, HealthCheckGracePeriod=60)
    (first,) = members(scaling)
    scaling.set_instance_health(InstanceId=first, HealthStatus="Unhealthy")
    assert list(members(scaling)) == [first]
    cloud.options.seconds_ahead = 61
    scaling.set_instance_health(InstanceId=first, HealthStatus="Healthy")
    assert list(members(scaling)) == [first]
    scaling.set_instance_health(InstanceId=first, HealthStatus="Unhealthy")
    (second,) = members(scaling)
    assert second != first
    assert state(cloud, first) == "terminated"
    scaling.set_instance_health(InstanceId=second, HealthStatus="Unhealthy", ShouldRespectGracePeriod=False)
    assert second not in members(scaling)
    with refused("ValidationError"):
        scaling.set_instance_health(InstanceId=first, HealthStatus="Unhealthy")


def test_a_hook_holds_an_instance_until_it_is_complete_or_late(cloud: Cloud, template: str) -> None:
    scaling = create(cloud, template)
    hook = {"AutoScalingGroupName": GROUP, "LifecycleHookName": "retire"}
    scaling.put_lifecycle_hook(
        **hook, LifecycleTransition="autoscaling:EC2_INSTANCE_TERMINATING", HeartbeatTimeout=300
    )
    scaling.set_desired_capacity(AutoScalingGroupName=GROUP, DesiredCapacity=1)
    held, _ = members(scaling)
    assert members(scaling)[held] == "Terminating:Wait"
    assert cloud.metadata(held)[STATE] == "Terminated"
    assert state(cloud, held) == "running"
    with refused("ValidationError"):
        scaling.complete_lifecycle_action(
            AutoScalingGroupName=GROUP,
            LifecycleHookName="other",
            InstanceId=held,
            LifecycleActionResult="CONTINUE",
        )
    scaling.complete_lifecycle_action(**hook, InstanceId=held, LifecycleActionResult="CONTINUE")
    assert state(cloud, held) == "terminated"
    (last,) = members(scaling)
    scaling.terminate_instance_in_auto_scaling_group(InstanceId=last, ShouldDecrementDesiredCapacity=True)
    cloud.options.seconds_ahead = 200
    scaling.record_lifecycle_action_heartbeat(**hook, InstanceId=last)
    cloud.options.seconds_ahead = 400
    assert members(scaling) == {last: "Terminating:Wait"}
    cloud.options.seconds_ahead = 501
    assert state(cloud, last) == "terminated"
    assert members(scaling) == {}


def test_what_ends_outside_is_replaced(cloud: Cloud, template: str) -> None:
    scaling = create(cloud, template)
    first, second = members(scaling)
    cloud.client().terminate_instances(InstanceIds=[first])
    assert len(members(scaling)) == 2
    assert first not in members(scaling)
    cloud.client().stop_instances(InstanceIds=[second])
    assert second not in members(scaling)
    assert state(cloud, second) == "terminated"
    assert len(members(scaling)) == 2


def test_a_launch_that_is_refused_is_tried_again(cloud: Cloud, template: str) -> None:
    cloud.options.no_capacity = {("m6i.large", "*")}
    scaling = create(cloud, template)
    assert members(scaling) == {}
    cloud.options.no_capacity = set()
    assert len(members(scaling)) == 2


def test_a_group_is_deleted_with_its_instances_by_force_only(cloud: Cloud, template: str) -> None:
    scaling = create(cloud, template)
    found = list(members(scaling))
    with refused("ResourceInUse"):
        scaling.delete_auto_scaling_group(AutoScalingGroupName=GROUP)
    scaling.delete_auto_scaling_group(AutoScalingGroupName=GROUP, ForceDelete=True)
    assert scaling.describe_auto_scaling_groups()["AutoScalingGroups"] == []
    assert {state(cloud, one) for one in found} == {"terminated"}
    assert "instance" not in cloud.left()


def test_an_instance_may_do_what_its_printed_policy_says(cloud: Cloud, template: str) -> None:
    scaling = create(cloud, template, 1)
    (first,) = members(scaling)
    cloud.client("secretsmanager").create_secret(Name="dask/worker", SecretString="pem")
    cloud.client("secretsmanager").create_secret(Name="dask/workers", SecretString="pem")
    aws = AwsSettings()
    policy = of_instances(aws, tls="secretsmanager:dask/worker", group=GROUP)
    held = cloud.enforce(policy, role_key("worker"))
    role = {"access_key": role_key("worker")}
    secrets = cloud.client("secretsmanager", **role)
    assert secrets.get_secret_value(SecretId="dask/worker")["SecretString"] == "pem"
    with refused("AccessDeniedException"):
        secrets.get_secret_value(SecretId="dask/workers")
    own = cloud.client("autoscaling", **role)
    own.set_instance_health(InstanceId=first, HealthStatus="Healthy")
    with refused("AccessDenied"):
        own.set_desired_capacity(AutoScalingGroupName=GROUP, DesiredCapacity=3)
    with refused("UnauthorizedOperation"):
        cloud.client(**role).terminate_instances(InstanceIds=[first])
    assert held.used == {"secretsmanager:GetSecretValue", "autoscaling:SetInstanceHealth"}
    cloud.enforce(of_instances(aws, group="others"), role_key("worker"))
    with refused("AccessDenied"):
        own.set_instance_health(InstanceId=first, HealthStatus="Unhealthy")
