"""EC2 instances: one that lives as long as a context, and look-ups by id, client token and run."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as BotoConnectionError

from ami_builder.aws import images
from ami_builder.aws import tags as tagging
from ami_builder.aws.session import (
    ATTEMPTS,
    NO_CAPACITY_HINT,
    Account,
    aws_errors,
    code_of,
    failure,
    is_definite,
    look_for,
    poll,
    poll_call,
)
from ami_builder.aws.user_data import with_lifetime
from ami_builder.core.errors import BuildFailed, CloudFailed, UsageError
from ami_builder.core.options import Connect
from ami_builder.core.orphans import Resource
from ami_builder.core.records import Endpoint
from ami_builder.system import processes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from types_boto3_ec2.type_defs import (
        EbsBlockDeviceTypeDef,
        InstanceTypeDef,
        InstanceTypeInfoTypeDef,
        ReservationTypeDef,
        RunInstancesRequestTypeDef,
    )

    from ami_builder.state.ledger import Ledger, LedgerEntry

_MIB, _GIB = 1 << 20, 1 << 30
_POLL_SECONDS = 2.0
_ALIVE_SECONDS = 5.0
_LAUNCH_SECONDS = 300.0
_RUNNING_SECONDS = 300.0
_SEEN_SECONDS = 60.0
_TERMINATED_SECONDS = 600.0

# Errors that another instance type or zone may not have, unlike quotas and missing permissions.
_NO_CAPACITY = frozenset(
    {"InsufficientInstanceCapacity", "InsufficientHostCapacity", "SpotMaxPriceTooLow", "Unsupported"}
)
_NO_CAPACITY_LATER = "Server.InsufficientInstanceCapacity"
_ENDING = frozenset({"shutting-down", "terminated", "stopping", "stopped"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What to launch, and how to reach it."""

    ami: str
    instance_types: tuple[str, ...]
    """Tried in order while EC2 has no capacity, each in every one of `subnets`."""
    subnets: tuple[str, ...] = ()
    """Empty: EC2 chooses a subnet of the default VPC."""
    security_group: str
    user_data: str
    public_key: str
    user: str
    lifetime: float
    """Seconds after which the instance terminates itself."""
    disk_size: int = 0
    """Bytes of its root volume, at least the size of the AMI's."""
    instance_profile: str = ""
    connect: Connect = Connect.SSH
    ssh_port: int = 22
    encrypt: bool = False
    kms_key: str = ""


class _NoCapacity(Exception):
    pass


