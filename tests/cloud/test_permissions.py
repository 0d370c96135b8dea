"""What `check` says of permissions: by IAM's simulator, never by a dry run on what nobody has."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from ami_builder.aws import needs, permissions, policy, preflight, session
from ami_builder.aws.policy import Section
from ami_builder.aws.session import Account
from ami_builder.config.types import Destination
from ami_builder.core.options import Connect
from ami_builder.core.records import Finding, State
from tests.cloud.test_base_ami import DEFAULT
from tests.fake_ec2.faults import Fault
from tests.fake_ec2.server import REGION, Cloud
from tests.sample_image import image as guest_image

if TYPE_CHECKING:
    from ami_builder.config.schema import Image

KEY = "AKIALEASTPRIVILEGE00"
OTHER = "eu-west-1"
THEIRS = "999999999999"


def configured(**aws: Any) -> Image:
    image = guest_image()
    settings = {"source": DEFAULT, "source_cidrs": ("127.0.0.1/32",), "region": REGION, **aws}
    return replace(image, aws=replace(image.aws, **settings))


def found(image: Image) -> list[Finding]:
    return [one for one in preflight.check(image) if one.name.startswith("permissions")]


@pytest.fixture
def caller(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    return KEY


EVERYTHING: dict[str, Any] = {
    "spot": True,
    "copy_to": (Destination(region=OTHER),),
    "share_with": (THEIRS,),
    "instance_profile": "ours",
}


def with_profile(cloud: Cloud) -> None:
    iam = cloud.client("iam")
    iam.create_instance_profile(InstanceProfileName="ours")
    iam.create_role(RoleName="machine", Path="/ours/", AssumeRolePolicyDocument="{}")
    iam.add_role_to_instance_profile(InstanceProfileName="ours", RoleName="machine")


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_the_printed_policy_is_enough(cloud: Cloud, caller: str, settings: dict[str, Any]) -> None:
    with_profile(cloud)
    image = configured(**settings)
    held = cloud.enforce(policy.document(Section.ALL, image.aws), caller)
    (only,) = found(image)
    assert only.state is State.OK, only
    # The dry run of a launch is in the VPC's own group, which is not a run's.
    assert {action for action, _ in held.refused} <= {"ec2:RunInstances"}


def without(document: dict[str, Any], action: str) -> dict[str, Any]:
    statements = [
        {**one, "Action": [each for each in one["Action"] if each != action]} for one in document["Statement"]
    ]
    return {**document, "Statement": [one for one in statements if one["Action"]]}


@pytest.mark.parametrize(
    ("action", "section", "state"),
    [
        ("ec2:StopInstances", "build", State.STOPS),
        ("ec2:CreateSecurityGroup", "build", State.STOPS),
        ("ec2:GetConsoleOutput", "verify", State.STOPS),
        ("ec2:CopyImage", "copy", State.NOTE),
        ("ssm:PutParameter", "promote", State.NOTE),
        ("ec2:DeleteVolume", "lifecycle", State.NOTE),
        ("ec2:EnableImageDeprecation", "prune", State.NOTE),
    ],
)
def test_what_is_not_allowed_is_named_with_its_part(
    cloud: Cloud, caller: str, action: str, section: str, state: State
) -> None:
    image = configured(copy_to=(Destination(region=OTHER),))
    cloud.enforce(without(policy.document(Section.ALL, image.aws), action), caller)
    of = {one.name: one for one in found(image)}[f"permissions to {section}"]
    assert of.state is state
    assert action in of.found
    assert of.exit_code == (6 if state is State.STOPS else 0)
    assert f"iam-policy {section}" in of.hint


def test_a_default_key_of_the_user_s_is_asked_for_too(cloud: Cloud, caller: str) -> None:
    cloud.client().enable_ebs_encryption_by_default()
    key = f"arn:aws:kms:{REGION}:123456789012:key/01234567-89ab-cdef-0123-456789abcdef"
    cloud.options.default_ebs_key = key
    image = configured()
    cloud.enforce(policy.document(Section.ALL, image.aws), caller)
    findings = list(preflight.check(image))
    (default,) = [one for one in findings if one.name.startswith("encryption by default")]
    assert default.state is State.NOTE
    assert "aws.kms_key" in default.hint
    (unknown,) = [one for one in findings if one.name == permissions.NAME]
    assert "kms:CreateGrant on key" in unknown.found
    named = configured(encrypt=True, kms_key=key)
    cloud.enforce(policy.document(Section.ALL, named.aws), caller)
    (only,) = found(named)
    assert only.state is State.OK, only


@pytest.mark.parametrize(
    ("condition", "state"),
    [
        ({"StringNotLike": {"ec2:InstanceType": ["m6i.*", "t3.*"]}}, State.OK),
        ({"Null": {"aws:RequestTag/Owner": "true"}}, State.NOTE),
    ],
    ids=["an instance type", "a tag that is missing"],
)
def test_an_organization_s_policy_is_no_more_than_a_note(
    cloud: Cloud, caller: str, condition: dict[str, Any], state: State
) -> None:
    image = configured()
    deny = {"Effect": "Deny", "Action": "ec2:RunInstances", "Resource": "arn:aws:ec2:*:*:instance/*"}
    control = {"Version": "2012-10-17", "Statement": [{**deny, "Condition": condition}]}
    cloud.enforce(policy.document(Section.ALL, image.aws), caller, controls=[control])
    (only,) = found(image)
    assert only.state is state, only
    assert only.exit_code == 0


def test_without_simulation_nothing_is_said_to_be_refused(cloud: Cloud, caller: str) -> None:
    image = configured()
    document = without(policy.document(Section.ALL, image.aws), "iam:SimulatePrincipalPolicy")
    cloud.enforce(document, caller)
    (only,) = found(image)
    assert only.state is State.NOTE
    assert "calls were not tried" in only.found
    assert "allow iam:SimulatePrincipalPolicy on arn:aws:iam::" in only.hint


def test_every_call_of_the_policy_is_asked_for() -> None:
    aws = configured(**EVERYTHING, connect=Connect.SESSION_MANAGER, encrypt=True, kms_key="ours").aws
    image = replace(guest_image(), aws=aws)
    home = needs.Place(partition="aws", account="123456789012", region=REGION, image=image, role="arn:x")
    there = replace(home, region=OTHER)
    asked = {one.action for one in (*needs.at_home(home), *needs.of_copies(there, home))}
    written = {
        each for statement in policy.document(Section.ALL, aws)["Statement"] for each in statement["Action"]
    }
    reads = ("ec2:Describe", "ec2:Get", "autoscaling:Describe", "ssm:DescribeParameters", "ssm:GetParameters")
    looks = {"iam:GetInstanceProfile", "iam:GetRole", "iam:SimulatePrincipalPolicy", "pricing:GetProducts"}
    looks.add("servicequotas:GetServiceQuota")
    changing = {one for one in written if not one.startswith(reads) and one not in looks}
    changing.add("ec2:GetConsoleOutput")
    like = {one.rstrip("*") for one in changing}
    missing = {one for one in like if not any(each.startswith(one) for each in asked)}
    assert missing <= {"ec2:ModifyInstanceMetadataOptions", "ec2-instance-connect:SendSSHPublicKey"}
    # And nothing is asked for that the policy does not have.
    assert {one for one in asked if not any(one.startswith(each) for each in like)} <= {
        one for one in asked if one.startswith("ssm:GetParameter")
    }


# Who the caller is ------------------------------------------------------------------------------------------


class _Simulator:
    """An account whose simulator answers what a test says."""

    partition = "aws"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **result: Any) -> None:
        self.sources: list[str] = []

        def simulate(account: Any, principal: str, actions: list[str], *_: Any) -> list[dict[str, Any]]:
            self.sources.append(principal)
            return [{"EvalActionName": each, "EvalDecision": "implicitDeny", **result} for each in actions]

        monkeypatch.setattr(permissions, "_simulate", simulate)


NEED = needs.Need(
    section=Section.BUILD, action="ec2:StopInstances", resource="arn:x", what="a run's instance", context={}
)


@pytest.mark.parametrize(
    ("arn", "principal"),
    [
        ("arn:aws:iam::123456789012:user/team/ann", "arn:aws:iam::123456789012:user/team/ann"),
        ("arn:aws:sts::123456789012:assumed-role/plain/me", "arn:aws:iam::123456789012:role/plain"),
        ("arn:aws:sts::123456789012:assumed-role/machine/me", "arn:aws:iam::123456789012:role/ours/machine"),
        ("arn:aws-cn:sts::123456789012:assumed-role/x/me", "arn:aws-cn:iam::123456789012:role/x"),
    ],
)
def test_whose_policies_are_simulated(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, arn: str, principal: str
) -> None:
    with_profile(cloud)
    simulator = _Simulator(monkeypatch)
    list(permissions.findings(Account.open(), arn, [NEED]))
    assert simulator.sources == [principal]


@pytest.mark.parametrize(
    ("arn", "says"),
    [
        ("arn:aws:iam::123456789012:root", "root user"),
        ("arn:aws:sts::123456789012:federated-user/ann", "federated user"),
    ],
)
def test_who_can_not_be_simulated(cloud: Cloud, arn: str, says: str) -> None:
    (only,) = permissions.findings(Account.open(), arn, [NEED])
    assert only.state is State.NOTE
    assert says in only.found


def test_a_role_whose_path_is_not_told(cloud: Cloud) -> None:
    arn = "arn:aws:sts::123456789012:assumed-role/nobody/me"
    (only,) = permissions.findings(Account.open(), arn, [NEED])
    assert only.state is State.NOTE
    assert "iam:GetRole" in only.hint


@pytest.mark.parametrize(
    ("arn", "asked"),
    [
        ("arn:aws:sts::123456789012:assumed-role/machine/me", {"GetRole": 2, "SimulatePrincipalPolicy": 0}),
        ("arn:aws:iam::123456789012:user/ann", {"GetRole": 0, "SimulatePrincipalPolicy": 2}),
    ],
    ids=["role", "user"],
)
def test_iam_that_does_not_answer_is_soon_given_up(cloud: Cloud, arn: str, asked: dict[str, int]) -> None:
    for action in asked:
        cloud.faults.add(action, Fault.RESET, times=None)
    several = [replace(NEED, resource=f"arn:{number}") for number in range(5)]
    (only,) = permissions.findings(Account.open(), arn, several)
    assert only.state is State.NOTE
    assert "5 calls were not tried" in only.found
    assert {action: cloud.count(action) for action in asked} == asked


def test_simulations_that_are_throttled_are_asked_for_again(
    cloud: Cloud, caller: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "ATTEMPTS", 10)
    image = configured()
    cloud.enforce(policy.document(Section.ALL, image.aws), caller)
    cloud.faults.add("SimulatePrincipalPolicy", Fault.THROTTLE, nth=2, times=5)
    (only,) = found(image)
    assert only.state is State.OK, only


@pytest.mark.parametrize(
    ("result", "state", "says"),
    [
        ({}, State.STOPS, "ec2:StopInstances on a run's instance"),
        ({"EvalDecision": "explicitDeny"}, State.STOPS, "(a policy denies it)"),
        (
            {"OrganizationsDecisionDetail": {"AllowedByOrganizations": False}},
            State.NOTE,
            "unless the organization's policies do",
        ),
        (
            {"PermissionsBoundaryDecisionDetail": {"AllowedByPermissionsBoundary": False}},
            State.STOPS,
            "(the permissions boundary does not allow it)",
        ),
        ({"MissingContextValues": ["aws:SourceVpc"]}, State.NOTE, "aws:SourceVpc"),
        ({"EvalDecision": "allowed", "MissingContextValues": ["aws:SourceVpc"]}, State.OK, "allowed"),
    ],
)
def test_what_the_simulator_answers(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, result: dict[str, Any], state: State, says: str
) -> None:
    _Simulator(monkeypatch, **result)
    (only,) = permissions.findings(Account.open(), "arn:aws:iam::123456789012:user/ann", [NEED])
    assert only.state is state
    assert says in only.found


def test_a_key_s_own_policy_is_not_known(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    _Simulator(monkeypatch)
    (only,) = permissions.findings(
        Account.open(), "arn:aws:iam::123456789012:user/ann", [replace(NEED, action="kms:Decrypt")]
    )
    assert only.state is State.NOTE
    assert "the key's own policy" in only.found
