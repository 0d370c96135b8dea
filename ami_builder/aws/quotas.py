"""The quotas of vCPUs that run at once, against what a build and its verification need."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ami_builder.aws.session import Account, aws_errors
from ami_builder.config.schema import Image
from ami_builder.core.errors import UsageError

# https://github.com/skypilot-org/skypilot-catalog/pull/21 lists them by instance type.
_ON_DEMAND = "L-1216C47A"
_SPOT = "L-34B43A08"
_STANDARD = re.compile(r"[acdhimrtz][0-9]|is4|im4")
"""The families that share the two quotas."""


def vcpus(account: Account, image: Image) -> str:
    """Return how many vCPUs may run, how many are needed, and whether they fit beside what runs now.

    Baking comes before verification, which runs an instance of every type at the same time. Raises UsageError
    if the work can never fit, CloudFailed.
    """
    aws, kinds = image.aws, image.verify.instance_types
    of = _vcpus_of(account, [*aws.instance_types, *kinds])
    # Another type is tried when EC2 has none of the first.
    baking = min((of[kind] for kind in aws.instance_types if kind in of and _counts(kind)), default=0)
    verifying = sum(of.get(kind, 0) for kind in kinds if _counts(kind))
    needed = {
        _ON_DEMAND: max(verifying, 0 if aws.spot else baking),
        **({_SPOT: baking} if aws.spot else {}),
    }
    used = _running(account)
    texts = []
    for code, name in ((_ON_DEMAND, "on demand"), (_SPOT, "on spot")):
        if not needed.get(code):
            continue
        quota, running = _quota(account, code), used[code]
        text = f"{needed[code]} vCPUs {name} of {quota:.0f}, {running} are in use"
        if needed[code] > quota:
            raise UsageError(
                f"{account.region}: a build needs {text}",
                hint=f"verify on fewer or smaller types, or ask for more of quota {code}: "
                f"`aws service-quotas request-service-quota-increase --service-code ec2 --quota-code {code}`",
            )
        texts.append(text if needed[code] + running <= quota else f"{text}: too many to fit beside them now")
    return "; ".join(texts) or "no quota is known for these instance types"


def _counts(kind: str) -> bool:
    return bool(_STANDARD.match(kind))


def _quota(account: Account, code: str) -> float:
    with aws_errors("servicequotas"):
        client = account.client("service-quotas", attempts=2)
        return float(client.get_service_quota(ServiceCode="ec2", QuotaCode=code)["Quota"]["Value"])


def _vcpus_of(account: Account, kinds: Iterable[str]) -> dict[str, int]:
    wanted = dict.fromkeys(kinds)
    found = account.matching("describe_instance_types", "InstanceTypes", "instance-type", wanted)
    return {one["InstanceType"]: one["VCpuInfo"]["DefaultVCpus"] for one in found}


def _running(account: Account) -> dict[str, int]:
    """Return how many vCPUs run, by quota."""
    states = ["pending", "running"]
    found = account.matching("describe_instances", "Reservations", "instance-state-name", states)
    running = [one for reservation in found for one in reservation.get("Instances", [])]
    running = [one for one in running if _counts(one["InstanceType"])]
    of = _vcpus_of(account, [one["InstanceType"] for one in running]) if running else {}
    used = {_ON_DEMAND: 0, _SPOT: 0}
    for one in running:
        code = _SPOT if one.get("InstanceLifecycle") == "spot" else _ON_DEMAND
        used[code] += of.get(one["InstanceType"], 0)
    return used
