"""What an instance gets as user data besides the caller's: a key to log in with, and a timer that ends it.

The timer is a transient unit, so it lives in memory alone and can't get into an AMI; a boot hook sets it anew
at every boot. With InstanceInitiatedShutdownBehavior=terminate, the power-off ends the instance and its
volume.
"""

from __future__ import annotations

import email
import hashlib
from email.message import Message
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText

from ami_builder.core.errors import UsageError

MAX_BYTES = 16 * 1024
"""What RunInstances takes; EC2's documented quota."""

UNIT = "ami-builder-lifetime"

# cloud-init runs it before sysinit.target, which timers and services by default wait for.
_TIMER = """\
#!/bin/sh
exec systemd-run --quiet --unit={unit} --on-active={seconds}s \\
    --timer-property=AccuracySec=1s --timer-property=DefaultDependencies=no \\
    --property=DefaultDependencies=no systemctl --force poweroff
"""
# Added to keys that the caller's own cloud-config brings, rather than put in their place.
_KEY = """\
#cloud-config
merge_how: list(append)+dict(no_replace,recurse_list)+str()
ssh_authorized_keys:
- {public_key}
"""


def lifetime_user_data(seconds: float) -> str:
    """Return a shell script that powers the machine off `seconds` after it was booted, whatever happens."""
    return _TIMER.format(unit=UNIT, seconds=max(1, round(seconds)))


def with_lifetime(user_data: str, seconds: float, public_key: str = "") -> str:
    """Return user data of any of cloud-init's kinds with the timer, and with a key for the default user.

    Raises UsageError when that is more than EC2 takes.
    """
    parts: list[Message] = [MIMEText(lifetime_user_data(seconds), "cloud-boothook")]
    if user_data.strip():
        parts.append(_part(user_data))
    if public_key:
        parts.append(MIMEText(_KEY.format(public_key=public_key.strip()), "cloud-config"))
    joined = MIMEMultipart(boundary=_boundary(user_data))
    for part in parts:
        del part["MIME-Version"]
        joined.attach(part)
    text = joined.as_string()
    if (size := len(text.encode())) > MAX_BYTES:
        raise UsageError(
            f"the user data has {size} bytes, and EC2 takes at most {MAX_BYTES}",
            hint="have the machine fetch what is large",
        )
    return text


def _part(user_data: str) -> Message:
    if user_data.lower().startswith(("content-type: multipart", "mime-version:")):
        return email.message_from_string(user_data)
    # cloud-init tells the kind of plain text by its first line.
    return MIMEText(user_data, "plain")


def _boundary(user_data: str) -> str:
    # The same for the same text: a repeated RunInstances with one client token must not differ.
    return f"ami-builder-{hashlib.sha256(user_data.encode()).hexdigest()[:24]}"
