"""ARNs in the partition of their region, by botocore's endpoint data."""

from __future__ import annotations

from functools import cache

import botocore.session

from tests.fake_ec2.api_call import ACCOUNT

_NO_ACCOUNT = ("image", "snapshot")


@cache
def partition(region: str) -> str:
    """Return the partition of a region, such as `aws-cn`; raises botocore's error for an unknown one."""
    return str(botocore.session.get_session().get_partition_for_region(region))


def arn(service: str, region: str, resource: str, *, account: str = ACCOUNT) -> str:
    """Return an ARN; IAM and the like have no region in theirs."""
    where = "" if service in ("iam", "sts") else region
    return f"arn:{partition(region)}:{service}:{where}:{account}:{resource}"


def ec2(region: str, kind: str, resource_id: str) -> str:
    """Return the ARN of something in EC2. AMIs and snapshots have no account in theirs."""
    return arn("ec2", region, f"{kind}/{resource_id}", account="" if kind in _NO_ACCOUNT else ACCOUNT)
