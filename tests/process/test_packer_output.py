"""What each Packer printed, recorded from real runs, is read alike."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ami_builder.aws import hints, packer_messages
from ami_builder.build import packer, plugins
from ami_builder.core.errors import BuildFailed
from tests.fake_programs import fake

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Replay = Callable[[str], "Replayed"]

RECORDED = Path(__file__).parents[1] / "recorded" / "packer"
VERSIONS = ("1.6.6", "1.9.5", "1.14.3", "1.16.0")
AMI_VERSIONS = ("1.6.6", "1.14.3", "1.16.0")
"""With the plugin amazon 1.7.1 and 1.8.2 in the last two."""


def recorded(version: str, scene: str) -> list[str]:
    """Return the lines of one scene."""
    text = (RECORDED / f"{version}.log").read_text()
    scenes = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    return [line for line in scenes[scene].splitlines() if line]


class Replayed:
    """What a bake made of the recorded lines."""

    def __init__(self, folder: Path, lines: Sequence[str], status: int) -> None:
        self.progress: list[str] = []
        self.lines: list[str] = []
        self.error: BuildFailed | None = None
        (folder / "said").write_text("\n".join(lines) + "\n")
        (folder / "console.log").write_text("GRUB\n")
        said = shlex.quote(str(folder / "said"))
        fake(folder / "bin", "packer", f"cat {said}; exit {status}")
        try:
            packer.build(
                folder,
                log=folder / "packer.log",
                console_log=folder / "console.log",
                timeout=30,
                on_progress=self.progress.append,
                on_line=self.lines.append,
            )
        except BuildFailed as failed:
            self.error = failed

    @property
    def text(self) -> str:
        """The error with its last lines, which decides about another attempt."""
        assert self.error is not None
        return "\n".join((self.error.message, *self.error.tail))


@pytest.fixture
def replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Replay]:
    """Let a bake read a scene of the version that the test is about."""
    version: str = request.getfixturevalue("version")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    plugins.version.cache_clear()
    yield lambda scene: Replayed(tmp_path, recorded(version, scene), 0 if scene == "ami" else 1)
    plugins.version.cache_clear()


@pytest.mark.parametrize("version", VERSIONS)
def test_progress_is_the_same_in_all_versions(replay: Replay, version: str) -> None:
    # Since 1.13 the output of a script begins with an arrow too; stdout and stderr have no order.
    ran = replay("provisioner")
    start = ["Waiting for SSH to become available...", packer.CONNECTED, "prepare", "inline", "10-guest.sh"]
    assert ran.progress[1:6] == start
    end = ran.progress.index("20-container.sh")
    script = ["Setting up htop (3.4.1) ...", "W: a warning", "indented", "no newline"]
    assert sorted(ran.progress[6:end]) == sorted(script)
    assert ran.progress[end + 1] == "docker: no such image"
    assert "" not in ran.progress


@pytest.mark.parametrize("version", VERSIONS)
def test_the_provisioner_that_failed_is_named(replay: Replay, version: str) -> None:
    ran = replay("provisioner")
    assert ran.error is not None
    assert ran.error.message == "provisioner 20-container.sh failed"
    assert any("docker: no such image" in line for line in ran.error.tail)
    assert not any("htop" in line for line in ran.error.tail)


@pytest.mark.parametrize("version", VERSIONS)
def test_without_ssh_the_console_is_shown(replay: Replay, version: str) -> None:
    ran = replay("no-ssh")
    assert ran.error is not None
    assert "never answered by ssh" in ran.error.message
    assert ran.error.tail == ("GRUB",)


@pytest.mark.parametrize("version", AMI_VERSIONS)
def test_the_instance_and_the_ami_are_found(replay: Replay, version: str) -> None:
    ran = replay("ami")
    assert ran.error is None
    found: list[str] = []
    for line in ran.lines:
        found += filter(None, (packer_messages.instance_in(line), packer_messages.image_in(line)))
        found += ["imaging"] if packer_messages.is_imaging(line) else []
    instance, imaging, image = found[:3]
    assert instance.startswith("i-")
    assert imaging == "imaging", "before it is asked for"
    assert set(found[3:]) <= {image, imaging}
    assert image.startswith("ami-")


@pytest.mark.parametrize("version", AMI_VERSIONS)
def test_a_spot_shortage_is_a_lack_of_capacity(replay: Replay, version: str) -> None:
    text = replay("spot-capacity").text
    assert packer_messages.lacks_capacity(text)
    assert not packer_messages.is_transient(text)


@pytest.mark.parametrize("version", AMI_VERSIONS)
def test_an_error_of_ec2_is_transient(replay: Replay, version: str) -> None:
    text = replay("run-500").text
    assert packer_messages.is_transient(text)
    assert not packer_messages.lacks_capacity(text)


@pytest.mark.parametrize("version", AMI_VERSIONS)
def test_a_crash_of_a_plugin_is_not_transient(replay: Replay, version: str) -> None:
    ran = replay("fleet-throttled")
    crashed = any("panic:" in line for line in recorded(version, "fleet-throttled"))
    assert crashed is (version == "1.16.0"), "plugin 1.8 crashes when CreateFleet is refused"
    assert isinstance(ran.error, packer.PluginCrashed) is crashed
    assert packer_messages.is_transient(ran.text) is not crashed
    assert not any("goroutine" in line or "PACKER CRASH" in line for line in ran.text.splitlines())


@pytest.mark.parametrize(
    ("text", "transient", "capacity"),
    [
        # Of SDK v1, of v2, and of EC2 in either.
        ('RequestError: send request failed\ncaused by: Post "https://ec2": EOF', True, False),
        ("https response error StatusCode: 0, RequestID: , request send failed, Post: EOF", True, False),
        ("ServerError: \n\tstatus code: 503, request id: ", True, False),
        (
            "operation error EC2: RunInstances, https response error StatusCode: 503, RequestID: 1",
            True,
            False,
        ),
        ("failed to get rate limit token, retry quota exceeded, 2 available, 5 requested", True, False),
        ("api error InvalidGroup.NotFound: The security group 'sg-1' does not exist", True, False),
        ("api error UnauthorizedOperation: You are not authorized", False, False),
        ("unexpected EOF", False, False),
        (
            "https response error StatusCode: 500, RequestID: 1, api error InsufficientInstanceCapacity: We "
            "currently do not have sufficient m4.4xlarge capacity in the Availability Zone you requested",
            False,
            True,
        ),
        ("become ready:There is no Spot capacity available that matches your request.", False, True),
        ("Unsupported: The requested configuration is currently not supported.", False, True),
    ],
)
def test_why_a_bake_failed(text: str, transient: bool, capacity: bool) -> None:
    assert packer_messages.is_transient(text) is transient
    assert packer_messages.lacks_capacity(text) is capacity


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        (
            "Build 'amazon-ebs.image' errored: Error launching source instance: VcpuLimitExceeded: You have"
            " requested more vCPU capacity than your current vCPU limit",
            "quota 'Running On-Demand",
        ),
        (
            "Error launching source instance: operation error EC2: RunInstances, https response error"
            " StatusCode: 403, RequestID: 1, api error UnauthorizedOperation: You are not authorized to do"
            " this operation.",
            "allow ec2:RunInstances for these credentials",
        ),
        (
            "Error waiting for fleet request (fleet-1) to become ready:Max spot instance count exceeded",
            "quota 'All … Spot Instance Requests",
        ),
        ("Script exited with non-zero exit status: 1", None),
    ],
)
def test_what_to_do_about_an_error_in_the_output(line: str, hint: str | None) -> None:
    found = hints.in_output(line)
    assert found is None if hint is None else hint in str(found)


@pytest.mark.parametrize(
    ("line", "expired"),
    [
        ("Error stopping instance: RequestExpired: Request has expired.", True),
        ("api error ExpiredToken: The security token included in the request is expired", True),
        ("Error: AuthFailure: AWS was not able to validate the provided access credentials", True),
        ("api error AuthFailure.ServiceLinkedRoleCreationNotPermitted: The provided credentials", False),
        ("api error AuthFailure: Not authorized for images: [ami-0123456789abcdef0]", False),
        ("Error: InvalidParameterValue: Wrong.", False),
    ],
)
def test_expired_credentials_are_known_by_their_codes(line: str, expired: bool) -> None:
    assert hints.is_expired(line) is expired
