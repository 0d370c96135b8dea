"""The permissions that each part of the work needs: calls, on which resources, with what in the request.

A table of what the program's calls really look like, beside the policy that is printed; a test holds that
the two name the same calls. Calls that only read are not here: `check` makes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ami_builder.aws import tags as tagging
from ami_builder.aws.policy import Section
from ami_builder.aws.tags import Purpose
from ami_builder.build import plugins
from ami_builder.config.schema import Image
from ami_builder.core.options import Connect, Role

_NO_ID = "0123456789abcdef0"
Context = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """A permission: one call on one resource."""

    section: Section
    action: str
    resource: str
    """Its ARN; of one that does not exist yet, with `*` or an id that nobody has."""
    what: str
    """The resource for people, such as `an instance in eu-west-1`."""
    context: Context


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A region, and what is known of it."""

    partition: str
    account: str
    region: str
    image: Image
    """With the settings of this region."""
    base_ami: str = ""
    subnet: str = ""
    vpc: str = ""
    role: str = ""
    """The ARN of the role in aws.instance_profile."""
    default_key: str = ""
    """The user's own key of EBS encryption by default; empty if there is none."""

    def arn(self, kind: str, name: str = "*") -> str:
        """Return the ARN of an EC2 resource. AMIs and snapshots have no account in theirs."""
        owner = "" if kind in ("image", "snapshot") else self.account
        return f"arn:{self.partition}:ec2:{self.region}:{owner}:{kind}/{name}"

    def named(
        self, service: str, resource: str, *, region: str | None = None, owner: str | None = None
    ) -> str:
        """Return the ARN of a resource of another service."""
        where = self.region if region is None else region
        return f"arn:{self.partition}:{service}:{where}:{self.account if owner is None else owner}:{resource}"


_OWN = {
    "instance": f"i-{_NO_ID}",
    "volume": f"vol-{_NO_ID}",
    "network-interface": f"eni-{_NO_ID}",
    "security-group": f"sg-{_NO_ID}",
    "image": f"ami-{_NO_ID}",
    "snapshot": f"snap-{_NO_ID}",
    "launch-template": f"lt-{_NO_ID}",
    "spot-instances-request": f"sir-{_NO_ID[:8]}",
}


class _Writer:
    """Makes the needs of one region."""

    def __init__(self, place: Place) -> None:
        self.place = place
        tags = tagging.resource_tags(place.image, "0" * 64, "check", Purpose.VERIFY)
        self.anywhere: Context = {"aws:RequestedRegion": (place.region,), "ec2:Region": (place.region,)}
        self.asked: Context = {
            **{f"aws:RequestTag/{key}": (value,) for key, value in tags.items()},
            "aws:TagKeys": tuple(tags),
        }
        self.tagged: Context = {f"aws:ResourceTag/{key}": (value,) for key, value in tags.items()}
        self.tagged = {**self.tagged, **{f"ec2:ResourceTag/{key}": (value,) for key, value in tags.items()}}

    def need(
        self,
        section: Section,
        calls: str,
        resource: str,
        what: str,
        context: Context,
        *,
        service: str = "ec2",
    ) -> Iterator[Need]:
        for call in calls.split():
            yield Need(
                section=section,
                action=f"{service}:{call}",
                resource=resource,
                what=f"{what} in {self.place.region}",
                context={**self.anywhere, **context},
            )

    def make(self, section: Section, call: str, *kinds: str, more: Context | None = None) -> Iterator[Need]:
        """Yield what it takes to make resources, and to tag them in the same call."""
        for kind in kinds:
            arn = self.place.arn(kind)
            yield from self.need(section, call, arn, _a(kind), {**self.asked, **(more or {})})
            created = {**self.asked, "ec2:CreateAction": (call,)}
            yield from self.need(section, "CreateTags", arn, f"a new {kind}", created)

    def use(self, section: Section, calls: str, kind: str, context: Context | None = None) -> Iterator[Need]:
        """Yield what it takes to do something to a run's own resource."""
        arn = self.place.arn(kind, _OWN[kind])
        whole = {**self.tagged, **(context or {})}
        yield from self.need(section, calls, arn, f"a run's {kind}", whole)


def _launch(image: Image, section: Section) -> Context:
    """Return what a launch has that policies ask for most."""
    kinds = image.aws.instance_types if section is Section.BUILD else image.verify.instance_types
    required = section is not Section.BUILD or plugins.has_plugins()
    return {
        "ec2:InstanceType": kinds[:1],
        "ec2:MetadataHttpTokens": ("required",) if required else ("optional",),
        "ec2:VolumeType": ("gp3",),
        "ec2:RootDeviceType": ("ebs",),
    }


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeio" else f"a {kind}"


