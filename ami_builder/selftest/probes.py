"""The beliefs that the loopback cloud is built on, each as a few calls that cost next to nothing.

A probe is data: calls in order, their parameters, and what to look for in their answers. What is expected is
not written here: it is what the loopback cloud answered to the same calls (`recorded.json`). No probe needs
an instance, and each names only what it made itself, an id that nobody has, or the selftest's own AMI.
"""

from __future__ import annotations

from typing import Any

from ami_builder.aws.tags import RUN, SELFTEST
from ami_builder.selftest.probing import Call, Probe

_NO_ID = "0123456789abcdef0"
_VALIDATED_SECONDS = 15.0
_AMI, _SNAPSHOT, _GROUP = f"ami-{_NO_ID}", f"snap-{_NO_ID}", f"sg-{_NO_ID}"
_INSTANCE, _VOLUME, _TEMPLATE = f"i-{_NO_ID}", f"vol-{_NO_ID}", f"lt-{_NO_ID}"
_OURS = f"length([].Tags[?Key=='{RUN}'][])"
_IMAGE_VALUE = {
    "Type": "String",
    "DataType": "aws:ec2:image",
    "Overwrite": False,
    "Tags": [{"Key": SELFTEST, "Value": "{name}"}],
}


def _missing(name: str, belief: str, action: str, **parameters: Any) -> Probe:
    return Probe(name=name, belief=belief, calls=(Call(action=action, parameters=parameters),))


_DELETING = "A delete of an id that does not exist says so to those who may delete everything."
_DESCRIBING = "A describe of an id that does not exist is an error; a filter that matches nothing is not."
_TRYING = "A dry run of an id that does not exist says nothing about permissions that depend on tags."

_WRITE = Call(
    action="ssm:PutParameter",
    parameters={"Name": "{folder}again", "Value": "{base}", **_IMAGE_VALUE},
    facts={"version": "Version"},
)
_READ = Call(
    action="ssm:GetParameter",
    parameters={"Name": "{folder}again"},
    facts={"there": "Parameter.Value == kept.base", "version": "Parameter.Version"},
    until="there",
)
_DELETE = Call(action="ssm:DeleteParameter", parameters={"Name": "{folder}again"})

