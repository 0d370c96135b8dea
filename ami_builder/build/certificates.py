"""A folder with a small CA, and for each role of a cluster its certificate and the files that use it.

FOLDER/ca.pem, ca-key.pem      the CA; its key is nowhere else
FOLDER/ROLE/ca.pem, cert.pem, key.pem
FOLDER/ROLE/bundle.pem         all three in one text, for Secrets Manager or SSM
FOLDER/ROLE/user-data.yaml     for an instance that has no other user data
FOLDER/client/dask.yaml        for a client of the scheduler
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from textwrap import indent

from ami_builder.core.addresses import parse_scheduler
from ami_builder.core.errors import UsageError
from ami_builder.core.options import Listen, Role
from ami_builder.state.workspace import write_atomically
from ami_builder.system.certificates import Authority, Certificate

CA_DAYS = 3650
LONGEST_PARAMETER = 4096
"""Characters of a standard parameter of SSM."""

_CA, _CA_KEY = "ca.pem", "ca-key.pem"


class Holder(StrEnum):
    """Who gets a certificate: a machine of one role, or a person."""

    SCHEDULER = "scheduler"
    WORKER = "worker"
    LOCAL = "local"
    CLIENT = "client"

    @property
    def settings(self) -> str:
        """The content of dask.env on a machine of this role, without the scheduler's address."""
        return f"DASK_ROLE={self}\n" + (f"DASK_LISTEN={Listen.NETWORK}\n" if self.value == Role.LOCAL else "")


_IGNORE = ".gitignore"
_IGNORED = "".join(f"/{name}\n" for name in (_IGNORE, _CA, _CA_KEY, *(f"{holder}/" for holder in Holder)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """What one holder got."""

    role: Holder
    folder: Path
    end: datetime.datetime
    user_data: Path | None
    """None for a client, and for a worker whose scheduler is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """What the folder has now."""

    folder: Path
    new_ca: bool
    ca_end: datetime.datetime
    git_ignored: bool
    """Whether its .gitignore is of this command."""
    issued: tuple[Issued, ...]


def make(folder: Path, *, days: int, scheduler: str = "") -> Folder:
    """Make certificates for all holders. The folder gets a CA if it has none; a CA is never replaced.

    Raises UsageError for a folder with files of another origin, one that can't be written, a wrong number of
    days, and an address that is none.
    """
    if not 1 <= days <= CA_DAYS:
        raise UsageError(f"--days {days}: expected 1 to {CA_DAYS}")
    address = normalized(scheduler) if scheduler else ""
    folder = folder.absolute()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: expected a folder, which is made if it is missing")
    try:
        authority = _existing(folder)
        new = authority is None
        if authority is None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            authority = Authority.create(days=CA_DAYS)
            write_atomically(folder / _CA_KEY, authority.key_pem)
            try:
                write_atomically(folder / _CA, authority.pem)
            except BaseException:
                # A key alone would be taken for one whose certificate was lost.
                (folder / _CA_KEY).unlink()
                raise
        ignore = folder / _IGNORE
        if not (ignore.exists() or ignore.is_symlink()):
            # So that nobody commits a key; a folder may have other files too.
            write_atomically(ignore, _IGNORED)
        ignored = ignore.is_file() and ignore.read_bytes() == _IGNORED.encode()
        issued = tuple(_issue(folder, authority, holder, days, address) for holder in Holder)
    except OSError as failed:
        raise UsageError(f"{failed.filename or folder}: {failed.strerror}") from failed
    return Folder(folder=folder, new_ca=new, ca_end=authority.end, git_ignored=ignored, issued=issued)


def normalized(address: str) -> str:
    """Return a scheduler's address as HOST:PORT. Raises UsageError if it is none."""
    try:
        return parse_scheduler(address)[1]
    except ValueError as wrong:
        raise UsageError(f"--scheduler {address}: {wrong}") from wrong


def user_data(holder: Holder, certificate: Certificate, scheduler: str = "") -> str:
    """Return a cloud-config that starts Dask in a machine's role, with TLS."""
    settings = holder.settings + (f"DASK_SCHEDULER_ADDRESS={scheduler}\n" if scheduler else "")
    files = {
        "/etc/dask/tls/ca.pem": certificate.ca,
        "/etc/dask/tls/cert.pem": certificate.certificate,
        "/etc/dask/tls/key.pem": certificate.key,
        "/etc/dask/dask.env": settings,
    }
    lines = [
        "#cloud-config",
        f"# Dask's {holder}, with TLS. This text contains a private key.",
        "write_files:",
    ]
    for path, text in files.items():
        lines.append(f"  - path: {path}")
        if path.endswith("key.pem"):
            lines.append('    permissions: "0600"')
        lines += ["    content: |", indent(text.rstrip("\n"), " " * 6)]
    return "\n".join(lines) + "\n"


def _existing(folder: Path) -> Authority | None:
    """Return the CA of a folder; None if there is none yet. Raises UsageError for files of another origin."""
    there = [name for name in (_CA, _CA_KEY) if (folder / name).exists()]
    if len(there) == 1:
        missing = _CA_KEY if there == [_CA] else _CA
        raise UsageError(
            f"{folder} has {there[0]}, but no {missing}", hint="bring that file back, or name another folder"
        )
    authority = None
    if there:
        try:
            authority = Authority.load((folder / _CA).read_bytes(), (folder / _CA_KEY).read_bytes())
        except UsageError as wrong:
            raise UsageError(
                f"the CA in {folder} can't be used: {wrong.message}",
                hint="a new CA needs a new folder, and then all machines and clients need new certificates",
            ) from wrong
    for found in _foreign(folder, authority):
        raise UsageError(
            f"{found} is not from this command and its CA", hint="move it away, or name another folder"
        )
    return authority


def _foreign(folder: Path, authority: Authority | None) -> Iterator[Path]:
    """Yield what would be overwritten, but was not made with this CA."""
    for holder in Holder:
        own = folder / holder
        certificate = own / "cert.pem"
        if authority is None or not own.is_dir():
            if own.exists():
                yield own
        elif certificate.exists():
            if not authority.issued(certificate.read_bytes()):
                yield certificate
        elif any(own.iterdir()):
            yield own


def _issue(folder: Path, authority: Authority, holder: Holder, days: int, scheduler: str) -> Issued:
    own = folder / holder
    own.mkdir(mode=0o700, exist_ok=True)
    made = authority.issue(f"Dask {holder}", days=days, serves=holder is not Holder.CLIENT)
    files = {"cert.pem": made.certificate, "key.pem": made.key, "ca.pem": made.ca}
    data = None
    if holder is Holder.CLIENT:
        files["dask.yaml"] = _configuration(own)
    else:
        files["bundle.pem"] = made.bundle
        address = scheduler if holder is Holder.WORKER else ""
        if holder is Holder.WORKER and not scheduler:
            # It would have the former certificate.
            (own / "user-data.yaml").unlink(missing_ok=True)
        else:
            data = own / "user-data.yaml"
            files[data.name] = user_data(holder, made, address)
    for name, text in files.items():
        write_atomically(own / name, text)  # mode 0600
    return Issued(role=holder, folder=own, end=made.end, user_data=data)


def _configuration(folder: Path) -> str:
    """Return Dask's configuration for a client."""
    return f"""\
# For a client: DASK_CONFIG={folder}/dask.yaml, or copy it to ~/.config/dask/.
distributed:
  comm:
    default-scheme: tls
    require-encryption: true
    tls:
      ca-file: {folder}/ca.pem
      client:
        cert: {folder}/cert.pem
        key: {folder}/key.pem
"""
