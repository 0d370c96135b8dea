"""`ami-builder launch-template` and the policies for it: one template per region, kept as asked."""

from __future__ import annotations

import base64
import json
import shlex
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from moto.core.utils import utcnow

from ami_builder.aws import images, references
from ami_builder.aws import tags as tagging
from ami_builder.aws.session import Account
from ami_builder.aws.tags import Purpose
from ami_builder.core.errors import CloudFailed, UsageError
from ami_builder.core.records import Outcome
from tests.cloud.aws import make_ami, make_template, tags
from tests.cloud.flow import captured
from tests.cloud.test_least_privilege import allowed
from tests.fake_ec2.faults import Fault
from tests.fake_ec2.server import REGION

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fake_ec2.server import Cloud

THERE = "eu-west-1"
NAME = "ami-builder-dask-stable"
PARAMETER = "/ami-builder/dask/x86_64/stable"
COPIES = ("--set", f"aws.copy_to={THERE}")
BOTH = (*COPIES, "--set", "aws.tags=Owner=us")
NO_RATE = ("InvalidParameter", "VolumeInitializationRate is not available in this Region.")
WORKER = ("launch-template", "stable", "--scheduler", "10.0.0.7:8786")


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AMI_BUILDER_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("AMI_BUILDER_CONFIG", raising=False)


def current(cloud: Cloud, name: str = "a", region: str = REGION, root: str = "/dev/sda1") -> str:
    """Make a verified AMI of the image `dask` current in `stable`; return its id."""
    ami = make_ami(cloud, f"dask-{name}", **tags(Purpose.IMAGE))
    # As ours are registered; the emulated Debian's root is another.
    image = cloud.backend().amis[ami]
    for each in image.mapping:
        if each["DeviceName"] == image.root_device_name:
            each["DeviceName"] = root
    image.root_device_name = root
    account = Account.open(REGION)
    images.finish(account, ami, tags(Purpose.IMAGE))
    images.record_verdict(account, ami, Outcome.PASSED, "c" * 64)
    if region != REGION:
        copied = cloud.client(region=region).copy_image(
            SourceRegion=REGION, SourceImageId=ami, Name=f"c-{name}"
        )
        ami = str(copied["ImageId"])
    ssm = cloud.client("ssm", region=region)
    ssm.put_parameter(Name=PARAMETER, Value=ami, Type="String", DataType="aws:ec2:image", Overwrite=True)
    return ami


def ran(*arguments: str, status: int = 0) -> Any:
    """Run the command with --json and return its answer, or what it said if it fails."""
    done = captured(*arguments, *(("--json",) if not status else ()))
    assert done.status == status, done.err
    return json.loads(done.out) if not status else done.err


def versions(cloud: Cloud, region: str = REGION, name: str = NAME) -> list[dict[str, Any]]:
    found = cloud.client(region=region).describe_launch_template_versions(LaunchTemplateName=name)
    return sorted(found["LaunchTemplateVersions"], key=lambda one: int(one["VersionNumber"]))


def data(cloud: Cloud, region: str = REGION, name: str = NAME) -> dict[str, Any]:
    return dict(
        next(one for one in versions(cloud, region, name) if one["DefaultVersion"])["LaunchTemplateData"]
    )


def settings(launched: dict[str, Any]) -> dict[str, str]:
    """Return the dask.env that the user data of a template writes."""
    (file,) = yaml.safe_load(base64.b64decode(launched["UserData"]))["write_files"]
    assert file["path"] == "/etc/dask/dask.env"
    return dict(line.split("=", 1) for line in file["content"].splitlines())


