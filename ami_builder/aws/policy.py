"""The IAM policies that ami-builder needs, limited to resources with a run's tag where EC2 supports it."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from ami_builder.aws import tags as tagging
from ami_builder.core.options import Connect

if TYPE_CHECKING:  # `--help` needs no pydantic
    from ami_builder.config.schema import AwsSettings

_RUN = tagging.RUN
_ASKED: dict[str, Any] = {"Null": {f"aws:RequestTag/{_RUN}": "false"}}
"""The request sets a run's tag."""
_OURS: dict[str, Any] = {"Null": {f"aws:ResourceTag/{_RUN}": "false"}}
"""The resource has a run's tag."""
_KEYS: dict[str, Any] = {"ForAllValues:StringLike": {"aws:TagKeys": [tagging.NAME, f"{tagging.PREFIX}*"]}}
"""The request sets our tags only."""
_NAMELESS: dict[str, Any] = {
    "Null": {f"aws:RequestTag/{_RUN}": "false", f"aws:ResourceTag/{tagging.NAME}": "true"},
    **_KEYS,
}
"""The request sets a run's tag on a resource without a Name, so not on one that somebody else named."""
_FROM_TEMPLATE: dict[str, Any] = {
    "Null": {**_NAMELESS["Null"], f"aws:ResourceTag/{tagging.LAUNCH_TEMPLATE}": "false"},
    **_KEYS,
}
"""The same, on an instance that was launched from a template."""
_FOR_AWS: dict[str, Any] = {"Bool": {"kms:GrantIsForAWSResource": "true"}}
_MOVES = (
    "ssm:GetParameter GetParameterHistory GetParametersByPath PutParameter AddTagsToResource"
    " LabelParameterVersion DeleteParameter"
)
_READS = "ssm:GetParameters GetParametersByPath GetParameterHistory"

LONGEST = 6144
"""AWS's limit for the characters of a managed policy, not counting white space."""


