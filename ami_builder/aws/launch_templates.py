"""Launch templates that Packer makes for spot instances: a run's are found by its tag, and deleted."""

from __future__ import annotations

from botocore.exceptions import ClientError

from ami_builder.aws import tags as tagging
from ami_builder.aws.session import Account, code_of, translated


def of_run(account: Account, run_id: str) -> list[str]:
    """Return the ids of a run's launch templates."""
    with translated():
        pages = account.ec2.get_paginator("describe_launch_templates").paginate(
            Filters=[{"Name": f"tag:{tagging.RUN}", "Values": [run_id]}]
        )
        return [one["LaunchTemplateId"] for page in pages for one in page["LaunchTemplates"]]


def delete(account: Account, template: str) -> None:
    """Delete a launch template with all its versions; one that is gone is fine."""
    with translated():
        try:
            account.ec2.delete_launch_template(LaunchTemplateId=template)
        except ClientError as error:
            if "NotFound" not in code_of(error):
                raise
