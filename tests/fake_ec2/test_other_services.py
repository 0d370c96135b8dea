"""Parameters of type aws:ec2:image, as SSM treats them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fake_ec2.server import Cloud

NAME = "/ours/image"


def test_a_value_that_is_no_image_is_accepted_and_dropped(cloud: Cloud) -> None:
    ssm = cloud.client("ssm")
    put = {"Name": NAME, "DataType": "aws:ec2:image", "Type": "String"}
    assert ssm.put_parameter(**put, Value=cloud.base_ami())["Version"] == 1
    wrong = ssm.put_parameter(**put, Value="ami-0123456789abcdef0", Overwrite=True)
    assert wrong["Version"] == 2
    found = ssm.get_parameter(Name=NAME)["Parameter"]
    assert (found["Value"], found["Version"]) == (cloud.base_ami(), 1)
    assert ssm.put_parameter(Name="/ours/text", Type="String", Value="ami-no")["Version"] == 1


def test_a_good_value_may_take_a_while(cloud: Cloud) -> None:
    cloud.options.parameter_reads = 2
    ssm = cloud.client("ssm")
    put = {"Name": NAME, "DataType": "aws:ec2:image", "Type": "String", "Value": cloud.base_ami()}
    for version in (1, 2):
        assert ssm.put_parameter(**put, Overwrite=version > 1)["Version"] == version
        for _ in range(2):
            shown = ssm.get_parameters(Names=[NAME])["Parameters"]
            assert [one["Version"] for one in shown] == ([1] if version == 2 else [])
        assert ssm.get_parameter(Name=NAME)["Parameter"]["Version"] == version
