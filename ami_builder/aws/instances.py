"""EC2 instances: look-ups by id, client token and run, and their end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ami_builder.aws import presence
from ami_builder.aws import tags as tagging
from ami_builder.aws.session import Account, aws_errors, poll
from ami_builder.core.errors import CloudFailed, UsageError
from ami_builder.core.options import Arch

if TYPE_CHECKING:
    from types_boto3_ec2.type_defs import InstanceTypeDef, ReservationTypeDef

_SEEN_SECONDS = 60.0
_IMDS_SECONDS = 5.0
_TERMINATED_SECONDS = 600.0


def require_arch(account: Account, kinds: Iterable[str], arch: Arch, setting: str) -> None:
    """Raise UsageError if instances of one of these types can't run images of an architecture.

    A type that the region does not have is not reported.
    """
    found = account.matching("describe_instance_types", "InstanceTypes", "instance-type", kinds)
    runs = {
        one["InstanceType"]: one.get("ProcessorInfo", {}).get("SupportedArchitectures", []) for one in found
    }
    if wrong := sorted(kind for kind, of in runs.items() if of and arch.ec2 not in of):
        raise UsageError(
            f"{setting}: {', '.join(wrong)}: expected types that run {arch.ec2}, as the image does,"
            f" but {wrong[0]} runs {', '.join(runs[wrong[0]])}",
            hint=f"change {setting}, or set arch to the architecture of these types",
        )


def require_offered(account: Account, kinds: Sequence[str], setting: str) -> Sequence[str]:
    """Return those instance types that the region offers, in order. Raises UsageError if there are none."""
    found = account.matching(
        "describe_instance_type_offerings", "InstanceTypeOfferings", "instance-type", dict.fromkeys(kinds)
    )
    offered = {one["InstanceType"] for one in found}
    if known := [kind for kind in kinds if kind in offered]:
        return known
    raise UsageError(
        f"{setting}: {account.region} does not offer {', '.join(kinds)}", hint=f"change {setting}"
    )


def describe(account: Account, instance: str) -> InstanceTypeDef | None:
    """Return an instance as EC2 describes it; None when EC2 does not show it yet, or any more."""
    found: list[ReservationTypeDef] = []
    with aws_errors(ignore="InvalidInstanceID.NotFound"):
        found = account.ec2.describe_instances(InstanceIds=[instance])["Reservations"]
    return next((i for r in found for i in r.get("Instances", [])), None)


def by_token(account: Account, run_id: str, token: str) -> str | None:
    """Return the id of the instance that a run launched with a client token, or None."""
    found = (i["InstanceId"] for i in _search(account, run_id) if i.get("ClientToken") == token)
    return next(found, None)


def of_run(account: Account, run_id: str) -> list[str]:
    """Return the ids of a run's instances that are not terminated or shutting down."""
    ended = {"shutting-down", "terminated"}
    return [i["InstanceId"] for i in _search(account, run_id) if i["State"]["Name"] not in ended]


def require_imdsv2(account: Account, instance: str) -> None:
    """Turn off IMDSv1 on an instance, for those that Packer launches."""
    presence.once_visible(
        account,
        instance,
        lambda: account.ec2.modify_instance_metadata_options(
            InstanceId=instance, HttpTokens="required", HttpPutResponseHopLimit=1
        ),
        # It holds up reading Packer's output, and is tried again with each line of that.
        seconds=_IMDS_SECONDS,
    )


def terminate(account: Account, instance: str) -> None:
    """Terminate an instance, which may be missing already, and wait until it has terminated.

    Raises CloudFailed when it has not after 10 minutes.
    """

    def ended() -> bool:
        found = describe(account, instance)
        return found is None or found["State"]["Name"] == "terminated"

    # EC2 may not show a new one yet.
    presence.if_present(
        account,
        instance,
        lambda: account.ec2.terminate_instances(InstanceIds=[instance]),
        appears=_SEEN_SECONDS,
    )
    if not poll(ended, seconds=_TERMINATED_SECONDS):
        raise CloudFailed(
            f"instance {instance} did not terminate within {_TERMINATED_SECONDS:.0f} s",
            hint="run `ami-builder gc --apply` to try again",
        )


def _search(account: Account, run_id: str) -> Sequence[InstanceTypeDef]:
    found = account.matching("describe_instances", "Reservations", f"tag:{tagging.RUN}", [run_id])
    return [i for reservation in found for i in reservation.get("Instances", [])]
