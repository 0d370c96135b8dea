"""Injected faults: each kind once, as boto3 sees it, and set by another process."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import HTTPClientError

from tests.fake_ec2.faults import Fault
from tests.fake_ec2.requests import launch, refused

if TYPE_CHECKING:
    from tests.fake_ec2.server import Cloud


@pytest.fixture
def ec2(cloud: Cloud) -> Any:
    return cloud.client()


@pytest.mark.parametrize("fault", list(Fault))
def test_faults(cloud: Cloud, ec2: Any, fault: Fault) -> None:
    cloud.faults.add("CreateSecurityGroup", fault, nth=2, seconds=0.2)

    def make(name: str) -> None:
        ec2.create_security_group(GroupName=name, Description="test")

    make("first")
    start = time.monotonic()
    match fault:
        case Fault.THROTTLE:
            with refused("RequestLimitExceeded", 503):
                make("second")
        case Fault.HTTP500:
            with refused("InternalError", 500):
                make("second")
        case Fault.RESET | Fault.LOST_RESPONSE:
            with pytest.raises(HTTPClientError):
                make("second")
        case _:
            make("second")
    if fault is Fault.SLOW:
        assert time.monotonic() - start > 0.2
    make("third")
    performed = fault in (Fault.SLOW, Fault.LOST_RESPONSE, Fault.DUPLICATED)
    assert len(cloud.left()["security-group"]) == (3 if performed else 2)
    assert cloud.count("CreateSecurityGroup") == 3


def test_botocore_retries_faults(cloud: Cloud) -> None:
    retrying: Any = boto3.client(
        "ec2", config=Config(retries={"mode": "standard", "total_max_attempts": 10}, proxies={})
    )
    for nth, fault in enumerate((Fault.THROTTLE, Fault.HTTP500, Fault.RESET, Fault.LOST_RESPONSE)):
        cloud.faults.add("RunInstances", fault, nth=nth + 1)
    launch(cloud, retrying, ClientToken="t")
    assert cloud.count("RunInstances") == 5
    assert len(cloud.left()["instance"]) == 1


def test_other_processes_set_faults(cloud: Cloud, ec2: Any) -> None:
    def control(method: str, path: str, body: object = None) -> Any:
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(f"{cloud.url}/_cloud/{path}", data, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            return json.loads(answer.read())

    control("POST", "faults", {"action": "*", "fault": "throttle", "times": None})
    with refused("RequestLimitExceeded"):
        ec2.describe_images()
    control("DELETE", "faults")
    ec2.describe_images()
    assert [each["outcome"] for each in control("GET", "calls")] == ["RequestLimitExceeded", "ok"]
    control("POST", "reset")
    assert cloud.calls == ()
    with pytest.raises(urllib.error.HTTPError, match="400"):
        control("POST", "faults", {"action": "*", "fault": "flood"})
