"""The workspace: the cache, finished images, run directories and locks.

cache/<kind>/<digest>/           a base disk or a container archive, always complete
state/images/<name>/<digest>/    a finished image, or its location: artifact, verdict, package list
state/runs/<run id>/             record.json, logs, rendered files; work/ while the run lives
state/nights/<name>.<target>/    one folder a nightly run: journal and summary; `latest` links to the last
state/locks/                     one build and one nightly run at a time for an image and target
"""

import json
import math
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeVar

from filelock import FileLock, Timeout
from platformdirs import user_cache_path, user_state_path
from pydantic import TypeAdapter

from ami_builder.core.errors import Inconclusive, Interrupted, Locked, UsageError
from ami_builder.core.records import Artifact, RunRecord, RunStatus, TargetKind, Verdict

T = TypeVar("T")

IMAGE_FILE = "image.qcow2"
_MADE_SECONDS = 60.0
"""In which a folder of a run that has begun gets its lock, also on a busy host."""
_WRITABLE = "set AMI_BUILDER_HOME to a folder with write permission"


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a temporary file and rename it, so that a reader sees either the old or the new content."""
    raw = data.encode() if isinstance(data, str) else data
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        Path(aside).replace(path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def dump(value: object, path: Path) -> None:
    """Write a record as JSON."""
    write_atomically(path, TypeAdapter[Any](type(value)).dump_json(value, indent=2) + b"\n")


def load(kind: type[T], path: Path) -> T | None:
    """Read a record from JSON; None if the file is missing or has another content.

    A time without a zone, and a number that is not finite, are other content: neither can be compared.
    """
    try:
        found = TypeAdapter(kind).validate_json(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return found if _is_comparable(found) else None


def _is_comparable(value: object) -> bool:
    match value:
        case datetime():
            return value.tzinfo is not None
        case float():
            return math.isfinite(value)
        case dict():
            return all(map(_is_comparable, value.values()))
        case list() | tuple():
            return all(map(_is_comparable, value))
        case _ if is_dataclass(value):
            return all(_is_comparable(getattr(value, one.name)) for one in fields(value))
        case _:
            return True


def folders(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted, and none if it is missing; raises OSError if it can't be read.

    `Path.glob` passes over what it can't read, and who plans a deletion must know all that is in use.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry) for entry in entries if entry.is_dir())
    except FileNotFoundError:
        return []


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredImage:
    """A finished image, and its verdict if there is one."""

    artifact: Artifact
    verdict: Verdict | None
    directory: Path | None
    """Its folder in the workspace; None for an image that was not built here."""

    @property
    def path(self) -> Path:
        """The disk of a local image."""
        return Path(self.artifact.location)

    @property
    def name(self) -> str:
        """Its name for people: the file's name, or the AMI id."""
        return self.path.name


