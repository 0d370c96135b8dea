"""What credentials allow, found out without creating anything.

IAM's simulator answers for calls on resources that do not exist yet: a dry run on an id that nobody has is
refused by every policy that asks for a tag. Dry runs are for calls whose resources all exist.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ami_builder.aws import tags as tagging
from ami_builder.aws.needs import Need
from ami_builder.aws.policy import Section
from ami_builder.aws.session import DENIED, Account, aws_errors, code_of
from ami_builder.aws.tags import Purpose
from ami_builder.build.preflight import stops
from ami_builder.config.schema import Image
from ami_builder.core.errors import CloudFailed
from ami_builder.core.records import Finding, State

NAME = "permissions"
"""The name, or its beginning, of what the simulator found."""
DRY_RUN = "dry run of "
"""The beginning of the name of what a dry run found."""
_NEEDED = (Section.BUILD, Section.VERIFY)
"""What `build` does; without the rest, other commands fail."""


_SIDE_BY_SIDE = 4
"""How many simulations are asked for at a time: a region takes some 50."""
_ATTEMPTS = 2
"""How often the first call is attempted: a network may have no way to IAM, which costs only a note."""


class _Answer(StrEnum):
    ALLOWED = "allowed"
    REFUSED = "refused"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    need: Need
    answer: _Answer
    why: str = ""


_Asked = tuple[str, tuple[tuple[str, tuple[str, ...]], ...]]
"""A resource, and the context of the request."""
_Group = tuple[_Asked, Sequence[Need]]


class _Untried(Exception):
    """Nothing can be simulated; the text says why."""

    def __init__(self, why: str, hint: str) -> None:
        super().__init__(why)
        self.why, self.hint = why, hint


def findings(account: Account, arn: str, needs: Sequence[Need]) -> Iterator[Finding]:
    """Yield what the credentials of `arn` allow of `needs`: one finding, or one for each part refused."""
    try:
        verdicts = _simulated(account, arn, needs)
    except _Untried as untried:
        text = f"{len(needs)} calls were not tried: {untried.why}"
        yield Finding(name=NAME, state=State.NOTE, found=text, hint=untried.hint)
        return
    except CloudFailed as failed:
        yield Finding(
            name=NAME,
            state=State.NOTE,
            found=f"{len(needs)} calls were not tried: {failed.message}",
            hint=failed.hint or "",
        )
        return
    refused = [one for one in verdicts if one.answer is _Answer.REFUSED]
    unknown = [one for one in verdicts if one.answer is _Answer.UNKNOWN]
    for section in Section:
        if of := [one for one in refused if one.need.section is section]:
            yield _refusal(section, of)
    if unknown:
        yield Finding(
            name=NAME,
            state=State.NOTE,
            found=f"{len(unknown)} of {len(verdicts)} calls depend on what only the call itself has:"
            f" {_listed(unknown)}",
            hint="a build shows it; what a policy of the organization demands may be a tag: see aws.tags",
        )
    elif not refused:
        yield Finding(name=NAME, state=State.OK, found=f"{len(verdicts)} calls simulated, all are allowed")


def _refusal(section: Section, refused: Sequence[_Verdict]) -> Finding:
    return Finding(
        name=f"{NAME} to {section}",
        state=State.STOPS if section in _NEEDED else State.NOTE,
        found=f"these credentials do not allow: {_listed(refused)}",
        hint=f"`ami-builder iam-policy {section}` prints a policy that does",
        exit_code=CloudFailed.exit_code if section in _NEEDED else 0,
    )


def _listed(verdicts: Sequence[_Verdict]) -> str:
    """Return the calls, each with its kinds of resources, and why."""
    of: dict[tuple[str, str], list[str]] = defaultdict(list)
    for one in verdicts:
        of[one.need.action, one.why].append(one.need.what)
    return ", ".join(
        f"{action} on {' and '.join(dict.fromkeys(kinds))}{f' ({why})' if why else ''}"
        for (action, why), kinds in of.items()
    )


def _simulated(account: Account, arn: str, needs: Sequence[Need]) -> list[_Verdict]:
    principal = _principal(account, arn)
    groups: dict[_Asked, list[Need]] = defaultdict(list)
    for need in needs:
        groups[need.resource, tuple(sorted(need.context.items()))].append(need)

    def verdicts(group: _Group, attempts: int = 0) -> list[_Verdict]:
        (resource, context), of = group
        actions = list(dict.fromkeys(one.action for one in of))
        client = account.client("iam", attempts=attempts)
        results = _simulate(client, principal, actions, resource, context)
        by_action = {result["EvalActionName"]: result for result in results}
        return [_verdict(need, by_action[need.action]) for need in of]

    first, *others = groups.items()
    begun = verdicts(first, _ATTEMPTS)
    with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
        return [*begun, *(one for found in pool.map(verdicts, others) for one in found)]


def _simulate(
    client: Any,
    principal: str,
    actions: Sequence[str],
    resource: str,
    context: Sequence[tuple[str, Sequence[str]]],
) -> list[dict[str, Any]]:
    entries = [
        {
            "ContextKeyName": key,
            "ContextKeyValues": list(values),
            "ContextKeyType": "stringList" if key == "aws:TagKeys" else "string",
        }
        for key, values in context
    ]
    try:
        with aws_errors("iam"):
            pages = client.get_paginator("simulate_principal_policy")
            asked = pages.paginate(
                PolicySourceArn=principal,
                ActionNames=actions,
                ResourceArns=[resource],
                ContextEntries=entries,
            )
            return [one for page in asked for one in page["EvaluationResults"]]
    except CloudFailed as failed:
        if code_of(failed) in DENIED:
            raise _Untried(
                "these credentials are not allowed to simulate them",
                f"allow iam:SimulatePrincipalPolicy on {principal}",
            ) from failed
        if code_of(failed) == "NoSuchEntity":
            raise _Untried(
                f"there is no {principal}: the role's path is not known",
                "allow iam:GetRole, which tells a role's path",
            ) from failed
        raise


def _principal(account: Account, arn: str) -> str:
    """Return the user or role whose policies decide about calls with an ARN of STS.

    An assumed role's ARN lacks the role's path, which iam:GetRole tells. Raises _Untried for others, and when
    IAM does not answer.
    """
    _, partition, _, _, number, of = arn.split(":", 5)
    kind, _, rest = of.partition("/")
    if kind == "assumed-role":
        role = rest.partition("/")[0]
        try:
            with aws_errors("iam"):
                client = account.client("iam", attempts=_ATTEMPTS)
                return str(client.get_role(RoleName=role)["Role"]["Arn"])
        except CloudFailed as failed:
            if not code_of(failed):
                raise _Untried(failed.message, failed.hint or "") from failed
            return f"arn:{partition}:iam::{number}:role/{role}"
    if kind == "root":
        raise _Untried(
            "the root user is allowed everything but what its organization denies",
            "use a role with the policy of `ami-builder iam-policy`",
        )
    if kind == "federated-user":
        raise _Untried(
            "IAM can't simulate a federated user, whose session has a policy of its own",
            "use a role or a user to find out",
        )
    return arn


def _verdict(need: Need, result: Mapping[str, Any]) -> _Verdict:
    if result["EvalDecision"] == "allowed":
        return _Verdict(need=need, answer=_Answer.ALLOWED)
    if missing := result.get("MissingContextValues"):
        return _Verdict(need=need, answer=_Answer.UNKNOWN, why=", ".join(missing))
    if not result.get("OrganizationsDecisionDetail", {}).get("AllowedByOrganizations", True):
        # The call itself may have what such a policy asks for: the simulator does not say what is missing.
        why = "unless the organization's policies do: a simulated call lacks much of what they may ask for"
        return _Verdict(need=need, answer=_Answer.UNKNOWN, why=why)
    why = ""
    if not result.get("PermissionsBoundaryDecisionDetail", {}).get("AllowedByPermissionsBoundary", True):
        why = "the permissions boundary does not allow it"
    elif result["EvalDecision"] == "explicitDeny":
        why = "a policy denies it"
    if need.action.startswith("kms:") and result["EvalDecision"] == "implicitDeny" and not why:
        return _Verdict(need=need, answer=_Answer.UNKNOWN, why="unless the key's own policy allows it")
    return _Verdict(need=need, answer=_Answer.REFUSED, why=why)


def tried(account: Account, image: Image, *, ami: str, kind: str, vpc: str) -> Iterator[Finding]:
    """Yield what the dry runs answered that are refused: of calls whose resources all exist."""
    tags = tagging.resource_tags(image, "0" * 64, "check", Purpose.BAKE)
    name = tagging.group_name("check", Purpose.BAKE)
    calls: list[tuple[str, dict[str, Any]]] = []
    if vpc:
        calls.append(
            (
                "create_security_group",
                {
                    "GroupName": name,
                    "Description": "ami-builder check",
                    "VpcId": vpc,
                    "TagSpecifications": tagging.specifications(tags, "security-group"),
                },
            )
        )
    if image.aws.spot and ami:
        calls.append(
            (
                "create_launch_template",
                {
                    "LaunchTemplateName": name,
                    "LaunchTemplateData": {"ImageId": ami},
                    "TagSpecifications": tagging.specifications(tags, "launch-template"),
                },
            )
        )
    if ami and kind:
        subnet = {"SubnetId": image.aws.subnets[0]} if image.aws.subnets else {}
        calls.append(
            (
                "run_instances",
                {
                    "ImageId": ami,
                    "InstanceType": kind,
                    "MinCount": 1,
                    "MaxCount": 1,
                    "TagSpecifications": tagging.specifications(tags, "instance", "volume"),
                    **subnet,
                },
            )
        )
    for call, parameters in calls:
        action = "ec2:" + "".join(word.capitalize() for word in call.split("_"))
        try:
            with aws_errors(ignore="DryRunOperation"):
                getattr(account.ec2, call)(DryRun=True, **parameters)
        except CloudFailed as failed:
            # A launch without a group of ours is one in the VPC's own, which a policy need not allow.
            if call == "run_instances" and code_of(failed) in DENIED:
                continue
            yield stops(f"{DRY_RUN}{action}", failed)
