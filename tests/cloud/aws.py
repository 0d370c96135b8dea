"""What the tests of the AWS adapters share: tags, groups, launches, AMIs."""

from __future__ import annotations

import base64
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ami_builder.aws import tags as tagging
from ami_builder.aws.machine import Ec2Machine
from ami_builder.aws.network import find_vpc, security_group
from ami_builder.aws.tags import Purpose
from ami_builder.config.schema import AwsSettings
from ami_builder.core.options import Connect
from ami_builder.core.orphans import Resource
from tests.sample_image import image

if TYPE_CHECKING:
    from pathlib import Path

    from ami_builder.aws.session import Account
    from ami_builder.core.records import Endpoint
    from ami_builder.state.ledger import Ledger
    from tests.fake_ec2.server import Cloud

USER_DATA = "#cloud-config\nhostname: dask\n"
RUN = "20260101T000000Z-abcdef"
DIGEST = "ab" * 32
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE9xampleexampleexampleexampleexampleexampl ami-builder"


def tags(purpose: Purpose = Purpose.VERIFY, run_id: str = RUN, digest: str = DIGEST) -> dict[str, str]:
    """Return the tags of a thing of the run."""
    return tagging.resource_tags(replace(image(), name="dask"), digest, run_id, purpose)


def group(
    account: Account,
    ledger: Ledger,
    *,
    run_id: str = RUN,
    cidrs: tuple[str, ...] = ("127.0.0.1/32",),
    port: int = 22,
    subnet: str = "",
) -> AbstractContextManager[str]:
    """Return a security group of the run; without `cidrs` one that Session Manager needs."""
    connect = Connect.SSH if cidrs else Connect.SESSION_MANAGER
    aws = AwsSettings(source_cidrs=cidrs, ssh_port=port, connect=connect)
    return security_group(
        account,
        ledger,
        aws,
        run_id=run_id,
        purpose=Purpose.VERIFY,
        tags=tags(run_id=run_id),
        subnets=[subnet] if subnet else [],
    )


def left_group(account: Account, ledger: Ledger, run_id: str = RUN) -> str:
    """Return the security group that a killed run left."""
    name, vpc = tagging.group_name(run_id, Purpose.VERIFY), find_vpc(account)
    entry = ledger.intend(Resource.SECURITY_GROUP, account.region, run=run_id, name=name, vpc=vpc)
    specifications = tagging.specifications(tags(run_id=run_id), "security-group")
    made = account.ec2.create_security_group(
        GroupName=name, Description="left", VpcId=vpc, TagSpecifications=specifications
    )
    return ledger.made(entry, made["GroupId"]).id


Launch = dict[str, Any]
"""What Ec2Machine is told of the image."""


def launch(cloud: Cloud, security_group: str, *, ami: str = "", **aws: Any) -> Launch:
    """Return an ordinary launch of the base AMI, with some settings of `aws`."""
    plain = image()
    return {
        "name": "m6i.large",
        "ami": ami or cloud.base_ami(),
        "group": security_group,
        "image": replace(plain, aws=replace(plain.aws, **aws)),
    }


class Instance(Ec2Machine):
    """A machine that a `with` starts and ends."""

    def __init__(self, directory: Path, **more: Any) -> None:
        super().__init__(**more)
        self.directory, self._stack = directory, ExitStack()

    def __enter__(self) -> Endpoint:
        with ExitStack() as stack:
            endpoint = self.start(stack, self.directory, USER_DATA, KEY)
            self._stack = stack.pop_all()
        return endpoint

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


def instance(
    account: Account, ledger: Ledger, launch: Launch, directory: Path, run_id: str = RUN
) -> Instance:
    """Return an instance of the run."""
    return Instance(
        directory, account=account, ledger=ledger, run_id=run_id, tags=tags(run_id=run_id), **launch
    )


def make_template(cloud: Cloud, name: str, **tags: str) -> str:
    """Make a launch template and return its id."""
    made = cloud.client().create_launch_template(
        LaunchTemplateName=name,
        LaunchTemplateData={"ImageId": cloud.base_ami(), "InstanceType": "m6i.large"},
        TagSpecifications=tagging.specifications(tags, "launch-template") if tags else [],
    )
    return str(made["LaunchTemplate"]["LaunchTemplateId"])


def call_here(cloud: Cloud, template: str, endpoint: str) -> None:
    """Let instances of a launch template, by name, call the emulated cloud: its last setting of dask.env."""
    ec2, named = cloud.client(), {"LaunchTemplateName": template}
    (default,) = ec2.describe_launch_template_versions(**named, Versions=["$Default"])[
        "LaunchTemplateVersions"
    ]
    data: Any = default["LaunchTemplateData"]
    text = base64.b64decode(data["UserData"]).decode() + f"      DASK_AWS_ENDPOINT={endpoint}\n"
    data["UserData"] = base64.b64encode(text.encode()).decode()
    made = ec2.create_launch_template_version(**named, LaunchTemplateData=data)["LaunchTemplateVersion"]
    ec2.modify_launch_template(**named, DefaultVersion=str(made["VersionNumber"]))


def make_ami(cloud: Cloud, name: str, **tags: str) -> str:
    """Make an AMI as Packer does: from an instance that is gone afterwards; return its id."""
    ec2 = cloud.client()
    hidden, cloud.options.hidden_describes = cloud.options.hidden_describes, 0
    made = ec2.run_instances(ImageId=cloud.base_ami(), MinCount=1, MaxCount=1, InstanceType="m6i.large")
    cloud.options.hidden_describes = hidden
    instance = made["Instances"][0]["InstanceId"]
    specs = tagging.specifications(tags, "image") if tags else []
    ami = str(ec2.create_image(InstanceId=instance, Name=name, TagSpecifications=specs)["ImageId"])
    ec2.terminate_instances(InstanceIds=[instance])
    return ami