class Run:
    """A run's directory and record; made by `Workspace.run`."""

    def __init__(self, directory: Path, record: RunRecord) -> None:
        self.directory = directory
        self.record = record
        self.logs = directory / "logs"
        self.work = directory / "work"
        for folder in (self.logs, self.work):
            folder.mkdir()
        self.update()

    def log(self, name: str) -> Path:
        """Return the path of a log of this run."""
        return self.logs / f"{name}.log"

    def update(self, **changes: Any) -> None:
        """Change fields of the record and write it."""
        self.record = replace(self.record, **changes)
        dump(self.record, self.directory / "record.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """The folders that are kept between runs."""

    cache: Path
    state: Path

    @property
    def accelerator(self) -> Path:
        """The file that keeps whether VMs run under KVM here."""
        return self.cache / "accelerator.json"

    @classmethod
    def open(cls, environ: Mapping[str, str]) -> Self:
        """Return the user's workspace; `AMI_BUILDER_HOME` puts all of it into one folder."""
        home = environ.get("AMI_BUILDER_HOME")
        try:
            if home:
                root = Path(home).expanduser().absolute()
                return cls(cache=root / "cache", state=root / "state")
            return cls(cache=user_cache_path("ami-builder"), state=user_state_path("ami-builder"))
        except RuntimeError as unknown:  # the user has no entry in passwd
            what = f"AMI_BUILDER_HOME={home}" if home else "HOME is not set"
            raise UsageError(
                f"{what}: the home folder of this user is unknown", hint="set AMI_BUILDER_HOME to a folder"
            ) from unknown

    @property
    def images_dir(self) -> Path:
        """Finished images."""
        return self.state / "images"

    @property
    def runs_dir(self) -> Path:
        """Run directories."""
        return self.state / "runs"

    @property
    def nightly_dir(self) -> Path:
        """Journals and summaries of nightly runs."""
        return self.state / "nights"

    def log_dir(self) -> Path:
        """Return the folder for logs that are written before a run begins."""
        folder = self.cache / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def ensure(self) -> None:
        """Create the folders; raises UsageError without the permission to write to them."""
        for folder in (self.cache, self.images_dir, self.runs_dir, self.state / "locks"):
            try:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError as bad:
                raise UsageError(
                    f"can't create the folder {folder}: {bad.strerror}",
                    hint=_WRITABLE,
                ) from bad
            if not os.access(folder, os.W_OK | os.X_OK):
                raise UsageError(f"can't write to the folder {folder}", hint=_WRITABLE)

    @contextmanager
    def run(self, command: str, image: str, digest: str | None = None, *, of: str = "") -> Iterator[Run]:
        """Make a run directory. At the end the record gets the run's status, and work/ is removed.

        The id of a run that is part of another run begins with the other run's id.
        """
        self.ensure()
        now = datetime.now(UTC)
        unique = secrets.token_hex(3)
        run_id = f"{of}.{unique}" if of else f"{now:%Y%m%dT%H%M%SZ}-{unique}"
        directory = self.runs_dir / run_id
        record = RunRecord(
            run_id=run_id,
            command=command,
            image=image,
            digest=digest,
            status=RunStatus.RUNNING,
            started=now,
            steps=(),
        )
        directory.mkdir()
        with FileLock(directory / ".alive"):
            run = Run(directory, record)
            try:
                yield run
            except (Interrupted, KeyboardInterrupt, SystemExit) as stopped:
                run.update(status=RunStatus.INTERRUPTED, error=str(stopped))
                raise
            except Inconclusive as busy:
                run.update(status=RunStatus.INCONCLUSIVE, error=str(busy))
                raise
            except BaseException as failed:
                run.update(status=RunStatus.FAILED, error=str(failed))
                raise
            else:
                run.update(status=RunStatus.PASSED)
            finally:
                shutil.rmtree(run.work, ignore_errors=True)

    def is_live(self, run_id: str) -> bool:
        """Return whether a run of this host is in progress."""
        directory = self.runs_dir / run_id
        return directory.is_dir() and not self._is_dead(directory)

    def sweep(self) -> tuple[str, ...]:
        """Remove the working files of killed runs, and return the ids of the runs."""
        swept: list[str] = []
        for directory in folders(self.runs_dir):
            record = load(RunRecord, directory / "record.json")
            if (record is not None and record.status is not RunStatus.RUNNING) or not self._is_dead(
                directory
            ):
                continue
            shutil.rmtree(directory / "work", ignore_errors=True)
            if record is not None:
                dump(
                    replace(record, status=RunStatus.INTERRUPTED, error="the process was killed"),
                    directory / "record.json",
                )
            swept.append(directory.name)
        for half in self.cache.glob("*/.*.half"):
            if self._is_dead(half):
                shutil.rmtree(half, ignore_errors=True)
        return tuple(swept)

    @staticmethod
    def _is_dead(directory: Path) -> bool:
        lock = directory / ".alive"
        try:
            if not lock.exists():  # it is just being made, unless its process was killed at that moment
                return time.time() - directory.stat().st_mtime > _MADE_SECONDS
            with FileLock(lock).acquire(timeout=0):
                return True
        except (Timeout, OSError):
            return False

    def lock(self, image: str, target: TargetKind) -> AbstractContextManager[None]:
        """Hold the build lock of an image and target; raises Locked with its holder."""
        return self._locked(f"{image}.{target}", f"image {image!r} is being built for {target}")

    def lock_nightly_run(self, image: str, target: TargetKind) -> AbstractContextManager[None]:
        """Hold the lock of nightly runs of an image and target; raises Locked with its holder."""
        what = f"a nightly run of image {image!r} for {target} is in progress"
        return self._locked(f"{image}.{target}.night", what)

    @contextmanager
    def _locked(self, name: str, what: str) -> Iterator[None]:
        self.ensure()
        path = self.state / "locks" / f"{name}.lock"
        holder = path.with_suffix(".json")
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout as busy:
            try:
                who = json.loads(holder.read_text())
                text = f"process {who['pid']}, since {who['since']}"
            except (OSError, ValueError, KeyError, TypeError):
                text = "another process"
            raise Locked(f"{what} ({text})", hint="wait until it ends") from busy
        try:
            since = datetime.now(UTC).isoformat(timespec="seconds")
            with suppress(OSError):  # a full disk, on which `prune` must run; only a message needs this
                write_atomically(holder, json.dumps({"pid": os.getpid(), "since": since}))
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()

    def cached(self, kind: str, digest: str, make: Callable[[Path], None]) -> Path:
        """Return the complete folder cache/<kind>/<digest>; `make(folder)` fills it if it is missing.

        If two runs need the same folder, the second waits for the first.
        """
        final = self.cache / kind / digest
        if final.is_dir():
            return final
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.parent / f"{digest}.lock"):
            if final.is_dir():
                return final
            half = final.parent / f".{digest}.half"
            shutil.rmtree(half, ignore_errors=True)
            half.mkdir()
            try:
                with FileLock(half / ".alive"):
                    make(half)
                (half / ".alive").unlink(missing_ok=True)
                half.rename(final)
            except BaseException:
                shutil.rmtree(half, ignore_errors=True)
                raise
        return final

    def store(self, artifact: Artifact, disk: Path, packages: Path | None) -> StoredImage:
        """Move a baked disk to the finished images, atomically; it replaces one with the same digest."""
        final = self.images_dir / artifact.image / artifact.digest[:16]
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=".new-") as aside:
            new = Path(aside) / "image"
            new.mkdir()
            disk.rename(new / IMAGE_FILE)
            (new / IMAGE_FILE).chmod(0o444)
            if packages is not None and packages.exists():
                shutil.copy(packages, new / "packages.txt")
            placed = replace(
                artifact, location=str(final / IMAGE_FILE), size=(new / IMAGE_FILE).stat().st_size
            )
            dump(placed, new / "artifact.json")
            if final.exists():
                final.rename(Path(aside) / "former")
            new.rename(final)
        return StoredImage(artifact=placed, verdict=None, directory=final)

    def store_remote(self, artifact: Artifact, packages: Path | None) -> StoredImage:
        """Store the record of an image in a cloud; it replaces one with the same digest."""
        folder = self.images_dir / artifact.image / artifact.digest[:16]
        if packages is not None and packages.exists():
            write_atomically(folder / "packages.txt", packages.read_bytes())
        (folder / "verdict.json").unlink(missing_ok=True)
        dump(artifact, folder / "artifact.json")
        return StoredImage(artifact=artifact, verdict=None, directory=folder)

    def forget_remote(self, location: str) -> None:
        """Remove the record of an image that its cloud no longer has; do nothing if there is no record."""
        for folder in (each for name in folders(self.images_dir) for each in folders(name)):
            artifact = load(Artifact, folder / "artifact.json")
            if artifact is not None and artifact.location == location:
                shutil.rmtree(folder, ignore_errors=True)

    def store_verdict(self, stored: StoredImage, verdict: Verdict) -> StoredImage:
        """Store the verdict of an image, if the image was built here, and return both."""
        if stored.directory is not None:
            dump(verdict, stored.directory / "verdict.json")
        return replace(stored, verdict=verdict)

    def images(self) -> tuple[StoredImage, ...]:
        """Return all finished images, oldest first.

        EC2 knows the time of an AMI to the second alone, so of two in one second the later record counts.
        Raises UsageError for a damaged record: without it, another image would be the newest.
        """
        found: list[tuple[datetime, int, StoredImage]] = []
        for folder in (each for name in folders(self.images_dir) for each in folders(name)):
            if folder.name.startswith("."):  # half made, or half deleted
                continue
            record = folder / "artifact.json"
            artifact = load(Artifact, record)
            if artifact is None:
                if not record.exists():
                    continue
                raise UsageError(
                    f"{record} is damaged, or of another version of ami-builder",
                    hint=f"restore it, or delete its folder and with it the image: {folder}",
                )
            if artifact.target is TargetKind.QEMU:  # the workspace may have been moved
                artifact = replace(artifact, location=str(folder / IMAGE_FILE))
            if artifact.target is not TargetKind.QEMU or (folder / IMAGE_FILE).exists():
                verdict = load(Verdict, folder / "verdict.json")
                stored = StoredImage(artifact=artifact, verdict=verdict, directory=folder)
                with suppress(FileNotFoundError):  # another process has just deleted the image
                    found.append((artifact.created, record.stat().st_mtime_ns, stored))
        return tuple(stored for *_, stored in sorted(found, key=lambda one: one[:2]))

    def image(self, name: str, digest: str) -> StoredImage | None:
        """Return the finished image of exactly this digest."""
        return next(
            (s for s in self.images() if (s.artifact.image, s.artifact.digest) == (name, digest)), None
        )