def at_home(place: Place) -> Iterator[Need]:
    """Yield what baking, verifying and cleaning up in a region need."""
    writer, image = _Writer(place), place.image
    aws = image.aws
    base = place.base_ami or _OWN["image"]
    build, verify, lifecycle = Section.BUILD, Section.VERIFY, Section.LIFECYCLE
    for section in (build, verify):
        yield from writer.make(section, "RunInstances", "instance", "volume", more=_launch(image, section))
        yield from writer.need(
            section, "RunInstances", place.arn("network-interface"), "a network-interface", {}
        )
        subnet = place.arn("subnet", place.subnet or f"subnet-{_NO_ID}")
        yield from writer.need(section, "RunInstances", subnet, "the subnet", {})
        yield from writer.use(section, "RunInstances", "security-group")
        yield from writer.make(section, "CreateSecurityGroup", "security-group")
        vpc = place.arn("vpc", place.vpc or f"vpc-{_NO_ID}")
        yield from writer.need(section, "CreateSecurityGroup", vpc, "the VPC", {})
        yield from writer.use(section, "AuthorizeSecurityGroupIngress DeleteSecurityGroup", "security-group")
        yield from writer.use(section, "TerminateInstances", "instance")
        if place.role:
            to_ec2 = {"iam:PassedToService": ("ec2.amazonaws.com",)}
            yield from writer.need(section, "PassRole", place.role, "its role", to_ec2, service="iam")
        yield from _session(writer, section)
        yield from _key(writer, section, aws.kms_key or place.default_key)
    yield from writer.need(build, "RunInstances", place.arn("image", base), "the base AMI", {})
    yield from writer.use(verify, "RunInstances", "image")
    yield from writer.use(verify, "GetConsoleOutput", "instance")
    yield from writer.use(build, "StopInstances CreateImage", "instance")
    if not plugins.has_plugins():
        yield from writer.use(build, "ModifyInstanceMetadataOptions", "instance")
    for kind in ("image", "snapshot"):
        yield from writer.need(build, "CreateImage", place.arn(kind), _a(kind), writer.asked)
        new = place.arn(kind, _OWN[kind])
        yield from writer.need(build, "CreateTags", new, f"a new {kind}", writer.asked)
        yield from writer.use(build, "CreateTags", kind, writer.asked)
    if aws.root_device:
        yield from writer.make(build, "RegisterImage", "image")
        yield from writer.use(build, "RegisterImage", "snapshot")
    yield from writer.use(build, "ModifyImageAttribute DeregisterImage", "image")
    yield from writer.use(build, "DeleteSnapshot", "snapshot")
    yield from writer.use(verify, "CreateTags", "image", writer.asked)
    if aws.spot:
        yield from _spot(writer)
    yield from writer.use(lifecycle, "TerminateInstances", "instance")
    yield from writer.use(lifecycle, "DeleteSecurityGroup", "security-group")
    yield from writer.use(lifecycle, "DeleteLaunchTemplate", "launch-template")
    yield from writer.use(lifecycle, "DeleteVolume", "volume")
    yield from writer.use(lifecycle, "DeregisterImage", "image")
    yield from writer.use(lifecycle, "DeleteSnapshot", "snapshot")
    yield from _released(writer)


def of_copies(place: Place, home: Place) -> Iterator[Need]:
    """Yield what copies of an AMI of `home` need in another region."""
    writer, copy = _Writer(place), Section.COPY
    yield from writer.make(copy, "CopyImage", "image", "snapshot")
    yield from writer.need(copy, "CopyImage", home.arn("image", _OWN["image"]), "the AMI", writer.asked)
    yield from writer.use(copy, "CreateTags", "image", writer.asked)
    yield from writer.use(copy, "CreateTags", "snapshot", writer.asked)
    yield from writer.use(copy, "ModifyImageAttribute DeregisterImage", "image")
    yield from writer.use(copy, "DeleteSnapshot", "snapshot")
    yield from _key(writer, copy, place.image.aws.kms_key or place.default_key)
    yield from _released(writer)


def _released(writer: _Writer) -> Iterator[Need]:
    """Yield what channels, sharing and pruning need in any region."""
    image = writer.place.image
    name = f"parameter/ami-builder/{image.name}/{image.arch.ec2}/{image.lifecycle.channels[0]}"
    calls = (
        "GetParameter GetParameterHistory GetParametersByPath PutParameter AddTagsToResource"
        " LabelParameterVersion DeleteParameter"
    )
    parameter = writer.place.named("ssm", name)
    yield from writer.need(Section.PROMOTE, calls, parameter, "a channel's parameter", {}, service="ssm")
    yield from writer.use(Section.PROMOTE, "CreateTags", "image", writer.asked)
    if image.aws.share_with:
        yield from writer.use(Section.COPY, "ModifyImageAttribute", "image")
        yield from writer.use(Section.COPY, "ModifySnapshotAttribute", "snapshot")
    yield from _templates(writer)
    yield from writer.use(Section.PRUNE, "EnableImageDeprecation DeregisterImage", "image")
    yield from writer.use(Section.PRUNE, "DeleteSnapshot", "snapshot")


