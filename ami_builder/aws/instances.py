"""Instances by their id or their client token, whoever launched them: described, found, terminated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from botocore.exceptions import ClientError

from ami_builder.aws import tags as tagging
from ami_builder.aws.session import DENIED, Account, code_of, translated
from ami_builder.aws.waiting import settle
from ami_builder.core.errors import CloudFailed

if TYPE_CHECKING:
    from types_boto3_ec2.type_defs import InstanceTypeDef

_SEEN_SECONDS = 60.0
_TERMINATED_SECONDS = 600.0
# What a region or its quotas lack, whatever the AMI is.
_NOT_ITS_FAULT = frozenset(
    {
        "InstanceLimitExceeded",
        "InsufficientInstanceCapacity",
        "MissingInput",
        "Unsupported",
        "VPCIdNotSpecified",
        "VcpuLimitExceeded",
    }
)


def describe(account: Account, instance: str) -> InstanceTypeDef | None:
    """Return an instance as EC2 describes it; None when EC2 doesn't know it (yet, or any more)."""
    with translated():
        try:
            answer = account.ec2.describe_instances(InstanceIds=[instance])
        except ClientError as error:
            if code_of(error) != "InvalidInstanceID.NotFound":
                raise
            return None
    return next((i for r in answer["Reservations"] for i in r.get("Instances", [])), None)


def by_token(account: Account, run_id: str, token: str) -> str | None:
    """Return the instance that a run launched with a client token, whether or not anybody heard of it."""
    found = (i["InstanceId"] for i in _search(account, run_id) if i.get("ClientToken") == token)
    return next(found, None)


def of_run(account: Account, run_id: str) -> list[str]:
    """Return the instances of a run that have not ended yet."""
    ended = {"shutting-down", "terminated"}
    return [i["InstanceId"] for i in _search(account, run_id) if i["State"]["Name"] not in ended]


def require_imdsv2(account: Account, instance: str) -> None:
    """Let an instance that somebody else has launched answer metadata requests of version 2 only."""
    with translated():
        account.ec2.modify_instance_metadata_options(
            InstanceId=instance, HttpTokens="required", HttpPutResponseHopLimit=1
        )


def try_launch(account: Account, ami: str, instance_type: str, tags: Mapping[str, str]) -> str:
    """Ask EC2 whether an AMI could be launched in the default VPC, without launching it.

    Returns why that could not be told, such as lacking permissions or no default VPC; empty when it could be.
    Raises CloudFailed when it can't be launched.
    """
    with translated():
        try:
            account.ec2.run_instances(
                DryRun=True,
                ImageId=ami,
                InstanceType=instance_type,  # type: ignore[arg-type] # EC2 has more than the stubs know
                MinCount=1,
                MaxCount=1,
                TagSpecifications=tagging.specifications(tags, "instance", "volume"),
            )
        except ClientError as error:
            code = code_of(error)
            if code in DENIED:
                return "these credentials may not launch it"
            if code in _NOT_ITS_FAULT:
                return code
            if code != "DryRunOperation":
                raise
    return ""


def terminate(account: Account, instance: str) -> None:
    """Terminate an instance and wait until it is; one that is gone is fine.

    Raises CloudFailed when it does not end within its bound.
    """

    def asked() -> bool:
        try:
            account.ec2.terminate_instances(InstanceIds=[instance])
        except ClientError as error:
            if code_of(error) != "InvalidInstanceID.NotFound":
                raise
            return False
        return True

    def ended() -> bool:
        found = describe(account, instance)
        return found is None or found["State"]["Name"] == "terminated"

    with translated():
        # One that was made a moment ago may not be seen yet.
        done = not settle(asked, seconds=_SEEN_SECONDS) or settle(ended, seconds=_TERMINATED_SECONDS)
    if not done:
        raise CloudFailed(
            f"the instance {instance} does not end", hint="`ami-builder gc --apply` tries it again"
        )


def _search(account: Account, run_id: str) -> Sequence[InstanceTypeDef]:
    with translated():
        pages = account.ec2.get_paginator("describe_instances").paginate(
            Filters=[{"Name": f"tag:{tagging.RUN}", "Values": [run_id]}]
        )
        return [i for page in pages for r in page["Reservations"] for i in r.get("Instances", [])]
