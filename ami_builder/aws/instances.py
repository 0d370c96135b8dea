"""One EC2 instance that lives as long as a context, and ends itself even when nobody is left to end it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError

from ami_builder.aws import tags as tagging
from ami_builder.aws.session import (
    ATTEMPTS,
    Account,
    aws_errors,
    code_of,
    failure,
    is_definite,
    look_for,
    poll,
)
from ami_builder.aws.user_data import with_lifetime
from ami_builder.core.errors import BuildFailed, CloudFailed, UsageError
from ami_builder.core.options import Connect
from ami_builder.core.orphans import Resource
from ami_builder.core.records import Endpoint
from ami_builder.state.ledger import Ledger, LedgerEntry
from ami_builder.system import processes

if TYPE_CHECKING:
    from types_boto3_ec2.type_defs import (
        EbsBlockDeviceTypeDef,
        InstanceTypeDef,
        RunInstancesRequestTypeDef,
    )

_MIB, _GIB = 1 << 20, 1 << 30
_POLL_SECONDS = 2.0
_ALIVE_SECONDS = 5.0
_LAUNCH_SECONDS = 300.0
_RUNNING_SECONDS = 300.0
_SEEN_SECONDS = 60.0
_TERMINATED_SECONDS = 600.0

# What another type or another zone may have. Quotas and refusals are the same everywhere.
_NO_CAPACITY = frozenset(
    {"InsufficientInstanceCapacity", "InsufficientHostCapacity", "SpotMaxPriceTooLow", "Unsupported"}
)
_NO_CAPACITY_LATER = "Server.InsufficientInstanceCapacity"
_ENDING = frozenset({"shutting-down", "terminated", "stopping", "stopped"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What to launch, and how it is reached."""

    ami: str
    instance_types: tuple[str, ...]
    """Tried in turn when EC2 has no capacity, each in all of `subnets`."""
    subnets: tuple[str, ...] = ()
    """None: EC2 chooses one of the default VPC."""
    security_group: str
    user_data: str
    public_key: str
    user: str
    lifetime: float
    """After these seconds it ends itself."""
    disk_size: int = 0
    """Bytes of its root volume; 0, or less than the AMI's: the AMI's."""
    instance_profile: str = ""
    connect: Connect = Connect.SSH
    ssh_port: int = 22
    encrypt: bool = False
    kms_key: str = ""


class _NoCapacity(Exception):
    pass