def _templates(writer: _Writer) -> Iterator[Need]:
    """Yield what the launch templates of channels need; they have no run's tag."""
    place, section = writer.place, Section.LAUNCH_TEMPLATE
    tags = {
        **tagging.own_tags(place.image.aws),
        tagging.NAME: place.image.name,
        tagging.IMAGE: place.image.name,
        tagging.CHANNEL: place.image.lifecycle.channels[0],
        tagging.ROLE: str(Role.WORKER),
    }
    asked: dict[str, tuple[str, ...]] = {f"aws:RequestTag/{key}": (value,) for key, value in tags.items()}
    asked["aws:TagKeys"] = tuple(tags)
    tagged = {f"{service}:ResourceTag/{k}": (v,) for service in ("aws", "ec2") for k, v in tags.items()}
    new, what = place.arn("launch-template"), "a channel's launch template"
    created = {**asked, "ec2:CreateAction": ("CreateLaunchTemplate",)}
    yield from writer.need(section, "CreateLaunchTemplate", new, what, asked)
    yield from writer.need(section, "CreateTags", new, what, created)
    own = place.arn("launch-template", _OWN["launch-template"])
    calls = "CreateLaunchTemplateVersion ModifyLaunchTemplate DeleteLaunchTemplate"
    yield from writer.need(section, calls, own, what, tagged)
    yield from writer.need(section, "CreateTags", own, what, {**tagged, **asked})


def _spot(writer: _Writer) -> Iterator[Need]:
    place, build = writer.place, Section.BUILD
    yield from writer.make(build, "CreateLaunchTemplate", "launch-template")
    yield from writer.use(build, "CreateFleet RunInstances DeleteLaunchTemplate", "launch-template")
    name = "role/aws-service-role/spot.amazonaws.com/AWSServiceRoleForEC2Spot"
    role = place.named("iam", name, region="")
    service = {"iam:AWSServiceName": ("spot.amazonaws.com",)}
    yield from writer.need(build, "CreateServiceLinkedRole", role, "the role of spot", service, service="iam")
    for kind in ("fleet", "instance", "volume"):
        yield from writer.need(build, "CreateFleet", place.arn(kind), _a(kind), {})
    for kind in ("instance", "volume"):
        yield from writer.need(build, "RunInstances", place.arn(kind), f"{_a(kind)} of a fleet", {})
        yield from writer.use(build, "CreateTags", kind, writer.asked)
    made = {**writer.asked, f"aws:ResourceTag/{tagging.LAUNCH_TEMPLATE}": (_OWN["launch-template"],)}
    instance = place.arn("instance", _OWN["instance"])
    yield from writer.need(build, "CreateTags", instance, "an instance of a fleet", made)
    request = place.arn("spot-instances-request", _OWN["spot-instances-request"])
    yield from writer.need(build, "CreateTags", request, "a spot request", writer.asked)


def _session(writer: _Writer, section: Section) -> Iterator[Need]:
    place = writer.place
    if place.image.aws.connect is not Connect.SESSION_MANAGER:
        return
    tagged: Context = {
        key.replace("aws:ResourceTag", "ssm:resourceTag"): value for key, value in writer.tagged.items()
    }
    instance = place.arn("instance", _OWN["instance"])
    yield from writer.need(section, "StartSession", instance, "a run's instance", tagged, service="ssm")
    documents = {Section.BUILD: "PortForwarding", Section.VERIFY: "SSH"}
    document = place.named("ssm", f"document/AWS-Start{documents[section]}Session", owner="")
    yield from writer.need(section, "StartSession", document, "its document", {}, service="ssm")
    session = place.named("ssm", "session/ami-builder")
    calls = "TerminateSession ResumeSession"
    yield from writer.need(section, calls, session, "its session", {}, service="ssm")
    if section is Section.BUILD and plugins.has_plugins():
        calls, service = "SendSSHPublicKey", "ec2-instance-connect"
        yield from writer.need(section, calls, instance, "a run's instance", writer.tagged, service=service)


def _key(writer: _Writer, section: Section, key: str) -> Iterator[Need]:
    if not key:
        return
    exact = key.startswith("arn:") and ":alias/" not in key
    # The simulator knows no alias.
    arn = key if exact else writer.place.named("kms", f"key/{_UUID if '/' in key else key}")
    calls = "DescribeKey Decrypt ReEncryptFrom ReEncryptTo GenerateDataKeyWithoutPlaintext"
    yield from writer.need(section, calls, arn, f"key {key}", {}, service="kms")
    for_aws = {"kms:GrantIsForAWSResource": ("true",)}
    yield from writer.need(section, "CreateGrant", arn, f"key {key}", for_aws, service="kms")


_UUID = "01234567-89ab-cdef-0123-456789abcdef"
