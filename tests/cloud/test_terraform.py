"""The Terraform configuration of docs/how-to/launch-template.md makes what the command makes."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hcl2
import pytest

from ami_builder.aws import tags as tagging
from tests.cloud.test_launch_template import NAME, current, data, ran
from tests.terraform import Terraform

if TYPE_CHECKING:
    from tests.fake_ec2.server import Cloud

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "launch-template.md"
HCL = re.findall(r"```hcl\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
FLAGS = [
    *("launch-template", "stable", "--scheduler", "10.0.0.7:8786", "--instance-profile", "dask-worker"),
    *("--security-group", "sg-0123456789abcdef0", "--instance-type", "m6i.xlarge", "--disk", "100GiB"),
    *("--initialization-rate", "200", "--tls", "secretsmanager:dask/worker"),
    *("--replace-unhealthy-after", "10min", "--lifecycle-hook", "retire"),
]
"""The example of the page, with --initialization-rate."""


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AMI_BUILDER_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("AMI_BUILDER_CONFIG", raising=False)


def comparable(found: dict[str, Any]) -> dict[str, Any]:
    """Return the data of a template without an order of tags, and with its user data as text."""
    specs = {one["ResourceType"]: tagging.as_dict(one["Tags"]) for one in found["TagSpecifications"]}
    text = base64.b64decode(found["UserData"]).decode()
    (mapping,) = found["BlockDeviceMappings"]
    # The provider writes booleans of volumes as text.
    ebs = {key: str(value).lower() for key, value in mapping["Ebs"].items()}
    return {
        **found,
        "TagSpecifications": specs,
        "UserData": text,
        "BlockDeviceMappings": [{**mapping, "Ebs": ebs}],
    }


def by_command(cloud: Cloud) -> dict[str, Any]:
    current(cloud)
    ran(*FLAGS)
    return comparable(data(cloud, name=NAME))


def test_the_flags_are_those_of_the_page() -> None:
    command = PAGE.read_text().partition("```sh\nami-builder ")[2].partition("```")[0]
    words = command.replace("\\\n", " ").split()
    without = FLAGS.index("--initialization-rate")
    assert sorted(words) == sorted([*FLAGS[:without], *FLAGS[without + 2 :]])


def test_the_page_has_what_the_command_makes(cloud: Cloud) -> None:
    parsed = hcl2.loads(HCL)
    (block,) = [
        one["aws_launch_template"]["worker"]
        for one in plain(parsed)["resource"]
        if "aws_launch_template" in one
    ]
    local = plain(parsed)["locals"][0]["tags"]
    metadata, (mapping,) = block["metadata_options"][0], block["block_device_mappings"]
    ebs = mapping["ebs"][0]
    heredoc = HCL.partition("<<EOT\n")[2].partition("EOT\n")[0]
    written = {
        "ImageId": block["image_id"],
        "InstanceType": block["instance_type"],
        "SecurityGroupIds": block["vpc_security_group_ids"],
        "IamInstanceProfile": {"Name": block["iam_instance_profile"][0]["name"]},
        "MetadataOptions": {
            "HttpEndpoint": metadata["http_endpoint"],
            "HttpTokens": metadata["http_tokens"],
            "HttpPutResponseHopLimit": metadata["http_put_response_hop_limit"],
            "InstanceMetadataTags": metadata["instance_metadata_tags"],
        },
        "BlockDeviceMappings": [
            {
                "DeviceName": mapping["device_name"],
                "Ebs": {
                    "VolumeType": ebs["volume_type"],
                    "VolumeSize": str(ebs["volume_size"]),
                    "VolumeInitializationRate": str(ebs["volume_initialization_rate"]),
                    "DeleteOnTermination": str(ebs["delete_on_termination"]).lower(),
                },
            }
        ],
        "TagSpecifications": {one["resource_type"]: local for one in block["tag_specifications"]},
        "UserData": heredoc,
    }
    assert all("local.tags" in one["tags"] for one in block["tag_specifications"])
    assert written == by_command(cloud)


@pytest.mark.needs("terraform")
def test_terraform_makes_the_same_and_a_group_of_it(cloud: Cloud, tmp_path: Path) -> None:
    expected = by_command(cloud)
    cloud.client("iam").create_instance_profile(InstanceProfileName="dask-worker")
    vpc = cloud.client().describe_vpcs()["Vpcs"][0]["VpcId"]
    group = cloud.client().create_security_group(GroupName="workers", Description="x", VpcId=vpc)["GroupId"]
    subnet = cloud.client().describe_subnets()["Subnets"][0]["SubnetId"]
    (tmp_path / "main.tf").write_text(HCL.replace("sg-0123456789abcdef0", group))
    terraform = Terraform(tmp_path, cloud.url, cloud.environment())
    terraform.init()
    terraform.run("validate")
    terraform.run("apply", "-auto-approve", "-input=false", f'-var=subnet_ids=["{subnet}"]')
    made = comparable(data(cloud, name="dask-worker"))
    assert made == expected | {"SecurityGroupIds": [group]}
    (workers,) = cloud.client("autoscaling").describe_auto_scaling_groups()["AutoScalingGroups"]
    assert [one["LifecycleState"] for one in workers["Instances"]] == ["InService"] * 3
    (hook,) = cloud.client("autoscaling").describe_lifecycle_hooks(AutoScalingGroupName="dask-workers")[
        "LifecycleHooks"
    ]
    assert (hook["LifecycleHookName"], hook["HeartbeatTimeout"]) == ("retire", 900)


def plain(value: Any) -> Any:
    """Return what hcl2 read, without the quotes that it keeps around text and names."""
    if isinstance(value, dict):
        return {str(key).strip('"'): plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value.strip('"') if isinstance(value, str) else value
