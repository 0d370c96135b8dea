"""The channels of AMIs: SSM parameters `/ami-builder/IMAGE/ARCHITECTURE/CHANNEL`, for launch templates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from botocore.exceptions import ClientError
from filelock import FileLock

from ami_builder.aws import images
from ami_builder.aws import tags as tagging
from ami_builder.aws.session import Account, aws_errors, code_of, look_for, poll
from ami_builder.core.channels import ChannelEntry, Move
from ami_builder.core.errors import AmiBuilderError, CloudFailed, TimedOut, UsageError
from ami_builder.core.options import Arch
from ami_builder.state.workspace import StoredImage, Workspace
from ami_builder.system import processes

LABEL = "current"
"""A label on the current version. It has to move along: on the oldest of the 100 versions that SSM keeps it
would make the next write fail."""

_UPDATE_SECONDS = 60.0
_POLL_SECONDS = 1.0
_DELETED_SECONDS = 30.0
_DESCRIPTION = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelParameters:
    """The channels of one image name in one region."""

    account: Account
    image: str
    arch: Arch
    workspace: Workspace
    ami: Callable[[str], StoredImage]
    """Returns an AMI of the region by its id."""
    own_tags: Mapping[str, str] = field(default_factory=dict)
    """The user's own, for new parameters."""

    @property
    def folder(self) -> str:
        """The beginning of the parameters' names, with EC2's name of the architecture."""
        return tagging.channels_of(self.image, self.arch)

    def locked(self) -> AbstractContextManager[object]:
        """Let no other process of this host move the channels; reading back shows what other hosts do."""
        self.workspace.ensure()
        name = f"{self.image}.{self.account.region}.channels.lock"
        return FileLock(self.workspace.state / "locks" / name)

    def id_of(self, stored: StoredImage) -> str:
        """Return the id of an AMI, also when disabled. Raises UsageError if it is no finished one of ours."""
        image_id = stored.artifact.location
        found = images.get(self.account, image_id)
        if found is None or not found.finished:
            raise UsageError(
                f"{image_id} is not a finished AMI of ours in {self.account.region}",
                hint="`ami-builder build --target aws` makes one",
            )
        name = found.tags.get(tagging.IMAGE)
        if name != self.image:
            raise UsageError(f"{image_id} is an image of {name!r}, not of {self.image!r}")
        if found.arch is not self.arch:
            raise UsageError(
                f"{image_id} is for {found.arch}, but the channels of {self.image!r} are for {self.arch}",
                hint=f'give each architecture an image of its own, with arch = "{found.arch}"',
            )
        return image_id

    def find(self, image_id: str) -> StoredImage | None:
        """Return an AMI that can be launched."""
        found = images.get(self.account, image_id)
        return None if found is None or found.state != "available" else self.ami(image_id)

    def entries(self, channel: str) -> tuple[ChannelEntry, ...]:
        """Return the moves of a channel as far as SSM keeps them (100 versions), the oldest first."""
        found = self.account.listed(
            "get_parameter_history",
            "Parameters",
            service="ssm",
            ignore="ParameterNotFound",
            Name=self.folder + channel,
        )
        return tuple(_entry(channel, one) for one in sorted(found, key=lambda one: int(one["Version"])))

    def used(self) -> tuple[str, ...]:
        """Return the channels that have a parameter."""
        found = self.account.listed("get_parameters_by_path", "Parameters", service="ssm", Path=self.folder)
        return tuple(one["Name"].rpartition("/")[2] for one in found)

    def revoked(self, ids: Sequence[str]) -> Mapping[str, str]:
        """Return which of these AMIs are tagged as revoked, or were deregistered: none of them comes back."""
        there = images.find_by_ids(self.account, ids)
        missing = {image_id: "it was deregistered" for image_id in ids if image_id not in there}
        return missing | {image_id: ami.revoked for image_id, ami in there.items() if ami.revoked is not None}

    def require_movable(self, channel: str) -> None:
        """Raise UsageError when the parameter is of another type, whose values SSM does not validate."""
        name = self.folder + channel
        found = _parameter(self.account, name)
        kind = f"{found['Type']}, {found.get('DataType', 'text')}" if found else ""
        if found and kind != "String, aws:ec2:image":
            raise UsageError(
                f"the parameter {name} in {self.account.region} is of another type ({kind}) and has the value"
                f" {found['Value']!r}: expected String, aws:ec2:image",
                hint="SSM can't change a parameter's type: if nobody needs it, delete it with"
                f" `aws ssm delete-parameter --name {name}`, and run this command again",
            )

    def write(self, entry: ChannelEntry) -> None:
        """Set the parameter and wait until it has the new value; delete it for an entry without an image.

        Raises UsageError for a parameter of another type, and CloudFailed when SSM does not accept the AMI,
        when someone else moves the channel too, or deletes the AMI.
        """
        self.require_movable(entry.channel)
        name = self.folder + entry.channel
        if not entry.id:
            with aws_errors("ssm", ignore="ParameterNotFound"):
                self.account.client("ssm").delete_parameter(Name=name)
            return
        description = f"{entry.move}: {entry.reason}" if entry.reason else str(entry.move)
        values: dict[str, Any] = {
            "Name": name,
            "Value": entry.id,
            "Description": description[:_DESCRIPTION],
            "Type": "String",
            "DataType": "aws:ec2:image",
        }
        if before := _current(self.account, name):
            values["Overwrite"] = True
            # Versions that others wrote may have left the label behind.
            _label(self.account, name, before[1])
        else:
            tags = {**self.own_tags, tagging.IMAGE: self.image}
            values |= {"Overwrite": False, "Tags": tagging.as_list(tags)}
        version = _put(self.account, values)
        # It can be created again only some 30 seconds after it was deleted, says SSM's DeleteParameter.
        if not before and not poll(lambda: _current(self.account, name), seconds=_DELETED_SECONDS):
            version = _put(self.account, values)
        _label(self.account, name, _read_back(self.account, name, entry.id, version))
        # `prune` on another host may have looked at the channel just before.
        if look_for(lambda: images.get(self.account, entry.id)) is None:
            raise CloudFailed(
                f"{entry.id} was deleted while it was promoted: channel {entry.channel} of {self.image} names"
                f" an AMI that does not exist in {self.account.region}",
                hint="`ami-builder rollback` makes the image before it current again",
            )

    def revoke(self, image_id: str, reason: str, entries: Sequence[ChannelEntry]) -> None:
        """Tag the AMI, then write each parameter. A parameter without a current image is deleted.

        Raises the first error after all other parameters were written.
        """
        images.revoke(self.account, image_id, reason)
        errors = []
        for entry in entries:
            try:
                self.write(entry)
            except AmiBuilderError as failed:
                errors.append(failed)
        if errors:
            raise errors[0]


