"""The IAM policies that ami-builder needs, limited to resources with a run's tag where AWS supports it.

Which condition keys an action supports for which type of resource is in the Service Authorization Reference:
https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazonec2.html
Regions are a condition of the request, so that a policy hardly grows with them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from ami_builder.aws import tags as tagging
from ami_builder.aws.launch_settings import require_tls
from ami_builder.config.types import KMS_KEY
from ami_builder.core.errors import UsageError
from ami_builder.core.options import Connect

if TYPE_CHECKING:  # `--help` needs no pydantic
    from ami_builder.config.schema import AwsSettings

_RUN = tagging.RUN
_ASKED: dict[str, Any] = {"Null": {f"aws:RequestTag/{_RUN}": "false"}}
"""The request sets a run's tag."""
_OURS: dict[str, Any] = {"Null": {f"aws:ResourceTag/{_RUN}": "false"}}
"""The resource has a run's tag."""
_FOR_AWS: dict[str, Any] = {"Bool": {"kms:GrantIsForAWSResource": "true"}}
_MOVES = (
    "ssm:GetParameter GetParameterHistory GetParametersByPath PutParameter AddTagsToResource"
    " LabelParameterVersion DeleteParameter"
)
_READS = "ssm:GetParameters GetParametersByPath GetParameterHistory"

_PER_REGION = ("ec2", "ssm", "ec2-instance-connect")
"""Services whose requests have the region of what they act on."""

LONGEST = 6144
"""AWS's limit for the characters of a managed policy, not counting white space."""


_VERSION = "2012-10-17"


class Section(StrEnum):
    """A part of the work that a policy allows."""

    CHECK = "check"
    BUILD = "build"
    VERIFY = "verify"
    COPY = "copy"
    PROMOTE = "promote"
    PRUNE = "prune"
    LIFECYCLE = "lifecycle"
    LAUNCH_TEMPLATE = "launch-template"
    DOCTOR = "doctor"
    ALL = "all"


class _Row(NamedTuple):
    sid: str
    """Rows of the same Sid become one statement."""
    sections: str
    actions: str
    """A service, and its calls."""
    resources: list[str]
    condition: dict[str, Any] | None = None


def document(section: Section | str, aws: AwsSettings | None = None) -> dict[str, Any]:
    """Return the policy for one part of the work, or for all.

    `aws` limits it to its region, and to those of its copies and subnets, and adds what its settings need: an
    instance profile, KMS keys, spot, Session Manager, an SSM parameter. Without a region it is for all.
    """
    from ami_builder.config.schema import AwsSettings

    wanted = Section(section)
    aws = aws or AwsSettings()
    regions = _regions(aws)
    statements: dict[str, dict[str, Any]] = {}
    for row in _rows(aws):
        if wanted is not Section.ALL and wanted not in row.sections.split():
            continue
        service, _, calls = row.actions.partition(":")
        condition = row.condition or {}
        if regions and service in _PER_REGION and row.resources != ["*"]:
            condition = _all(condition, {"StringEquals": {"aws:RequestedRegion": regions}})
        new = {"Sid": row.sid, "Effect": "Allow", "Action": [], "Resource": []}
        statement = statements.setdefault(row.sid, new | ({"Condition": condition} if condition else {}))
        actions = [f"{service}:{call}" for call in calls.split()]
        for part, more in (("Action", actions), ("Resource", row.resources)):
            statement[part] += [one for one in more if one not in statement[part]]
    return {"Version": _VERSION, "Statement": list(statements.values())}


