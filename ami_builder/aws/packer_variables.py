"""The variables of packer/amazon.pkr.hcl and packer/build.pkr.hcl, and the tags among them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ami_builder.aws import source_ami, tags
from ami_builder.aws.session import Account
from ami_builder.build import container, packer, plugins
from ami_builder.build.inputs import Inputs
from ami_builder.core.options import Connect
from ami_builder.core.units import GIB
from ami_builder.state.workspace import Run


def of_bake(
    inputs: Inputs,
    base: source_ami.BaseAmi,
    account: Account,
    run: Run,
    *,
    name: str,
    kind: str,
    subnet: str,
    group: str,
    key: Path,
    user_data: Path,
) -> Mapping[str, packer.Variable]:
    """Return the variables of a bake on an instance of type `kind`; `name` is the AMI's."""
    image, aws = inputs.image, inputs.image.aws
    run_id = run.record.run_id
    size = max(image.base.disk_size, base.size)
    return {
        "image_name": image.name,
        "image_digest": inputs.digest,
        "run_id": run_id,
        **container.variables(image),
        "packages": list(image.base.packages),
        "records_directory": str(run.directory),
        "manifest_file": str(run.directory / "manifest.json"),
        "ssh_username": image.base.ssh_user,
        "ssh_private_key_file": str(key),
        "ssh_port": aws.ssh_port,
        "ssh_interface": "session_manager" if aws.connect is Connect.SESSION_MANAGER else "",
        "region": account.region,
        "endpoint": account.endpoint("ec2"),
        "ami_name": name,
        "source_ami": base.id,
        "root_device": base.root_device,
        "volume_size": -(-size // GIB),
        "instance_type": kind,
        "spot": aws.spot,
        "subnet_id": subnet,
        "security_group_id": group,
        # EC2 takes a name alone here.
        "instance_profile": aws.instance_profile.rpartition("/")[2],
        "user_data_file": str(user_data),
        "encrypt": aws.encrypt,
        "kms_key": aws.kms_key,
        # 1.6.6 would tag what it has made, as bake.finish does, but gives up on what EC2 does not show yet.
        "tags": image_tags(inputs, run_id) if plugins.has_plugins() else {},
        "run_tags": bake_tags(inputs, run_id),
    }


def image_tags(inputs: Inputs, run_id: str) -> Mapping[str, str]:
    """Return the tags of an AMI and its snapshots."""
    more = {tags.BASE_AMI: inputs.base_digest}
    return tags.resource_tags(inputs.image, inputs.digest, run_id, tags.Purpose.IMAGE, more)


def bake_tags(inputs: Inputs, run_id: str) -> Mapping[str, str]:
    """Return the tags of what exists only during a bake."""
    return tags.resource_tags(inputs.image, inputs.digest, run_id, tags.Purpose.BAKE)
