"""Who may reach instances, and that a run's security group is gone when the run is."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError

from ami_builder.aws import network, session, subnets
from ami_builder.aws.network import source_cidrs
from ami_builder.aws.session import Account
from ami_builder.core.errors import CloudFailed, UsageError
from ami_builder.state.ledger import Ledger, read
from tests.cloud.aws import RUN, group, instance, launch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.fake_ec2.server import Cloud


@pytest.fixture
def account(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> Account:
    monkeypatch.setattr(session, "_LOOK_SECONDS", 1.0)
    return Account.open()


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.jsonl")


@contextmanager
def checkip(answer: bytes) -> Iterator[str]:
    """Answer as checkip.amazonaws.com does; yields the URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_only_this_machine_unless_somebody_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert source_cidrs(["10.0.0.0/8"]) == ("10.0.0.0/8",)
    for answer, expected in {b"203.0.113.7\n": "203.0.113.7/32", b"2001:db8::7\n": "2001:db8::7/128"}.items():
        with checkip(answer) as url:
            monkeypatch.setattr(network, "CHECKIP_URL", url)
            assert source_cidrs(()) == (expected,)
    with checkip(b"<html>please log in</html>") as url:
        monkeypatch.setattr(network, "CHECKIP_URL", url)
        with pytest.raises(CloudFailed, match="public address") as caught:
            source_cidrs(())
    assert "aws.source_cidrs" in str(caught.value.hint)
    with pytest.raises(CloudFailed, match="public address"):
        source_cidrs(())


def test_a_group_is_open_to_whom_it_says_and_then_gone(
    cloud: Cloud, account: Account, ledger: Ledger
) -> None:
    with group(account, ledger, cidrs=("203.0.113.7/32", "2001:db8::/64"), port=2222) as made:
        assert cloud.left() == {"security-group": [made]}
        (shown,) = account.ec2.describe_security_groups(GroupIds=[made])["SecurityGroups"]
        (rule,) = shown["IpPermissions"]
        assert (rule["FromPort"], rule["ToPort"], rule["IpProtocol"]) == (2222, 2222, "tcp")
        assert [each["CidrIp"] for each in rule["IpRanges"]] == ["203.0.113.7/32"]
        assert [each["CidrIpv6"] for each in rule["Ipv6Ranges"]] == ["2001:db8::/64"]
        assert {"Key": "ami-builder:run", "Value": RUN} in shown["Tags"]
        (entry,) = read(ledger.path)
        assert (entry.id, entry.deleted, entry.find["run"]) == (made, False, RUN)
    assert cloud.left() == {}
    assert read(ledger.path)[0].deleted


def test_session_manager_needs_no_way_in(cloud: Cloud, account: Account, ledger: Ledger) -> None:
    with group(account, ledger, cidrs=()) as made:
        (shown,) = account.ec2.describe_security_groups(GroupIds=[made])["SecurityGroups"]
        assert shown["IpPermissions"] == []
    assert cloud.count("AuthorizeSecurityGroupIngress") == 0


@pytest.mark.parametrize("action", ["CreateSecurityGroup", "AuthorizeSecurityGroupIngress"])
@pytest.mark.parametrize("fault", ["throttle", "http500", "reset", "lost_response", "duplicated"])
def test_one_fault_leaves_nothing_and_stops_nothing(
    cloud: Cloud, account: Account, ledger: Ledger, action: str, fault: str
) -> None:
    cloud.faults.add(action, fault)
    with group(account, ledger) as made:
        (shown,) = account.ec2.describe_security_groups(GroupIds=[made])["SecurityGroups"]
        assert len(shown["IpPermissions"]) == 1
    assert cloud.left() == {}


@pytest.mark.parametrize("fault", ["throttle", "http500", "lost_response", "duplicated"])
def test_a_fault_while_deleting_leaves_nothing(
    cloud: Cloud, account: Account, ledger: Ledger, fault: str
) -> None:
    with group(account, ledger):
        cloud.faults.add("DeleteSecurityGroup", fault)
    assert cloud.left() == {}


def test_a_group_that_does_not_show_yet_is_waited_for(cloud: Cloud, account: Account, ledger: Ledger) -> None:
    cloud.options.hidden_describes = 2
    cloud.faults.add("CreateSecurityGroup", "lost_response")
    with group(account, ledger) as made:
        assert cloud.left() == {"security-group": [made]}
    assert cloud.left() == {}