def _label(account: Account, name: str, version: int) -> None:
    with aws_errors("ssm"):
        account.client("ssm").label_parameter_version(Name=name, ParameterVersion=version, Labels=[LABEL])


def _put(account: Account, values: Mapping[str, Any]) -> int:
    """Write a parameter and return its version; 0 when only reading it back can tell.

    A parameter can be made again some 30 s after its deletion. Source:
    https://docs.aws.amazon.com/systems-manager/latest/APIReference/API_DeleteParameter.html
    """
    name = values["Name"]

    def written() -> tuple[int] | None:
        try:
            return (account.client("ssm").put_parameter(**values)["Version"],)
        except ClientError as error:
            if code_of(error) == "ParameterMaxVersionLimitExceeded":
                raise CloudFailed(
                    f"SSM keeps 100 versions of {name}, and someone has put a label on the oldest",
                    hint=f"`aws ssm get-parameter-history --name {name}` shows it; remove it with"
                    " `aws ssm unlabel-parameter-version`",
                ) from error
            if code_of(error) != "ParameterAlreadyExists":
                raise
        # A call repeated after a lost answer finds its own parameter: reading it back decides.
        return (0,) if _current(account, name) else None

    with aws_errors("ssm"):
        (version,) = processes.wait_until(
            written,
            what=f"SSM to make {name} again after its deletion",
            timeout=_UPDATE_SECONDS,
            interval=_POLL_SECONDS,
        )
    return version


def _read_back(account: Account, name: str, ami: str, version: int) -> int:
    """Wait until a parameter has an AMI as its value, and return the version.

    SSM validates such a value only after it has answered, and drops a bad one silently.
    """

    def updated() -> int | None:
        value, at = _current(account, name) or ("", 0)
        if value == ami and at >= version:
            return at
        if at > version or (at and not version):
            raise CloudFailed(
                f"{name} was moved to {value} by someone else at the same time",
                hint="`ami-builder history` shows who; then decide which image should be current",
            )
        return None

    try:
        return processes.wait_until(
            updated, what=f"the update of {name}", timeout=_UPDATE_SECONDS, interval=_POLL_SECONDS
        )
    except TimedOut as late:
        raise CloudFailed(
            f"SSM did not accept {ami} for {name}: the channel is unchanged",
            hint="these credentials, and SSM, must be able to describe that AMI in this region",
        ) from late


def _current(account: Account, name: str) -> tuple[str, int] | None:
    found = _parameter(account, name)
    return (found["Value"], int(found["Version"])) if found else None


def _parameter(account: Account, name: str) -> Mapping[str, Any] | None:
    with aws_errors("ssm", ignore="ParameterNotFound"):
        return account.client("ssm").get_parameter(Name=name)["Parameter"]  # type: ignore[no-any-return]
    return None


def _entry(channel: str, one: Any) -> ChannelEntry:
    word, _, reason = one.get("Description", "").partition(": ")
    by_us = word in list(Move)
    return ChannelEntry(
        channel=channel,
        # A version that a person wrote counts as a promotion.
        move=Move(word) if by_us else Move.PROMOTED,
        id=one["Value"],
        at=one["LastModifiedDate"],
        by=one["LastModifiedUser"],
        reason=reason if by_us else one.get("Description", ""),
    )
