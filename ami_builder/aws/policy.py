"""The IAM policies that ami-builder needs, limited to resources with a run's tag where EC2 supports it."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any

from ami_builder.aws import tags as tagging
from ami_builder.core.options import Connect

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ami_builder.config.schema import AwsSettings

_RUN = tagging.RUN
_ASKED: Mapping[str, Any] = {"Null": {f"aws:RequestTag/{_RUN}": "false"}}
"""The request sets a run's tag."""
_OURS: Mapping[str, Any] = {"Null": {f"aws:ResourceTag/{_RUN}": "false"}}
"""The resource has a run's tag."""
_KEYS: Mapping[str, Any] = {"ForAllValues:StringLike": {"aws:TagKeys": [tagging.NAME, f"{tagging.PREFIX}*"]}}
"""The request sets our tags only."""
_NAMELESS: Mapping[str, Any] = {
    "Null": {f"aws:RequestTag/{_RUN}": "false", f"aws:ResourceTag/{tagging.NAME}": "true"},
    **_KEYS,
}
"""The request sets a run's tag on a resource without a Name, so not on one that somebody else named."""
_FROM_TEMPLATE: Mapping[str, Any] = {
    "Null": {**_NAMELESS["Null"], f"aws:ResourceTag/{tagging.LAUNCH_TEMPLATE}": "false"},
    **_KEYS,
}
"""The same, on an instance that was launched from a template."""

LONGEST = 6144
"""AWS's limit for the characters of a managed policy, not counting white space."""

_NO_ACCOUNT = frozenset({"image", "snapshot"})


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


def document(section: Section | str, aws: AwsSettings | None = None) -> dict[str, Any]:
    """Return the policy for one part of the work, or for all.

    `aws` limits it to its region, and to those of its copies for AMIs and channels, and adds what its
    settings need: an instance profile, KMS keys, spot, Session Manager, an SSM parameter.
    """
    wanted = Section(section)
    parts = _Statements(aws)
    statements: dict[str, dict[str, Any]] = {}
    for one, make in (
        (Section.CHECK, parts.check),
        (Section.BUILD, parts.build),
        (Section.VERIFY, parts.verify),
        (Section.COPY, parts.copy),
        (Section.PROMOTE, parts.promote),
        (Section.PRUNE, parts.prune),
        (Section.LIFECYCLE, parts.lifecycle),
    ):
        if wanted in (one, Section.ALL):
            for statement in make():
                _merge(statements, statement)
    return {"Version": "2012-10-17", "Statement": list(statements.values())}