def test_a_template_launches_what_is_current_in_its_channel(cloud: Cloud) -> None:
    ami = current(cloud)
    made = captured(*BOTH[2:], *WORKER, "--instance-profile", "worker", "--tls", "secretsmanager:dask/worker",
                    "--replace-unhealthy-after", "10min", "--lifecycle-hook", "retire",
                    "--disk", "100GiB", "--initialization-rate", "200",
                    "--security-group", "sg-0123456789abcdef0",
                    "--security-group", f"{THERE}=sg-0123456789abcdef1", "--key-name", "ours", "--spot",
                    "--instance-type", "r7i.xlarge")  # fmt: skip
    assert made.status == 0, made.err
    (template,) = cloud.client().describe_launch_templates()["LaunchTemplates"]
    assert made.out == f"{REGION}\t{template['LaunchTemplateId']}\t1\n"
    assert ami in made.err
    expected = {
        "Owner": "us", "Name": "dask worker",
        "ami-builder:image": "dask", "ami-builder:channel": "stable", "ami-builder:role": "worker",
    }  # fmt: skip
    assert tagging.as_dict(template["Tags"]) == expected
    found = data(cloud)
    assert found["ImageId"] == f"resolve:ssm:{PARAMETER}"
    assert found["MetadataOptions"] == {
        "HttpEndpoint": "enabled", "HttpTokens": "required", "HttpPutResponseHopLimit": 1,
        "InstanceMetadataTags": "enabled",
    }  # fmt: skip
    (root,) = found["BlockDeviceMappings"]
    (image,) = cloud.client().describe_images(ImageIds=[ami])["Images"]
    assert root == {
        "DeviceName": image["RootDeviceName"],
        "Ebs": {
            "VolumeType": "gp3", "VolumeSize": 100, "VolumeInitializationRate": 200,
            "DeleteOnTermination": True,
        },
    }  # fmt: skip
    tagged = {one["ResourceType"]: tagging.as_dict(one["Tags"]) for one in found["TagSpecifications"]}
    assert tagged == {"instance": expected, "volume": expected}
    assert found["IamInstanceProfile"] == {"Name": "worker"}
    assert found["SecurityGroupIds"] == ["sg-0123456789abcdef0"]
    assert (found["KeyName"], found["InstanceType"]) == ("ours", "r7i.xlarge")
    assert found["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert settings(found) == {
        "DASK_ROLE": "worker",
        "DASK_SCHEDULER_ADDRESS": "10.0.0.7:8786",
        "DASK_TLS": "secretsmanager:dask/worker",
        "DASK_GROUP_HEALTH_SECONDS": "600",
        "DASK_LIFECYCLE_HOOK": "retire",
    }


def test_without_flags_it_has_what_follows_from_the_image(cloud: Cloud) -> None:
    current(cloud)
    ran("--set", "container.network=bridge", *WORKER)
    found = data(cloud)
    assert found["MetadataOptions"]["HttpPutResponseHopLimit"] == 2
    assert found["InstanceType"] == "m6i.large"
    by_flags = {
        "BlockDeviceMappings", "IamInstanceProfile", "InstanceMarketOptions", "KeyName", "SecurityGroupIds",
    }  # fmt: skip
    assert not by_flags & found.keys()
    ran(
        "launch-template",
        "stable",
        "--role",
        "scheduler",
        "--tls",
        "ssm:/dask/scheduler",
        "--instance-profile",
        "s",
    )
    assert settings(data(cloud, name=f"{NAME}-scheduler")) == {
        "DASK_ROLE": "scheduler",
        "DASK_TLS": "ssm:/dask/scheduler",
    }