def test_a_group_that_never_shows_stands_in_the_ledger(
    cloud: Cloud, account: Account, ledger: Ledger
) -> None:
    cloud.options.hidden_describes = 1000
    cloud.faults.add("CreateSecurityGroup", "lost_response")
    with pytest.raises(CloudFailed, match=r"InvalidGroup\.Duplicate"), group(account, ledger):
        pass
    (entry,) = read(ledger.path)
    assert not entry.deleted
    assert entry.find["run"] == RUN


def test_what_was_refused_was_never_made(
    cloud: Cloud, account: Account, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        said: Any = {
            "Error": {"Code": "SecurityGroupLimitExceeded", "Message": "The maximum number …"},
            "ResponseMetadata": {"HTTPStatusCode": 400},
        }
        raise ClientError(said, "CreateSecurityGroup")

    monkeypatch.setattr(account.ec2, "create_security_group", refuse)
    with pytest.raises(CloudFailed, match="AWS refused ec2:CreateSecurityGroup"):
        group(account, ledger).__enter__()
    assert read(ledger.path)[0].deleted


def test_a_group_in_use_is_deleted_once_it_is_not(
    cloud: Cloud, account: Account, ledger: Ledger, tmp_path: Path
) -> None:
    ec2 = cloud.client()
    with group(account, ledger) as made:
        launched = ec2.run_instances(
            ImageId=cloud.base_ami(),
            InstanceType="m6i.large",
            MinCount=1,
            MaxCount=1,
            SecurityGroupIds=[made],
        )
        ids = [launched["Instances"][0]["InstanceId"]]
        ending = threading.Timer(1.0, lambda: ec2.terminate_instances(InstanceIds=ids))
        ending.start()
    ending.join()
    assert cloud.left() == {}
    assert cloud.count("DeleteSecurityGroup") > 1


def test_what_can_not_be_deleted_stands_in_the_ledger(
    cloud: Cloud, account: Account, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "_DELETE_SECONDS", 0.3)
    ec2 = cloud.client()

    def use(made: str) -> None:
        ec2.run_instances(
            ImageId=cloud.base_ami(),
            InstanceType="m6i.large",
            MinCount=1,
            MaxCount=1,
            SecurityGroupIds=[made],
        )

    with (
        pytest.raises(CloudFailed, match="is still in use") as caught,
        group(account, ledger) as made,
    ):
        use(made)
    assert "ami-builder gc" in str(caught.value.hint)
    assert not read(ledger.path)[0].deleted
    # What went wrong first is what is told.
    other = group(account, ledger, run_id="other")
    use(other.__enter__())
    other.__exit__(ValueError, ValueError("ours"), None)
    assert not read(ledger.path)[1].deleted


def test_where_there_is_no_network(cloud: Cloud, account: Account, ledger: Ledger) -> None:
    with pytest.raises(UsageError, match="subnet-0123456789abcdef0"):
        group(account, ledger, subnet="subnet-0123456789abcdef0").__enter__()
    (subnet, *_) = account.ec2.describe_subnets()["Subnets"]
    assert subnets.get(account, [subnet["SubnetId"]])[0].vpc == network.find_vpc(account)
    for vpc in cloud.backend().vpcs.values():
        vpc.is_default = "false"
    with pytest.raises(UsageError, match="there is no default VPC") as caught:
        group(account, ledger).__enter__()
    assert "aws.subnets" in str(caught.value.hint)
    assert read(ledger.path) == ()


def test_a_refusal_is_final_and_known_to_have_made_nothing(
    cloud: Cloud, account: Account, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud.faults.add("AuthorizeSecurityGroupIngress", "http500", times=None)
    monkeypatch.setattr("ami_builder.aws.session.ATTEMPTS", 2)
    with pytest.raises(CloudFailed, match="InternalError"), group(Account.open(), ledger):
        pass
    assert cloud.left() == {}


def test_an_instance_in_the_group_goes_before_it(
    cloud: Cloud, account: Account, ledger: Ledger, tmp_path: Path
) -> None:
    with group(account, ledger) as made, instance(account, ledger, launch(cloud, made), tmp_path / "m"):
        assert cloud.left().keys() == {"security-group", "instance", "volume"}
    assert cloud.left() == {}
