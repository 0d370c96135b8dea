"""A run's tag on what only a name, a template or a ledger tells is the run's: then alone may we end it.

What is tagged already, or gone, is fine.
"""

from __future__ import annotations

from botocore.exceptions import ClientError

from ami_builder.aws import images
from ami_builder.aws import tags as tagging
from ami_builder.aws.session import Account, code_of, translated


def claim_instance(account: Account, instance: str, run_id: str) -> None:
    """Tag an instance."""
    _tag(account, instance, run_id)


def claim_image(account: Account, ami: str, run_id: str) -> None:
    """Tag an AMI, and its snapshots first: nothing may be deregistered whose snapshots can't be deleted."""
    found = images.get(account, ami)
    if found is None:
        return
    for snapshot in found.snapshots:
        claim_snapshot(account, snapshot, run_id)
    if tagging.RUN not in found.tags:
        _tag(account, ami, run_id)


def claim_snapshot(account: Account, snapshot: str, run_id: str) -> None:
    """Tag a snapshot."""
    for shown in images.shown(account, [snapshot]):
        if tagging.RUN not in tagging.as_dict(shown.get("Tags", [])):
            _tag(account, snapshot, run_id)


def _tag(account: Account, id: str, run_id: str) -> None:
    with translated():
        try:
            account.ec2.create_tags(Resources=[id], Tags=tagging.as_list({tagging.RUN: run_id}))
        except ClientError as error:
            if "NotFound" not in code_of(error):
                raise
