"""`doctor --aws`: a real Dask cluster whose workers have the ids of instances of the emulated account."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from ami_builder.aws import images, origins
from ami_builder.aws.policy import Section, document
from ami_builder.aws.session import Account
from ami_builder.aws.tags import Purpose
from ami_builder.cli import app as cli
from ami_builder.core.units import GIB
from tests.cloud.aws import DIGEST, make_ami, tags
from tests.real_dask import said, scheduler, worker

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fake_ec2.server import Cloud

KEY = "AKIALEASTPRIVILEGE00"


def launched(cloud: Cloud, ami: str) -> str:
    made = cloud.client().run_instances(ImageId=ami, MinCount=1, MaxCount=1, InstanceType="m6i.large")
    return str(made["Instances"][0]["InstanceId"])


def promoted(cloud: Cloud, channel: str, ami: str) -> None:
    cloud.client("ssm").put_parameter(
        Name=f"/ami-builder/dask/x86_64/{channel}", Value=ami, Type="String", DataType="aws:ec2:image"
    )


def test_where_instances_came_from(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [make_ami(cloud, f"ours-{n}", **tags(Purpose.IMAGE)) for n in range(2)]
    other = make_ami(cloud, "other")
    instances = [launched(cloud, ami) for ami in (*ours, other, cloud.base_ami())]
    promoted(cloud, "stable", ours[0])
    promoted(cloud, "testing", ours[0])
    images.revoke(Account.open(), ours[1], "a hole")
    lost = launched(cloud, other)
    cloud.client().terminate_instances(InstanceIds=[lost])
    cloud.client().deregister_image(ImageId=other)
    held = cloud.enforce(document(Section.DOCTOR), KEY)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    found = origins.find(Account.open(), [*instances, "i-00000000000000000"])
    assert held.refused == []
    assert held.unused == set()
    first, second, third, base = (found[one] for one in instances)
    assert (first.ami, first.image, first.digest, first.channels) == (
        ours[0], "dask", DIGEST, ("stable", "testing")
    )  # fmt: skip
    assert (first.others, first.revoked, first.instance_type) == ((), None, "m6i.large")
    assert (second.channels, second.revoked) == ((), "a hole")
    assert second.others == (f"stable={ours[0]}", f"testing={ours[0]}")
    assert (third.ami, third.name) == (other, "")
    assert base.name.startswith("debian-13")
    assert base.image == ""
    assert "i-00000000000000000" not in found


def test_the_command(
    cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    current = make_ami(cloud, "new", **tags(Purpose.IMAGE))
    older = make_ami(cloud, "old", **tags(Purpose.IMAGE))
    promoted(cloud, "stable", current)
    instances = {"a": launched(cloud, current), "b": launched(cloud, older)}

    def asked(*flags: str) -> tuple[int, dict[str, Any], str]:
        capsys.readouterr()
        status = cli.run(["-q", "doctor", address, "--json", "--timeout", "10min", *flags])
        printed = capsys.readouterr()
        return status, json.loads(printed.out or "{}"), printed.err

    with ExitStack() as stack:
        address = stack.enter_context(scheduler(tmp_path))
        limit = ("--memory-limit", str(4 * GIB))
        for name, instance in instances.items():
            one = worker(tmp_path, address, name, *limit, total=8 * GIB, available=4 * GIB, instance=instance)
            stack.enter_context(one)
        for name in instances:
            said(tmp_path / f"{name}.log", "Registered to")
        status, found, _ = asked("--region", "us-east-1")
        assert status == 0
        by_name = {one["name"]: one for one in found["machines"]}
        assert by_name[instances["a"]]["origin"]["channels"] == ["stable"]
        assert by_name[instances["b"]]["origin"]["others"] == [f"stable={current}"]
        elsewhere, *warned = found["warnings"]
        assert elsewhere.startswith(f"the AMI of machine {found['scheduler']['host']} is unknown: ")
        each = sorted((f"{current} on machine {instances['a']}", f"{older} on machine {instances['b']}"))
        assert warned == [
            f"the machines run different AMIs: {'; '.join(each)}",
            f"{older} is not current in any channel of dask: stable={current}",
        ]
        status, found, _ = asked("--region", "eu-west-1")
        assert (status, found["warnings"][1:]) == (
            0, ["2 instances can't be found in this account in eu-west-1"]
        )  # fmt: skip
        # What AWS refuses or can't tell loses nothing else.
        unknown = "the images and channels of the machines are unknown"
        look, channels = document(Section.DOCTOR)["Statement"]
        for allowed in (look, channels):
            cloud.enforce({"Version": "2012-10-17", "Statement": [allowed]}, KEY)
            with monkeypatch.context() as limited:
                limited.setenv("AWS_ACCESS_KEY_ID", KEY)
                status, found, _ = asked("--region", "us-east-1")
            assert (status, len(found["workers"]), len(found["machines"])) == (0, 2, 3)
            (warning,) = found["warnings"]
            assert warning.startswith(f"{unknown}: ")
            assert "not authorized" in warning
        with monkeypatch.context() as without:
            without.delenv("AWS_ACCESS_KEY_ID")
            without.delenv("AWS_SECRET_ACCESS_KEY")
            without.setenv("AWS_EC2_METADATA_DISABLED", "true")
            without.setenv("HOME", str(tmp_path))
            status, found, _ = asked("--region", "us-east-1")
            assert (status, len(found["workers"])) == (0, 2)
            assert found["warnings"][0].startswith(f"{unknown}: no AWS credentials found")
            # A limit that is missing still decides.
            stack.enter_context(
                worker(tmp_path, address, "c", "--memory-limit", "0", total=GIB, available=GIB)
            )
            said(tmp_path / "c.log", "Registered to")
            assert cli.run(["-q", "doctor", address, "--region", "us-east-1"]) == 5
            printed = capsys.readouterr()
            assert len(printed.out.splitlines()) == 3
            assert f"warning: {unknown}" in printed.err
        # Without the flag nobody is asked.
        cloud.reset()
        status, found, _ = asked()
        assert (status, found["warnings"], cloud.calls) == (5, [], ())


def test_wrong_settings_fail_before_anybody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ami-builder.toml").write_text("[images.a]\n[images.b]\n")
    monkeypatch.setenv("AMI_BUILDER_CONFIG", str(tmp_path / "ami-builder.toml"))
    nobody = "127.0.0.1:1"
    for flags, wrong in (
        (["--aws"], "give --region"),
        (["--region", "Paris"], "expected the name of a region"),
    ):
        assert cli.run(["-q", "doctor", nobody, *flags]) == 2
        assert wrong in capsys.readouterr().err
