"""The base AMI: taken by its exact name, and named wherever a person looks."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from moto.core.utils import utcnow

from ami_builder.aws import source_ami
from ami_builder.aws.session import Account
from ami_builder.config import loading
from ami_builder.core.options import Arch
from ami_builder.core.records import TargetKind
from tests.cloud.faulting import BUILD
from tests.cloud.flow import captured, in_haste, without_ssh
from tests.fake_ec2 import fake_image

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fake_ec2.server import Cloud

DEBIAN = fake_image.DEBIAN_ACCOUNT
DEFAULT = f"{DEBIAN}/debian-13-amd64-########-####"
LOOSE = f"{DEBIAN}/debian-13-amd64-*"


def published(cloud: Cloud, name: str, *, hours: int = 1) -> str:
    """Let Debian publish another AMI, some hours ago, and return its id."""
    backend = cloud.backend()
    made = fake_image._debian(backend, name, "x86_64", 0)
    made.creation_date = utcnow() - timedelta(hours=hours)
    backend.amis[made.id] = made
    return str(made.id)


def taken(source: str) -> source_ami.BaseAmi:
    return source_ami.resolve(Account.open(), source, Arch.AMD64)


@pytest.fixture
def home(cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AMI_BUILDER_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("AMI_BUILDER_CONFIG", raising=False)
    without_ssh(monkeypatch)
    in_haste(monkeypatch)
    return tmp_path / "home"


@pytest.mark.parametrize("arch", list(Arch))
def test_the_default_is_debian_s_exact_name(arch: Arch) -> None:
    config = loading.load(None, environ={"AMI_BUILDER_ARCH": arch}, overrides={}, target=TargetKind.AWS)
    assert config.select().aws.source == f"{DEBIAN}/debian-13-{arch}-########-####"


@pytest.mark.parametrize(
    "variant",
    [
        "debian-13-amd64-sql-20261121-1",
        "debian-13-amd64-daily-20261122-2305",
        # EC2's `?` also matches no character at all, and any but a digit.
        "debian-13-amd64-20261121-1",
        "debian-13-amd64-sql-2026-1121",
    ],
)
def test_a_newer_variant_is_not_taken(cloud: Cloud, variant: str) -> None:
    published(cloud, variant)
    found = taken(DEFAULT)
    assert (found.id, found.name) == (cloud.base_ami(), fake_image.NEWEST)
    over = source_ami.passed_over(Account.open(), DEFAULT, found)
    assert over[0] == variant
    assert fake_image.NEWEST not in over


def test_what_is_older_was_not_passed_over(cloud: Cloud) -> None:
    newest = published(cloud, "debian-13-amd64-20261121-2304")
    published(cloud, "debian-13-amd64-sql-20261001-1", hours=999)
    found = taken(DEFAULT)
    assert found.id == newest
    assert source_ami.passed_over(Account.open(), DEFAULT, found) == []
    assert source_ami.passed_over(Account.open(), newest, found) == []


def test_check_shows_what_was_taken_and_passed_over(cloud: Cloud, home: Path) -> None:
    published(cloud, "debian-13-amd64-sql-20261121-1")
    found = _findings("--set", "aws.source=")
    base = found["base AMI"]
    assert base["state"] == "ok"
    assert cloud.base_ami() in base["found"]
    assert fake_image.NEWEST in base["found"]
    (image,) = cloud.client().describe_images(ImageIds=[cloud.base_ami()])["Images"]
    assert image["CreationDate"][:10] in base["found"]
    over = found["newer AMIs, passed over"]
    assert over["state"] == "ok"
    assert over["found"].startswith("debian-13-amd64-sql-20261121-1, debian-13-amd64-daily-")


def test_check_says_when_a_pattern_takes_names_of_several_kinds(cloud: Cloud, home: Path) -> None:
    sql = published(cloud, "debian-13-amd64-sql-20261121-1")
    found = _findings("--set", f"aws.source={LOOSE}")["base AMI"]
    assert found["state"] == "note"
    assert sql in found["found"]
    assert "debian-13-amd64-########-####" in found["hint"]


def test_a_build_names_its_base(cloud: Cloud, home: Path) -> None:
    published(cloud, "debian-13-amd64-sql-20261121-1")
    ran = captured("--set", "aws.source=", *BUILD)
    assert ran.status == 0, ran.err
    whole = f"{fake_image.NEWEST} ({cloud.base_ami()})"
    assert whole in ran.err
    (record,) = [
        record
        for record in map(json.loads, (path.read_text() for path in home.glob("state/runs/*/record.json")))
        if record["command"] == "build"
    ]
    assert record["base"] == whole
    asked = [call for call in cloud.calls if call.action == "DescribeImages" and not call.packer]
    assert sum(cloud.base_ami() in call.params.get("ImageIds", []) for call in asked) == 0, "described again"


def _findings(*settings: str) -> dict[str, dict[str, str]]:
    ran = captured(*settings, "check", "--target", "aws", "--json")
    return {one["name"]: one for one in json.loads(ran.out)["findings"]}
