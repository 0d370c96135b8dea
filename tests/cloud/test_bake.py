"""A bake, the account's features, and this host's Packer: credentials, endpoints, IMDSv2, quotas."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest

from ami_builder.aws import bake, packer_limits
from ami_builder.aws.session import Account
from ami_builder.build import plugins
from ami_builder.config.schema import AwsSettings
from ami_builder.core.options import Connect
from tests.cloud.faulting import BUILD, Place, fresh, only_the_ami
from tests.cloud.flow import Ran, captured
from tests.fake_ec2.server import ACCESS_KEY

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.fake_ec2.server import Cloud

LOGIN = """\
import datetime, json, pathlib
count = pathlib.Path(__file__).with_name("count")
number = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(number))
end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=1)
print(json.dumps({
    "Version": 1,
    "AccessKeyId": f"AKIAREFRESHED{number:07d}",
    "SecretAccessKey": "very-secret",
    "SessionToken": f"very-secret-token-{number}",
    "Expiration": end.isoformat(),
}))
"""
TYPES = ("--set", "aws.instance_types=m6i.large,m7i.large")


@pytest.fixture
def account(cloud: Cloud, places: Sequence[Place], tmp_path: Path) -> Path:
    """A new account; returns the folder of runs."""
    fresh(cloud, tmp_path / "home")
    return tmp_path / "home"


def build(*flags: str) -> Ran:
    return captured(*flags, *BUILD)


def by_packer(cloud: Cloud, action: str) -> list[dict[str, object]]:
    """Return the parameters of Packer's calls of an action."""
    return [dict(call.params) for call in cloud.calls if call.packer and call.action == action]


