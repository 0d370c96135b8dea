"""The instance that an AMI is verified on: launched where EC2 has capacity, always terminated."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as BotoConnectionError

from ami_builder.aws import images, instances
from ami_builder.aws import tags as tagging
from ami_builder.aws.session import (
    ATTEMPTS,
    Account,
    aws_errors,
    code_of,
    failure,
    is_definite,
    look_for,
)
from ami_builder.aws.user_data import with_lifetime
from ami_builder.config.schema import Image
from ami_builder.core.errors import BuildFailed, CloudFailed, UsageError
from ami_builder.core.options import Connect
from ami_builder.core.orphans import Resource
from ami_builder.core.records import Endpoint
from ami_builder.core.units import GIB, MIB
from ami_builder.state.ledger import Ledger, LedgerEntry
from ami_builder.system import processes
from ami_builder.system.ssh import Session

if TYPE_CHECKING:
    from types_boto3_ec2.type_defs import (
        EbsBlockDeviceTypeDef,
        InstanceTypeDef,
        InstanceTypeInfoTypeDef,
        RunInstancesRequestTypeDef,
    )

_POLL_SECONDS = 2.0
_ALIVE_SECONDS = 5.0
_LAUNCH_SECONDS = 300.0
_RUNNING_SECONDS = 300.0

# Errors that another zone may not have, unlike quotas and missing permissions.
_NO_CAPACITY = frozenset(
    {
        "InsufficientFreeAddressesInSubnet",
        "InsufficientHostCapacity",
        "InsufficientInstanceCapacity",
        "SpotMaxPriceTooLow",
        "Unsupported",
    }
)
# The security group was made a moment ago.
_NOT_SEEN_YET = "InvalidGroup.NotFound"
_NO_CAPACITY_LATER = "Server.InsufficientInstanceCapacity"
_ENDING = frozenset({"shutting-down", "terminated", "stopping", "stopped"})


class _NoCapacity(Exception):
    pass


@dataclass(slots=True, kw_only=True)
class Ec2Machine:
    """An EC2 instance of an AMI. Each of a run needs its own directory."""

    name: str
    """The instance type."""
    image: Image
    ami: str
    account: Account
    ledger: Ledger
    group: str
    """The id of its security group."""
    run_id: str
    tags: Mapping[str, str]
    memory: int = field(default=0, init=False)
    instance_id: str = field(default="", init=False)
    console_log: Path = field(default=Path(), init=False)
    _entry: LedgerEntry | None = field(default=None, init=False)
    _last_check: float = field(default=0.0, init=False)

    def start(self, stack: ExitStack, directory: Path, user_data: str, public_key: str) -> Endpoint:
        """Launch it in the first of aws.subnets that has capacity; closing `stack` terminates it.

        It returns when EC2 reports the state `running`, before the guest has booted. Once
        cloud-init has run, it powers itself off after aws.lifetime, without this host. Raises UsageError,
        CloudFailed, BuildFailed, TimedOut.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self.console_log = directory / "console.log"
        self.console_log.touch()
        disk = self._disk()
        data = with_lifetime(user_data, self.image.aws.lifetime, public_key)
        self.memory = self._memory_of_type()
        instances.require_arch(self.account, [self.name], self.image.arch, "verify.instance_types")
        stack.push(self._exit)
        refused: list[str] = []
        for attempt, subnet in enumerate(self.image.aws.subnets or ("",)):
            identity = f"{self.run_id}/{directory.name}/{self.name}/{subnet}/{attempt}"
            token = hashlib.sha256(identity.encode()).hexdigest()
            try:
                return self._endpoint(self._started(self._request(token, subnet, disk, data)))
            except _NoCapacity as full:
                refused.append(f"{self.name}{f' in {subnet}' if subnet else ''}: {full}")
        raise CloudFailed(
            f"EC2 has no capacity in {self.account.region} for {self.name}",
            hint="add aws.subnets in other availability zones, or change verify.instance_types",
            tail=tuple(refused),
        )

    def check_alive(self) -> None:
        """Raise BuildFailed, with the end of the console's log, when the instance ends or has ended."""
        if time.monotonic() - self._last_check < _ALIVE_SECONDS:
            return
        self._last_check = time.monotonic()
        described = instances.describe(self.account, self.instance_id)
        if described is None or described["State"]["Name"] in _ENDING:
            raise self._ended(described)

    def reboot(self, session: Session, timeout: float, alive: Callable[[], None]) -> None:
        """Reboot the instance from inside, and wait for a login."""
        session.reboot(timeout, alive)

    def cpu_seconds(self, session: Session) -> float | None:
        """Return the CPU seconds that the instance has used since it was started, or rebooted.

        proc_stat(5): all but idle, iowait, steal, and guest time, which is in user time already.
        """
        done = session.run("head -n 1 /proc/stat; getconf CLK_TCK", check=False)
        fields = done.stdout.split()
        if done.status or len(fields) < 10:
            return None
        user, nice, system, _, _, irq, softirq = (int(field) for field in fields[1:8])
        return (user + nice + system + irq + softirq) / int(fields[-1])

    @property
    def emulator(self) -> int:
        """0: an instance has no process on this host."""
        return 0

    def save_console(self) -> None:
        """Write the console's output to `console_log`; keep the file when EC2 returns nothing."""
        if not self.instance_id:
            return
        for latest in (True, False):
            try:
                answer = self.account.ec2_once.get_console_output(InstanceId=self.instance_id, Latest=latest)
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

    def _exit(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None:
            self.save_console()
        try:
            self._remove()
        except CloudFailed:
            # The instance is in the ledger, for gc; the first error matters more.
            if error is None:
                raise

    def _disk(self) -> tuple[str, EbsBlockDeviceTypeDef]:
        """Return the AMI's root device name, and the volume to create for it."""
        if (found := images.describe(self.account, self.ami)) is None:
            raise UsageError(
                f"there is no AMI {self.ami} in {self.account.region} that these credentials can use",
                hint="check the id and the region",
            )
        if found.get("Architecture", arch := self.image.arch.ec2) != arch:
            raise UsageError(
                f"{self.ami} is for {found.get('Architecture')}, but image {self.image.name} is for {arch}",
                hint="set arch to the architecture of the AMI",
            )
        root, size = images.root_volume(found)
        ebs: EbsBlockDeviceTypeDef = {"VolumeType": "gp3", "DeleteOnTermination": True}
        if size := max(-(-self.image.verify.disk_size // GIB), size):
            ebs["VolumeSize"] = size
        if self.image.aws.encrypt:
            ebs["Encrypted"] = True
        if self.image.aws.kms_key:
            ebs["KmsKeyId"] = self.image.aws.kms_key
        return root, ebs

    def _memory_of_type(self) -> int:
        """Return the bytes of memory of the instance type."""
        found: list[InstanceTypeInfoTypeDef] = []
        with aws_errors(ignore="InvalidInstanceType"):
            found = self.account.ec2.describe_instance_types(InstanceTypes=[self.name])["InstanceTypes"]  # type: ignore[list-item]
        if not found:
            raise UsageError(
                f"there is no instance type {self.name} in {self.account.region}",
                hint="change verify.instance_types",
            )
        return found[0]["MemoryInfo"]["SizeInMiB"] * MIB

    def _request(
        self, token: str, subnet: str, disk: tuple[str, EbsBlockDeviceTypeDef], user_data: str
    ) -> RunInstancesRequestTypeDef:
        request: RunInstancesRequestTypeDef = {
            "ClientToken": token,
            "ImageId": self.ami,
            "InstanceType": self.name,  # type: ignore[typeddict-item]
            "MinCount": 1,
            "MaxCount": 1,
            "UserData": user_data,
            "SecurityGroupIds": [self.group],
            "InstanceInitiatedShutdownBehavior": "terminate",
            # An account's default may turn metadata off, which cloud-init needs.
            "MetadataOptions": {
                "HttpEndpoint": "enabled",
                "HttpTokens": "required",
                "HttpPutResponseHopLimit": 1,
            },
            "BlockDeviceMappings": [{"DeviceName": disk[0], "Ebs": disk[1]}],
            "TagSpecifications": tagging.specifications(self.tags, "instance", "volume", "network-interface"),
        }
        if subnet:
            request["SubnetId"] = subnet
        if profile := self.image.aws.instance_profile:
            by = "Arn" if profile.startswith("arn:") else "Name"
            request["IamInstanceProfile"] = {by: profile}  # type: ignore[misc]
        return request

    def _started(self, request: RunInstancesRequestTypeDef) -> InstanceTypeDef:
        """Launch once and wait until the instance runs; raises _NoCapacity."""
        self._entry = self.ledger.intend(
            Resource.INSTANCE, self.account.region, run=self.run_id, token=request["ClientToken"]
        )
        with aws_errors():
            try:
                self.instance_id = self._run(request)
            except ClientError as error:
                if is_definite(error) or code_of(error) in _NO_CAPACITY:
                    self._entry = self.ledger.deleted(self._entry)
                if code_of(error) not in _NO_CAPACITY:
                    raise
                raise _NoCapacity(failure(error).message) from error
        self._entry = self.ledger.made(self._entry, self.instance_id)
        described = processes.wait_until(
            self._running,
            what=f"the start of instance {self.instance_id}",
            timeout=_RUNNING_SECONDS,
            interval=_POLL_SECONDS,
            log=self.console_log,
        )
        if described["State"]["Name"] == "running":
            return described
        reason = described.get("StateReason", {})
        if reason.get("Code") == _NO_CAPACITY_LATER:
            self._remove()
            raise _NoCapacity(reason.get("Message", _NO_CAPACITY_LATER))
        raise self._ended(described)

    def _run(self, request: RunInstancesRequestTypeDef) -> str:
        """Call RunInstances, and retry with the same token while its result is unknown.

        botocore retries too, but also for missing capacity (HTTP 500), where another zone is better.
        """
        tried = 0

        def launched() -> str | None:
            nonlocal tried
            tried += 1
            try:
                return self.account.ec2_once.run_instances(**request)["Instances"][0]["InstanceId"]
            except ClientError as error:
                final = is_definite(error) and code_of(error) != _NOT_SEEN_YET
                if tried == ATTEMPTS or final or code_of(error) in _NO_CAPACITY:
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
        described = instances.describe(self.account, self.instance_id)
        if described is None or described["State"]["Name"] == "pending":
            return None
        return described

    def _endpoint(self, described: InstanceTypeDef) -> Endpoint:
        aws, region = self.image.aws, self.account.region
        address, proxy = described.get("PublicIpAddress") or described.get("PrivateIpAddress", ""), ""
        if aws.connect is Connect.SESSION_MANAGER:
            # Without an open port.
            address = self.instance_id
            proxy = (
                f"aws ssm start-session --region {region} --target {address}"
                " --document-name AWS-StartSSHSession --parameters portNumber=%p"
            )
        return Endpoint(
            address=address,
            port=aws.ssh_port,
            user=self.image.base.ssh_user,
            console_log=self.console_log,
            proxy_command=proxy,
        )

    def _ended(self, described: InstanceTypeDef | None) -> BuildFailed:
        self.save_console()
        reason = described.get("StateReason", {}).get("Message", "") if described is not None else ""
        state = described["State"]["Name"] if described is not None else "missing"
        return BuildFailed(
            f"instance {self.instance_id} is {state}" + (f": {reason}" if reason else ""),
            hint=f"it powers itself off after {self.image.aws.lifetime:.0f} s (aws.lifetime)",
            log=self.console_log,
            tail=processes.last_lines(self.console_log),
        )

    def _remove(self) -> None:
        """Terminate the instance; look for it by its token when no answer had its id."""
        if self._entry is None or self._entry.deleted:
            return
        if not self._entry.id:
            token = self._entry.find["token"]
            if (found := look_for(lambda: instances.by_token(self.account, self.run_id, token))) is None:
                return
            self._entry = self.ledger.made(self._entry, found)
        instances.terminate(self.account, self._entry.id)
        self._entry = self.ledger.deleted(self._entry)
