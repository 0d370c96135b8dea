"""User data for instances: the caller's, an ssh key, a timer that powers the instance off, Dask's settings.

The timer is a transient systemd unit: it is only in memory, so it can't get into an AMI, and a boot hook
starts it again at every boot. With InstanceInitiatedShutdownBehavior=terminate, powering off terminates the
instance and deletes its volume.
"""

from __future__ import annotations

import email
import hashlib
from collections.abc import Mapping, Sequence
from email.message import Message
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText

from ami_builder.core.errors import UsageError

MAX_BYTES = 16 * 1024
"""EC2's limit for user data (its documentation)."""

UNIT = "ami-builder-lifetime"

# cloud-init runs it before sysinit.target, which timers and services wait for by default.
_TIMER = """\
#!/bin/sh
exec systemd-run --quiet --unit={unit} --on-active={seconds}s \\
    --timer-property=AccuracySec=1s --timer-property=DefaultDependencies=no \\
    --property=DefaultDependencies=no systemctl --force poweroff
"""
_MERGED = "merge_how: list(append)+dict(no_replace,recurse_list)+str()\n"
# Merged with the keys in the caller's own cloud-config, instead of replacing them.
_KEY = f"""\
#cloud-config
{_MERGED}ssh_authorized_keys:
- {{public_key}}
"""
_SETTINGS = """\
#cloud-config
write_files:
  - path: /etc/dask/dask.env
    content: |
{lines}"""


def lifetime_user_data(seconds: float) -> str:
    """Return a shell script that powers the instance off `seconds` after each boot."""
    return _TIMER.format(unit=UNIT, seconds=max(1, round(seconds)))


def with_lifetime(user_data: str, seconds: float, public_key: str = "") -> str:
    """Return user data of any cloud-init type with the timer, and with an ssh key for the default user.

    Raises UsageError when it is too large for EC2.
    """
    parts: list[Message] = [MIMEText(lifetime_user_data(seconds), "cloud-boothook")]
    if user_data.strip():
        parts.append(_part(user_data))
    if public_key:
        parts.append(MIMEText(_KEY.format(public_key=public_key.strip()), "cloud-config"))
    return _within_limit(_joined(user_data, parts))


def with_settings(settings: Mapping[str, str], user_data: str = "") -> str:
    """Return user data that writes /etc/dask/dask.env, joined with the caller's, of any cloud-init type.

    Raises UsageError when it is too large for EC2.
    """
    lines = "".join(f"      {name}={value}\n" for name, value in settings.items())
    own = _SETTINGS.format(lines=lines)
    if not user_data.strip():
        return _within_limit(own)
    # Merged with the files of the caller's own cloud-config, instead of replacing them.
    merged = own.replace("#cloud-config\n", f"#cloud-config\n{_MERGED}", 1)
    return _within_limit(_joined(user_data, [_part(user_data), MIMEText(merged, "cloud-config")]))


def _joined(seed: str, parts: Sequence[Message]) -> str:
    # Derived from the text: a RunInstances retried with its client token must be identical.
    boundary = hashlib.sha256(seed.encode()).hexdigest()[:24]
    joined = MIMEMultipart(boundary=f"ami-builder-{boundary}")
    for part in parts:
        del part["MIME-Version"]
        joined.attach(part)
    return joined.as_string()


def _within_limit(text: str) -> str:
    if (size := len(text.encode())) > MAX_BYTES:
        raise UsageError(
            f"the user data has {size} bytes, but EC2 accepts at most {MAX_BYTES}",
            hint="let the instance download large files",
        )
    return text


def _part(user_data: str) -> Message:
    if user_data.lower().startswith(("content-type: multipart", "mime-version:")):
        return email.message_from_string(user_data)
    # cloud-init detects the type of plain text by its first line.
    return MIMEText(user_data, "plain")
