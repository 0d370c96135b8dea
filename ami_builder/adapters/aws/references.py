"""What in a region needs an AMI: instances, launch templates, launch configurations, SSM parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from ami_builder.retention import Reference

from .session import Account, translated

_AMI = re.compile(r"\bami-(?:[0-9a-f]{17}|[0-9a-f]{8})\b")
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
    """Return every use of an AMI in this region, whoever's AMI it is; one call for each page of each list.

    Raises CloudFailed when any list can't be read to its end, since what is not known may need an AMI.
    Of parameters the current value counts, whatever the name and wherever in it an AMI's id stands; of those
    that name an AMI also versions with a label, or that a launch template pins.
    """
    templates = list(_templates(account))
    return [
        *_instances(account),
        *(Reference(id=ami, by=by) for ami, by in templates if ami.startswith("ami-")),
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
    """Yield what each version of each launch template names as its image, and the version in words."""
    for template in _listed(account, "ec2", "describe_launch_templates", "LaunchTemplates"):
        id, name = template["LaunchTemplateId"], template["LaunchTemplateName"]
        for version in _listed(
            account, "ec2", "describe_launch_template_versions", "LaunchTemplateVersions", LaunchTemplateId=id
        ):
            if named := version["LaunchTemplateData"].get("ImageId"):
                yield named, f"used by launch template {name} ({id}), version {version['VersionNumber']}"


def _configurations(account: Account) -> Iterator[Reference]:
    for one in _listed(account, "autoscaling", "describe_launch_configurations", "LaunchConfigurations"):
        yield Reference(
            id=one["ImageId"], by=f"used by launch configuration {one['LaunchConfigurationName']}"
        )


def _parameters(account: Account, pinned: set[tuple[str | Any, ...]]) -> Iterator[Reference]:
    described = _listed(account, "ssm", "describe_parameters", "Parameters")
    images = {one["Name"] for one in described if one.get("DataType") == "aws:ec2:image"}
    # Nobody launches from a secret, and reading one needs its key.
    names = [one["Name"] for one in described if one["Type"] != "SecureString"]
    for start in range(0, len(names), _AT_ONCE):
        with translated("ssm"):
            answer = account.client("ssm").get_parameters(Names=names[start : start + _AT_ONCE])
        for one in answer["Parameters"]:
            found = _AMI.findall(one["Value"])
            if found:
                images.add(one["Name"])
            yield from _named(found, f"named by SSM parameter {one['Name']}")
    for name in sorted(images):
        for version in _listed(account, "ssm", "get_parameter_history", "Parameters", Name=name):
            number = str(version["Version"])
            if version.get("Labels") or (name, number) in pinned:
                yield from _named(
                    _AMI.findall(version["Value"]), f"named by SSM parameter {name}, version {number}"
                )


def _named(amis: Iterable[str], by: str) -> Iterator[Reference]:
    return (Reference(id=ami, by=by) for ami in amis)


def _listed(account: Account, service: str, call: str, key: str, **more: Any) -> list[Any]:
    with translated(service):
        pages = account.client(service).get_paginator(call)
        shown = pages.paginate(PaginationConfig={"PageSize": _PAGES[call]}, **more)
        return [one for page in shown for one in page[key]]
