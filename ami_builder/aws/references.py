"""Find what in a region uses an AMI or a snapshot: instances, launch templates and configurations, SSM."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from ami_builder.aws import images
from ami_builder.aws.session import Account, aws_errors
from ami_builder.core.cleanup import Reference

_NAMED = re.compile(r"\b(?:ami|snap)-(?:[0-9a-f]{17}|[0-9a-f]{8})\b")
_PINNED = re.compile(r"resolve:ssm:([^:]+):([^:]+)")
_ENDED = "terminated"
_AT_ONCE = 10  # SSM's limit of names in one GetParameters call


def find(account: Account) -> list[Reference]:
    """Return every reference to an AMI or a snapshot in this region.

    An id anywhere in a parameter's current value is a reference; so are ids in versions that have a label or
    that a launch template pins. Raises CloudFailed when any list can't be read to its end, since an unknown
    reference could cost somebody their AMI.
    """
    templates = list(_templates(account))
    return [
        *_instances(account),
        *(Reference(id=named, by=by) for named, by in templates if named.startswith(("ami-", "snap-"))),
        *_configurations(account),
        *_parameters(account, {pin.groups() for named, _ in templates if (pin := _PINNED.fullmatch(named))}),
    ]


def _instances(account: Account) -> Iterator[Reference]:
    for reservation in account.listed("describe_instances", "Reservations"):
        for one in reservation["Instances"]:
            state = one["State"]["Name"]
            if state != _ENDED:
                yield Reference(id=one["ImageId"], by=f"used by instance {one['InstanceId']} ({state})")


def _templates(account: Account) -> Iterator[tuple[str, str]]:
    """Yield the images and snapshots that each version of each launch template names, with a description."""
    for template in account.listed("describe_launch_templates", "LaunchTemplates"):
        template_id, name = template["LaunchTemplateId"], template["LaunchTemplateName"]
        for version in account.listed(
            "describe_launch_template_versions",
            "LaunchTemplateVersions",
            LaunchTemplateId=template_id,
        ):
            data, by = version["LaunchTemplateData"], f"used by launch template {name} ({template_id})"
            for named in (data.get("ImageId", ""), *images.snapshot_ids(data)):
                yield named, f"{by}, version {version['VersionNumber']}"


def _configurations(account: Account) -> Iterator[Reference]:
    for one in account.listed(
        "describe_launch_configurations", "LaunchConfigurations", service="autoscaling"
    ):
        by = f"used by launch configuration {one['LaunchConfigurationName']}"
        yield from (Reference(id=named, by=by) for named in (one["ImageId"], *images.snapshot_ids(one)))


def _parameters(account: Account, pinned: set[tuple[str | Any, ...]]) -> Iterator[Reference]:
    described = account.listed("describe_parameters", "Parameters", service="ssm")
    named = {one["Name"] for one in described if one.get("DataType") == "aws:ec2:image"}
    # A secret can't be launched from, and reading one needs its key.
    names = [one["Name"] for one in described if one["Type"] != "SecureString"]
    for start in range(0, len(names), _AT_ONCE):
        with aws_errors("ssm"):
            answer = account.client("ssm").get_parameters(Names=names[start : start + _AT_ONCE])
        for one in answer["Parameters"]:
            found = _NAMED.findall(one["Value"])
            if found:
                named.add(one["Name"])
            yield from _named(found, f"named by SSM parameter {one['Name']}")
    for name in sorted(named):
        for version in account.listed("get_parameter_history", "Parameters", service="ssm", Name=name):
            number = str(version["Version"])
            if version.get("Labels") or (name, number) in pinned:
                yield from _named(
                    _NAMED.findall(version["Value"]), f"named by SSM parameter {name}, version {number}"
                )


def _named(ids: Iterable[str], by: str) -> Iterator[Reference]:
    return (Reference(id=one, by=by) for one in ids)
