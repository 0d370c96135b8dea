"""Permissions: who may make which call, under the policies in force for an access key.

A call is allowed when, for each resource that it touches (touched_resources.py), every kind of policy in
force allows the action on it, and none denies it. A request's context has only those condition keys that the
Service Authorization Reference has for the action and the type of resource (authorization.py).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from tests.fake_ec2 import arns, authorization
from tests.fake_ec2.api_call import ACCOUNT, ApiCall, Refused
from tests.fake_ec2.policy import Context, Decision, Document, Policy, like, normal
from tests.fake_ec2.touched_resources import Touched, touched

if TYPE_CHECKING:
    from collections.abc import Iterator


class PolicyKind(StrEnum):
    """A kind of policy, as the messages of denials name it."""

    IDENTITY = "identity-based policy"
    BOUNDARY = "permissions boundary"
    CONTROL = "service control policy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What all policies say about one action on one resource, and which kind of policy decided it."""

    decision: Decision
    kind: PolicyKind = PolicyKind.IDENTITY

    @property
    def reason(self) -> str:
        """Why it is denied, with `{}` for the action."""
        # behaviour: denial-messages
        if self.decision is Decision.EXPLICIT_DENY:
            article = "an" if self.kind is PolicyKind.IDENTITY else "a"
            return f"with an explicit deny in {article} {self.kind}"
        return f"because no {self.kind} allows the {{}} action"


@dataclass(slots=True, kw_only=True)
class Enforced:
    """One access key's policies, and what came of them; tries (DryRun) don't count as use."""

    identity: Policy
    boundary: Policy | None = None
    controls: Sequence[Policy] = ()
    used: set[str] = field(default_factory=set)
    """Actions that were allowed and called."""
    refused: list[tuple[str, str]] = field(default_factory=list)
    """(action, ARN) that were called and not allowed."""
    gone: list[tuple[str, str]] = field(default_factory=list)
    """The same for what doesn't exist, which only has no tags that a policy could ask for."""

    @property
    def unused(self) -> set[str]:
        """The identity policy's actions that nothing called, as the document writes them."""
        return {each for each in self.identity.actions if not any(like(used, each) for used in self.used)}

    def verdict(self, action: str, arn: str, context: Context) -> Verdict:
        """Return what all kinds of policy say together."""
        # behaviour: kinds-of-policy
        found = [
            (kind, [each.decision(action, arn, context) for each in policies])
            for kind, policies in self._in_force()
        ]
        for kind, decisions in found:
            if Decision.EXPLICIT_DENY in decisions:
                return Verdict(decision=Decision.EXPLICIT_DENY, kind=kind)
        for kind, decisions in found:
            if Decision.ALLOWED not in decisions:
                return Verdict(decision=Decision.IMPLICIT_DENY, kind=kind)
        return Verdict(decision=Decision.ALLOWED)

    def _in_force(self) -> Iterator[tuple[PolicyKind, Sequence[Policy]]]:
        if self.controls:
            # An organization's FullAWSAccess stays attached unless something else allows.
            everything = () if any(p.allows_something for p in self.controls) else (_EVERYTHING,)
            yield PolicyKind.CONTROL, (*self.controls, *everything)
        if self.boundary is not None:
            yield PolicyKind.BOUNDARY, (self.boundary,)
        yield PolicyKind.IDENTITY, (self.identity,)


_EVERYTHING = Policy.of({"Statement": {"Effect": "Allow", "Action": "*", "Resource": "*"}})


