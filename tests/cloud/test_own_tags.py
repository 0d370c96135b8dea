"""aws.tags: everything that is made in the account has the user's tags, from the call that makes it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from ami_builder.build import plugins
from tests.cloud.flow import captured
from tests.fake_ec2.server import REGION, Cloud

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.cloud.faulting import Place
    from tests.fake_ec2.api_call import ApiCall

OWN = {"Owner": "data platform", "cost-center": "4711"}
TAGGED = ("--set", "aws.tags=" + ",".join(f"{key}={value}" for key, value in OWN.items()))
ELSEWHERE = "eu-west-1"
_LATER = {"CreateImage", "CreateFleet"}
"""Packer 1.6.6 tags what these make only afterwards."""


def _makers(cloud: Cloud) -> Iterator[ApiCall]:
    for call in cloud.calls:
        if call.outcome == "ok" and not call.params.get("DryRun") and _makes(call):
            yield call


def _makes(call: ApiCall) -> bool:
    if call.service == "ssm":
        return call.action == "PutParameter" and not call.params.get("Overwrite")
    return call.action in {"RunInstances", "CopyImage"} or (
        call.action.startswith("Create") and call.action != "CreateTags"
    )


def _asked(call: ApiCall) -> list[dict[str, str]]:
    if call.service == "ssm":
        return [{tag["Key"]: tag["Value"] for tag in call.params.get("Tags", [])}]
    template: Any = call.params.get("LaunchTemplateData", {})
    found = [*call.params.get("TagSpecifications", []), *template.get("TagSpecifications", [])]
    return [{tag["Key"]: tag["Value"] for tag in each["Tags"]} for each in found]


@pytest.mark.parametrize("spot", ["false", "true"])
def test_every_call_that_makes_something_sets_them(cloud: Cloud, places: Sequence[Place], spot: str) -> None:
    cloud.reset()
    settings = (*TAGGED, "--set", f"aws.spot={spot}", "--set", f"aws.copy_to={ELSEWHERE}")
    built = captured(*settings, "build", "--target", "aws")
    assert built.status == 0, built.err
    ami = built.out.splitlines()[-1]
    copied = captured(*settings, "copy", ami)
    assert copied.status == 0, copied.err
    promoted = captured(*settings, "promote", ami, "testing")
    assert promoted.status == 0, promoted.err

    makers = list(_makers(cloud))
    assert {call.action for call in makers} >= {
        "CreateSecurityGroup",
        "RunInstances",
        "CopyImage",
        "PutParameter",
    }
    for call in makers:
        if call.action in _LATER and not plugins.has_plugins():
            continue
        asked = _asked(call)
        assert asked, f"{call.action} asks for no tags"
        for tags in asked:
            assert OWN.items() <= tags.items(), call.action
    for region in (REGION, ELSEWHERE):
        ec2 = cloud.client(region=region)
        for kind, named in (("images", "Images"), ("snapshots", "Snapshots")):
            owners = {"Owners" if kind == "images" else "OwnerIds": ["self"]}
            found = getattr(ec2, f"describe_{kind}")(**owners)[named]
            assert found
            for one in found:
                assert OWN.items() <= {tag["Key"]: tag["Value"] for tag in one["Tags"]}.items()


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("Owner", "expected KEY=VALUE"),
        ("=x", "expected KEY=VALUE"),
        ("Name=x", "expected a key other than Name"),
        ("aws:x=y", "expected a key other than Name"),
        ("ami-builder:run=y", "expected a key other than Name"),
        ("Owner=a,Owner=b", "expected each key once, but Owner"),
        (",".join(f"k{n}=v" for n in range(31)), "expected at most 30 tags"),
    ],
)
def test_tags_that_ec2_would_refuse_are_refused_here(tags: str, expected: str) -> None:
    found = captured("--set", f"aws.tags={tags}", "config", "show", "--json")
    assert found.status == 2
    assert expected in found.err


def test_a_digest_does_not_depend_on_them(cloud: Cloud, places: Sequence[Place]) -> None:
    cloud.reset()
    first = json.loads(captured("build", "--target", "aws", "--no-verify", "--json").out)
    again = json.loads(captured(*TAGGED, "build", "--target", "aws", "--no-verify", "--json").out)
    assert again["unchanged"]
    assert again["artifact"]["digest"] == first["artifact"]["digest"]