WITHOUT_AMI: tuple[Probe, ...] = (
    _missing("deregister a missing AMI", _DELETING, "ec2:DeregisterImage", ImageId=_AMI),
    _missing("delete a missing snapshot", _DELETING, "ec2:DeleteSnapshot", SnapshotId=_SNAPSHOT),
    _missing("delete a missing group", _DELETING, "ec2:DeleteSecurityGroup", GroupId=_GROUP),
    _missing("delete a missing volume", _DELETING, "ec2:DeleteVolume", VolumeId=_VOLUME),
    _missing("terminate a missing instance", _DELETING, "ec2:TerminateInstances", InstanceIds=[_INSTANCE]),
    _missing("delete a missing template", _DELETING, "ec2:DeleteLaunchTemplate", LaunchTemplateId=_TEMPLATE),
    _missing("try to deregister a missing AMI", _TRYING, "ec2:DeregisterImage", ImageId=_AMI, DryRun=True),
    _missing(
        "try to delete a missing snapshot", _TRYING, "ec2:DeleteSnapshot", SnapshotId=_SNAPSHOT, DryRun=True
    ),
    _missing(
        "try to terminate a missing instance",
        _TRYING,
        "ec2:TerminateInstances",
        InstanceIds=[_INSTANCE],
        DryRun=True,
    ),
    _missing(
        "try to delete a missing group", _TRYING, "ec2:DeleteSecurityGroup", GroupId=_GROUP, DryRun=True
    ),
    _missing(
        "tag a missing AMI",
        "A tag for an id that does not exist is refused.",
        "ec2:CreateTags",
        Resources=[_AMI],
        Tags=[{"Key": RUN, "Value": "selftest"}],
    ),
    _missing("describe a missing AMI", _DESCRIBING, "ec2:DescribeImages", ImageIds=[_AMI]),
    _missing("describe a malformed AMI", _DESCRIBING, "ec2:DescribeImages", ImageIds=["ami-selftest"]),
    _missing("describe a missing snapshot", _DESCRIBING, "ec2:DescribeSnapshots", SnapshotIds=[_SNAPSHOT]),
    _missing("describe a missing instance", _DESCRIBING, "ec2:DescribeInstances", InstanceIds=[_INSTANCE]),
    _missing("describe a missing volume", _DESCRIBING, "ec2:DescribeVolumes", VolumeIds=[_VOLUME]),
    _missing("describe a missing group", _DESCRIBING, "ec2:DescribeSecurityGroups", GroupIds=[_GROUP]),
    Probe(
        name="filter by a missing AMI",
        belief=_DESCRIBING,
        calls=(
            Call(
                action="ec2:DescribeImages",
                parameters={"Filters": [{"Name": "image-id", "Values": [_AMI]}]},
                facts={"images": "length(Images)"},
            ),
        ),
    ),
    Probe(
        name="copy a missing AMI",
        belief="CopyImage of a source that does not exist is refused at once.",
        calls=(
            Call(
                action="ec2:CopyImage",
                parameters={"Name": "{name}-missing", "SourceImageId": _AMI, "SourceRegion": "{region}"},
                tagged=("image", "snapshot"),
            ),
        ),
    ),
    _missing(
        "try to launch a missing AMI",
        "A dry run of a launch finds out that the AMI does not exist.",
        "ec2:RunInstances",
        ImageId=_AMI,
        InstanceType="{type}",
        MinCount=1,
        MaxCount=1,
        DryRun=True,
    ),
    _missing(
        "try a fleet of a missing template",
        _TRYING,
        "ec2:CreateFleet",
        Type="instant",
        LaunchTemplateConfigs=[
            {"LaunchTemplateSpecification": {"LaunchTemplateId": _TEMPLATE, "Version": "1"}}
        ],
        TargetCapacitySpecification={"TotalTargetCapacity": 1, "DefaultTargetCapacityType": "spot"},
        DryRun=True,
    ),
    _missing(
        "ids and a page size together",
        "DescribeImages takes ids and MaxResults together, unlike DescribeInstances.",
        "ec2:DescribeImages",
        ImageIds=["{base}"],
        MaxResults=5,
    ),
    _missing(
        "more than 200 values of a filter",
        "A filter takes 200 values.",
        "ec2:DescribeImages",
        Filters=[{"Name": "image-id", "Values": [f"ami-{number:017x}" for number in range(201)]}],
    ),
    _missing(
        "a missing instance profile",
        "An instance profile that does not exist is NoSuchEntity, to those who may look.",
        "iam:GetInstanceProfile",
        InstanceProfileName="{name}",
    ),
    _missing(
        "an instance profile by its ARN",
        "Only the name of an instance profile is taken.",
        "iam:GetInstanceProfile",
        InstanceProfileName="arn:aws:iam::000000000000:instance-profile/{name}",
    ),
    Probe(
        name="a security group twice",
        belief="A name is taken at once, tags are there at once, and what is deleted can't be deleted again.",
        calls=(
            Call(
                action="ec2:CreateSecurityGroup",
                parameters={"GroupName": "{name}", "Description": "selftest", "VpcId": "{vpc}"},
                tagged=("security-group",),
                keep={"group": "GroupId"},
            ),
            Call(
                action="ec2:CreateSecurityGroup",
                parameters={"GroupName": "{name}", "Description": "selftest", "VpcId": "{vpc}"},
                tagged=("security-group",),
            ),
            Call(
                action="ec2:DescribeSecurityGroups",
                parameters={"GroupIds": ["{group}"]},
                facts={"tags of the run": f"SecurityGroups | {_OURS}"},
            ),
            Call(action="ec2:DeleteSecurityGroup", parameters={"GroupId": "{group}"}),
            Call(action="ec2:DeleteSecurityGroup", parameters={"GroupId": "{group}"}),
        ),
    ),
    Probe(
        name="a parameter with a missing AMI",
        belief="SSM answers with a version, and drops a value that names no AMI later and silently.",
        calls=(
            Call(
                action="ssm:PutParameter",
                parameters={"Name": "{folder}missing", "Value": _AMI, **_IMAGE_VALUE},
                facts={"version": "Version"},
            ),
            Call(
                action="ssm:GetParameter",
                parameters={"Name": "{folder}missing"},
                after=_VALIDATED_SECONDS,
                facts={"version": "Parameter.Version"},
            ),
            Call(action="ssm:GetParameterHistory", parameters={"Name": "{folder}missing"}),
            Call(action="ssm:DeleteParameter", parameters={"Name": "{folder}missing"}),
        ),
    ),
    _missing(
        "a parameter with a word for an AMI",
        "SSM takes a value that can't be an AMI's id at first, like any other.",
        "ssm:PutParameter",
        Name="{folder}word",
        Value="selftest",
        **_IMAGE_VALUE,
    ),
    Probe(
        name="a parameter that is deleted and made again",
        belief="A deleted parameter can be made again, and counts from version 1.",
        calls=(
            _WRITE,
            _READ,
            Call(
                action="ssm:PutParameter",
                parameters={"Name": "{folder}again", "Value": "{base}", **_IMAGE_VALUE},
            ),
            Call(
                action="ssm:LabelParameterVersion",
                parameters={"Name": "{folder}again", "ParameterVersion": 9, "Labels": ["selftest"]},
            ),
            _DELETE,
            Call(action="ssm:GetParameter", parameters={"Name": "{folder}again"}),
            _WRITE,
            _READ,
            _DELETE,
        ),
    ),
)
"""Probes that need no AMI of ours."""

_COPY = {
    "Name": "{name}-probe",
    "SourceImageId": "{ami}",
    "SourceRegion": "{region}",
    "ClientToken": "{token}",
}
_OWN = {"Filters": [{"Name": "image-id", "Values": ["{copy}"]}], "Owners": ["self"]}