def test_only_a_change_makes_a_new_version(cloud: Cloud) -> None:
    current(cloud)
    (first,) = ran(*WORKER)["templates"]
    assert (first["version"], first["change"], first["name"]) == (1, "created", NAME)
    (again,) = ran(*WORKER)["templates"]
    assert again == first | {"change": "unchanged"}
    # A promotion changes what is launched, not the template.
    promoted = current(cloud, "b")
    (after,) = ran(*WORKER)["templates"]
    assert (after["version"], after["change"], after["ami"]) == (1, "unchanged", promoted)
    assert [one.action for one in cloud.calls if "LaunchTemplate" in one.action] == [
        "DescribeLaunchTemplates", "CreateLaunchTemplate",
        *("DescribeLaunchTemplates", "DescribeLaunchTemplateVersions") * 2,
    ]  # fmt: skip
    (changed,) = ran(*WORKER, "--disk", "50GiB")["templates"]
    assert (changed["version"], changed["change"]) == (2, "changed")
    assert data(cloud)["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] == 50
    # Somebody else's version, or default, is replaced.
    template = first["id"]
    ec2 = cloud.client()
    ec2.modify_launch_template(LaunchTemplateId=template, DefaultVersion="1")
    (moved,) = ran(*WORKER, "--disk", "50GiB")["templates"]
    assert (moved["version"], moved["change"]) == (3, "changed")
    ec2.create_launch_template_version(
        LaunchTemplateId=template, LaunchTemplateData={"InstanceType": "t3.small"}
    )
    (ours,) = ran(*WORKER, "--disk", "50GiB")["templates"]
    assert (ours["version"], ours["change"]) == (5, "changed")
    (tagged,) = ran("--set", "aws.tags=Owner=them", *WORKER, "--disk", "50GiB")["templates"]
    (described,) = ec2.describe_launch_templates()["LaunchTemplates"]
    assert tagged["version"] == 6
    assert tagging.as_dict(described["Tags"])["Owner"] == "them"


def test_each_region_has_its_own_and_one_that_fails_does_not_end_the_others(cloud: Cloud) -> None:
    there = current(cloud, "copy", THERE)
    done = captured(*COPIES, *WORKER, "--json")
    assert done.status == CloudFailed.exit_code
    answer = json.loads(done.out)
    assert [(one["region"], one["ami"]) for one in answer["templates"]] == [(THERE, there)]
    (failed,) = answer["failed"]
    assert failed["region"] == REGION
    assert "no image is current in channel stable of dask" in failed["error"]
    assert "ami-builder promote dask stable --target aws" in done.err
    current(cloud)
    both = ran(*COPIES, *WORKER)["templates"]
    assert [(one["region"], one["change"]) for one in both] == [(REGION, "created"), (THERE, "unchanged")]
    groups = (
        "--security-group",
        f"{THERE}=sg-0123456789abcdef1",
        "--security-group",
        f"{REGION}=sg-01234567",
    )
    ran(*COPIES, *WORKER, *groups)
    assert data(cloud)["SecurityGroupIds"] == ["sg-01234567"]
    assert data(cloud, THERE)["SecurityGroupIds"] == ["sg-0123456789abcdef1"]
    (only,) = ran(*COPIES, *WORKER, "--region", THERE)["templates"]
    assert only["region"] == THERE


def test_deletion_is_planned_and_refused_while_a_group_uses_it(cloud: Cloud) -> None:
    current(cloud)
    (made,) = ran(*WORKER)["templates"]
    group = {
        "AutoScalingGroupName": "workers", "MinSize": 0, "MaxSize": 1,
        "LaunchTemplate": {"LaunchTemplateId": made["id"], "Version": "$Default"},
        "AvailabilityZones": [f"{REGION}a"],
    }  # fmt: skip
    scaling = cloud.client("autoscaling")
    scaling.create_auto_scaling_group(**group)
    delete = ("launch-template", "stable", "--delete")
    (planned,) = ran(*delete)["plan"]
    assert planned == {"region": REGION, "id": made["id"], "name": NAME, "groups": ["workers"]}
    assert "used by the Auto Scaling group workers" in ran(*delete, "--apply", status=CloudFailed.exit_code)
    assert made["id"] in cloud.left()["launch-template"]
    scaling.delete_auto_scaling_group(AutoScalingGroupName="workers", ForceDelete=True)
    plan = captured(*delete)
    assert "to delete" in plan.out
    assert "--apply" in plan.err
    assert made["id"] in cloud.left()["launch-template"]
    assert ran(*delete, "--apply")["applied"] is True
    assert "launch-template" not in cloud.left()
    assert ran(*delete, "--apply")["plan"] == []
    (again,) = ran(*WORKER)["templates"]
    assert again["id"] != made["id"]


def test_the_template_of_another_is_left_alone(cloud: Cloud) -> None:
    current(cloud)
    theirs = make_template(cloud, NAME, Owner="them")
    assert "ami-builder did not create it" in ran(*WORKER, status=UsageError.exit_code)
    assert "ami-builder did not create it" in ran(
        "launch-template", "stable", "--delete", "--apply", status=6
    )
    assert len(versions(cloud)) == 1
    assert cloud.left()["launch-template"] == [theirs]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("stabel --scheduler h", "did you mean stable?"),
        ("stable", "a worker needs its scheduler"),
        ("stable --scheduler http://h", "expected HOST or HOST:PORT"),
        ("stable --scheduler h:99999", "expected HOST or HOST:PORT"),
        ("stable --role scheduler --scheduler h", "only a worker has a scheduler"),
        ("stable --role local", "expected worker or scheduler"),
        ("stable --scheduler h --tls dask", "expected secretsmanager:NAME or ssm:NAME"),
        ("stable --scheduler h --tls ssm:dask", "--tls needs --instance-profile"),
        ("stable --scheduler h --replace-unhealthy-after 10min", "needs --instance-profile"),
        ("stable --scheduler h --instance-profile p --replace-unhealthy-after 59s", "expected at least 1min"),
        ("stable --scheduler h --replace-unhealthy-after soon", "expected a duration"),
        ("stable --scheduler h --instance-profile p --lifecycle-hook 'a b'", "expected a name of"),
        ("stable --scheduler h --initialization-rate 50", "expected 100 to 300 MiB/s"),
        ("stable --scheduler h --disk big", "expected a size"),
        ("stable --scheduler h --security-group web", "expected sg-…"),
        ("stable --scheduler h --region eu-west-9", "is not in this region"),
        ("stable --scheduler h --apply", "--apply is for --delete only"),
        ("stable --scheduler h --user-data missing", "No such file"),
    ],
)
def test_what_can_not_be_is_refused_before_aws_is_asked(cloud: Cloud, flags: str, said: str) -> None:
    done = captured("launch-template", *shlex.split(flags))
    assert done.status == UsageError.exit_code, done.err
    assert said in done.err
    assert [one.action for one in cloud.calls] == []