class Instance:
    """A context manager that launches an instance, returns its Endpoint, and always terminates it.

    The endpoint is returned when EC2 reports the state `running`, before the guest has booted. The console's
    log is `directory`/console.log; each instance of a run needs its own directory. Entering raises
    UsageError, CloudFailed, BuildFailed, TimedOut.
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
        """Bytes of memory of the instance type."""
        self._entry: LedgerEntry | None = None
        self._last_check = 0.0

    def __enter__(self) -> Endpoint:
        self._directory.mkdir(parents=True, exist_ok=True)
        self.console_log.touch()
        root, size = self._root()
        user_data = with_lifetime(self._launch.user_data, self._launch.lifetime, self._launch.public_key)
        refused: list[str] = []
        places = product(self._launch.instance_types, self._launch.subnets or ("",))
        for attempt, (kind, subnet) in enumerate(places):
            self.memory = self._memory_of(kind)
            request = self._request(kind, subnet, attempt, root, size, user_data)
            try:
                described = self._started(request)
            except _NoCapacity as full:
                refused.append(f"{kind}{f' in {subnet}' if subnet else ''}: {full}")
                continue
            except BaseException as error:
                self.__exit__(type(error), error, None)
                raise
            self.instance_type = kind
            return self._endpoint(described)
        raise CloudFailed(
            f"EC2 has no capacity in {self._account.region} for any of the configured instance types",
            hint=NO_CAPACITY_HINT,
            tail=tuple(refused),
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.instance_id:
            self.save_console()
        try:
            self._remove()
        except CloudFailed:
            # The instance is in the ledger and terminates itself; the first error matters more.
            if error is None:
                raise

    def check_alive(self) -> None:
        """Raise BuildFailed, with the end of the console's log, when the instance ends or has ended."""
        if time.monotonic() - self._last_check < _ALIVE_SECONDS:
            return
        self._last_check = time.monotonic()
        described = describe(self._account, self.instance_id)
        if described is None or described["State"]["Name"] in _ENDING:
            raise self._ended(described)

    def save_console(self) -> None:
        """Write the console's output to `console_log`; keep the file when EC2 returns nothing."""
        for latest in (True, False):
            try:
                answer = self._account.ec2_once.get_console_output(InstanceId=self.instance_id, Latest=latest)
            except ClientError as error:
                # Older instance types do not support `Latest`.
                if code_of(error) != "UnsupportedOperation":
                    return
            except BotoCoreError:
                return
            else:
                if text := answer.get("Output", ""):
                    self.console_log.write_text(text, encoding="utf-8", errors="replace")
                return

    def _root(self) -> tuple[str, int]:
        """Return the AMI's root device name, and the size of the volume to create in GiB."""
        ami = self._launch.ami
        if (found := images.describe(self._account, ami)) is None:
            raise UsageError(
                f"there is no AMI {ami} in {self._account.region} that these credentials can use",
                hint="check the id and the region",
            )
        root, size = images.root_volume(found)
        return root, max(-(-self._launch.disk_size // _GIB), size)

    def _memory_of(self, kind: str) -> int:
        found: list[InstanceTypeInfoTypeDef] = []
        with aws_errors(ignore="InvalidInstanceType"):
            found = self._account.ec2.describe_instance_types(InstanceTypes=[kind])["InstanceTypes"]  # type: ignore[list-item]
        if not found:
            raise UsageError(
                f"there is no instance type {kind} in {self._account.region}",
                hint="change aws.instance_types or verify.instance_types",
            )
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
        """Launch once and wait until the instance runs; raises _NoCapacity."""
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
        """Call RunInstances, and retry with the same token while its result is unknown.

        botocore retries too, but also for missing capacity (HTTP 500), where another type is better.
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
            except (HTTPClientError, BotoConnectionError):
                if tried == ATTEMPTS:
                    raise
            return None

        return processes.wait_until(
            launched,
            what="the launch of an instance",
            timeout=_LAUNCH_SECONDS,
            interval=_POLL_SECONDS,
            log=self.console_log,
        )

    def _running(self) -> InstanceTypeDef | None:
        """Return the instance once it has left the state `pending`."""
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
        state = described["State"]["Name"] if described is not None else "missing"
        return BuildFailed(
            f"instance {self.instance_id} is {state}" + (f": {reason}" if reason else ""),
            hint=f"it powers itself off after {self._launch.lifetime:.0f} s (aws.lifetime)",
            log=self.console_log,
            tail=processes.last_lines(self.console_log),
        )

    def _remove(self) -> None:
        """Terminate the instance; look for it by its token when no answer told its id."""
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
    """Return an instance as EC2 describes it; None when EC2 does not show it yet, or any more."""
    found: list[ReservationTypeDef] = []
    with aws_errors(ignore="InvalidInstanceID.NotFound"):
        found = account.ec2.describe_instances(InstanceIds=[instance])["Reservations"]
    return next((i for r in found for i in r.get("Instances", [])), None)


def by_token(account: Account, run_id: str, token: str) -> str | None:
    """Return the id of the instance that a run launched with a client token, or None."""
    found = (i["InstanceId"] for i in _search(account, run_id) if i.get("ClientToken") == token)
    return next(found, None)


def of_run(account: Account, run_id: str) -> list[str]:
    """Return the ids of a run's instances that are not terminated or shutting down."""
    ended = {"shutting-down", "terminated"}
    return [i["InstanceId"] for i in _search(account, run_id) if i["State"]["Name"] not in ended]


def require_imdsv2(account: Account, instance: str) -> None:
    """Turn off IMDSv1 on an instance, for those that Packer launches."""
    with aws_errors():
        account.ec2.modify_instance_metadata_options(
            InstanceId=instance, HttpTokens="required", HttpPutResponseHopLimit=1
        )


def terminate(account: Account, instance: str) -> None:
    """Terminate an instance, which may be missing already, and wait until it has terminated.

    Raises CloudFailed when it has not after 10 minutes.
    """

    def ended() -> bool:
        found = describe(account, instance)
        return found is None or found["State"]["Name"] == "terminated"

    # EC2 may not show a new one yet.
    exists = poll_call(
        lambda: account.ec2.terminate_instances(InstanceIds=[instance]),
        retry=r"InvalidInstanceID\.NotFound",
        seconds=_SEEN_SECONDS,
    )
    if exists and not poll(ended, seconds=_TERMINATED_SECONDS):
        raise CloudFailed(
            f"instance {instance} did not terminate within {_TERMINATED_SECONDS:.0f} s",
            hint="run `ami-builder gc --apply` to try again",
        )


def _search(account: Account, run_id: str) -> Sequence[InstanceTypeDef]:
    found = account.matching("describe_instances", "Reservations", f"tag:{tagging.RUN}", [run_id])
    return [i for reservation in found for i in reservation.get("Instances", [])]


def _proxy_command(instance: str, region: str) -> str:
    """Return the ssh ProxyCommand that reaches an instance through Session Manager, without an open port."""
    return (
        f"aws ssm start-session --region {region} --target {instance} "
        "--document-name AWS-StartSSHSession --parameters portNumber=%p"
    )