class Section(StrEnum):
    """A part of the work that a policy allows."""

    CHECK = "check"
    BUILD = "build"
    VERIFY = "verify"
    COPY = "copy"
    PROMOTE = "promote"
    PRUNE = "prune"
    LIFECYCLE = "lifecycle"
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

    `aws` limits it to its region, and to those of its copies for AMIs and channels, and adds what its
    settings need: an instance profile, KMS keys, spot, Session Manager, an SSM parameter.
    """
    from ami_builder.config.schema import AwsSettings

    wanted = Section(section)
    statements: dict[str, dict[str, Any]] = {}
    for row in _rows(aws or AwsSettings()):
        if wanted is not Section.ALL and wanted not in row.sections.split():
            continue
        new = {"Sid": row.sid, "Effect": "Allow", "Action": [], "Resource": []}
        statement = statements.setdefault(
            row.sid, new | ({"Condition": row.condition} if row.condition else {})
        )
        service, _, calls = row.actions.partition(":")
        actions = [f"{service}:{call}" for call in calls.split()]
        for part, more in (("Action", actions), ("Resource", row.resources)):
            statement[part] += [one for one in more if one not in statement[part]]
    return {"Version": "2012-10-17", "Statement": list(statements.values())}


def _rows(aws: AwsSettings) -> Iterator[_Row]:
    """Yield what each part of the work needs with these settings."""
    arns = _Arns(aws)
    here, kept = arns.ec2, arns.kept
    instance, group, template = here("instance"), here("security-group"), here("launch-template")
    image, copied = here("image", "snapshot"), kept("image", "snapshot")
    every = " ".join(Section)
    made = here("instance", "volume", "network-interface", "security-group", "image", "snapshot")
    makers = ["RunInstances", "CreateSecurityGroup", "CreateImage"]
    if aws.spot:
        made, makers = made + template + here("fleet"), [*makers, "CreateLaunchTemplate", "CreateFleet"]
    removing = "ec2:DeregisterImage DeleteSnapshot"
    launched_from = here("image", "snapshot", "subnet", "network-interface")
    yield from (
        _Row("Look", every, "ec2:Describe*", ["*"]),
        _Row("Prices", "check", "pricing:GetProducts", ["*"]),
        _Row("Launch", "build verify", "ec2:RunInstances", here("instance", "volume"), _ASKED),
        _Row("LaunchFrom", "build verify", "ec2:RunInstances", launched_from),
        _Row("UseGroupsOfRuns", "build verify", "ec2:RunInstances", group, _OURS),
        _Row("UseGroupsOfRuns", "build verify", "ec2:AuthorizeSecurityGroupIngress", group, _OURS),
        _Row("UseGroupsOfRuns", "build verify lifecycle", "ec2:DeleteSecurityGroup", group, _OURS),
        _Row("MakeGroups", "build verify", "ec2:CreateSecurityGroup", group, _ASKED),
        _Row("MakeGroupsIn", "build verify", "ec2:CreateSecurityGroup", here("vpc")),
        _Row("TagWhatIsMade", "build verify", "ec2:CreateTags", made, _created_by(*makers)),
        _Row("UseInstancesOfRuns", "build verify lifecycle", "ec2:TerminateInstances", instance, _OURS),
        _Row("UseInstancesOfRuns", "verify", "ec2:GetConsoleOutput", instance, _OURS),
        _Row("UseInstancesOfRuns", "build", "ec2:StopInstances CreateImage", instance, _OURS),
        # Packer 1.6.6 alone: later versions launch with IMDSv2.
        _Row("UseInstancesOfRuns", "build", "ec2:ModifyInstanceMetadataOptions", instance, _OURS),
        # Packer 1.6.6 tags an AMI only after it made it; plugins send the run's tags with CreateImage.
        _Row("MakeImages", "build", "ec2:CreateImage", image),
        _Row("TagImages", "build", "ec2:CreateTags", image, _NAMELESS),
        _Row("ChangeImagesOfRuns", "build", "ec2:CreateTags ModifyImageAttribute", image, _OURS),
        _Row("ChangeImagesOfRuns", "verify", "ec2:CreateTags", here("image"), _OURS),
        # An unfinished AMI when a build is stopped.
        _Row("RemoveImagesOfRuns", "build", removing, image, _OURS),
        _Row("CopyImagesOfRuns", "copy", "ec2:CopyImage", copied, _OURS),
        _Row("MakeCopies", "copy", "ec2:CopyImage", copied, _ASKED),
        _Row("TagCopies", "copy", "ec2:CreateTags", copied, _created_by("CopyImage")),
        # A copy that began without its tags is found by its name.
        _Row("TagImages", "copy lifecycle", "ec2:CreateTags", copied, _NAMELESS),
        _Row("ChangeImagesOfRuns", "copy", "ec2:CreateTags ModifyImageAttribute", copied, _OURS),
        _Row("ChangeImagesOfRuns", "promote", "ec2:CreateTags", kept("image"), _OURS),
        _Row("ShareSnapshotsOfRuns", "copy", "ec2:ModifySnapshotAttribute", kept("snapshot"), _OURS),
        # A failed copy is deleted before the next attempt.
        _Row("RemoveImagesOfRuns", "copy prune lifecycle", removing, copied, _OURS),
        # SSM validates an AMI with the caller's permissions.
        _Row("MoveChannels", "promote", _MOVES, arns.everywhere("ssm", "*", "parameter/ami-builder/*")),
        _Row("FindUses", "prune", "autoscaling:DescribeLaunchConfigurations", ["*"]),
        _Row("FindUses", "prune", "ssm:DescribeParameters", ["*"]),
        _Row("FindUsesByValue", "prune", _READS, arns.everywhere("ssm", "*", "parameter/*")),
        _Row("DeprecateImagesOfRuns", "prune", "ec2:EnableImageDeprecation", kept("image"), _OURS),
        _Row("UseTemplatesOfRuns", "lifecycle", "ec2:DeleteLaunchTemplate", template, _OURS),
        _Row("DeleteVolumesOfRuns", "lifecycle", "ec2:DeleteVolume", here("volume"), _OURS),
    )
    if aws.source.startswith("ssm:"):
        name = aws.source[4:].lstrip("/")
        parameter = arns.of("ssm", "" if name.startswith("aws/service/") else "*", f"parameter/{name}")
        yield _Row("ReadBaseParameter", "build", "ssm:GetParameter", [parameter])
    if aws.instance_profile:
        # The profile's role is unknown here; a policy that names it is stricter.
        role = arns.of("iam", "*", "role/*", region="")
        to_ec2 = {"StringLike": {"iam:PassedToService": "ec2.amazonaws.com*"}}
        yield _Row("PassInstanceProfile", "build verify", "iam:PassRole", [role], to_ec2)
        # Packer checks that the profile exists.
        profile = arns.of("iam", "*", "instance-profile/*", region="")
        yield _Row("LookAtInstanceProfile", "check build", "iam:GetInstanceProfile", [profile])
    if aws.connect is Connect.SESSION_MANAGER:
        tagged = {"StringLike": {f"ssm:resourceTag/{_RUN}": "*"}}
        documents = [arns.of("ssm", "", f"document/AWS-Start{by}Session") for by in ("SSH", "PortForwarding")]
        session = [arns.of("ssm", "*", "session/*")]
        yield _Row("Connect", "build verify", "ssm:StartSession", instance, tagged)
        yield _Row("ConnectBySsh", "build verify", "ssm:StartSession", documents)
        # Packer's plugin brings its key this way, since version 1.2.
        yield _Row("UseInstancesOfRuns", "build", "ec2-instance-connect:SendSSHPublicKey", instance, _OURS)
        yield _Row("EndConnections", "build verify", "ssm:TerminateSession ResumeSession", session)
    copies = [arns.key(one.kms_key, one.region) for one in aws.copy_to if one.kms_key]
    own = [arns.key(aws.kms_key)] if aws.kms_key else []
    for of, keys, sections in (
        ("Copies", copies, "copy"),
        ("", own, "build verify copy" if copies else "build verify"),
    ):
        if keys:
            yield _Row(f"UseKey{of}", sections, "kms:DescribeKey Decrypt ReEncrypt* GenerateDataKey*", keys)
            yield _Row(f"LetEc2UseKey{of}", sections, "kms:CreateGrant", keys, _FOR_AWS)
    if aws.spot:
        # Packer creates a fleet from a launch template, and tags its resources later; with plugins, the
        # template tags them too.
        launched = here("instance", "volume")
        fleet = [*launched, *here("fleet", "image", "subnet", "network-interface")]
        requests = here("volume", "spot-instances-request")
        fleet_calls = "ec2:CreateFleet RunInstances DeleteLaunchTemplate"
        yield from (
            _Row("SpotFleet", "build", "ec2:CreateFleet", fleet),
            _Row("SpotLaunch", "build", "ec2:RunInstances", launched),
            _Row("UseTemplatesOfRuns", "build", fleet_calls, template, _OURS),
            _Row("MakeTemplates", "build", "ec2:CreateLaunchTemplate", template, _ASKED),
            _Row("TagSpotInstances", "build lifecycle", "ec2:CreateTags", instance, _FROM_TEMPLATE),
            # Both Packer and ami-builder do it, in either order.
            _Row("UseInstancesOfRuns", "build", "ec2:CreateTags", launched, _OURS),
            _Row("TagSpotRequests", "build", "ec2:CreateTags", requests, _NAMELESS),
        )


class _Arns:
    """ARNs of the resources that a policy names, limited to the configured regions."""

    def __init__(self, aws: AwsSettings) -> None:
        self._region = aws.region or "*"
        self._regions = [aws.region, *(one.region for one in aws.copy_to)] if aws.region else ["*"]
        starts = {"cn-": "aws-cn", "us-gov-": "aws-us-gov"}
        self._partition = next((p for s, p in starts.items() if aws.region.startswith(s)), "aws")

    def of(self, service: str, account: str, resource: str, region: str | None = None) -> str:
        """Return one ARN, of the AMI's own region unless `region` is given."""
        where = self._region if region is None else region
        return f"arn:{self._partition}:{service}:{where}:{account}:{resource}"

    def everywhere(self, service: str, account: str, resource: str) -> list[str]:
        """Return the ARN in the regions of copies too."""
        return [self.of(service, account, resource, region) for region in self._regions]

    def ec2(self, *kinds: str) -> list[str]:
        """Return the ARNs of all resources of these kinds. AMIs and snapshots have no account in theirs."""
        return [self.of("ec2", "" if kind in ("image", "snapshot") else "*", f"{kind}/*") for kind in kinds]

    def kept(self, *kinds: str) -> list[str]:
        """Return the ARNs of AMIs or snapshots, in the regions of copies too."""
        return [arn for kind in kinds for arn in self.everywhere("ec2", "", f"{kind}/*")]

    def key(self, key: str, region: str | None = None) -> str:
        """Return the ARN of a KMS key; of all keys of its region for an id or an alias."""
        exact = key.startswith("arn:") and ":alias/" not in key
        return key if exact else self.of("kms", "*", "key/*", region)


def _created_by(*calls: str) -> dict[str, Any]:
    return {"StringEquals": {"ec2:CreateAction": list(calls)}, **_KEYS}