def test_more_user_data_is_joined_and_too_much_is_refused(cloud: Cloud, tmp_path: Path) -> None:
    current(cloud)
    own = tmp_path / "more.yaml"
    own.write_text("#cloud-config\nwrite_files:\n  - path: /etc/ours\n    content: x\n")
    ran(*WORKER, "--user-data", str(own))
    text = base64.b64decode(data(cloud)["UserData"]).decode()
    assert "/etc/ours" in text
    assert "DASK_SCHEDULER_ADDRESS=10.0.0.7:8786" in text
    assert "merge_how: list(append)" in text
    own.write_text("#cloud-config\n# " + "x" * 16384)
    assert "but EC2 accepts at most 16384" in ran(
        *WORKER, "--user-data", str(own), status=UsageError.exit_code
    )


def test_what_a_region_or_a_guest_would_refuse_is_said_at_once(cloud: Cloud) -> None:
    current(cloud)
    refused = ran(*WORKER, "--instance-type", "m7g.large", status=UsageError.exit_code)
    assert "m7g.large runs arm64" in refused
    assert "does not offer m99.large" in ran(*WORKER, "--instance-type", "m99.large", status=2)
    spaced = ran("--set", "aws.tags=Cost Center=1", *WORKER, status=UsageError.exit_code)
    assert "'Cost Center' can't be the key of a tag" in spaced
    assert "launch-template" not in cloud.left()


