"""The account by the standard chain, errors that say what to do, and the AMI that baking starts from."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError

from ami_builder.aws import source_ami
from ami_builder.aws.session import Account, aws_errors, failure, is_definite
from ami_builder.core.errors import CloudFailed, UsageError
from ami_builder.core.options import Arch
from tests.fake_ec2.server import ACCESS_KEY, REGION, Cloud

if TYPE_CHECKING:
    from pathlib import Path

DEBIAN = "136693071363"


def test_the_account_is_the_chains(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Account.open().region == REGION
    assert Account.open("eu-central-1").region == "eu-central-1"
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-3")
    assert Account.open().region == REGION, "AWS_REGION goes first, as for AWS's own programs"
    monkeypatch.delenv("AWS_REGION")
    assert Account.open().region == "eu-west-3"
    assert Account.open().identity().startswith("arn:aws:iam::123456789012:user/")


def test_what_is_missing_is_named(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_REGION")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    with pytest.raises(UsageError, match="no AWS region is set") as unset:
        Account.open()
    assert "aws.region" in str(unset.value.hint)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(CloudFailed, match="no AWS credentials") as caught:
        Account.open(REGION)
    assert "AWS_PROFILE" in str(caught.value.hint)
    assert caught.value.exit_code == 6


NO_FILE = "[default]\n"
BROKEN = "[default\n"
NO_PROGRAM = "[default]\ncredential_process = /nowhere/login\n"
UNQUOTED = "[default]\ncredential_process = 'x\n"
NO_SESSION = "[default]\nsso_session = x\nsso_account_id = 1\nsso_role_name = x\n"
LOOP = "[default]\nrole_arn = arn:aws:iam::123456789012:role/x\nsource_profile = default\n"


@pytest.mark.parametrize(
    ("config", "variables"),
    [
        (NO_FILE, {"AWS_ENDPOINT_URL": "127.0.0.1:5555"}),
        (NO_FILE, {"AWS_ENDPOINT_URL_EC2": "http://127.0.0.1:x"}),
        (NO_FILE, {"AWS_ENDPOINT_URL": "http:// x"}),
        (NO_FILE, {"AWS_ENDPOINT_URL": "ftp://127.0.0.1"}),
        (NO_FILE, {"AWS_REGION": "US-EAST-1"}),
        (NO_FILE, {"AWS_REGION": "us east"}),
        (NO_FILE, {"AWS_PROFILE": "nobodys"}),
        (NO_FILE, {"AWS_CA_BUNDLE": "/nowhere"}),
        (NO_FILE, {"AWS_DEFAULTS_MODE": "fast"}),
        (NO_FILE, {"AWS_RESPONSE_CHECKSUM_VALIDATION": "never"}),
        (NO_FILE, {"AWS_REQUEST_MIN_COMPRESSION_SIZE_BYTES": "-1"}),
        (NO_FILE, {"AWS_METADATA_SERVICE_TIMEOUT": "soon"}),
        (NO_FILE, {"AWS_METADATA_SERVICE_NUM_ATTEMPTS": "many"}),
        (NO_FILE, {"AWS_EC2_METADATA_SERVICE_ENDPOINT": "h p"}),
        (NO_FILE, {"AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE": "ipv5"}),
        (NO_FILE, {"AWS_CREDENTIAL_EXPIRATION": "tomorrow"}),
        (NO_FILE, {"AWS_ACCESS_KEY_ID": "", "AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://10.0.0.1/x"}),
        (NO_FILE, {"AWS_ACCESS_KEY_ID": "", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "x"}),
        (
            NO_FILE,
            {
                "AWS_ACCESS_KEY_ID": "",
                "AWS_WEB_IDENTITY_TOKEN_FILE": "/nowhere/token",
                "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/x",
            },
        ),
        (BROKEN, {}),
        (NO_PROGRAM, {"AWS_ACCESS_KEY_ID": ""}),
        (UNQUOTED, {"AWS_ACCESS_KEY_ID": ""}),
        (NO_SESSION, {"AWS_ACCESS_KEY_ID": ""}),
        (LOOP, {"AWS_ACCESS_KEY_ID": ""}),
    ],
    ids=lambda given: "" if isinstance(given, str) else "-".join(given),
)
def test_a_wrong_setting_of_aws_is_named(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: str, variables: dict[str, str]
) -> None:
    (tmp_path / "config").write_text(config)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as caught:
        Account.open().identity()
    text = f"{caught.value} {caught.value.hint}"
    for name in {n: v for n, v in variables.items() if v and n != "AWS_ROLE_ARN"} or ["AWS_CONFIG_FILE"]:
        assert name in text
        assert variables.get(name, str(tmp_path / "config")) in text
    assert "secret" not in text
    assert ACCESS_KEY not in text


def test_credentials_that_have_expired(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_CREDENTIAL_EXPIRATION", "2020-01-01T00:00:00Z")
    with pytest.raises(CloudFailed, match="have expired") as caught:
        Account.open().identity()
    assert "log in again" in str(caught.value.hint)


def test_a_profile_is_used(cloud: Cloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "credentials"
    file.write_text("[ours]\naws_access_key_id = AKIAPROFILEPROFILE00\naws_secret_access_key = x\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "ours")
    Account.open().ec2.describe_vpcs()
    assert cloud.calls[-1].access_key == "AKIAPROFILEPROFILE00"


def test_threads_share_a_client(cloud: Cloud) -> None:
    account = Account.open()
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(account.client("ec2"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(client) for client in found}) == 1
    assert account.client("ec2", "eu-west-1") is not found[0]
    assert found[0].meta.config.retries == {"mode": "standard", "total_max_attempts": 10}
    assert "ami-builder/" in found[0].meta.config.user_agent_extra


def test_passing_faults_are_tried_again(cloud: Cloud) -> None:
    for fault in ("throttle", "http500", "reset", "lost_response"):
        cloud.faults.add("DescribeVpcs", fault)
    assert Account.open().ec2.describe_vpcs()["Vpcs"]


def test_aws_not_answering_is_no_traceback(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("ami_builder.aws.session.ATTEMPTS", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    account = Account.open()
    with pytest.raises(CloudFailed, match="AWS did not answer") as caught, aws_errors():
        account.ec2.describe_vpcs()
    assert not is_definite(caught.value)
    assert "AWS_ENDPOINT_URL" in str(caught.value.hint)


REFUSED = "You are not authorized to perform this operation. "


@pytest.mark.parametrize(
    ("code", "said", "hint"),
    [
        ("UnauthorizedOperation", "You are not authorized.", "allow ec2:RunInstances"),
        (
            "UnauthorizedOperation",
            REFUSED + "User: arn:aws:iam::1:user/x is not authorized"
            " to perform: ec2:CreateTags on resource: x Encoded authorization failure message: aGVsbG8",
            "allow ec2:CreateTags",
        ),
        (
            "UnauthorizedOperation",
            REFUSED + "Encoded authorization failure message: aGVsbG8",
            "decode-authorization-message",
        ),
        (
            "UnauthorizedOperation",
            REFUSED + "User: arn:aws:iam::1:user/x is not authorized to"
            " perform: ec2:RunInstances on resource: x with an explicit deny in a"
            " service control policy. Encoded authorization failure message: aGVsbG8",
            "a service control policy denies ec2:RunInstances",
        ),
        (
            "UnauthorizedOperation",
            REFUSED + "User: arn:aws:iam::1:user/x is not authorized to"
            " perform: ec2:CreateTags on resource: x because no permissions boundary allows the"
            " ec2:CreateTags action",
            "a permissions boundary does not allow ec2:CreateTags",
        ),
        (
            "AccessDenied",
            "User: arn:aws:iam::1:user/x is not authorized to perform: iam:GetInstanceProfile on resource: x"
            " because no identity-based policy allows the iam:GetInstanceProfile action",
            "allow iam:GetInstanceProfile for these credentials; `ami-builder iam-policy`",
        ),
        (
            "TagPolicyViolation",
            "The tag policy does not allow the specified value for the following tag key: 'Project'.",
            "aws.tags",
        ),
        ("MaxFleetCountExceeded", "You've reached your quota for maximum Fleet Requests", "Spot Fleet"),
        (
            "AuthFailure.ServiceLinkedRoleCreationNotPermitted",
            "The provided credentials do not have permission to create the service-linked role for EC2 Spot"
            " Instances.",
            "create-service-linked-role",
        ),
        ("MaxSpotInstanceCountExceeded", "Max spot instance count exceeded", "'All … Spot Instance Requests"),
        ("InsufficientFreeAddressesInSubnet", "There are not enough free addresses", "aws.subnets"),
        ("AuthFailure", "AWS was not able to validate the provided access credentials", "log in again"),
        ("AuthFailure", "Not authorized for images: [ami-0123456789abcdef0]", "another account"),
        ("RequestExpired", "Request has expired.", "log in again"),
        ("RequestLimitExceeded", "Request limit exceeded.", "several attempts"),
        ("VcpuLimitExceeded", "You have requested more vCPU capacity", "quota 'Running On-Demand"),
        ("InsufficientInstanceCapacity", "We currently do not have", "aws.instance_types"),
        ("InternalError", "An internal error has occurred", "try again later"),
        ("InvalidParameterValue", "Wrong.", None),
    ],
)
def test_an_error_of_aws_names_the_call_and_what_to_do(code: str, said: str, hint: str | None) -> None:
    error = ClientError(
        {
            "Error": {"Code": code, "Message": said},
            "ResponseMetadata": {
                "RequestId": "4f8",
                "HTTPStatusCode": 400,
                "HostId": "",
                "HTTPHeaders": {},
                "RetryAttempts": 0,
            },
        },
        "RunInstances",
    )
    failed = failure(error)
    assert failed.message.startswith(f"AWS refused ec2:RunInstances: {code}: ")
    assert "Encoded" not in failed.message
    encoded = ("encoded message: aGVsbG8",) if "Encoded" in said else ()
    assert failed.tail == ("request id 4f8", *encoded)
    assert hint is None if failed.hint is None else str(hint) in failed.hint
    # What the printed policy can't change.
    may_help = ("allow", "decode", "create")
    assert ("iam-policy" in str(failed.hint)) == str(hint).startswith(may_help)
    assert is_definite(error) == (code != "RequestLimitExceeded")


def test_an_error_without_a_message_is_an_error_all_the_same() -> None:
    error = ClientError({"Error": {"Code": "Unknown", "Message": None}}, "RunInstances")  # type: ignore[typeddict-item]
    assert failure(error).message == "AWS refused ec2:RunInstances: Unknown"


def test_credentials_are_in_no_message(cloud: Cloud) -> None:
    account = Account.open()
    with pytest.raises(CloudFailed) as caught, aws_errors():
        account.ec2.describe_volumes(VolumeIds=["vol-0123456789abcdef0"])
    assert ACCESS_KEY not in f"{caught.value}{caught.value.hint}{caught.value.tail}"
    assert "secret" not in f"{caught.value}{caught.value.hint}{caught.value.tail}"


# The base AMI -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [f"{DEBIAN}/debian-13-amd64-########-####", "ssm:/aws/service/debian/release/13/latest/amd64", "AMI"],
)
def test_the_base_ami_is_found_three_ways(cloud: Cloud, source: str) -> None:
    newest = cloud.base_ami()
    found = source_ami.resolve(Account.open(), newest if source == "AMI" else source, Arch.AMD64)
    assert found.id == newest
    assert found.name.startswith("debian-13-amd64-")
    assert found.root_device == "/dev/xvda"
    assert found.size == 8 << 30


def refused(source: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        source_ami.resolve(Account.open(), source, Arch.AMD64)
    return caught.value


def test_no_ami_matches(cloud: Cloud) -> None:
    error = refused(f"{DEBIAN}/debian-15-amd64-*")
    assert error.message == f"aws.source: no AMI in {REGION} matches {DEBIAN}/debian-15-amd64-*"
    assert "debian-13-amd64-" in str(error.hint)
    error = refused("999999999999/debian-13-amd64-########-####")
    assert "999999999999" in str(error.hint)


def test_arm64_has_an_ami_of_its_own(cloud: Cloud) -> None:
    found = source_ami.resolve(Account.open(), f"{DEBIAN}/debian-13-*64-########-####", Arch.ARM64)
    assert found.name.startswith("debian-13-arm64-")
    with pytest.raises(UsageError, match="is for x86_64, not arm64"):
        source_ami.resolve(Account.open(), cloud.base_ami(), Arch.ARM64)


def test_an_ami_that_can_not_be_baked_from(cloud: Cloud) -> None:
    assert "is for arm64, not x86_64" in refused(f"{DEBIAN}/debian-13-arm64-*").message
    images = cloud.backend().amis
    newest = images[cloud.base_ami()]
    newest.deprecation_time = "2026-01-01T00:00:00.000Z"
    assert "deprecated since 2026-01-01" in refused(newest.id).message
    assert (
        source_ami.resolve(Account.open(), f"{DEBIAN}/debian-13-amd64-########-####", Arch.AMD64).id
        != newest.id
    )
    newest.deprecation_time = None
    newest.root_device_type = "instance-store"
    assert "instance store" in refused(newest.id).message
    for image in images.values():
        image.deprecation_time = "2026-01-01T00:00:00.000Z"
    error = refused(f"{DEBIAN}/debian-13-amd64-########-####")
    assert "is deprecated" in error.message
    assert "is deprecated" in error.message


def test_an_ami_that_is_not_there(cloud: Cloud) -> None:
    assert "there is no AMI ami-0123456789abcdef0" in refused("ami-0123456789abcdef0").message
    assert "no SSM parameter /no/such" in refused("ssm:/no/such").message
    cloud.client("ssm").put_parameter(Name="/ours/base", Value="soon", Type="String")
    assert "'soon'" in refused("ssm:/ours/base").message
