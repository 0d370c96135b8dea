"""What in a region needs an AMI or a snapshot: instances, templates, configurations, SSM parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ami_builder.aws.session import Account, aws_errors
from ami_builder.core.cleanup import Reference

_NAMED = re.compile(r"\b(?:ami|snap)-(?:[0-9a-f]{17}|[0-9a-f]{8})\b")
_PINNED = re.compile(r"resolve:ssm:([^:]+):([^:]+)")
_ENDED = "terminated"
_AT_ONCE = 10  # parameters that SSM tells the values of in one call
_PAGES = {
    "describe_instances": 1000,
    "describe_launch_templates": 200,
    "describe_launch_template_versions": 200,
    "describe_launch_configurations": 100,
    "describe_parameters": 50,
    "get_parameter_history": 50,
}


def find(account: Account) -> list[Reference]:
    """Return every use of an AMI or a snapshot in this region; one call for each page of each list.

    Raises CloudFailed when any list can't be read to its end, since what is not known may need an AMI.
    Of parameters the current value counts, whatever the name and wherever in it an AMI's id stands; of those
    that name an AMI also versions with a label, or that a launch template pins.
    """
    templates = list(_templates(account))
    return [
        *_instances(account),
        *(Reference(id=id, by=by) for id, by in templates if id.startswith(("ami-", "snap-"))),
        *_configurations(account),
        *_parameters(account, {pin.groups() for named, _ in templates if (pin := _PINNED.fullmatch(named))}),
    ]


def _instances(account: Account) -> Iterator[Reference]:
    for reservation in _listed(account, "ec2", "describe_instances", "Reservations"):
        for one in reservation["Instances"]:
            state = one["State"]["Name"]
            if state != _ENDED:
                yield Reference(id=one["ImageId"], by=f"used by instance {one['InstanceId']} ({state})")


def _templates(account: Account) -> Iterator[tuple[str, str]]:
    """Yield what each version of each launch template names as image or disk, and the version in words."""
    for template in _listed(account, "ec2", "describe_launch_templates", "LaunchTemplates"):
        id, name = template["LaunchTemplateId"], template["LaunchTemplateName"]
        for version in _listed(
            account, "ec2", "describe_launch_template_versions", "LaunchTemplateVersions", LaunchTemplateId=id
        ):
            data, by = version["LaunchTemplateData"], f"used by launch template {name} ({id})"
            for named in (data.get("ImageId", ""), *_disks(data)):
                yield named, f"{by}, version {version['VersionNumber']}"


def _configurations(account: Account) -> Iterator[Reference]:
    for one in _listed(account, "autoscaling", "describe_launch_configurations", "LaunchConfigurations"):
        by = f"used by launch configuration {one['LaunchConfigurationName']}"
        yield from (Reference(id=id, by=by) for id in (one["ImageId"], *_disks(one)))


def _disks(shown: Mapping[str, Any]) -> list[str]:
    disks = (mapping.get("Ebs", {}) for mapping in shown.get("BlockDeviceMappings", []))
    return [disk["SnapshotId"] for disk in disks if disk.get("SnapshotId")]


def _parameters(account: Account, pinned: set[tuple[str | Any, ...]]) -> Iterator[Reference]:
    described = _listed(account, "ssm", "describe_parameters", "Parameters")
    images = {one["Name"] for one in described if one.get("DataType") == "aws:ec2:image"}
    # Nobody launches from a secret, and reading one needs its key.
    names = [one["Name"] for one in described if one["Type"] != "SecureString"]
    for start in range(0, len(names), _AT_ONCE):
        with aws_errors("ssm"):
            answer = account.client("ssm").get_parameters(Names=names[start : start + _AT_ONCE])
        for one in answer["Parameters"]:
            found = _NAMED.findall(one["Value"])
            if found:
                images.add(one["Name"])
            yield from _named(found, f"named by SSM parameter {one['Name']}")
    for name in sorted(images):
        for version in _listed(account, "ssm", "get_parameter_history", "Parameters", Name=name):
            number = str(version["Version"])
            if version.get("Labels") or (name, number) in pinned:
                yield from _named(
                    _NAMED.findall(version["Value"]), f"named by SSM parameter {name}, version {number}"
                )


def _named(ids: Iterable[str], by: str) -> Iterator[Reference]:
    return (Reference(id=id, by=by) for id in ids)


def _listed(account: Account, service: str, call: str, key: str, **more: Any) -> list[Any]:
    with aws_errors(service):
        pages = account.client(service).get_paginator(call)
        shown = pages.paginate(PaginationConfig={"PageSize": _PAGES[call]}, **more)
        return [one for page in shown for one in page[key]]