class Instance:
    """A running instance; the context yields its Endpoint, and terminates it, whatever happens.

    It returns once EC2 says that it runs, before the guest is up. Its console's log lands in
    `directory`/console.log. Two of a run need different directories. Entering raises UsageError, CloudFailed,
    BuildFailed, TimedOut.
    """

    def __init__(
        self,
        account: Account,
        ledger: Ledger,
        launch: Launch,
        *,
        run_id: str,
        tags: Mapping[str, str],
        directory: Path,
    ) -> None:
        self._account, self._ledger, self._launch = account, ledger, launch
        self._run_id, self._tags, self._directory = run_id, tags, directory
        self.console_log = directory / "console.log"
        self.instance_id = ""
        self.instance_type = ""
        self.memory = 0
        """Bytes, as EC2 tells of the type."""
        self._entry: LedgerEntry | None = None
        self._looked = 0.0

    def __enter__(self) -> Endpoint:
        self._directory.mkdir(parents=True, exist_ok=True)
        self.console_log.touch()
        root, size = self._root()
        user_data = with_lifetime(self._launch.user_data, self._launch.lifetime, self._launch.public_key)
        lacking: list[str] = []
        for attempt, (kind, subnet) in enumerate(self._places()):
            self.memory = self._memory_of(kind)
            request = self._request(kind, subnet, attempt, root, size, user_data)
            try:
                described = self._started(request)
            except _NoCapacity as full:
                lacking.append(f"{kind}{f' in {subnet}' if subnet else ''}: {full}")
                continue
            except BaseException as error:
                self.__exit__(type(error), error, None)
                raise
            self.instance_type = kind
            return self._endpoint(described)
        raise CloudFailed(
            f"EC2 has no capacity in {self._account.region} for any of these",
            hint="name more aws.instance_types, or aws.subnets in other zones",
            tail=tuple(lacking),
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.instance_id:
            self.save_console()
        try:
            self._remove()
        except CloudFailed:
            # It stands in the ledger, and it ends itself: what went wrong first is what a person has to read.
            if error is None:
                raise

    def check_alive(self) -> None:
        """Raise BuildFailed, with the end of the console, when the instance is ending or has ended."""
        if time.monotonic() - self._looked < _ALIVE_SECONDS:
            return
        self._looked = time.monotonic()
        described = describe(self._account, self.instance_id)
        if described is None or described["State"]["Name"] in _ENDING:
            raise self._ended(described)

    def save_console(self) -> None:
        """Write what EC2 has of the console to `console_log`; when it tells nothing, what was there stays."""
        for latest in (True, False):
            try:
                answer = self._account.ec2_once.get_console_output(InstanceId=self.instance_id, Latest=latest)
            except ClientError as error:
                # Older types have no latest output.
                if code_of(error) != "UnsupportedOperation":
                    return
            except BotoCoreError:
                return
            else:
                if text := answer.get("Output", ""):
                    self.console_log.write_text(text, encoding="utf-8", errors="replace")
                return

    def _places(self) -> Iterator[tuple[str, str]]:
        return product(self._launch.instance_types, self._launch.subnets or ("",))

    def _root(self) -> tuple[str, int]:
        """Return the root device's name of the AMI, and the size that its volume is to have in GiB."""
        ami = self._launch.ami
        with aws_errors():
            try:
                images = self._account.ec2.describe_images(ImageIds=[ami])["Images"]
            except ClientError as error:
                if not code_of(error).startswith("InvalidAMIID"):
                    raise
                images = []
        if not images:
            raise UsageError(
                f"there is no AMI {ami} in {self._account.region} that these credentials may use"
            )
        root = images[0].get("RootDeviceName", "")
        sizes = [
            mapping.get("Ebs", {}).get("VolumeSize", 0)
            for mapping in images[0].get("BlockDeviceMappings", [])
            if mapping.get("DeviceName") == root
        ]
        return root, max([-(-self._launch.disk_size // _GIB), *sizes])

    def _memory_of(self, kind: str) -> int:
        with aws_errors():
            try:
                found = self._account.ec2.describe_instance_types(InstanceTypes=[kind])["InstanceTypes"]  # type: ignore[list-item]
            except ClientError as error:
                if code_of(error) != "InvalidInstanceType":
                    raise
                found = []
        if not found:
            raise UsageError(f"there is no instance type {kind} in {self._account.region}")
        return found[0]["MemoryInfo"]["SizeInMiB"] * _MIB

    def _request(
        self, kind: str, subnet: str, attempt: int, root: str, size: int, user_data: str
    ) -> RunInstancesRequestTypeDef:
        launch = self._launch
        identity = f"{self._run_id}/{self._directory.name}/{kind}/{subnet}/{attempt}"
        ebs: EbsBlockDeviceTypeDef = {"VolumeType": "gp3", "DeleteOnTermination": True}
        if size:
            ebs["VolumeSize"] = size
        if launch.encrypt:
            ebs["Encrypted"] = True
        if launch.kms_key:
            ebs["KmsKeyId"] = launch.kms_key
        request: RunInstancesRequestTypeDef = {
            "ClientToken": hashlib.sha256(identity.encode()).hexdigest()[:64],
            "ImageId": launch.ami,
            "InstanceType": kind,  # type: ignore[typeddict-item]
            "MinCount": 1,
            "MaxCount": 1,
            "UserData": user_data,
            "SecurityGroupIds": [launch.security_group],
            "InstanceInitiatedShutdownBehavior": "terminate",
            "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 1},
            "BlockDeviceMappings": [{"DeviceName": root, "Ebs": ebs}],
            "TagSpecifications": tagging.specifications(
                self._tags, "instance", "volume", "network-interface"
            ),
        }
        if subnet:
            request["SubnetId"] = subnet
        if launch.instance_profile:
            profile = launch.instance_profile
            request["IamInstanceProfile"] = (
                {"Arn": profile} if profile.startswith("arn:") else {"Name": profile}
            )
        return request

    def _started(self, request: RunInstancesRequestTypeDef) -> InstanceTypeDef:
        """Launch once and wait until it runs; raises _NoCapacity when another place may do."""
        self._entry = self._ledger.intend(
            Resource.INSTANCE, self._account.region, run=self._run_id, token=request["ClientToken"]
        )
        with aws_errors():
            try:
                self.instance_id = self._run(request)
            except ClientError as error:
                if is_definite(error) or code_of(error) in _NO_CAPACITY:
                    self._entry = self._ledger.deleted(self._entry)
                if code_of(error) not in _NO_CAPACITY:
                    raise
                raise _NoCapacity(failure(error).message) from error
        self._entry = self._ledger.made(self._entry, self.instance_id)
        described = processes.wait_until(
            self._running,
            what=f"the start of instance {self.instance_id}",
            timeout=_RUNNING_SECONDS,
            interval=_POLL_SECONDS,
            log=self.console_log,
        )
        if described["State"]["Name"] == "running":
            return described
        if described.get("StateReason", {}).get("Code") == _NO_CAPACITY_LATER:
            self._remove()
            raise _NoCapacity(described.get("StateReason", {}).get("Message", _NO_CAPACITY_LATER))
        raise self._ended(described)

    def _run(self, request: RunInstancesRequestTypeDef) -> str:
        """Call RunInstances, and again with the same token while it is unclear what came of it.

        botocore would do that too, but also for lack of capacity (HTTP 500), where the next place is better.
        """
        tried = 0

        def launched() -> str | None:
            nonlocal tried
            tried += 1
            try:
                return self._account.ec2_once.run_instances(**request)["Instances"][0]["InstanceId"]
            except ClientError as error:
                if tried == ATTEMPTS or is_definite(error) or code_of(error) in _NO_CAPACITY:
                    raise
            except (HTTPClientError, ConnectionError):
                if tried == ATTEMPTS:
                    raise
            return None

        return processes.wait_until(
            launched, what="a launch", timeout=_LAUNCH_SECONDS, interval=_POLL_SECONDS, log=self.console_log
        )

    def _running(self) -> InstanceTypeDef | None:
        """Return the instance once it runs, or once it never will."""
        described = describe(self._account, self.instance_id)
        if described is None or described["State"]["Name"] == "pending":
            return None
        return described

    def _endpoint(self, described: InstanceTypeDef) -> Endpoint:
        launch = self._launch
        through_ssm = launch.connect is Connect.SESSION_MANAGER
        address = described.get("PublicIpAddress") or described.get("PrivateIpAddress", "")
        return Endpoint(
            address=self.instance_id if through_ssm else address,
            port=launch.ssh_port,
            user=launch.user,
            console_log=self.console_log,
            ports={22: launch.ssh_port},
            proxy_command=_proxy_command(self.instance_id, self._account.region) if through_ssm else "",
        )

    def _ended(self, described: InstanceTypeDef | None) -> BuildFailed:
        self.save_console()
        reason = described.get("StateReason", {}).get("Message", "") if described is not None else ""
        state = described["State"]["Name"] if described is not None else "gone"
        return BuildFailed(
            f"the instance {self.instance_id} is {state}" + (f": {reason}" if reason else ""),
            hint=f"did it switch itself off? It does so after {self._launch.lifetime:.0f} s (aws.lifetime)",
            log=self.console_log,
            tail=processes.last_lines(self.console_log),
        )

    def _remove(self) -> None:
        """Terminate what was launched, or may have been: the ledger says which."""
        if self._entry is None or self._entry.deleted:
            return
        if not self._entry.id:
            token = self._entry.find["token"]
            found = look_for(lambda: by_token(self._account, self._run_id, token))
            if found is None:
                return
            self._entry = self._ledger.made(self._entry, found)
        terminate(self._account, self._entry.id)
        self._entry = self._ledger.deleted(self._entry)


def describe(account: Account, instance: str) -> InstanceTypeDef | None:
    """Return an instance as EC2 describes it; None when EC2 doesn't know it (yet, or any more)."""
    with aws_errors():
        try:
            answer = account.ec2.describe_instances(InstanceIds=[instance])
        except ClientError as error:
            if code_of(error) != "InvalidInstanceID.NotFound":
                raise
            return None
    return next((i for r in answer["Reservations"] for i in r.get("Instances", [])), None)


def by_token(account: Account, run_id: str, token: str) -> str | None:
    """Return the instance that a run launched with a client token, whether or not anybody heard of it."""
    found = (i["InstanceId"] for i in _search(account, run_id) if i.get("ClientToken") == token)
    return next(found, None)


def of_run(account: Account, run_id: str) -> list[str]:
    """Return the instances of a run that have not ended yet."""
    ended = {"shutting-down", "terminated"}
    return [i["InstanceId"] for i in _search(account, run_id) if i["State"]["Name"] not in ended]


def require_imdsv2(account: Account, instance: str) -> None:
    """Let an instance that somebody else has launched answer metadata requests of version 2 only."""
    with aws_errors():
        account.ec2.modify_instance_metadata_options(
            InstanceId=instance, HttpTokens="required", HttpPutResponseHopLimit=1
        )


def terminate(account: Account, instance: str) -> None:
    """Terminate an instance and wait until it is; one that is gone is fine.

    Raises CloudFailed when it does not end within its bound.
    """

    def asked() -> bool:
        try:
            account.ec2.terminate_instances(InstanceIds=[instance])
        except ClientError as error:
            if code_of(error) != "InvalidInstanceID.NotFound":
                raise
            return False
        return True

    def ended() -> bool:
        found = describe(account, instance)
        return found is None or found["State"]["Name"] == "terminated"

    with aws_errors():
        # One that was made a moment ago may not be seen yet.
        done = not poll(asked, seconds=_SEEN_SECONDS) or poll(ended, seconds=_TERMINATED_SECONDS)
    if not done:
        raise CloudFailed(
            f"the instance {instance} does not end", hint="`ami-builder gc --apply` tries it again"
        )


def _search(account: Account, run_id: str) -> Sequence[InstanceTypeDef]:
    with aws_errors():
        pages = account.ec2.get_paginator("describe_instances").paginate(
            Filters=[{"Name": f"tag:{tagging.RUN}", "Values": [run_id]}]
        )
        return [i for page in pages for r in page["Reservations"] for i in r.get("Instances", [])]


def _proxy_command(instance: str, region: str) -> str:
    """Return the ssh ProxyCommand that reaches an instance through Session Manager, without an open port."""
    return (
        f"aws ssm start-session --region {region} --target {instance} "
        "--document-name AWS-StartSSHSession --parameters portNumber=%p"
    )
