"""What the tests here do again and again by boto3."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fake_ec2.server import Cloud

RUN = {"ami-builder:run": "r1"}


@contextmanager
def refused(code: str, status: int | None = None) -> Iterator[None]:
    with pytest.raises(ClientError) as caught:
        yield
    assert caught.value.response["Error"]["Code"] == code, caught.value
    if status is not None:
        assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == status


def tagged(*kinds: str, tags: dict[str, str] = RUN) -> list[dict[str, Any]]:
    return [{"ResourceType": k, "Tags": [{"Key": a, "Value": b} for a, b in tags.items()]} for k in kinds]


def launch(cloud: Cloud, ec2: Any, **more: Any) -> str:
    settings = {"ImageId": cloud.base_ami(), "InstanceType": "t3.small", "MinCount": 1, "MaxCount": 1}
    return str(ec2.run_instances(**(settings | more))["Instances"][0]["InstanceId"])


def instance(ec2: Any, instance_id: str) -> Any:
    return ec2.describe_instances(InstanceIds=[instance_id])["Reservations"][0]["Instances"][0]


def image(ec2: Any, image_id: str) -> Any:
    return ec2.describe_images(ImageIds=[image_id])["Images"][0]
