"""Which resources a call touches, as IAM sees them: ARNs, tags, and the tags that the call asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moto.ec2.models import ec2_backends
from moto.iam.models import iam_backends
from moto.secretsmanager.models import secretsmanager_backends

from tests.fake_ec2 import arns, authorization
from tests.fake_ec2.api_call import ACCOUNT, ApiCall, Refused
from tests.fake_ec2.scaling_actions import find_group

NEW = "*"
"""The id of what the call is about to make."""

_KINDS = {
    "ami": ("image", "InvalidAMIID.NotFound"),
    "i": ("instance", "InvalidInstanceID.NotFound"),
    "snap": ("snapshot", "InvalidSnapshot.NotFound"),
    "vol": ("volume", "InvalidVolume.NotFound"),
    "sg": ("security-group", "InvalidGroup.NotFound"),
    "subnet": ("subnet", "InvalidSubnetID.NotFound"),
    "vpc": ("vpc", "InvalidVpcID.NotFound"),
    "eni": ("network-interface", "InvalidNetworkInterfaceID.NotFound"),
    "key": ("key-pair", "InvalidKeyPair.NotFound"),
    "lt": ("launch-template", "InvalidLaunchTemplateId.NotFound"),
    "sir": ("spot-instances-request", "InvalidSpotInstanceRequestID.NotFound"),
}

# Action -> what it makes, and the parameters that name what it touches. Others take no resource.
EC2: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "RunInstances": (
        ("instance", "volume", "network-interface"),
        ("ImageId", "SubnetId", "SecurityGroupIds", "KeyName"),
    ),
    "CreateLaunchTemplate": (("launch-template",), ()),
    "CreateLaunchTemplateVersion": ((), ("LaunchTemplateId", "LaunchTemplateName")),
    "ModifyLaunchTemplate": ((), ("LaunchTemplateId", "LaunchTemplateName")),
    "DeleteLaunchTemplate": ((), ("LaunchTemplateId", "LaunchTemplateName")),
    "CreateFleet": (("fleet", "instance", "volume"), ()),
    "TerminateInstances": ((), ("InstanceIds",)),
    "StopInstances": ((), ("InstanceIds",)),
    "StartInstances": ((), ("InstanceIds",)),
    "RebootInstances": ((), ("InstanceIds",)),
    "GetConsoleOutput": ((), ("InstanceId",)),
    "DescribeInstanceAttribute": ((), ("InstanceId",)),
    "DescribeImageAttribute": ((), ("ImageId",)),
    "DescribeSnapshotAttribute": ((), ("SnapshotId",)),
    "ModifyInstanceAttribute": ((), ("InstanceId",)),
    "ModifyInstanceMetadataOptions": ((), ("InstanceId",)),
    "CreateImage": (("image", "snapshot"), ("InstanceId",)),
    "CopyImage": (("image", "snapshot"), ()),
    "RegisterImage": (("image",), ()),
    "DeregisterImage": ((), ("ImageId",)),
    "ModifyImageAttribute": ((), ("ImageId",)),
    "EnableImageDeprecation": ((), ("ImageId",)),
    "DisableImageDeprecation": ((), ("ImageId",)),
    "EnableImageDeregistrationProtection": ((), ("ImageId",)),
    "DisableImageDeregistrationProtection": ((), ("ImageId",)),
    "EnableImage": ((), ("ImageId",)),
    "DisableImage": ((), ("ImageId",)),
    "CreateSecurityGroup": (("security-group",), ("VpcId",)),
    "DeleteSecurityGroup": ((), ("GroupId",)),
    "AuthorizeSecurityGroupIngress": ((), ("GroupId",)),
    "AuthorizeSecurityGroupEgress": ((), ("GroupId",)),
    "RevokeSecurityGroupIngress": ((), ("GroupId",)),
    "RevokeSecurityGroupEgress": ((), ("GroupId",)),
    "CreateKeyPair": (("key-pair",), ()),
    "ImportKeyPair": (("key-pair",), ()),
    "DeleteKeyPair": ((), ("KeyName", "KeyPairId")),
    "CreateVolume": (("volume",), ()),
    "DeleteVolume": ((), ("VolumeId",)),
    "CreateSnapshot": (("snapshot",), ("VolumeId",)),
    "DeleteSnapshot": ((), ("SnapshotId",)),
    "ModifySnapshotAttribute": ((), ("SnapshotId",)),
    "CreateTags": ((), ("Resources",)),
    "DeleteTags": ((), ("Resources",)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Touched:
    """One resource that a call touches, and the permission that it needs for it."""

    action: str
    arn: str
    tags: Mapping[str, str] = field(default_factory=dict)
    """Those that it has."""
    requested: Mapping[str, str] | None = None
    """Those that the call asks for; None when tags are no matter of this call."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Values of other condition keys, in lower case."""
    by_fleet: bool = False
    """Whether a fleet needs it for what it launches."""
    unknown: str = ""
    """The error that EC2 answers when there is no such resource; empty when there is."""


