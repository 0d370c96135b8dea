"""What instances get as user data: whatever the caller sends, a key, and the timer that ends them."""

from __future__ import annotations

import email
import subprocess
from typing import TYPE_CHECKING

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ami_builder.aws.user_data import MAX_BYTES, lifetime_user_data, with_lifetime
from ami_builder.core.errors import UsageError
from tests.fake_programs import calls, fake

if TYPE_CHECKING:
    from email.message import Message
    from pathlib import Path

KEY = "ssh-ed25519 AAAAC3Nz ami-builder"


def parts(text: str) -> dict[str, str]:
    """Return the parts as cloud-init sees them: content type -> text."""
    whole = email.message_from_string(text)
    assert whole.is_multipart()
    return {part.get_content_type(): _text(part) for part in whole.walk() if not part.is_multipart()}


def _text(part: Message) -> str:
    raw = part.get_payload(decode=True)
    assert isinstance(raw, bytes)
    return raw.decode(part.get_content_charset("utf-8"))


def test_the_timer_powers_off_from_memory_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "systemd-run", "")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    subprocess.run(["sh", "-c", lifetime_user_data(5400.4)], check=True)
    (called,) = calls(tmp_path, "systemd-run")
    assert "--on-active=5400s" in called
    assert called.endswith("systemctl --force poweroff")
    # A boot hook runs before what timers and services wait for by default.
    assert "--timer-property=DefaultDependencies=no" in called
    assert " --property=DefaultDependencies=no" in called
    assert "/etc" not in called
    assert "--on-active=1s" in lifetime_user_data(0.2)


def test_a_builder_gets_a_key_and_the_timer() -> None:
    found = parts(with_lifetime("", 7200, f"{KEY}\n"))
    assert found.keys() == {"text/cloud-boothook", "text/cloud-config"}
    assert found["text/cloud-boothook"] == lifetime_user_data(7200)
    assert found["text/cloud-config"].startswith("#cloud-config\n")
    assert yaml.safe_load(found["text/cloud-config"])["ssh_authorized_keys"] == [KEY]


def test_a_control_planes_user_data_stays_what_it_is() -> None:
    found = parts(with_lifetime("#cloud-config\nhostname: dask\n", 60, KEY))
    assert found["text/plain"] == "#cloud-config\nhostname: dask\n"
    # Both bring a cloud-config: ours comes last, and adds to the keys rather than replacing them.
    assert "list(append)" in found["text/cloud-config"]
    assert list(found)[-1] == "text/cloud-config"


def test_user_data_of_several_parts_stays_so() -> None:
    inner = with_lifetime("#!/bin/sh\necho hello\n", 60)
    found = email.message_from_string(with_lifetime(inner, 120))
    leaves = [_text(part) for part in found.walk() if not part.is_multipart()]
    assert leaves == [lifetime_user_data(120), lifetime_user_data(60), "#!/bin/sh\necho hello\n"]


def test_what_ec2_would_not_take_is_refused() -> None:
    with pytest.raises(UsageError, match=f"at most {MAX_BYTES}"):
        with_lifetime("#cloud-config\n" + "#" * MAX_BYTES, 60)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=2000))
def test_any_text_arrives_as_it_was_sent(text: str) -> None:
    sent = f"#cloud-config\n{text}\n"
    joined = with_lifetime(sent, 60, KEY)
    assert joined == with_lifetime(sent, 60, KEY), "a repeated launch with one client token must not differ"
    assert joined.isascii()
    assert parts(joined)["text/plain"] == sent