class _Statements:
    def __init__(self, aws: AwsSettings | None) -> None:
        self._aws = aws
        self._region = aws.region if aws is not None and aws.region else "*"
        copies = [one.region for one in aws.copy_to] if aws is not None else []
        self._regions = [self._region] if self._region == "*" else [self._region, *copies]
        starts = {"cn-": "aws-cn", "us-gov-": "aws-us-gov"}
        self._partition = next((p for s, p in starts.items() if self._region.startswith(s)), "aws")

    def check(self) -> Iterator[dict[str, Any]]:
        """Yield what `check` needs beyond the other parts, whose calls it tries with DryRun."""
        yield self._look()
        yield _allow("Prices", ["pricing:GetProducts"], ["*"])
        if self._aws is not None and self._aws.instance_profile:
            yield self._profile()

    def build(self) -> Iterator[dict[str, Any]]:
        """Yield what a bake needs: Packer's amazon-ebs, and finishing the AMI."""
        yield from self._instances("RunInstances")
        yield _allow(
            "UseInstancesOfRuns",
            ["ec2:StopInstances", "ec2:ModifyInstanceMetadataOptions", "ec2:CreateImage"],
            self._ec2("instance"),
            _OURS,
        )
        # Old versions of Packer tag an AMI only after they made it.
        made = self._ec2("image", "snapshot")
        yield _allow("MakeImages", ["ec2:CreateImage"], made)
        yield self._tag(made)
        yield _allow("ChangeImagesOfRuns", ["ec2:CreateTags"], made, _OURS)
        yield _allow("ChangeImagesOfRuns", ["ec2:ModifyImageAttribute"], self._ec2("image"), _OURS)
        # An unfinished AMI when a build is stopped.
        yield self._delete(made)
        yield from self._optional()

    def verify(self) -> Iterator[dict[str, Any]]:
        """Yield what verifying an AMI on instances needs."""
        yield from self._instances("RunInstances")
        yield _allow("UseInstancesOfRuns", ["ec2:GetConsoleOutput"], self._ec2("instance"), _OURS)
        yield _allow("ChangeImagesOfRuns", ["ec2:CreateTags"], self._ec2("image"), _OURS)
        yield from self._optional(baking=False)

    def copy(self) -> Iterator[dict[str, Any]]:
        """Yield what copying an AMI to other regions and sharing it needs."""
        yield self._look()
        made = self._kept("image", "snapshot")
        yield _allow("CopyImagesOfRuns", ["ec2:CopyImage"], made, _OURS)
        yield _allow("MakeCopies", ["ec2:CopyImage"], made, _ASKED)
        yield _allow(
            "TagCopies",
            ["ec2:CreateTags"],
            made,
            {"StringEquals": {"ec2:CreateAction": ["CopyImage"]}, **_KEYS},
        )
        # A copy that began without its tags is found by its name.
        yield self._tag(made)
        yield _allow("ChangeImagesOfRuns", ["ec2:CreateTags"], made, _OURS)
        yield _allow("ChangeImagesOfRuns", ["ec2:ModifyImageAttribute"], self._kept("image"), _OURS)
        yield _allow("ShareSnapshotsOfRuns", ["ec2:ModifySnapshotAttribute"], self._kept("snapshot"), _OURS)
        # A failed copy is deleted before the next attempt.
        yield self._delete(self._kept("image", "snapshot"))
        if self._aws is not None and (keys := [one for one in self._aws.copy_to if one.kms_key]):
            yield from self._keys("Copies", [self._key(one.kms_key, one.region) for one in keys])
            if self._aws.kms_key:
                yield from self._keys("", [self._key(self._aws.kms_key, self._region)])

    def promote(self) -> Iterator[dict[str, Any]]:
        """Yield what moving channels needs; SSM validates an AMI with the caller's permissions."""
        yield self._look()
        yield _allow(
            "MoveChannels",
            [
                f"ssm:{action}"
                for action in (
                    "GetParameter",
                    "GetParameterHistory",
                    "GetParametersByPath",
                    "PutParameter",
                    "AddTagsToResource",
                    "LabelParameterVersion",
                    "DeleteParameter",
                )
            ],
            self._everywhere("ssm", "*", "parameter/ami-builder/*"),
        )
        yield _allow("ChangeImagesOfRuns", ["ec2:CreateTags"], self._kept("image"), _OURS)

    def prune(self) -> Iterator[dict[str, Any]]:
        """Yield what finding every reference to an AMI needs, and deprecating and deleting AMIs of runs."""
        yield self._look()
        lists = ["autoscaling:DescribeLaunchConfigurations", "ssm:DescribeParameters"]
        yield _allow("FindUses", lists, ["*"])
        reads = ["GetParameters", "GetParametersByPath", "GetParameterHistory"]
        everything = self._everywhere("ssm", "*", "parameter/*")
        yield _allow("FindUsesByValue", [f"ssm:{action}" for action in reads], everything)
        yield _allow("DeprecateImagesOfRuns", ["ec2:EnableImageDeprecation"], self._kept("image"), _OURS)
        yield self._delete(self._kept("image", "snapshot"))

    def lifecycle(self) -> Iterator[dict[str, Any]]:
        """Yield what deleting orphaned resources needs."""
        yield self._look()
        yield _allow("UseInstancesOfRuns", ["ec2:TerminateInstances"], self._ec2("instance"), _OURS)
        if self._aws is not None and self._aws.spot:
            yield _allow("TagSpotInstances", ["ec2:CreateTags"], self._ec2("instance"), _FROM_TEMPLATE)
        templates = self._ec2("launch-template")
        yield _allow("UseTemplatesOfRuns", ["ec2:DeleteLaunchTemplate"], templates, _OURS)
        yield _allow("DeleteVolumesOfRuns", ["ec2:DeleteVolume"], self._ec2("volume"), _OURS)
        yield self._tag(self._kept("image", "snapshot"))
        yield self._delete(self._kept("image", "snapshot"))
        yield _allow("UseGroupsOfRuns", ["ec2:DeleteSecurityGroup"], self._ec2("security-group"), _OURS)

    def _look(self) -> dict[str, Any]:
        return _allow("Look", ["ec2:Describe*"], ["*"])

    def _instances(self, action: str) -> Iterator[dict[str, Any]]:
        """Yield what launching and terminating an instance in its own security group needs."""
        yield self._look()
        yield _allow("Launch", [f"ec2:{action}"], self._ec2("instance", "volume"), _ASKED)
        yield _allow(
            "LaunchFrom",
            [f"ec2:{action}"],
            self._ec2("image", "snapshot", "subnet", "network-interface"),
        )
        yield _allow("UseGroupsOfRuns", [f"ec2:{action}"], self._ec2("security-group"), _OURS)
        yield _allow("MakeGroups", ["ec2:CreateSecurityGroup"], self._ec2("security-group"), _ASKED)
        yield _allow("MakeGroupsIn", ["ec2:CreateSecurityGroup"], self._ec2("vpc"))
        calls = [action, "CreateSecurityGroup", "CreateImage"]
        made = self._ec2("instance", "volume", "network-interface", "security-group", "image", "snapshot")
        if self._aws is not None and self._aws.spot:
            calls.append("CreateLaunchTemplate")
            made += self._ec2("launch-template")
        condition = {"StringEquals": {"ec2:CreateAction": calls}, **_KEYS}
        yield _allow("TagWhatIsMade", ["ec2:CreateTags"], made, condition)
        yield _allow("UseInstancesOfRuns", ["ec2:TerminateInstances"], self._ec2("instance"), _OURS)
        yield _allow(
            "UseGroupsOfRuns",
            ["ec2:AuthorizeSecurityGroupIngress", "ec2:DeleteSecurityGroup"],
            self._ec2("security-group"),
            _OURS,
        )

    def _profile(self) -> dict[str, Any]:
        profile = self._arn_of("iam", "", "*", "instance-profile/*")
        return _allow("LookAtInstanceProfile", ["iam:GetInstanceProfile"], [profile])

    def _tag(self, resources: Sequence[str]) -> dict[str, Any]:
        """Return what tagging AMIs and snapshots that were made without tags needs."""
        return _allow("TagImages", ["ec2:CreateTags"], resources, _NAMELESS)

    def _delete(self, resources: Sequence[str]) -> dict[str, Any]:
        return _allow("RemoveImagesOfRuns", ["ec2:DeregisterImage", "ec2:DeleteSnapshot"], resources, _OURS)

    def _optional(self, *, baking: bool = True) -> Iterator[dict[str, Any]]:
        """Yield what some settings need."""
        aws = self._aws
        if aws is None:
            return
        if aws.source.startswith("ssm:") and baking:
            name = aws.source[4:].lstrip("/")
            owner = "" if name.startswith("aws/service/") else "*"
            parameter = self._arn_of("ssm", self._region, owner, f"parameter/{name}")
            yield _allow("ReadBaseParameter", ["ssm:GetParameter"], [parameter])
        if aws.instance_profile:
            # The profile's role is unknown here; a policy that names it is stricter.
            role = self._arn_of("iam", "", "*", "role/*")
            to_ec2 = {"StringLike": {"iam:PassedToService": "ec2.amazonaws.com*"}}
            yield _allow("PassInstanceProfile", ["iam:PassRole"], [role], to_ec2)
            if baking:
                # Packer checks that the profile exists.
                yield self._profile()
        if aws.connect is Connect.SESSION_MANAGER:
            tagged = {"StringLike": {f"ssm:resourceTag/{_RUN}": "*"}}
            yield _allow("Connect", ["ssm:StartSession"], self._ec2("instance"), tagged)
            documents = [self._arn_of("ssm", self._region, "", "document/AWS-StartSSHSession")]
            documents.append(self._arn_of("ssm", self._region, "", "document/AWS-StartPortForwardingSession"))
            yield _allow("ConnectBySsh", ["ssm:StartSession"], documents)
            sessions = [self._arn_of("ssm", self._region, "*", "session/*")]
            yield _allow("EndConnections", ["ssm:TerminateSession", "ssm:ResumeSession"], sessions)
        if aws.kms_key:
            yield from self._keys("", [self._key(aws.kms_key, self._region)])
        if aws.spot and baking:
            # Packer creates a fleet from a launch template, and tags its resources later.
            template, launched = self._ec2("launch-template"), self._ec2("instance", "volume")
            places = self._ec2("fleet", "image", "subnet", "network-interface")
            yield _allow("SpotFleet", ["ec2:CreateFleet"], [*launched, *places])
            yield _allow("SpotLaunch", ["ec2:RunInstances"], launched)
            yield _allow("UseTemplatesOfRuns", ["ec2:CreateFleet", "ec2:RunInstances"], template, _OURS)
            yield _allow("MakeTemplates", ["ec2:CreateLaunchTemplate"], template, _ASKED)
            yield _allow("UseTemplatesOfRuns", ["ec2:DeleteLaunchTemplate"], template, _OURS)
            yield _allow("TagSpotInstances", ["ec2:CreateTags"], self._ec2("instance"), _FROM_TEMPLATE)
            # Both Packer and ami-builder do it, in either order.
            yield _allow("UseInstancesOfRuns", ["ec2:CreateTags"], self._ec2("instance"), _OURS)
            others = self._ec2("volume", "spot-instances-request")
            yield _allow("TagSpotRequests", ["ec2:CreateTags"], others, _NAMELESS)

    def _keys(self, of: str, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
        uses = [f"kms:{use}" for use in ("DescribeKey", "Decrypt", "ReEncrypt*", "GenerateDataKey*")]
        yield _allow(f"UseKey{of}", uses, keys)
        for_aws = {"Bool": {"kms:GrantIsForAWSResource": "true"}}
        yield _allow(f"LetEc2UseKey{of}", ["kms:CreateGrant"], keys, for_aws)

    def _key(self, key: str, region: str) -> str:
        exact = key.startswith("arn:") and ":alias/" not in key
        return key if exact else self._arn_of("kms", region, "*", "key/*")

    def _kept(self, *kinds: str) -> list[str]:
        """Return the ARNs of `_ec2`, in the regions of copies too."""
        return [arn for kind in kinds for arn in self._everywhere("ec2", "", f"{kind}/*")]

    def _everywhere(self, service: str, account: str, resource: str) -> list[str]:
        return [self._arn_of(service, region, account, resource) for region in self._regions]

    def _ec2(self, *kinds: str) -> list[str]:
        return [
            self._arn_of("ec2", self._region, "" if kind in _NO_ACCOUNT else "*", f"{kind}/*")
            for kind in kinds
        ]

    def _arn_of(self, service: str, region: str, account: str, resource: str) -> str:
        return f"arn:{self._partition}:{service}:{region}:{account}:{resource}"


def _allow(
    sid: str, actions: Sequence[str], resources: Sequence[str], condition: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    statement = {"Sid": sid, "Effect": "Allow", "Action": list(actions), "Resource": list(resources)}
    return statement | ({"Condition": dict(condition)} if condition else {})


def _merge(statements: dict[str, dict[str, Any]], new: dict[str, Any]) -> None:
    """Add a statement, or merge its actions and resources into the one of the same Sid and condition."""
    known = statements.setdefault(new["Sid"], new)
    for part in ("Action", "Resource"):
        known[part] += [one for one in new[part] if one not in known[part]]