def touched(call: ApiCall, backend: Any) -> list[Touched]:
    """Return what a call touches; raises LookupError for an action that this table doesn't know."""
    if call.service == "ec2":
        return list(_ec2(call, backend))
    return list(_others(call))


def not_found(resource_id: str) -> Refused:
    """Return what EC2 answers when it does not show the resource of this id."""
    _, code = _KINDS[resource_id.partition("-")[0]]
    return Refused(code, f"The ID '{resource_id}' does not exist")


def _ec2(call: ApiCall, backend: Any) -> Iterator[Touched]:
    name = call.name
    if call.action not in EC2:
        yield _resourceless(call)
        return
    makes, names = EC2[call.action]
    asked = _asked(call.params)
    for kind in makes:
        arn = arns.ec2(call.region, kind, NEW)
        tags = asked.get(kind, {})
        yield Touched(action=name, arn=arn, requested=tags, keys=_of_the_new(kind, call.params))
        if tags:
            yield _tagged_by(call.action, arn, tags)
    of_tags = call.action in ("CreateTags", "DeleteTags")
    requested = {t["Key"]: t.get("Value", "") for t in call.params.get("Tags", [])} if of_tags else None
    for parameter in names:
        given = call.params.get(parameter) or ()
        for each in (given,) if isinstance(given, str) else given:
            yield _existing(name, each, parameter, call.region, backend, requested)
    yield from _implied(call, backend)


def _resourceless(call: ApiCall) -> Touched:
    """Return what a call touches that names no resource; raises LookupError when it can name one."""
    if any(kind.required for kind in authorization.kinds(call.name).values()):
        raise LookupError(f"{call.name}: say in {__name__} what it touches")
    return Touched(action=call.name, arn="*")