def test_a_rate_that_a_region_does_not_take_is_left_out(cloud: Cloud) -> None:
    current(cloud)
    cloud.options.not_valid["VolumeInitializationRate"] = NO_RATE
    flags = ("--initialization-rate", "300", "--disk", "50GiB")
    done = captured(*WORKER, *flags)
    assert done.status == 0, done.err
    assert "default rate" in done.err
    assert data(cloud)["BlockDeviceMappings"][0]["Ebs"].keys() == {
        "VolumeType", "VolumeSize", "DeleteOnTermination",
    }  # fmt: skip
    (again,) = ran(*WORKER, *flags)["templates"]
    assert (again["version"], again["change"]) == (1, "unchanged")
    # The version that EC2 can't launch is never the default.
    changed = captured(*WORKER, "--initialization-rate", "200", "--disk", "60GiB")
    assert changed.status == 0, changed.err
    assert [one["DefaultVersion"] for one in versions(cloud)] == [False, False, True]
    assert data(cloud)["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] == 60
    assert len(cloud.left()["launch-template"]) == 1


def test_what_ec2_can_not_launch_is_an_error_and_never_the_default(cloud: Cloud) -> None:
    current(cloud)
    there = current(cloud, "copy", THERE)
    cloud.options.not_valid["KeyName"] = ("InvalidKeyPair.NotFound", "The key pair 'ours' does not exist")
    said = ran(*WORKER, "--key-name", "ours", status=CloudFailed.exit_code)
    assert "The key pair 'ours' does not exist" in said
    assert "launch-template" not in cloud.left()
    (made,) = ran(*WORKER)["templates"]
    for _ in range(2):
        ran(*WORKER, "--key-name", "ours", status=CloudFailed.exit_code)
        assert "KeyName" not in data(cloud)
    (back,) = ran(*WORKER)["templates"]
    assert (back["id"], back["version"], back["change"]) == (made["id"], 4, "changed")
    del cloud.options.not_valid["KeyName"]
    both = ran(*COPIES, *WORKER, "--key-name", "ours")["templates"]
    assert [(one["region"], one["version"]) for one in both] == [(REGION, 5), (THERE, 1)]
    assert both[1]["ami"] == there


def test_a_template_names_no_root_device_that_its_next_ami_has_not(cloud: Cloud) -> None:
    ami = current(cloud, root="/dev/xvda")
    ran(*WORKER)
    assert "BlockDeviceMappings" not in data(cloud)
    for flags in (("--disk", "50GiB"), ("--initialization-rate", "200")):
        said = ran(*WORKER, *flags, status=UsageError.exit_code)
        assert f"that of {ami}, which is current in stable, is /dev/xvda" in said
        assert "set aws.root_device to /dev/xvda" in said
    for setting in ("/dev/xvda", ""):
        ran("--set", f"aws.root_device={setting}", *WORKER, "--disk", "50GiB")
        assert data(cloud)["BlockDeviceMappings"][0]["DeviceName"] == "/dev/xvda"
    current(cloud, "b")
    ran(*WORKER, "--disk", "50GiB")
    assert data(cloud)["BlockDeviceMappings"][0]["DeviceName"] == "/dev/sda1"


def test_a_template_is_deleted_whatever_the_configuration_has_by_now(cloud: Cloud) -> None:
    current(cloud)
    current(cloud, "copy", THERE)
    ran(*COPIES, *WORKER)
    later = (
        *("--set", "lifecycle.channels=testing", "--set", "aws.tags=Cost Center=1"),
        *("launch-template", "stable", "--delete", "--apply"),
    )
    (there,) = ran(*later, "--region", THERE)["plan"]
    assert there["region"] == THERE
    assert "launch-template" not in cloud.left(THERE)
    (here,) = ran(*later)["plan"]
    assert here["region"] == REGION
    assert "launch-template" not in cloud.left()


def test_a_lost_answer_makes_no_second_version(cloud: Cloud) -> None:
    current(cloud)
    cloud.faults.add("CreateLaunchTemplate", Fault.LOST_RESPONSE)
    (made,) = ran(*WORKER)["templates"]
    cloud.faults.add("CreateLaunchTemplateVersion", Fault.LOST_RESPONSE)
    (changed,) = ran(*WORKER, "--disk", "50GiB")["templates"]
    assert changed["version"] == 2
    assert len(versions(cloud)) == 2
    assert cloud.left()["launch-template"] == [made["id"]]


def test_neither_gc_nor_prune_takes_it_or_its_ami(cloud: Cloud) -> None:
    ami = current(cloud)
    (made,) = ran(*WORKER)["templates"]
    ec2 = cloud.client()
    launched = ec2.run_instances(
        MinCount=1, MaxCount=1, LaunchTemplate={"LaunchTemplateId": made["id"]}, ImageId=ami,
        TagSpecifications=data(cloud)["TagSpecifications"],
    )["Instances"]  # fmt: skip
    # Older than anything that a live run has.
    backend, old = cloud.backend(), utcnow() - timedelta(days=30)
    backend.launch_templates[made["id"]].create_time = old
    for one in launched:
        backend.get_instance(one["InstanceId"]).launch_time = old
    assert any("launch template" in one.by for one in references.find(Account.open()) if one.id == ami)
    collected = captured("gc", "--apply", "--json")
    assert collected.status == 0, collected.err
    kept = {"launch-template": [made["id"]], "instance": [one["InstanceId"] for one in launched]}
    assert {kind: cloud.left()[kind] for kind in kept} == kept
    ec2.terminate_instances(InstanceIds=kept["instance"])
    pruned = captured("--set", "lifecycle.keep=0", "--set", "lifecycle.keep_days=0", "--set",
                      "lifecycle.grace_days=0", "prune", "--target", "aws", "--apply", "--json")  # fmt: skip
    assert pruned.status == 0, pruned.err
    assert ami in cloud.left()["image"]
    assert cloud.left()["launch-template"] == [made["id"]]


def test_the_printed_policy_is_exactly_what_it_needs(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    current(cloud)
    theirs = make_template(cloud, "theirs", Owner="them")
    owned = ("--set", "aws.tags=Owner=us")
    held = allowed(cloud, monkeypatch, "launch-template", settings=owned)
    ran(*owned, *WORKER)
    ran(*owned, *WORKER, "--disk", "50GiB")
    ran("--set", "aws.tags=Owner=more", *WORKER)
    ran(*owned, "launch-template", "stable", "--delete", "--apply")
    assert held.refused == []
    assert held.unused == set()
    account = Account.open()
    plain: Any = {"InstanceType": "m6i.large"}
    for call in (
        lambda: account.ec2.delete_launch_template(LaunchTemplateId=theirs),
        lambda: account.ec2.create_tags(Resources=[theirs], Tags=[{"Key": tagging.CHANNEL, "Value": "x"}]),
        lambda: account.ec2.create_launch_template(LaunchTemplateName="x", LaunchTemplateData=plain),
        lambda: account.ec2.create_launch_template_version(LaunchTemplateId=theirs, LaunchTemplateData=plain),
    ):
        with pytest.raises(account.ec2.exceptions.ClientError, match="UnauthorizedOperation"):
            call()
    without = allowed(cloud, monkeypatch, "promote")
    said = ran(*WORKER, status=CloudFailed.exit_code)
    assert {action for action, _ in without.refused} == {"ec2:CreateLaunchTemplate"}
    assert "ec2:CreateLaunchTemplate" in said


def test_the_role_of_instances_is_limited_to_what_the_flags_name() -> None:
    printed = captured(
        "iam-policy", "--instance", "--tls", "secretsmanager:dask/worker", "--group", "workers"
    )
    assert printed.status == 0, printed.err
    statements = {one["Sid"]: one for one in json.loads(printed.out)["Statement"]}
    assert statements.keys() == {"ReadCertificates", "TellGroup"}
    assert statements["ReadCertificates"]["Action"] == ["secretsmanager:GetSecretValue"]
    assert statements["ReadCertificates"]["Resource"] == [
        "arn:aws:secretsmanager:*:*:secret:dask/worker-??????"
    ]
    keyed = captured("iam-policy", "--instance", "--tls", "ssm:/dask/worker", "--kms-key", "alias/ours")
    both = {one["Sid"]: one for one in json.loads(keyed.out)["Statement"]}
    assert both["DecryptCertificates"]["Condition"] == {
        "StringLike": {"kms:ViaService": "ssm.*"},
        "ForAnyValue:StringEquals": {"kms:ResourceAliases": "alias/ours"},
    }
    assert both["DecryptCertificates"]["Resource"] == ["arn:aws:kms:*:*:key/*"]
    by_id = captured("iam-policy", "--instance", "--tls", "ssm:/dask/worker", "--kms-key", "1234-ab")
    assert '"arn:aws:kms:*:*:key/1234-ab"' in by_id.out
    assert both["ReadCertificates"]["Resource"] == ["arn:aws:ssm:*:*:parameter/dask/worker"]
    for wrong in (
        ("--instance",),
        ("--group", "x"),
        ("--instance", "--kms-key", "x"),
        ("--instance", "--tls", "x:y"),
        ("--instance", "--tls", "secretsmanager:a*"),
        ("--instance", "--tls", 'ssm:/x y"z'),
        ("--instance", "--tls", "ssm:/x", "--kms-key", "*"),
        ("--instance", "--tls", "ssm:/x", "--kms-key", "key/*"),
        ("--instance", "--group", "*"),
    ):
        assert captured("iam-policy", *wrong).status == UsageError.exit_code