def of_instances(aws: AwsSettings, *, tls: str = "", group: str = "", key: str = "") -> dict[str, Any]:
    """Return the policy for the role of instances that `launch-template` launches.

    `tls` is what they read, `secretsmanager:NAME` or `ssm:NAME`, and `key` its KMS key. `group` is the name
    of their Auto Scaling group: they report their health to it, and complete its lifecycle hooks.
    Raises UsageError if these name nothing.
    """
    arns, statements = _Arns(aws), []

    def allow(sid: str, calls: str, resource: str, condition: dict[str, Any] | None = None) -> None:
        service, _, names = calls.partition(":")
        new = {"Sid": sid, "Effect": "Allow", "Action": [f"{service}:{name}" for name in names.split()]}
        more = {"Condition": condition} if condition else {}
        statements.append(new | {"Resource": [resource]} | more)

    service, _, name = tls.partition(":")
    reads = {
        # Secrets Manager adds six characters to a secret's name.
        "secretsmanager": ("secretsmanager:GetSecretValue", f"secret:{name}-??????"),
        "ssm": ("ssm:GetParameter", f"parameter/{name.lstrip('/')}"),
    }
    if tls:
        require_tls(tls)
        call, resource = reads[service]
        allow("ReadCertificates", call, arns.of(service, "*", resource))
    if key:
        if not tls:
            raise UsageError("--kms-key is the key of what --tls names", hint="add --tls")
        if not re.fullmatch(KMS_KEY, key):
            raise UsageError(f"--kms-key {key}: expected a key's id or ARN, or alias/NAME")
        via: dict[str, Any] = {"StringLike": {"kms:ViaService": f"{service}.*"}}
        if "alias/" in key:  # which no ARN of a key has
            via["ForAnyValue:StringEquals"] = {"kms:ResourceAliases": key[key.index("alias/") :]}
        allow("DecryptCertificates", "kms:Decrypt", arns.key(key, ""), via)
    if group:
        if not re.fullmatch(r"[^*?$:\x00-\x1f]{1,255}", group):
            raise UsageError(f"--group {group}: expected the name of one Auto Scaling group")
        resource = f"autoScalingGroup:*:autoScalingGroupName/{group}"
        calls = "autoscaling:SetInstanceHealth CompleteLifecycleAction"
        allow("TellGroup", calls, arns.of("autoscaling", "*", resource))
    if not statements:
        raise UsageError("--instance: nothing to allow", hint="add --tls, --group or both")
    return {"Version": _VERSION, "Statement": statements}


def size(policy: Mapping[str, Any]) -> int:
    """Return how many characters of LONGEST a policy has."""
    return len("".join(json.dumps(policy, separators=(",", ":")).split()))


