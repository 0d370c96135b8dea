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
    assert Account.open().identity().startswith("arn:aws:sts::123456789012:")


def test_what_is_missing_is_named(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_REGION")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    with pytest.raises(CloudFailed, match="no AWS region is set") as caught:
        Account.open()
    assert "aws.region" in str(caught.value.hint)
    assert caught.value.exit_code == 6
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(CloudFailed, match="no AWS credentials") as caught:
        Account.open(REGION)
    assert "AWS_PROFILE" in str(caught.value.hint)
    monkeypatch.setenv("AWS_PROFILE", "nobodys")
    with pytest.raises(CloudFailed, match=r"credentials can't be used.*nobodys"):
        Account.open(REGION)


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


@pytest.mark.parametrize(
    ("code", "said", "hint"),
    [
        ("UnauthorizedOperation", "You are not authorized.", "allow ec2:RunInstances"),
        (
            "UnauthorizedOperation",
            "You are not authorized to perform this operation. User: arn:aws:iam::1:user/x is not authorized"
            " to perform: ec2:CreateTags on resource: x Encoded authorization failure message: aGVsbG8",
            "allow ec2:CreateTags",
        ),
        ("AuthFailure", "AWS was not able to validate the provided access credentials", "log in again"),
        ("RequestExpired", "Request has expired.", "log in again"),
        ("RequestLimitExceeded", "Request limit exceeded.", "10 attempts"),
        ("VcpuLimitExceeded", "You have requested more vCPU capacity", "quota"),
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
    assert failed.tail == ("request id 4f8",)
    assert hint is None if failed.hint is None else str(hint) in failed.hint
    assert is_definite(error) == (code != "RequestLimitExceeded")


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