WITH_AMI: tuple[Probe, ...] = (
    Probe(
        name="a copy and its client token",
        belief="A token stands for one copy, with the same parameters only. A copy has its tags at once.",
        calls=(
            Call(
                action="ec2:CopyImage",
                parameters=_COPY,
                tagged=("image", "snapshot"),
                keep={"copy": "ImageId"},
            ),
            Call(
                action="ec2:CopyImage",
                parameters=_COPY,
                tagged=("image", "snapshot"),
                facts={"the same": "ImageId == kept.copy"},
            ),
            Call(
                action="ec2:CopyImage",
                parameters={**_COPY, "Name": "{name}-other"},
                tagged=("image", "snapshot"),
            ),
            Call(
                action="ec2:CopyImage",
                parameters={**_COPY, "ClientToken": "{token}-2"},
                tagged=("image", "snapshot"),
            ),
            Call(
                action="ec2:DescribeImages",
                parameters={"ImageIds": ["{copy}"]},
                facts={"tags of the run": f"Images | {_OURS}"},
            ),
            Call(
                action="ec2:DescribeImages",
                parameters={"ImageIds": ["{copy}"]},
                facts={
                    "available": "Images[0].State == 'available'",
                    "settled": "Images[0].State != 'pending'",
                },
                keep={"copied": "Images[0].BlockDeviceMappings[0].Ebs.SnapshotId"},
                until="settled",
                seconds=3600.0,
            ),
            Call(
                action="ec2:DescribeSnapshots",
                parameters={"SnapshotIds": ["{copied}"]},
                facts={"tags of the run": f"Snapshots | {_OURS}"},
            ),
        ),
    ),
    Probe(
        name="deprecation",
        belief="A time in the past is refused; the owner sees a deprecated AMI without IncludeDeprecated.",
        calls=(
            Call(
                action="ec2:EnableImageDeprecation", parameters={"ImageId": "{copy}", "DeprecateAt": "{past}"}
            ),
            Call(
                action="ec2:EnableImageDeprecation", parameters={"ImageId": "{copy}", "DeprecateAt": "{soon}"}
            ),
            Call(action="ec2:DescribeImages", parameters=_OWN, facts={"images": "length(Images)"}),
            Call(
                action="ec2:DescribeImages",
                parameters={**_OWN, "IncludeDeprecated": True},
                facts={
                    "images": "length(Images)",
                    "to the minute": "ends_with(Images[0].DeprecationTime, ':00.000Z')",
                },
            ),
        ),
    ),
    Probe(
        name="a tag of AWS's",
        belief="Nobody can set a tag whose key begins with `aws:`.",
        calls=(
            Call(
                action="ec2:CreateTags",
                parameters={"Resources": ["{copy}"], "Tags": [{"Key": "aws:selftest", "Value": "selftest"}]},
            ),
        ),
    ),
    Probe(
        name="a disabled AMI",
        belief="A disabled AMI is in no list without IncludeDisabled, and keeps its snapshots.",
        calls=(
            Call(action="ec2:DisableImage", parameters={"ImageId": "{copy}"}),
            Call(action="ec2:DescribeImages", parameters=_OWN, facts={"images": "length(Images)"}),
            Call(
                action="ec2:DescribeImages",
                parameters={**_OWN, "IncludeDisabled": True},
                facts={"images": "length(Images)"},
            ),
            Call(
                action="ec2:DescribeImages",
                parameters={"ImageIds": ["{copy}"]},
                facts={"images": "length(Images)"},
            ),
            Call(action="ec2:EnableImage", parameters={"ImageId": "{copy}"}),
        ),
    ),
    Probe(
        name="a snapshot in use",
        belief="A snapshot of an AMI can't be deleted.",
        calls=(Call(action="ec2:DeleteSnapshot", parameters={"SnapshotId": "{copied}"}),),
    ),
    Probe(
        name="deregistering with snapshots",
        belief="The answer says what became of each snapshot. A second deregistration finds nothing.",
        calls=(
            Call(action="ec2:DeregisterImage", parameters={"ImageId": "{copy}", "DryRun": True}),
            Call(
                action="ec2:DeregisterImage",
                parameters={"ImageId": "{copy}", "DeleteAssociatedSnapshots": True},
                facts={"results": "DeleteSnapshotResults[].ReturnCode"},
            ),
            Call(
                action="ec2:DeregisterImage",
                parameters={"ImageId": "{copy}", "DeleteAssociatedSnapshots": True},
            ),
            Call(action="ec2:DescribeImages", parameters={"ImageIds": ["{copy}"]}),
            Call(action="ec2:DeleteSnapshot", parameters={"SnapshotId": "{copied}"}),
            Call(action="ec2:DescribeSnapshots", parameters={"SnapshotIds": ["{copied}"]}),
            Call(
                action="ec2:EnableImageDeprecation", parameters={"ImageId": "{copy}", "DeprecateAt": "{soon}"}
            ),
        ),
    ),
    Probe(
        name="the token of a deregistered copy",
        belief="A client token stays bound to its copy, also after that was deregistered.",
        calls=(
            Call(
                action="ec2:CopyImage",
                parameters=_COPY,
                tagged=("image", "snapshot"),
                facts={"the same": "ImageId == kept.copy"},
            ),
        ),
    ),
)
"""Probes of a copy that they make of the selftest's AMI, in the same region."""