class Guard:
    """The policies in force, by access key; a key without one may do everything."""

    def __init__(self) -> None:
        self.enforced: dict[str, Enforced] = {}
        self.principals: dict[str, str] = {}
        """Access key -> the ARN of its user or assumed role, where it isn't a user of the key's name."""
        self.role_paths: dict[str, str] = {}
        """Role -> its path, such as `aws-reserved/`, which an assumed role's ARN doesn't have."""

    def clear(self) -> None:
        """Allow everything again."""
        self.enforced.clear()
        self.principals.clear()
        self.role_paths.clear()

    def enforce(
        self,
        document: Document,
        access_key: str,
        *,
        boundary: Document | None = None,
        controls: Sequence[Document] = (),
    ) -> Enforced:
        """Allow an access key only what policies allow; raises ValueError when one isn't understood."""
        enforced = Enforced(
            identity=Policy.of(document),
            boundary=None if boundary is None else Policy.of(boundary),
            controls=[Policy.of(each) for each in controls],
        )
        self.enforced[access_key] = enforced
        return enforced

    def principal(self, access_key: str, region: str) -> str:
        """Return the ARN of the user or assumed role that an access key belongs to."""
        return self.principals.get(access_key) or arns.arn("iam", region, f"user/{access_key}")

    def entity(self, access_key: str, region: str) -> str:
        """Return the ARN of the user or role that an access key's policies are attached to."""
        principal = self.principal(access_key, region)
        if ":assumed-role/" not in principal:
            return principal
        role = principal.split("/")[1]
        return arns.arn("iam", region, f"role/{self.role_paths.get(role, '')}{role}")

    def allows(self, it: Touched, call: ApiCall) -> bool:
        """Tell whether the call's access key may do it."""
        enforced = self.enforced.get(call.access_key)
        return enforced is None or self._verdict(enforced, it, call).decision is Decision.ALLOWED

    def judge(self, call: ApiCall, backend: Any, unseen: Collection[str] = ()) -> None:
        """Raise Refused when the call's access key may not do that.

        The `unseen` ids are those of resources that EC2 does not show yet.
        """
        enforced = self.enforced.get(call.access_key)
        if enforced is None:
            return
        everything = touched(call, backend)
        for it in everything:
            gone = it.unknown or it.arn.rpartition("/")[2] in unseen
            # behaviour: gone-is-unauthorized
            verdict = self._verdict(enforced, replace(it, tags={}) if gone else it, call)
            if verdict.decision is Decision.ALLOWED:
                continue
            call.authorised = False
            (enforced.gone if gone else enforced.refused).append((it.action, it.arn))
            refused = self._unauthorized(call, it, verdict)
            # behaviour: fleet-answers-denials-as-errors
            if it.by_fleet:
                call.fleet_error = refused
                break
            raise refused
        if not call.params.get("DryRun"):
            enforced.used |= {it.action for it in everything}

    def make_spot_role(self, call: ApiCall) -> None:
        """Raise Refused when a first spot request may not make EC2's role for spot instances."""
        role = arns.arn(
            "iam", call.region, "role/aws-service-role/spot.amazonaws.com/AWSServiceRoleForEC2Spot"
        )
        service = {"iam:awsservicename": "spot.amazonaws.com"}
        it = Touched(action="iam:CreateServiceLinkedRole", arn=role, keys=service)
        # behaviour: first-spot-request-makes-a-role
        if not self.allows(it, call):
            self.enforced[call.access_key].refused.append((it.action, it.arn))
            raise Refused(
                "AuthFailure.ServiceLinkedRoleCreationNotPermitted",
                "The provided credentials do not have permission to create the service-linked role for EC2"
                " Spot Instances.",
                403,
            )
        if call.access_key in self.enforced:
            self.enforced[call.access_key].used.add(it.action)

    def _verdict(self, enforced: Enforced, it: Touched, call: ApiCall) -> Verdict:
        entity = self.entity(call.access_key, call.region)
        return enforced.verdict(it.action, it.arn, context_of(it, call, entity))

    def _unauthorized(self, call: ApiCall, it: Touched, verdict: Verdict) -> Refused:
        principal = self.principal(call.access_key, call.region)
        message = (
            f"User: {principal} is not authorized to perform: {it.action} on resource: {it.arn} "
            + verdict.reason.format(it.action)
        )
        if call.service == "ec2":
            return Refused(
                "UnauthorizedOperation", f"You are not authorized to perform this operation. {message}", 403
            )
        if call.service in ("sts", "iam", "autoscaling"):
            return Refused("AccessDenied", message, 403)
        return Refused("AccessDeniedException", message, 400)


def context_of(it: Touched, call: ApiCall, principal: str) -> Context:
    """Return the context of a request: those keys only that the action and the type of resource support."""
    kind = authorization.kind_of(it.action, it.arn)
    context: dict[str, Sequence[str]] = {
        "aws:requestedregion": [call.region],
        "aws:principalarn": [principal],
        "aws:principalaccount": [ACCOUNT],
        "ec2:region": [call.region],
        **{key: [value] for key, value in it.keys.items()},
    }
    for key, value in it.tags.items():
        context[f"aws:resourcetag/{key}"] = context[f"ec2:resourcetag/{key}"] = [value]
        context[f"ssm:resourcetag/{key}"] = [value]
    if it.requested:
        context |= {f"aws:requesttag/{key}": [value] for key, value in it.requested.items()}
        context["aws:tagkeys"] = list(it.requested)
    return {normal(key): values for key, values in context.items() if authorization.can_hold(key, kind)}
