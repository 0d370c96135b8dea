"""An instance's life: launched where there is room, reached, watched, terminated whatever happens."""

from __future__ import annotations

import base64
import email
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from ami_builder.aws import instances, machine, network, session
from ami_builder.aws.session import Account
from ami_builder.core.errors import BuildFailed, CloudFailed, Interrupted, TimedOut, UsageError
from ami_builder.core.options import Arch, Connect
from ami_builder.state.ledger import Ledger, LedgerEntry, read
from tests.cloud.aws import KEY, RUN, USER_DATA, Instance, Launch, group, instance, launch
from tests.fake_ec2.server import REGION, Cloud

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut short what real clouds need."""
    monkeypatch.setattr(machine, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(machine, "_ALIVE_SECONDS", 0.0)
    monkeypatch.setattr(session, "_LOOK_SECONDS", 1.0)
    monkeypatch.setattr(network, "_DELETE_SECONDS", 3.0)


@pytest.fixture
def account(cloud: Cloud) -> Account:
    return Account.open()


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.jsonl")


@pytest.fixture
def ordinary(cloud: Cloud, account: Account, ledger: Ledger) -> Iterator[Launch]:
    """A launch into a security group; whatever the test does, nothing is left."""
    with group(account, ledger) as made:
        yield launch(cloud, made)
    assert cloud.left() == {}
    assert all(entry.deleted for entry in read(ledger.path))


def requests(cloud: Cloud) -> list[dict[str, Any]]:
    """Return the parameters of all RunInstances."""
    return [dict(call.params) for call in cloud.calls if call.action == "RunInstances"]


def test_what_is_launched(
    cloud: Cloud, account: Account, ledger: Ledger, ordinary: Launch, tmp_path: Path
) -> None:
    subject = instance(account, ledger, ordinary, tmp_path / "machine")
    with subject as endpoint:
        assert subject.instance_id.startswith("i-")
        assert subject.memory == 8 << 30
        assert endpoint.address.startswith("127.77.")
        assert (endpoint.port, endpoint.user, endpoint.proxy_command) == (22, "admin", "")
        assert endpoint.console_log == tmp_path / "machine" / "console.log"
        subject.check_alive()
        entry = read(ledger.path)[-1]
        assert (entry.id, entry.find["run"], entry.deleted) == (subject.instance_id, RUN, False)
        (request,) = requests(cloud)
        assert request["ClientToken"] == entry.find["token"]
        assert len(request["ClientToken"]) == 64
        assert request["InstanceInitiatedShutdownBehavior"] == "terminate"
        assert request["MetadataOptions"] == {
            "HttpEndpoint": "enabled",
            "HttpTokens": "required",
            "HttpPutResponseHopLimit": 1,
        }
        (disk,) = request["BlockDeviceMappings"]
        assert disk["DeviceName"] == "/dev/xvda"
        assert disk["Ebs"]["VolumeType"] == "gp3"
        assert disk["Ebs"]["DeleteOnTermination"]
        assert "KeyName" not in request, "no key pair exists that could leak"
        tagged = {spec["ResourceType"]: spec["Tags"] for spec in request["TagSpecifications"]}
        assert tagged.keys() == {"instance", "volume", "network-interface"}
        assert all({"Key": "ami-builder:run", "Value": RUN} in tags for tags in tagged.values())
        sent = email.message_from_bytes(base64.b64decode(request["UserData"]))
        texts = [str(part.get_payload()) for part in sent.walk() if not part.is_multipart()]
        assert "--on-active=7200s" in texts[0]
        assert texts[1] == USER_DATA
        assert KEY in texts[2]
    assert cloud.left().keys() == {"security-group"}


def test_a_larger_disk_encryption_profile_subnet_and_port(
    cloud: Cloud, account: Account, ledger: Ledger, ordinary: Launch, tmp_path: Path
) -> None:
    subnet = account.ec2.describe_subnets()["Subnets"][0]["SubnetId"]
    cloud.client("iam").create_instance_profile(InstanceProfileName="ours")
    special = launch(
        cloud,
        ordinary["group"],
        encrypt=True,
        kms_key="alias/ours",
        instance_profile="ours",
        subnets=(subnet,),
        connect=Connect.SESSION_MANAGER,
        ssh_port=2222,
    )
    verify = replace(special["image"].verify, disk_size=(10 << 30) + 1)
    special["image"] = replace(special["image"], verify=verify)
    subject = instance(account, ledger, special, tmp_path / "machine")
    with subject as endpoint:
        (request,) = requests(cloud)
        ebs = request["BlockDeviceMappings"][0]["Ebs"]
        assert (ebs["VolumeSize"], ebs["Encrypted"], ebs["KmsKeyId"]) == (11, True, "alias/ours")
        assert (request["SubnetId"], request["IamInstanceProfile"]) == (subnet, {"Name": "ours"})
        assert (endpoint.address, endpoint.port) == (subject.instance_id, 2222)
        assert endpoint.proxy_command == (
            f"aws ssm start-session --region {REGION} --target {subject.instance_id} "
            "--document-name AWS-StartSSHSession --parameters portNumber=%p"
        )


def test_where_there_is_no_capacity_the_next_place_is_tried(
    cloud: Cloud, account: Account, ledger: Ledger, ordinary: Launch, tmp_path: Path
) -> None:
    first, second = (s["SubnetId"] for s in account.ec2.describe_subnets()["Subnets"][:2])
    cloud.options.no_capacity = {("m6i.large", first)}
    wanted = launch(cloud, ordinary["group"], subnets=(first, second))
    with instance(account, ledger, wanted, tmp_path / "machine"):
        assert [r["SubnetId"] for r in requests(cloud)] == [first, second]
        assert len({r["ClientToken"] for r in requests(cloud)}) == 2


def test_a_group_that_is_not_seen_yet_is_waited_for(
    cloud: Cloud, account: Account, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_POLL_SECONDS", 0.05)
    with group(account, ledger) as new:
        # To another of EC2's servers than the one that has just opened it.
        cloud.options.hidden_describes = 3
        cloud.hide(new)
        with instance(account, ledger, launch(cloud, new), tmp_path / "machine"):
            pass
        outcomes = [call.outcome for call in cloud.calls if call.action == "RunInstances"]
        assert outcomes[0] == "InvalidGroup.NotFound"
        assert outcomes[-1] == "ok"


def test_no_free_address_in_a_subnet_is_no_capacity_there(
    cloud: Cloud, account: Account, ledger: Ledger, ordinary: Launch, tmp_path: Path
) -> None:
    cloud.options.launch_refusal = (
        "InsufficientFreeAddressesInSubnet",
        "There are not enough free addresses in subnet 'subnet-1'.",
    )
    subnets = tuple(s["SubnetId"] for s in account.ec2.describe_subnets()["Subnets"][:2])
    wanted = launch(cloud, ordinary["group"], subnets=subnets)
    with pytest.raises(CloudFailed, match="no capacity"), instance(account, ledger, wanted, tmp_path / "m"):
        pass
    assert [r["SubnetId"] for r in requests(cloud)] == list(subnets)


def test_no_capacity_anywhere(
    cloud: Cloud, account: Account, ledger: Ledger, ordinary: Launch, tmp_path: Path
) -> None:
    cloud.options.no_capacity = {("m6i.large", "*")}
    with pytest.raises(CloudFailed, match="EC2 has no capacity") as caught:
        instance(account, ledger, ordinary, tmp_path / "machine").__enter__()
    assert "verify.instance_types" in str(caught.value.hint)
    assert caught.value.tail[0].startswith("m6i.large: AWS refused ec2:RunInstances: Insufficient")


def test_a_quota_is_no_matter_of_the_place(
    cloud: Cloud, account: Account, ledger: Ledger, ordinary: Launch, tmp_path: Path
) -> None:
    wanted = ordinary | {"ami": "ami-0123456789abcdef0"}
    with pytest.raises(UsageError, match="there is no AMI ami-0123456789abcdef0"):
        instance(account, ledger, wanted, tmp_path / "machine").__enter__()
    wanted = ordinary | {"name": "m6i.larger"}
    with pytest.raises(UsageError, match=r"no instance type m6i\.larger"):
        instance(account, ledger, wanted, tmp_path / "machine").__enter__()
    wanted = ordinary | {"group": "sg-0123456789abcdef0"}
    with pytest.raises(CloudFailed, match="RunInstances"):
        instance(account, ledger, wanted, tmp_path / "machine").__enter__()


def test_architectures_must_agree_before_a_launch(
    cloud: Cloud, account: Account, ledger: Ledger, ordinary: Launch, tmp_path: Path
) -> None:
    wanted = ordinary | {"name": "m7g.large"}
    with pytest.raises(UsageError, match="expected types that run x86_64"):
        instance(account, ledger, wanted, tmp_path / "machine").__enter__()
    wanted = ordinary | {"name": "m7g.large", "image": replace(ordinary["image"], arch=Arch.ARM64)}
    with pytest.raises(UsageError, match=r"is for x86_64, but image .* is for arm64"):
        instance(account, ledger, wanted, tmp_path / "machine").__enter__()
    assert requests(cloud) == []


@pytest.mark.parametrize("fault", ["throttle", "http500", "reset", "lost_response", "duplicated"])
@pytest.mark.parametrize(
    "action",
    ["DescribeImages", "DescribeInstanceTypes", "RunInstances", "DescribeInstances", "TerminateInstances"],
)
def test_one_fault_leaves_nothing_and_stops_nothing(
    cloud: Cloud, account: Account, ledger: Ledger, ordinary: Launch, tmp_path: Path, action: str, fault: str
) -> None:
    cloud.faults.add(action, fault)
    with instance(account, ledger, ordinary, tmp_path / "machine"):
        assert len(cloud.left()["instance"]) == 1, "one, however often the call was made"


def test_a_fault_that_stays_leaves_nothing_either(
    cloud: Cloud, ledger: Ledger, ordinary: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ami_builder.aws.machine.ATTEMPTS", 2)
    cloud.faults.add("RunInstances", "lost_response", times=None)
    with pytest.raises(CloudFailed, match="AWS did not answer"):
        instance(Account.open(), ledger, ordinary, tmp_path / "machine").__enter__()
    assert requests(cloud), "it was performed, though nobody heard of it"


def test_what_is_not_found_stands_in_the_ledger(
    cloud: Cloud, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ami_builder.aws.machine.ATTEMPTS", 2)
    group_id = cloud.client().describe_security_groups()["SecurityGroups"][0]["GroupId"]
    cloud.options.hidden_describes = 1000
    cloud.faults.add("RunInstances", "lost_response", times=None)
    with pytest.raises(CloudFailed, match="AWS did not answer"):
        instance(Account.open(), ledger, launch(cloud, group_id), tmp_path / "machine").__enter__()
    (entry,) = read(ledger.path)
    assert not entry.deleted
    assert entry.find["token"] == requests(cloud)[0]["ClientToken"]


def test_an_instance_that_does_not_show_yet_is_waited_for_and_terminated(
    cloud: Cloud, account: Account, ledger: Ledger, ordinary: Launch, tmp_path: Path
) -> None:
    cloud.options.hidden_describes = 3
    with instance(account, ledger, ordinary, tmp_path / "machine"):
        pass


def test_an_interrupt_at_the_worst_moment_leaves_nothing(
    cloud: Cloud,
    account: Account,
    ledger: Ledger,
    ordinary: Launch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = ledger.made

    def interrupted(entry: LedgerEntry, id: str) -> LedgerEntry:
        monkeypatch.setattr(ledger, "made", made)
        raise Interrupted("Ctrl-C, after the launch and before anybody knew its id")

    monkeypatch.setattr(ledger, "made", interrupted)
    with pytest.raises(Interrupted):
        instance(account, ledger, ordinary, tmp_path / "machine").__enter__()
    assert requests(cloud)


def test_an_instance_that_ends_is_noticed_with_its_console(
    cloud: Cloud,
    account: Account,
    ledger: Ledger,
    ordinary: Launch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    subject = instance(account, ledger, ordinary, tmp_path / "machine")

    def console(**_: object) -> dict[str, str]:
        return {"Output": "booting\nKernel panic\n"}

    with subject:
        monkeypatch.setattr(account.ec2_once, "get_console_output", console)
        cloud.client().terminate_instances(InstanceIds=[subject.instance_id])
        with pytest.raises(BuildFailed, match=f"{subject.instance_id} is terminated") as caught:
            subject.check_alive()
        assert caught.value.tail == ("booting", "Kernel panic")
        assert caught.value.log == subject.console_log
        assert "7200 s" in str(caught.value.hint)


def test_the_console_is_kept_when_something_failed(
    cloud: Cloud, account: Account, ledger: Ledger, ordinary: Launch, tmp_path: Path
) -> None:
    for fault in (None, "http500"):
        if fault:
            cloud.faults.add("GetConsoleOutput", fault, times=None)
        subject = instance(account, ledger, ordinary, tmp_path / f"{fault}")
        subject.__enter__()
        subject.__exit__(ValueError, ValueError("ours"), None)
        assert subject.console_log.exists()
    assert cloud.count("GetConsoleOutput") == 2


def test_an_instance_that_never_runs(
    cloud: Cloud,
    account: Account,
    ledger: Ledger,
    ordinary: Launch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pending = True
    described: dict[str, Any] = {"InstanceId": "i-1", "State": {"Name": "terminated"}}
    with monkeypatch.context() as patch:
        patch.setattr(machine, "_RUNNING_SECONDS", 0.1)
        patch.setattr(Instance, "_running", lambda _: None if pending else described)
        with pytest.raises(TimedOut, match="the start of instance"):
            instance(account, ledger, ordinary, tmp_path / "a").__enter__()
        pending = False
        described["StateReason"] = {"Code": "Client.InternalError", "Message": "Client error on launch"}
        with pytest.raises(BuildFailed, match="is terminated: Client error on launch"):
            instance(account, ledger, ordinary, tmp_path / "b").__enter__()
        described["StateReason"] = {"Code": "Server.InsufficientInstanceCapacity", "Message": "none left"}
        with pytest.raises(CloudFailed, match="EC2 has no capacity") as caught:
            instance(account, ledger, ordinary, tmp_path / "c").__enter__()
        assert caught.value.tail == ("m6i.large: none left",)


def test_what_does_not_end_is_told_and_stands_in_the_ledger(
    cloud: Cloud,
    account: Account,
    ledger: Ledger,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group_id = cloud.client().describe_security_groups()["SecurityGroups"][0]["GroupId"]
    running: dict[str, Any] = {"InstanceId": "i-1", "State": {"Name": "running"}}
    monkeypatch.setattr(instances, "_TERMINATED_SECONDS", 0.2)
    with pytest.raises(CloudFailed, match="did not terminate"):  # noqa: SIM117
        with instance(account, ledger, launch(cloud, group_id), tmp_path / "a"):
            monkeypatch.setattr(instances, "describe", lambda *_: running)
    assert not read(ledger.path)[-1].deleted


def test_two_of_a_run_are_two(
    cloud: Cloud, account: Account, ledger: Ledger, ordinary: Launch, tmp_path: Path
) -> None:
    first, second = (instance(account, ledger, ordinary, tmp_path / name) for name in ("a", "b"))
    with first, second:
        assert isinstance(first, Instance)
        assert first.instance_id != second.instance_id
