"""The channels of images on this host: one file beside the images of a name, replaced at each move."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import FileLock

from ami_builder.core.channels import ChannelEntry
from ami_builder.core.errors import UsageError
from ami_builder.core.records import TargetKind
from ami_builder.state.workspace import StoredImage, Workspace, dump, load


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelRecord:
    """The moves of all channels of one image name."""

    entries: tuple[ChannelEntry, ...] = ()
    revoked: Mapping[str, str] = field(default_factory=dict)
    """Digest -> reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelFile:
    """The channels of one image name on this host."""

    workspace: Workspace
    image: str

    def locked(self) -> AbstractContextManager[object]:
        """Let no other process change the file."""
        self.workspace.ensure()
        return FileLock(self.workspace.state / "locks" / f"{self.image}.channels.lock")

    def id_of(self, stored: StoredImage) -> str:
        """Return the digest of an image. Raises UsageError when it was not built here."""
        if stored.directory is None or stored.artifact.target is not TargetKind.QEMU:
            raise UsageError(
                f"{stored.artifact.location} was not built here", hint="`ami-builder list` shows what was"
            )
        return stored.artifact.digest

    def find(self, image_id: str) -> StoredImage | None:
        """Return the finished image of a digest."""
        found = self.workspace.image(self.image, image_id)
        return found if found is not None and found.artifact.target is TargetKind.QEMU else None

    def entries(self, channel: str) -> tuple[ChannelEntry, ...]:
        """Return the moves of a channel."""
        return tuple(entry for entry in self._read().entries if entry.channel == channel)

    def used(self) -> tuple[str, ...]:
        """Return the channels in the file, in the order of their first use."""
        return tuple(dict.fromkeys(entry.channel for entry in self._read().entries))

    def require_movable(self, channel: str) -> None:
        """Do nothing: the file takes any move."""

    def revoked(self, ids: Sequence[str]) -> Mapping[str, str]:
        """Return which of these digests were revoked."""
        known = self._read().revoked
        return {image_id: known[image_id] for image_id in ids if image_id in known}

    def write(self, entry: ChannelEntry) -> None:
        """Add a move."""
        record = self._read()
        dump(replace(record, entries=(*record.entries, entry)), self._path)

    def revoke(self, image_id: str, reason: str, entries: Sequence[ChannelEntry]) -> None:
        """Mark a digest and add the moves, in one step."""
        record = self._read()
        revoked = {**record.revoked, image_id: record.revoked.get(image_id, reason)}
        dump(ChannelRecord(entries=(*record.entries, *entries), revoked=revoked), self._path)

    @property
    def _path(self) -> Path:
        return self.workspace.images_dir / self.image / "channels.json"

    def _read(self) -> ChannelRecord:
        record = load(ChannelRecord, self._path)
        if record is None and self._path.exists():
            # Taken for empty, it would let revoked images come back.
            raise UsageError(
                f"{self._path} can't be read as a record of channels", hint="restore the file, or delete it"
            )
        return record or ChannelRecord()