def _asked(params: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the tags that a call asks for, by type of resource."""
    return {
        spec["ResourceType"]: {t["Key"]: t.get("Value", "") for t in spec.get("Tags", [])}
        for spec in params.get("TagSpecifications") or []
    }


def _tagged_by(action: str, arn: str, tags: Mapping[str, str]) -> Touched:
    # behaviour: tags-need-create-tags
    return Touched(action="ec2:CreateTags", arn=arn, requested=tags, keys={"ec2:createaction": action})


def _of_the_new(kind: str, params: Mapping[str, Any]) -> dict[str, str]:
    if kind != "instance":
        return {}
    found = {
        "ec2:instancetype": params.get("InstanceType"),
        "ec2:metadatahttptokens": (params.get("MetadataOptions") or {}).get("HttpTokens"),
    }
    return {key: str(value) for key, value in found.items() if value}


def _implied(call: ApiCall, backend: Any) -> Iterator[Touched]:
    """Yield what a call touches without naming it."""
    name, params = call.name, call.params
    if call.action == "RunInstances":
        if not params.get("SubnetId"):
            yield Touched(action=name, arn=arns.ec2(call.region, "subnet", "subnet-default"))
        if not params.get("SecurityGroupIds") and not params.get("NetworkInterfaces"):
            yield Touched(action=name, arn=arns.ec2(call.region, "security-group", "sg-default"))
        for interface in params.get("NetworkInterfaces", []):
            for parameter in ("SubnetId", "Groups"):
                given = interface.get(parameter) or ()
                for each in (given,) if isinstance(given, str) else given:
                    yield _existing(name, each, parameter, call.region, backend, None)
        profile = params.get("IamInstanceProfile") or {}
        if profile.get("Name") or profile.get("Arn"):
            yield from _passed(profile.get("Name") or profile["Arn"].rpartition("/")[2], call.region)
    if call.action in ("CreateLaunchTemplate", "CreateLaunchTemplateVersion"):
        # behaviour: parameters-of-templates-are-read
        kind, _, parameter = str(params.get("LaunchTemplateData", {}).get("ImageId", "")).rpartition("ssm:")
        if kind:
            arn = arns.arn("ssm", call.region, f"parameter/{parameter.lstrip('/')}")
            yield Touched(action="ssm:GetParameters", arn=arn)
    if call.action == "CreateFleet":
        yield from _launched_by_fleet(call, backend)
    if call.action == "CopyImage":
        # behaviour: copy-source-is-authorized
        origin = params["SourceRegion"]
        yield _existing(name, params["SourceImageId"], "", origin, ec2_backends[ACCOUNT][origin], None)
    if call.action == "RegisterImage":
        for disk in params.get("BlockDeviceMappings", []):
            if snapshot := disk.get("Ebs", {}).get("SnapshotId"):
                yield _existing(name, snapshot, "", call.region, backend, None)
    if call.action == "CreateSecurityGroup" and not params.get("VpcId"):
        yield Touched(action=name, arn=arns.ec2(call.region, "vpc", "vpc-default"))
    if call.action == "DeregisterImage" and params.get("DeleteAssociatedSnapshots"):
        image = backend.amis.get(params["ImageId"])
        for mapping in image.block_device_mappings if image is not None else ():
            yield _existing(
                "ec2:DeleteSnapshot", mapping["Ebs"]["SnapshotId"], "", call.region, backend, None
            )


def _launched_by_fleet(call: ApiCall, backend: Any) -> Iterator[Touched]:
    """Yield the template, and what a fleet launches from it, which needs RunInstances too."""
    for config in call.params["LaunchTemplateConfigs"]:
        asked = config["LaunchTemplateSpecification"]
        named = "LaunchTemplateId" if "LaunchTemplateId" in asked else "LaunchTemplateName"
        template = _existing(call.name, asked[named], named, call.region, backend, None)
        yield template
        yield replace(template, action="ec2:RunInstances", by_fleet=True)
        if template.unknown:
            continue
        data = backend.launch_templates[template.arn.rpartition("/")[2]].default_version().data
        # behaviour: fleet-tags-its-launches
        for kind, tags in _asked(data).items():
            for action in ("CreateFleet", "RunInstances"):
                yield replace(_tagged_by(action, arns.ec2(call.region, kind, NEW), tags), by_fleet=True)
        launch = ApiCall(
            service="ec2",
            action="RunInstances",
            region=call.region,
            access_key=call.access_key,
            params={key: value for key, value in data.items() if value and key != "TagSpecifications"},
        )
        tagged = {kind: tags for kind, tags in _asked(data).items() if tags}
        for it in _ec2(launch, backend):
            kind = it.arn.split(":")[5].partition("/")[0]
            requested = tagged.get(kind) if it.arn.endswith(f"/{NEW}") else it.requested
            yield replace(it, by_fleet=True, requested=requested)


def _passed(profile: str, region: str) -> Iterator[Touched]:
    """Yield the roles that an instance profile passes; one without a role here has one of its own name."""
    backend = iam_backends[ACCOUNT][arns.partition(region)]
    found = next((p for p in backend.instance_profiles.values() if p.name == profile), None)
    roles = [role.arn for role in found.roles] if found is not None else []
    service = "ec2.amazonaws.com" + (".cn" if arns.partition(region) == "aws-cn" else "")
    for role in roles or [arns.arn("iam", region, f"role/{profile}")]:
        yield Touched(action="iam:PassRole", arn=role, keys={"iam:passedtoservice": service})


def _existing(
    action: str,
    resource_id: str,
    parameter: str,
    region: str,
    backend: Any,
    requested: Mapping[str, str] | None,
) -> Touched:
    if parameter == "KeyName":
        found = backend.key_pairs.get(resource_id)
        tags = backend.tags.get(found.id, {}) if found is not None else {}
        return Touched(action=action, arn=arns.ec2(region, "key-pair", resource_id), tags=tags)
    if parameter == "LaunchTemplateName":
        resource_id = backend.launch_template_name_to_ids.get(resource_id, "lt-unknown")
    kind, error = _KINDS.get(resource_id.partition("-")[0], ("", ""))
    if not kind:
        raise Refused("InvalidID", f"The ID '{resource_id}' is not valid")
    thing = _find(kind, resource_id, backend)
    about = {
        "ec2:owner": str(getattr(thing, "owner_id", "") or ""),
        "ec2:public": str(getattr(thing, "is_public", "")).lower(),
        "ec2:imageid": resource_id if kind == "image" else "",
    }
    # behaviour: terminated-instance-loses-tags
    tagged = thing is not None and not (kind == "instance" and thing.state == "terminated")
    return Touched(
        action=action,
        arn=arns.ec2(region, kind, resource_id),
        # behaviour: gone-is-unauthorized
        tags=dict(backend.tags.get(resource_id, {})) if tagged else {},
        requested=requested,
        keys={key: value for key, value in about.items() if value},
        unknown="" if tagged else error,
    )


def _find(kind: str, resource_id: str, backend: Any) -> Any:
    match kind:
        case "image":
            return backend.amis.get(resource_id)
        case "instance":
            return backend.get_instance_by_id(resource_id)
        case "snapshot":
            return backend.snapshots.get(resource_id)
        case "volume":
            return backend.volumes.get(resource_id)
        case "security-group":
            return backend.get_security_group_from_id(resource_id)
        case "subnet":
            return next((s[resource_id] for s in backend.subnets.values() if resource_id in s), None)
        case "vpc":
            return backend.vpcs.get(resource_id)
        case "spot-instances-request":
            spots = (each for each in backend.all_instances() if hasattr(each, "spot_instance_request_id"))
            return next((each for each in spots if each.spot_instance_request_id == resource_id), None)
        case "launch-template":
            return backend.launch_templates.get(resource_id)
        case "network-interface":
            return backend.enis.get(resource_id)
        case _:
            return next((pair for pair in backend.key_pairs.values() if pair.id == resource_id), None)


def _others(call: ApiCall) -> Iterator[Touched]:
    match call.service, call.action:
        case "sts", "GetCallerIdentity":
            return
        case "autoscaling", _ if {"AutoScalingGroupName", "InstanceId"} & call.params.keys():
            named = call.params.get("AutoScalingGroupName", "")
            group = find_group(call.region, name=named, instance=call.params.get("InstanceId", ""))
            missing = arns.arn("autoscaling", call.region, f"autoScalingGroup:*:autoScalingGroupName/{named}")
            yield Touched(action=call.name, arn=missing if group is None else group.arn)
        case "secretsmanager", "GetSecretValue":
            secrets, named = secretsmanager_backends[ACCOUNT][call.region].secrets, call.params["SecretId"]
            arn = (
                secrets[named].arn
                if named in secrets
                else arns.arn("secretsmanager", call.region, f"secret:{named}")
            )
            yield Touched(action=call.name, arn=arn)
        case "ssm", _ if {"Name", "Names", "Path"} & call.params.keys():
            given = call.params.get("Names") or [call.params.get("Name") or call.params.get("Path")]
            requested = {tag["Key"]: tag["Value"] for tag in call.params.get("Tags", [])}
            for name in given:
                owner = "" if name.startswith("/aws/service/") else ACCOUNT
                arn = arns.arn("ssm", call.region, f"parameter/{name.lstrip('/')}", account=owner)
                yield Touched(action=call.name, arn=arn, requested=requested)
                if requested:
                    yield Touched(action="ssm:AddTagsToResource", arn=arn, requested=requested)
        case "iam", "GetInstanceProfile":
            profile = call.params["InstanceProfileName"]
            yield Touched(action=call.name, arn=arns.arn("iam", call.region, f"instance-profile/{profile}"))
        case "iam", "SimulatePrincipalPolicy":
            source = call.params["PolicySourceArn"]
            if ":iam:" in source:  # others are refused as none of IAM's
                yield Touched(action=call.name, arn=source)
        case "servicequotas", "GetServiceQuota":
            quota = f"{call.params['ServiceCode']}/{call.params['QuotaCode']}"
            yield Touched(action=call.name, arn=arns.arn("servicequotas", call.region, quota))
        case _:
            yield _resourceless(call)