def parts(policy: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return policies that allow the same together, each short enough for a managed policy."""
    found: list[dict[str, Any]] = []
    for statement in policy["Statement"]:
        for one in _halved(statement):
            longer = {"Version": _VERSION, "Statement": [*found[-1]["Statement"], one]} if found else {}
            if longer and size(longer) <= LONGEST:
                found[-1] = longer
            else:
                found.append({"Version": _VERSION, "Statement": [one]})
    return found


def _halved(statement: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a statement, in several with a part of its resources each if it is too long alone."""
    resources = statement["Resource"]
    if size({"Version": _VERSION, "Statement": [statement]}) <= LONGEST or len(resources) < 2:
        yield statement
        return
    middle = len(resources) // 2
    for number, half in ((1, resources[:middle]), (2, resources[middle:])):
        yield from _halved(statement | {"Sid": f"{statement['Sid']}{number}", "Resource": half})


def _regions(aws: AwsSettings) -> list[str]:
    """Return the regions of all work; empty when that of the bake is not known."""
    named = [subnet.partition("=")[0] for subnet in aws.subnets if "=" in subnet]
    everywhere = [aws.region, *(one.region for one in aws.copy_to), *named]
    return list(dict.fromkeys(everywhere)) if aws.region else []


def _all(*conditions: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return a condition that holds when all of these hold."""
    merged: dict[str, Any] = {}
    for condition in conditions:
        for operator, keys in condition.items():
            merged[operator] = {**merged.get(operator, {}), **keys}
    return merged


def _rows(aws: AwsSettings) -> Iterator[_Row]:
    """Yield what each part of the work needs with these settings."""
    arns = _Arns(aws)
    ec2 = arns.ec2
    instance, group, template = ec2("instance"), ec2("security-group"), ec2("launch-template")
    image, every = ec2("image", "snapshot"), " ".join(Section)
    keys = [tagging.NAME, f"{tagging.PREFIX}*", *(tag.key for tag in aws.tags)]
    # The request sets no other tags than ours and the user's.
    only_ours: dict[str, Any] = {"ForAllValues:StringLike": {"aws:TagKeys": keys}}
    # It sets a run's tag on a resource without a Name, so not on one that somebody else named.
    nameless = _all(_ASKED, {"Null": {f"aws:ResourceTag/{tagging.NAME}": "true"}}, only_ours)

    made = ec2("instance", "volume", "network-interface", "security-group", "image", "snapshot")
    makers = ["RunInstances", "CreateSecurityGroup", "CreateImage", "CopyImage"]
    if aws.root_device:
        makers += ["RegisterImage"]
    if aws.spot:
        made, makers = made + template + ec2("fleet"), [*makers, "CreateLaunchTemplate", "CreateFleet"]
    # It is one that makes the resource.
    created = _all({"StringEquals": {"ec2:CreateAction": makers}}, only_ours)
    removing = "ec2:DeregisterImage DeleteSnapshot"
    launch = str(Section.LAUNCH_TEMPLATE)
    asked_for_channel = _all({"Null": {f"aws:RequestTag/{tagging.CHANNEL}": "false"}}, only_ours)
    tagged_for_channel = _all({"StringEquals": {"ec2:CreateAction": "CreateLaunchTemplate"}}, only_ours)
    of_channel: dict[str, Any] = {"Null": {f"aws:ResourceTag/{tagging.CHANNEL}": "false"}}
    launched_from = ec2("image", "snapshot", "subnet", "network-interface")
    settings = "GetEbsEncryptionByDefault GetEbsDefaultKmsKeyId GetImageBlockPublicAccessState"
    yield from (
        _Row("Look", every, "ec2:Describe*", ["*"]),
        _Row("LookAtAccount", "check build", f"ec2:{settings} GetInstanceMetadataDefaults", ["*"]),
        _Row("LookAtQuotas", "check build", "servicequotas:GetServiceQuota", ["*"]),
        _Row("LookAtPermissions", "check", "iam:SimulatePrincipalPolicy", arns.iam("user/*", "role/*")),
        _Row("LookAtRole", "check", "iam:GetRole", arns.iam("role/*")),
        _Row(
            "ReadChannels",
            "doctor",
            "ssm:GetParametersByPath",
            [arns.of("ssm", "*", "parameter/ami-builder/*")],
        ),
        _Row("Prices", "check", "pricing:GetProducts", ["*"]),
        _Row("Make", "build verify", "ec2:RunInstances", ec2("instance", "volume"), _ASKED),
        _Row("LaunchFrom", "build verify", "ec2:RunInstances", launched_from),
        _Row("UseGroupsOfRuns", "build verify", "ec2:RunInstances", group, _OURS),
        _Row("UseGroupsOfRuns", "build verify", "ec2:AuthorizeSecurityGroupIngress", group, _OURS),
        _Row("UseGroupsOfRuns", "build verify lifecycle", "ec2:DeleteSecurityGroup", group, _OURS),
        _Row("Make", "build verify", "ec2:CreateSecurityGroup", group, _ASKED),
        _Row("MakeGroupsIn", "build verify", "ec2:CreateSecurityGroup", ec2("vpc")),
        _Row("TagWhatIsMade", "build verify", "ec2:CreateTags", made, created),
        _Row("UseInstancesOfRuns", "build verify lifecycle", "ec2:TerminateInstances", instance, _OURS),
        _Row("UseInstancesOfRuns", "verify", "ec2:GetConsoleOutput", instance, _OURS),
        _Row("UseInstancesOfRuns", "build", "ec2:StopInstances CreateImage", instance, _OURS),
        # Packer 1.6.6 alone: later versions launch with IMDSv2.
        _Row("UseInstancesOfRuns", "build", "ec2:ModifyInstanceMetadataOptions", instance, _OURS),
        # Packer 1.6.6 tags an AMI only after it made it; plugins send the run's tags with CreateImage.
        _Row("MakeImages", "build", "ec2:CreateImage", image),
        _Row("TagImages", "build", "ec2:CreateTags", image, nameless),
        _Row("ChangeImagesOfRuns", "build", "ec2:CreateTags ModifyImageAttribute", image, _OURS),
        _Row("ChangeImagesOfRuns", "verify", "ec2:CreateTags", ec2("image"), _OURS),
        # An unfinished AMI when a build is stopped.
        _Row("ChangeImagesOfRuns", "build", removing, image, _OURS),
        # The source: CopyImage doesn't support its tags. The ARN of what is made is `image/*`, without an id.
        _Row("CopyFrom", "copy", "ec2:CopyImage", [arns.of("ec2", "", "image/ami-*")]),
        _Row("Make", "copy", "ec2:CopyImage", image, _ASKED),
        _Row("TagWhatIsMade", "copy", "ec2:CreateTags", image, created),
        # A copy that began without its tags is found by its name.
        _Row("TagImages", "copy lifecycle", "ec2:CreateTags", image, nameless),
        _Row("ChangeImagesOfRuns", "copy", "ec2:CreateTags ModifyImageAttribute", image, _OURS),
        _Row("ChangeImagesOfRuns", "promote", "ec2:CreateTags", ec2("image"), _OURS),
        _Row("ChangeImagesOfRuns", "copy", "ec2:ModifySnapshotAttribute", ec2("snapshot"), _OURS),
        # A failed copy is deleted before the next attempt.
        _Row("ChangeImagesOfRuns", "copy prune lifecycle", removing, image, _OURS),
        # SSM validates an AMI with the caller's permissions.
        _Row("MoveChannels", "promote", _MOVES, [arns.of("ssm", "*", "parameter/ami-builder/*")]),
        _Row(
            "FindUses", "prune", "autoscaling:DescribeLaunchConfigurations DescribeAutoScalingGroups", ["*"]
        ),
        _Row("FindUses", "prune", "ssm:DescribeParameters", ["*"]),
        _Row("FindUsesByValue", "prune", _READS, [arns.of("ssm", "*", "parameter/*")]),
        _Row("ChangeImagesOfRuns", "prune", "ec2:EnableImageDeprecation", ec2("image"), _OURS),
        _Row("UseTemplatesOfRuns", "lifecycle", "ec2:DeleteLaunchTemplate", template, _OURS),
        _Row("DeleteVolumesOfRuns", "lifecycle", "ec2:DeleteVolume", ec2("volume"), _OURS),
        # Templates of channels have no run.
        _Row("MakeTemplates", launch, "ec2:CreateLaunchTemplate", template, asked_for_channel),
        _Row("TagTemplates", launch, "ec2:CreateTags", template, tagged_for_channel),
        _Row(
            "ChangeTemplates",
            launch,
            "ec2:CreateLaunchTemplateVersion ModifyLaunchTemplate DeleteLaunchTemplate CreateTags",
            template,
            of_channel,
        ),
        # EC2 asks for the second where a template names a parameter.
        _Row(
            "ReadChannels",
            launch,
            "ssm:GetParameter GetParameters",
            [arns.of("ssm", "*", "parameter/ami-builder/*")],
        ),
        _Row("FindUses", launch, "autoscaling:DescribeAutoScalingGroups", ["*"]),
    )
    if aws.source.startswith("ssm:"):
        name = aws.source[4:].lstrip("/")
        parameter = arns.of("ssm", "" if name.startswith("aws/service/") else "*", f"parameter/{name}")
        yield _Row("ReadBaseParameter", "check build", "ssm:GetParameter", [parameter])
    if aws.instance_profile:
        # The profile's role is unknown here; a policy that names it is stricter.
        to_ec2 = {"StringLike": {"iam:PassedToService": "ec2.amazonaws.com*"}}
        yield _Row("PassInstanceProfile", "build verify", "iam:PassRole", arns.iam("role/*"), to_ec2)
        profile = arns.iam("instance-profile/*")
        yield _Row("LookAtInstanceProfile", "check", "iam:GetInstanceProfile", profile)
    if aws.connect is Connect.SESSION_MANAGER:
        tagged = {"StringLike": {f"ssm:resourceTag/{_RUN}": "*"}}
        documents = [arns.of("ssm", "", f"document/AWS-Start{by}Session") for by in ("SSH", "PortForwarding")]
        session = [arns.of("ssm", "*", "session/*")]
        yield _Row("Connect", "build verify", "ssm:StartSession", instance, tagged)
        yield _Row("ConnectBySsh", "build verify", "ssm:StartSession", documents)
        # Packer's plugin brings its key this way, since version 1.2.
        yield _Row("UseInstancesOfRuns", "build", "ec2-instance-connect:SendSSHPublicKey", instance, _OURS)
        yield _Row("EndConnections", "build verify", "ssm:TerminateSession ResumeSession", session)
    if aws.root_device:
        # By Packer's snapshot, under another name of the root device.
        yield _Row("Make", "build", "ec2:RegisterImage", ec2("image"), _ASKED)
        yield _Row("ChangeImagesOfRuns", "build", "ec2:RegisterImage", ec2("snapshot"), _OURS)
    copies = [arns.key(one.kms_key, one.region) for one in aws.copy_to if one.kms_key]
    own = [arns.key(aws.kms_key, aws.region)] if aws.kms_key else []
    # A copy is decrypted with its source's key, whatever its own is.
    for of, used, sections in (("Copies", copies, "copy"), ("", own, "build verify copy")):
        if used:
            yield _Row(f"LookAtKey{of}", "check", "kms:DescribeKey", used)
            yield _Row(f"UseKey{of}", sections, "kms:DescribeKey Decrypt ReEncrypt* GenerateDataKey*", used)
            yield _Row(f"LetEc2UseKey{of}", sections, "kms:CreateGrant", used, _FOR_AWS)
    if aws.spot:
        # Packer creates a fleet from a launch template, and tags its resources later; with plugins, the
        # template tags them too.
        launched = ec2("instance", "volume")
        fleet = [*launched, *ec2("fleet", "image", "subnet")]
        requests = ec2("volume", "spot-instances-request")
        fleet_calls = "ec2:CreateFleet RunInstances DeleteLaunchTemplate"
        # Packer's, so not an instance of an Auto Scaling group.
        whose = {tagging.LAUNCH_TEMPLATE: "false", tagging.SCALING_GROUP: "true"}
        from_template = _all(
            nameless, {"Null": {f"aws:ResourceTag/{key}": null for key, null in whose.items()}}
        )
        # The first spot request of an account makes it.
        role = arns.iam("role/aws-service-role/spot.amazonaws.com/AWSServiceRoleForEC2Spot")
        for_spot = {"StringEquals": {"iam:AWSServiceName": "spot.amazonaws.com"}}
        yield from (
            _Row("MakeSpotRole", "build", "iam:CreateServiceLinkedRole", role, for_spot),
            _Row("SpotFleet", "build", "ec2:CreateFleet", fleet),
            _Row("SpotLaunch", "build", "ec2:RunInstances", launched),
            _Row("UseTemplatesOfRuns", "build", fleet_calls, template, _OURS),
            _Row("Make", "build", "ec2:CreateLaunchTemplate", template, _ASKED),
            _Row("TagSpotInstances", "build lifecycle", "ec2:CreateTags", instance, from_template),
            # Both Packer and ami-builder do it, in either order.
            _Row("UseInstancesOfRuns", "build", "ec2:CreateTags", launched, _OURS),
            _Row("TagSpotRequests", "build", "ec2:CreateTags", requests, nameless),
        )


class _Arns:
    """ARNs of the resources that a policy names, in any region: statements limit that by a condition."""

    def __init__(self, aws: AwsSettings) -> None:
        self._partition = _partition(aws.region)

    def of(self, service: str, account: str, resource: str, region: str = "*") -> str:
        """Return one ARN."""
        return f"arn:{self._partition}:{service}:{region}:{account}:{resource}"

    def iam(self, *resources: str) -> list[str]:
        """Return the ARNs of users, roles and the like, which have no region."""
        return [self.of("iam", "*", resource, region="") for resource in resources]

    def ec2(self, *kinds: str) -> list[str]:
        """Return the ARNs of all resources of these kinds. AMIs and snapshots have no account in theirs."""
        return [self.of("ec2", "" if kind in ("image", "snapshot") else "*", f"{kind}/*") for kind in kinds]

    def key(self, key: str, region: str) -> str:
        """Return the ARN of a KMS key; of all keys of its region for an alias."""
        if "alias/" in key:
            return self.of("kms", "*", "key/*", region or "*")
        return key if key.startswith("arn:") else self.of("kms", "*", f"key/{key}", region or "*")


def _partition(region: str) -> str:
    """Return the partition of a region, such as `aws-cn`, by botocore's data."""
    import botocore.session
    from botocore.exceptions import UnknownRegionError

    if not region:
        return "aws"
    try:
        return str(botocore.session.get_session().get_partition_for_region(region))
    except UnknownRegionError:
        return "aws"
