"""Who the caller is (sts:GetCallerIdentity), and what policies would say (iam:SimulatePrincipalPolicy)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moto.core.responses import ActionResult
from moto.iam.responses import IamResponse
from moto.sts.responses import TokenResponse

from tests.fake_ec2 import arns
from tests.fake_ec2.api_call import ACCOUNT, ApiCall, Refused
from tests.fake_ec2.guard import PolicyKind
from tests.fake_ec2.policy import Context, Decision, normal

if TYPE_CHECKING:
    from tests.fake_ec2.guard import Enforced, Guard


class Sts(TokenResponse):
    """moto's STS, which knows whose access key it is."""

    def __init__(self, guard: Guard, call: ApiCall) -> None:
        super().__init__()
        self.guard, self.call = guard, call

    def get_caller_identity(self) -> ActionResult:
        """GetCallerIdentity."""
        arn = self.guard.principal(self.call.access_key, self.call.region)
        return ActionResult({"UserId": "AIDATESTTESTTESTTEST0", "Account": ACCOUNT, "Arn": arn})


class Iam(IamResponse):
    """moto's IAM, and the policy simulator."""

    def __init__(self, guard: Guard, call: ApiCall) -> None:
        super().__init__()
        self.guard, self.call = guard, call

    def simulate_principal_policy(self) -> ActionResult:
        """SimulatePrincipalPolicy: one result an action, with one for each resource in it."""
        params = self.call.params
        enforced = self._of(params["PolicySourceArn"])
        context = {
            normal(entry["ContextKeyName"]): entry.get("ContextKeyValues", [])
            for entry in params.get("ContextEntries", [])
        }
        resources = params.get("ResourceArns") or ["*"]
        results = [_result(enforced, action, resources, context) for action in params["ActionNames"]]
        return ActionResult({"EvaluationResults": results, "IsTruncated": False})

    def _of(self, source: str) -> Enforced | None:
        """Return the policies of a user or a role; None when nothing limits it."""
        region = self.call.region
        keys = {self.call.access_key, *self.guard.enforced, *self.guard.principals}
        for key in keys:
            if self.guard.entity(key, region) == source:
                return self.guard.enforced.get(key)
        kind, _, name = source.rpartition(":")[2].partition("/")
        # behaviour: simulator-wants-an-entity
        if kind not in ("user", "group", "role") or not source.startswith(arns.arn("iam", region, "")):
            raise Refused(
                "InvalidInput", f"Invalid Entity Arn: {source} does not clearly define entity type."
            )
        raise Refused("NoSuchEntity", f"The {kind} with name {name} cannot be found.", 404)


def _result(
    enforced: Enforced | None, action: str, resources: Sequence[str], context: Context
) -> Mapping[str, Any]:
    found = [(arn, _simulated(enforced, action, arn, context)) for arn in resources]
    order = (Decision.EXPLICIT_DENY, Decision.IMPLICIT_DENY, Decision.ALLOWED)
    worst = min((verdict for _, (verdict, _) in found), key=order.index)
    result: dict[str, Any] = {
        "EvalActionName": action,
        "EvalResourceName": resources[0],
        "EvalDecision": worst,
        "MatchedStatements": [],
        "MissingContextValues": sorted({key for _, (_, missing) in found for key in missing}),
    }
    if list(resources) != ["*"]:
        result["ResourceSpecificResults"] = [
            {
                "EvalResourceName": arn,
                "EvalResourceDecision": decision,
                "MatchedStatements": [],
                "MissingContextValues": missing,
            }
            for arn, (decision, missing) in found
        ]
    if enforced is not None and enforced.controls:
        result["OrganizationsDecisionDetail"] = {
            "AllowedByOrganizations": all(
                enforced.verdict(action, arn, context).kind is not PolicyKind.CONTROL for arn in resources
            )
        }
    if enforced is not None and enforced.boundary is not None:
        result["PermissionsBoundaryDecisionDetail"] = {
            "AllowedByPermissionsBoundary": all(
                enforced.boundary.decision(action, arn, context) is Decision.ALLOWED for arn in resources
            )
        }
    return result


def _simulated(
    enforced: Enforced | None, action: str, arn: str, context: Context
) -> tuple[Decision, list[str]]:
    if enforced is None:
        return Decision.ALLOWED, []
    missing = sorted(k for k in enforced.identity.keys_of(action, arn) if normal(k) not in context)
    return enforced.verdict(action, arn, context).decision, missing
