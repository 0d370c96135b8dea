"""What RunInstances does with user data, parameters in place of AMIs, templates, and block devices."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import pytest

from tests.fake_ec2.requests import instance, launch, refused

if TYPE_CHECKING:
    from tests.fake_ec2.server import Cloud

PARAMETER = "/images/dask"
LIMIT = 16_384


@pytest.fixture
def ec2(cloud: Cloud) -> Any:
    return cloud.client()


@pytest.fixture
def images(cloud: Cloud) -> list[str]:
    """A parameter's values by version: two AMIs. The first version has the label `current`."""
    ssm, found = cloud.client("ssm"), []
    for image in list(cloud.backend().amis)[:2]:
        more = {"DataType": "aws:ec2:image", "Overwrite": True}
        ssm.put_parameter(Name=PARAMETER, Value=image, Type="String", **more)
        found.append(image)
    ssm.label_parameter_version(Name=PARAMETER, ParameterVersion=1, Labels=["current"])
    return found


def test_user_data_has_at_most_16_kib_before_base64(cloud: Cloud, ec2: Any) -> None:
    launched = launch(cloud, ec2, UserData="x" * LIMIT)
    sent = ec2.describe_instance_attribute(InstanceId=launched, Attribute="userData")["UserData"]["Value"]
    assert base64.b64decode(sent) == b"x" * LIMIT
    with refused("InvalidParameterValue", 400):
        launch(cloud, ec2, UserData="x" * (LIMIT + 1))
    long = base64.b64encode(b"x" * (LIMIT + 1)).decode()
    with refused("InvalidUserData.Malformed", 400):
        ec2.create_launch_template(LaunchTemplateName="t", LaunchTemplateData={"UserData": long})


@pytest.mark.parametrize(("suffix", "number"), [("", 1), (":1", 0), (":2", 1), (":current", 0)])
def test_a_parameter_takes_the_place_of_an_ami(
    cloud: Cloud, ec2: Any, images: list[str], suffix: str, number: int
) -> None:
    launched = launch(cloud, ec2, ImageId=f"resolve:ssm:{PARAMETER}{suffix}")
    assert instance(ec2, launched)["ImageId"] == images[number]


def test_a_parameter_that_there_is_not(cloud: Cloud, ec2: Any, images: list[str]) -> None:
    for name in ("/other", f"{PARAMETER}:9", f"{PARAMETER}:candidate"):
        with refused("InvalidParameterValue"):
            launch(cloud, ec2, ImageId=f"resolve:ssm:{name}")


def test_a_template_is_what_the_call_leaves_out(cloud: Cloud, ec2: Any, images: list[str]) -> None:
    data = {
        "ImageId": f"resolve:ssm:{PARAMETER}:current",
        "InstanceType": "t3.micro",
        "UserData": base64.b64encode(b"#cloud-config").decode(),
        "TagSpecifications": [{"ResourceType": "instance", "Tags": [{"Key": "a", "Value": "1"}]}],
    }
    made = ec2.create_launch_template(LaunchTemplateName="t", LaunchTemplateData=data)["LaunchTemplate"]
    ran = ec2.run_instances(
        LaunchTemplate={"LaunchTemplateName": "t"}, InstanceType="t3.small", MinCount=1, MaxCount=1
    )
    launched = ran["Instances"][0]["InstanceId"]
    found = instance(ec2, launched)
    assert (found["ImageId"], found["InstanceType"]) == (images[0], "t3.small")
    assert {tag["Key"]: tag["Value"] for tag in found["Tags"]} == {
        "a": "1",
        "aws:ec2launchtemplate:id": made["LaunchTemplateId"],
        "aws:ec2launchtemplate:version": "1",
    }
    sent = ec2.describe_instance_attribute(InstanceId=launched, Attribute="userData")["UserData"]["Value"]
    assert base64.b64decode(sent) == b"#cloud-config"


@pytest.mark.parametrize(("device", "sizes"), [("/dev/xvda", {"/dev/xvda": 40}), ("/dev/sda1", None)])
def test_a_device_that_is_not_the_root_is_a_second_volume(
    cloud: Cloud, ec2: Any, device: str, sizes: dict[str, int] | None
) -> None:
    ebs = {"VolumeSize": 40, "DeleteOnTermination": True}
    launched = launch(cloud, ec2, BlockDeviceMappings=[{"DeviceName": device, "Ebs": ebs}])
    volumes = {each["VolumeId"]: each["Size"] for each in ec2.describe_volumes()["Volumes"]}
    found = instance(ec2, launched)["BlockDeviceMappings"]
    attached = {each["DeviceName"]: volumes[each["Ebs"]["VolumeId"]] for each in found}
    assert attached == (sizes or {"/dev/xvda": 8, "/dev/sda1": 40})
    ec2.terminate_instances(InstanceIds=[launched])
    assert cloud.left() == {}


def test_an_instance_can_be_terminated_twice(ec2: Any, images: list[str]) -> None:
    launched = ec2.run_instances(ImageId=images[0], MinCount=2, MaxCount=2, InstanceType="t3.micro")
    first, second = (one["InstanceId"] for one in launched["Instances"])
    ec2.terminate_instances(InstanceIds=[first])
    again = ec2.terminate_instances(InstanceIds=[first, second])["TerminatingInstances"]
    assert {one["InstanceId"] for one in again} == {first, second}