def test_packer_gets_credentials_that_are_refreshed(
    cloud: Cloud, account: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "login.py").write_text(LOGIN)
    config = tmp_path / "config"
    config.write_text(f"[profile ours]\ncredential_process = {sys.executable} {tmp_path / 'login.py'}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "ours")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    ran = build()
    assert ran.status == 0, ran.err
    keys = [call.access_key for call in cloud.calls if call.packer]
    assert len(set(keys)) > 3
    assert all(key.startswith("AKIAREFRESHED") for key in keys)
    written = [path.read_bytes() for path in account.rglob("*") if path.is_file()]
    assert written
    assert not any(b"very-secret" in content for content in written)
    assert "very-secret" not in ran.err + ran.out


def test_only_who_has_the_token_gets_credentials(cloud: Cloud) -> None:
    import urllib.error
    import urllib.request

    from ami_builder.aws.credentials import served

    class Keys:
        access_key, secret_key, token = "AKIA", "s", None

    with served(Keys) as credentials:
        url = credentials.variables["AWS_CONTAINER_CREDENTIALS_FULL_URI"]
        assert url.startswith("http://127.0.0.1:")
        for given in ({}, {"Authorization": "guess"}):
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(urllib.request.Request(url, headers=given))
        right = {"Authorization": credentials.variables["AWS_CONTAINER_AUTHORIZATION_TOKEN"]}
        with urllib.request.urlopen(urllib.request.Request(url, headers=right)) as answer:
            assert json.load(answer)["AccessKeyId"] == "AKIA"
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(urllib.request.Request(url, headers=right))


@pytest.mark.parametrize(
    "action",
    [
        "DescribeImages",
        "RunInstances",
        # Packer waits until it is stopped.
        pytest.param("StopInstances", marks=pytest.mark.long),
        pytest.param("CreateImage", marks=pytest.mark.long),
    ],
)
def test_credentials_that_expire_in_the_middle(cloud: Cloud, account: Path, action: str) -> None:
    cloud.options.expired_after = action
    # Packer 1.6.6 and plugins before 1.8 ask for such an image until they are stopped.
    cloud.options.image_seconds = 1000
    ran = captured("--set", "bake.timeout=12s", "build", "--target", "aws")
    assert ran.status == 6, ran.err
    assert "log in again" in ran.err
    if action != "DescribeImages":
        assert cloud.left()["instance"]
        assert "an instance may be left: `ami-builder gc` finds it" in ran.err


def test_credentials_that_end_before_the_bake_may(
    cloud: Cloud, account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CREDENTIAL_EXPIRATION", "2999-01-01T00:00:00Z")
    ran = build()
    assert ran.status == 0, ran.err
    assert "credentials end" not in ran.err
    monkeypatch.setattr(Account, "seconds_left", lambda _: 6.0)
    cloud.reset()
    ran = build("--set", "memory.reserve=6%")
    assert "the AWS credentials end in 0 minutes and can't be refreshed; a bake may take" in ran.err


def test_a_profiles_endpoint_reaches_packer(
    cloud: Cloud, account: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "config"
    config.write_text(f"[profile ours]\nendpoint_url = {cloud.url}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "ours")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    ran = build()
    assert ran.status == 0, ran.err
    assert by_packer(cloud, "CreateImage")


@pytest.mark.parametrize(
    ("name", "ec2"),
    [
        ("AWS_USE_FIPS_ENDPOINT", "https://ec2-fips.us-east-1.amazonaws.com"),
        ("AWS_USE_DUALSTACK_ENDPOINT", "https://ec2.us-east-1.api.aws"),
        ("", ""),
    ],
)
def test_special_endpoints_reach_packer(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, name: str, ec2: str
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    if name:
        monkeypatch.setenv(name, "true")
    account = Account.open()
    assert account.endpoint("ec2") == ec2
    with account.environment("ec2", "sts") as credentials:
        assert credentials.variables.get("AWS_ENDPOINT_URL_EC2", "") == ec2
        assert credentials.variables["AWS_ACCESS_KEY_ID"] == ACCESS_KEY
        # The SDKs refuse it together with a URL.
        assert name not in credentials.variables
    assert cloud.calls == ()


def test_session_manager_needs_an_endpoint_of_its_own(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    aws = AwsSettings(connect=Connect.SESSION_MANAGER)
    found = list(packer_limits.limits(Account.open(), aws, bake.SOURCE.plugin))
    assert found == [], "one URL for both"
    monkeypatch.setenv("AWS_ENDPOINT_URL_SSM", "http://127.0.0.1:9")
    found = list(packer_limits.limits(Account.open(), aws, bake.SOURCE.plugin))
    newest = (
        max(plugins.installed(bake.SOURCE.plugin), default=((), None))[0] if plugins.has_plugins() else ()
    )
    assert [cloud.url in each.message for each in found] == ([] if newest >= (1, 8) else [True])
    aws = AwsSettings(connect=Connect.SSH)
    assert list(packer_limits.limits(Account.open(), aws, bake.SOURCE.plugin)) == []


def test_an_instance_profile_may_be_an_arn_with_a_path(cloud: Cloud, account: Path) -> None:
    iam = cloud.client("iam")
    iam.create_role(RoleName="builder", AssumeRolePolicyDocument="{}")
    made = iam.create_instance_profile(InstanceProfileName="builders", Path="/team/ci/")
    iam.add_role_to_instance_profile(InstanceProfileName="builders", RoleName="builder")
    ran = build("--set", f"aws.instance_profile={made['InstanceProfile']['Arn']}")
    assert ran.status == 0, ran.err
    assert by_packer(cloud, "RunInstances")[0]["IamInstanceProfile"] == {"Name": "builders"}
    assert cloud.count("GetInstanceProfile") == 0


def tokens_of_builder(cloud: Cloud) -> object:
    """Return HttpTokens of the first instance, which Packer launched."""
    builder = cloud.backend().all_instances()[0]
    return builder.metadata_options.http_tokens


def test_imdsv2_is_required_of_the_builder(cloud: Cloud, account: Path) -> None:
    # With plugins, the launch requires it.
    cloud.options.pending_changes = 2
    ran = build()
    assert ran.status == 0, ran.err
    assert tokens_of_builder(cloud) == "required"
    assert "still has IMDSv1" not in ran.err


@pytest.mark.skipif(plugins.has_plugins(), reason="this Packer requires it at the launch")
def test_imdsv1_that_stays_is_said(cloud: Cloud, account: Path) -> None:
    cloud.options.pending_changes = 1000
    ran = build()
    assert ran.status == 0, ran.err
    assert "still has IMDSv1 while it bakes: AWS refused ec2:ModifyInstanceMetadataOptions" in ran.err


def test_an_account_that_enforces_imdsv2(cloud: Cloud, account: Path) -> None:
    cloud.options.imdsv2_enforced = True
    ran = build()
    if plugins.has_plugins():
        assert ran.status == 0, ran.err
        return
    assert ran.status == 3, ran.err
    assert "the account enforces IMDSv2" in ran.err
    assert cloud.count("CreateSecurityGroup") + cloud.count("RunInstances") == 0
    checked = captured("check", "--target", "aws")
    assert "the account enforces IMDSv2" in checked.out + checked.err
    cloud.options.imds_default = "required"
    ran = build()
    assert ran.status == 0, ran.err


@pytest.mark.skipif(plugins.has_plugins(), reason="this Packer tags at the launch everywhere")
def test_packer_1_6_6_does_not_launch_without_tags(cloud: Cloud, account: Path) -> None:
    ran = build("--set", "aws.region=us-gov-west-1")
    assert ran.status == 3, ran.err
    assert "can't tag what it launches in us-gov-west-1" in ran.err
    assert cloud.count("CreateSecurityGroup") + cloud.count("RunInstances") == 0


def test_a_type_that_the_region_lacks_is_passed_over(cloud: Cloud, account: Path) -> None:
    ran = build("--set", "aws.instance_types=m99.large,m7i.large")
    assert ran.status == 0, ran.err
    assert "us-east-1 does not offer m99.large" in ran.err
    assert by_packer(cloud, "RunInstances")[0]["InstanceType"] == "m7i.large"
    only_the_ami(cloud)
    cloud.reset()
    ran = build("--set", "aws.instance_types=m99.large,m98.large")
    assert ran.status == 2, ran.err
    assert cloud.count("CreateSecurityGroup") == 0


SCP = (
    "You are not authorized to perform this operation. User: arn:aws:iam::123456789012:user/x is not"
    " authorized to perform: ec2:RunInstances on resource: arn:aws:ec2:us-east-1:123456789012:instance/*"
    " with an explicit deny in a service control policy. Encoded authorization failure message: aGVsbG8"
)


@pytest.mark.parametrize(
    ("code", "message", "hint"),
    [
        (
            "VcpuLimitExceeded",
            "You have requested more vCPU capacity than your current vCPU limit of 32 allows for the instance"
            " bucket that the specified instance type belongs to.",
            "reached a quota 'Running On-Demand",
        ),
        ("UnauthorizedOperation", SCP, "a service control policy denies ec2:RunInstances"),
        (
            "TagPolicyViolation",
            "The tag policy does not allow the specified value for the following tag key: 'Project'.",
            "set these tags with aws.tags",
        ),
    ],
)
@pytest.mark.parametrize("spot", ["false", "true"])
def test_a_launch_that_no_other_type_would_help(
    cloud: Cloud, account: Path, code: str, message: str, hint: str, spot: str
) -> None:
    cloud.options.launch_refusal = (code, message)
    ran = build(*TYPES, "--set", f"aws.spot={spot}")
    assert ran.status == 6, ran.err
    assert hint in ran.err
    assert "iam-policy" not in ran.err
    assert cloud.count("RunInstances") + cloud.count("CreateFleet") == 1
    assert cloud.left() == {}


@pytest.mark.long
def test_a_snapshot_may_take_longer_than_the_bake(cloud: Cloud, account: Path) -> None:
    cloud.options.image_seconds = 15
    ran = captured("--set", "bake.timeout=12s", "build", "--target", "aws")
    assert ran.status == 0, ran.err
    only_the_ami(cloud)
