"""What the tests of the AWS adapters share: tags, groups, launches, AMIs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ami_builder.aws import tags as tagging
from ami_builder.aws.instances import Instance, Launch
from ami_builder.aws.network import SecurityGroup
from ami_builder.aws.tags import Purpose

if TYPE_CHECKING:
    from pathlib import Path

    from ami_builder.aws.session import Account
    from ami_builder.state.ledger import Ledger
    from tests.fake_ec2.server import Cloud

RUN = "20260101T000000Z-abcdef"
DIGEST = "ab" * 32
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE9xampleexampleexampleexampleexampleexampl ami-builder"


def tags(purpose: Purpose = Purpose.VERIFY, run_id: str = RUN) -> dict[str, str]:
    """Return the tags of a thing of the run."""
    return tagging.resource_tags("dask", DIGEST, run_id, purpose)


def group(
    account: Account,
    ledger: Ledger,
    *,
    run_id: str = RUN,
    cidrs: tuple[str, ...] = ("127.0.0.1/32",),
    **more: Any,
) -> SecurityGroup:
    """Return a security group of the run."""
    return SecurityGroup(
        account, ledger, run_id=run_id, purpose=Purpose.VERIFY, tags=tags(run_id=run_id), cidrs=cidrs, **more
    )


def launch(cloud: Cloud, security_group: str, **changes: Any) -> Launch:
    """Return an ordinary launch of the base AMI."""
    return Launch(
        **{
            "ami": cloud.base_ami(),
            "instance_types": ("m6i.large",),
            "security_group": security_group,
            "user_data": "#cloud-config\nhostname: dask\n",
            "public_key": KEY,
            "user": "admin",
            "lifetime": 7200.0,
            **changes,
        }
    )


def instance(
    account: Account, ledger: Ledger, launch: Launch, directory: Path, run_id: str = RUN
) -> Instance:
    """Return an instance of the run."""
    return Instance(account, ledger, launch, run_id=run_id, tags=tags(run_id=run_id), directory=directory)


def make_template(cloud: Cloud, name: str, **tags: str) -> str:
    """Make a launch template and return its id."""
    made = cloud.client().create_launch_template(
        LaunchTemplateName=name,
        LaunchTemplateData={"ImageId": cloud.base_ami(), "InstanceType": "m6i.large"},
        TagSpecifications=tagging.specifications(tags, "launch-template") if tags else [],
    )
    return str(made["LaunchTemplate"]["LaunchTemplateId"])


def make_ami(cloud: Cloud, name: str, **tags: str) -> str:
    """Make an AMI as Packer does: from an instance that is gone afterwards; return its id."""
    ec2 = cloud.client()
    made = ec2.run_instances(ImageId=cloud.base_ami(), MinCount=1, MaxCount=1, InstanceType="m6i.large")
    instance = made["Instances"][0]["InstanceId"]
    ami = str(ec2.create_image(InstanceId=instance, Name=name)["ImageId"])
    if tags:
        ec2.create_tags(Resources=[ami], Tags=tagging.as_list(tags))
    ec2.terminate_instances(InstanceIds=[instance])
    return ami
