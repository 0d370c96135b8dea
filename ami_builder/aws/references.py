"""Find what in a region uses an AMI or a snapshot: instances, templates, fleets, spot requests, SSM."""

from __future__ import annotations

import math
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ami_builder.aws import images, tags
from ami_builder.aws.session import Account, aws_errors
from ami_builder.core.cleanup import Reference

_NAMED = re.compile(r"\b(?:ami|snap)-(?:[0-9a-f]{17}|[0-9a-f]{8})\b")
# A parameter's name or ARN, and a version or a label behind it.
_RESOLVED = "resolve:ssm:"
_ENDED = "terminated"
# A stopped persistent request is `disabled`, and launches again when its instance is started.
_SPOT_STATES = frozenset({"open", "active", "disabled"})
_FLEET_STATES = frozenset({"submitted", "active", "modifying"})
# Regions without fleets or spot instances.
_UNKNOWN = "UnsupportedOperation|InvalidAction"
_FRESH_SECONDS = 60.0
_AT_ONCE = 10  # SSM's limit of names in one GetParameters call


def find(account: Account, owned: Sequence[images.Ami] = ()) -> list[Reference]:
    """Return every reference to an AMI or a snapshot in this region.

    What needs a snapshot of one of the AMIs `owned` also needs that AMI: it is deregistered with its
    snapshots.

    An id anywhere in a parameter's current value is a reference; so is one in a version that a template, a
    group or a fleet resolves, and in any version with a label of a parameter that names an AMI now. Raises
    CloudFailed when any list can't be read to its end, since an unknown reference could cost somebody their
    AMI.
    """
    uses = [
        *_templates(account),
        *_configurations(account),
        *_groups(account),
        *_spot_requests(account),
        *_spot_fleets(account),
        *_fleets(account),
    ]
    found = [
        *_instances(account),
        *(Reference(id=named, by=by) for named, by in uses if _NAMED.fullmatch(named)),
        *_resolved(account, uses),
        *_parameters(account),
    ]
    return [*found, *_through_snapshots(found, owned)]


class Watch:
    """What needs an AMI or a snapshot at the moment, for one after the other.

    Instances, and parameters of our channels, are read again for each; all other references when they were
    read more than a minute ago.
    """

    def __init__(self, account: Account) -> None:
        self._account = account
        self._read = -math.inf
        self._by: dict[str, str] = {}

    def of(self, named: str) -> str:
        """Return what needs this AMI or snapshot, in words; empty for nothing. Raises CloudFailed."""
        if time.monotonic() - self._read > _FRESH_SECONDS:
            owned = images.list_owned(self._account)
            self._by = {one.id: one.by for one in find(self._account, owned)}
            # The end of a look that may itself take longer than a minute.
            self._read = time.monotonic()
        if by := self._by.get(named, ""):
            return by
        for one in self._account.listed(
            "get_parameters_by_path", "Parameters", service="ssm", Path=tags.CHANNELS, Recursive=True
        ):
            if named in one["Value"]:
                return f"named by SSM parameter {one['Name']}"
        image = [{"Name": "image-id", "Values": [named]}]
        return next((one.by for one in _instances(self._account, Filters=image)), "")


def _through_snapshots(found: Sequence[Reference], owned: Sequence[images.Ami]) -> Iterator[Reference]:
    by_id: dict[str, list[str]] = defaultdict(list)
    for one in found:
        by_id[one.id].append(one.by)
    for ami in owned:
        for snapshot in ami.snapshots:
            for by in by_id.get(snapshot, []):
                yield Reference(id=ami.id, by=f"its snapshot {snapshot} is {by}")


def _instances(account: Account, **which: Any) -> Iterator[Reference]:
    for reservation in account.listed("describe_instances", "Reservations", **which):
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
            yield from _launched(data, f"{by}, version {version['VersionNumber']}")


def _configurations(account: Account) -> Iterator[tuple[str, str]]:
    for one in account.listed(
        "describe_launch_configurations", "LaunchConfigurations", service="autoscaling"
    ):
        yield from _launched(one, f"used by launch configuration {one['LaunchConfigurationName']}")


def _groups(account: Account) -> Iterator[tuple[str, str]]:
    """Yield the AMIs that Auto Scaling groups name themselves, beside those of their launch templates."""
    for one in account.listed("describe_auto_scaling_groups", "AutoScalingGroups", service="autoscaling"):
        template = one.get("MixedInstancesPolicy", {}).get("LaunchTemplate", {})
        for override in template.get("Overrides", []):
            yield from _launched(override, f"used by Auto Scaling group {one['AutoScalingGroupName']}")


def _spot_requests(account: Account) -> Iterator[tuple[str, str]]:
    for one in account.listed("describe_spot_instance_requests", "SpotInstanceRequests", ignore=_UNKNOWN):
        if one["State"] in _SPOT_STATES:
            by = f"used by spot request {one['SpotInstanceRequestId']} ({one['State']})"
            yield from _launched(one.get("LaunchSpecification", {}), by)


def _spot_fleets(account: Account) -> Iterator[tuple[str, str]]:
    for one in account.listed("describe_spot_fleet_requests", "SpotFleetRequestConfigs", ignore=_UNKNOWN):
        if one["SpotFleetRequestState"] in _FLEET_STATES:
            for launch in one["SpotFleetRequestConfig"].get("LaunchSpecifications", []):
                yield from _launched(launch, f"used by Spot Fleet {one['SpotFleetRequestId']}")


def _fleets(account: Account) -> Iterator[tuple[str, str]]:
    """Yield the AMIs that EC2 Fleets name themselves, beside those of their launch templates."""
    for one in account.listed("describe_fleets", "Fleets", ignore=_UNKNOWN):
        if one["FleetState"] in _FLEET_STATES:
            for config in one.get("LaunchTemplateConfigs", []):
                for override in config.get("Overrides", []):
                    yield from _launched(override, f"used by EC2 Fleet {one['FleetId']}")


def _launched(launch: Mapping[str, Any], by: str) -> Iterator[tuple[str, str]]:
    """Yield the AMI, or the parameter to resolve, and the snapshots that something launches with."""
    yield from ((named, by) for named in (launch.get("ImageId") or "", *images.snapshot_ids(launch)) if named)


def _resolved(account: Account, uses: Iterable[tuple[str, str]]) -> Iterator[Reference]:
    """Resolve the parameters that launches name in place of an AMI, in every documented form.

    Source: https://docs.aws.amazon.com/autoscaling/ec2/userguide/using-systems-manager-parameters.html
    """
    by_name: dict[str, str] = {}
    for named, by in uses:
        if named.startswith(_RESOLVED):
            by_name.setdefault(named.removeprefix(_RESOLVED), by)
    for name, by in sorted(by_name.items()):
        # One at a time: a call must not name one parameter twice, and these may be versions of the same.
        with aws_errors("ssm", ignore="ParameterNotFound|ParameterVersionNotFound"):
            for one in account.client("ssm").get_parameters(Names=[name])["Parameters"]:
                yield from _named(_NAMED.findall(one["Value"]), f"{by} through SSM parameter {name}")


def _parameters(account: Account) -> Iterator[Reference]:
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
        for version in account.listed(
            "get_parameter_history", "Parameters", service="ssm", ignore="ParameterNotFound", Name=name
        ):
            if version.get("Labels"):
                number = version["Version"]
                yield from _named(
                    _NAMED.findall(version["Value"]), f"named by SSM parameter {name}, version {number}"
                )


def _named(ids: Iterable[str], by: str) -> Iterator[Reference]:
    return (Reference(id=one, by=by) for one in ids)
