"""The loopback EC2 itself: what it gives beside moto, each once, by boto3 over HTTP."""

from __future__ import annotations

import json
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError, ParamValidationError

from tests.fake_ec2.api_call import ACCOUNT
from tests.fake_ec2.cloud_state import DEBIAN_PARAMETER
from tests.fake_ec2.fake_image import DEBIAN_ACCOUNT
from tests.fake_ec2.requests import RUN, image, instance, launch, refused, tagged

if TYPE_CHECKING:
    from tests.fake_ec2.server import Cloud


@pytest.fixture
def ec2(cloud: Cloud) -> Any:
    return cloud.client()


def test_a_region_begins_with_debian(cloud: Cloud, ec2: Any) -> None:
    images = ec2.describe_images(
        Owners=[DEBIAN_ACCOUNT], Filters=[{"Name": "name", "Values": ["debian-13-amd64-2*"]}]
    )["Images"]
    newest = max(images, key=lambda each: each["CreationDate"])
    parameter = cloud.client("ssm").get_parameter(Name=DEBIAN_PARAMETER)["Parameter"]
    assert newest["ImageId"] == parameter["Value"] == cloud.base_ami()
    assert (newest["RootDeviceType"], newest["RootDeviceName"]) == ("ebs", "/dev/xvda")
    assert newest["BlockDeviceMappings"][0]["Ebs"]["VolumeType"] == "gp3"
    assert cloud.left() == {}


@pytest.mark.parametrize(
    ("action", "key", "least"),
    [
        ("describe_images", "Images", 1),
        ("describe_instances", "Reservations", 5),
        ("describe_snapshots", "Snapshots", 5),
        ("describe_volumes", "Volumes", 5),
        ("describe_security_groups", "SecurityGroups", 5),
    ],
)
def test_listings_come_in_pages(cloud: Cloud, ec2: Any, action: str, key: str, least: int) -> None:
    for number in range(12):
        instance_id = launch(cloud, ec2)
        ec2.create_image(InstanceId=instance_id, Name=f"image-{number}")
        ec2.create_security_group(GroupName=f"group-{number}", Description="test")
    call = getattr(ec2, action)
    whole = [json.dumps(each, default=str) for each in call()[key]]
    pages = list(ec2.get_paginator(action).paginate(PaginationConfig={"PageSize": 5}))
    assert len(pages) > 2
    assert [json.dumps(each, default=str) for page in pages for each in page[key]] == whole
    assert all(len(page[key]) <= 5 for page in pages)
    token = pages[0]["NextToken"]
    assert call(MaxResults=5, NextToken=token)[key] == pages[1][key], (
        "asked for once more, a page is the same"
    )
    with refused("InvalidPaginationToken"):
        call(MaxResults=5, NextToken=token[:-1])
    with pytest.raises((ClientError, ParamValidationError), match=r"InvalidParameterValue|valid min value"):
        call(MaxResults=least - 1)


def test_a_client_token_launches_once(cloud: Cloud, ec2: Any) -> None:
    first = launch(cloud, ec2, ClientToken="t1")
    assert launch(cloud, ec2, ClientToken="t1") == first
    assert launch(cloud, ec2, ClientToken="t2") != first
    assert launch(cloud, ec2) != launch(cloud, ec2)
    with refused("IdempotentParameterMismatch"):
        launch(cloud, ec2, ClientToken="t1", InstanceType="m6i.large")


def test_a_client_token_copies_once(cloud: Cloud, ec2: Any) -> None:
    made = ec2.create_image(
        InstanceId=launch(cloud, ec2), Name="one", TagSpecifications=tagged("image", tags={"own": "1"})
    )["ImageId"]
    there = cloud.client(region="eu-west-1")
    settings = {"SourceImageId": made, "SourceRegion": "us-east-1", "Name": "one", "ClientToken": "c"}
    extra = {"Encrypted": True, "CopyImageTags": True, "TagSpecifications": tagged("image", "snapshot")}
    copied = there.copy_image(**settings, **extra)["ImageId"]
    assert there.copy_image(**settings, **extra)["ImageId"] == copied
    with refused("IdempotentParameterMismatch"):
        there.copy_image(**settings)
    with refused("InvalidAMIName.Duplicate"):
        there.copy_image(**settings | {"ClientToken": "d"})
    found = image(there, copied)
    assert {t["Key"]: t["Value"] for t in found["Tags"]} == {"own": "1"} | RUN
    assert found["BlockDeviceMappings"][0]["Ebs"]["Encrypted"] is True
    snapshot = there.describe_snapshots(OwnerIds=["self"])["Snapshots"][0]
    assert (snapshot["Encrypted"], snapshot["Tags"]) == (True, [{"Key": "ami-builder:run", "Value": "r1"}])


def test_an_image_is_as_its_instance(cloud: Cloud, ec2: Any) -> None:
    root = {"VolumeSize": 12, "VolumeType": "gp3", "Encrypted": True, "DeleteOnTermination": True}
    source = launch(cloud, ec2, BlockDeviceMappings=[{"DeviceName": "/dev/xvda", "Ebs": root}])
    made = ec2.create_image(
        InstanceId=source, Name="image", Description="words", TagSpecifications=tagged("image", "snapshot")
    )["ImageId"]
    found = image(ec2, made)
    ebs = found["BlockDeviceMappings"][0]["Ebs"]
    assert (found["RootDeviceType"], found["RootDeviceName"]) == ("ebs", "/dev/xvda")
    assert (ebs["VolumeSize"], ebs["VolumeType"], ebs["Encrypted"]) == (12, "gp3", True)
    snapshot = ec2.describe_snapshots(SnapshotIds=[ebs["SnapshotId"]])["Snapshots"][0]
    assert (snapshot["VolumeSize"], snapshot["Tags"]) == (12, [{"Key": "ami-builder:run", "Value": "r1"}])
    assert snapshot["Description"] == f"Created by CreateImage({source}) for {made}"
    assert found["Public"] is False
    with refused("InvalidAMIName.Duplicate"):
        ec2.create_image(InstanceId=source, Name="image")
    with refused("InvalidBlockDeviceMapping"):
        launch(
            cloud,
            ec2,
            ImageId=made,
            BlockDeviceMappings=[{"DeviceName": "/dev/xvda", "Ebs": {"VolumeSize": 8}}],
        )


def test_an_image_is_pending_first(cloud: Cloud, ec2: Any) -> None:
    cloud.options.image_describes = 2
    made = ec2.create_image(InstanceId=launch(cloud, ec2), Name="image")["ImageId"]
    with refused("InvalidAMIID.Unavailable"):
        launch(cloud, ec2, ImageId=made)
    assert [image(ec2, made)["State"] for _ in range(4)] == ["pending", "pending", "available", "available"]
    cloud.options.image_failure = "the disk broke"
    failed = ec2.create_image(InstanceId=launch(cloud, ec2), Name="failed")["ImageId"]
    while image(ec2, failed)["State"] == "pending":
        pass
    assert image(ec2, failed)["State"] == "failed"
    assert image(ec2, failed)["StateReason"]["Message"] == "the disk broke"
    cloud.options.image_describes, cloud.options.image_failure = 0, ""
    cloud.options.image_seconds = 0.2
    launched, began = launch(cloud, ec2), time.monotonic()
    late = ec2.create_image(InstanceId=launched, Name="late")["ImageId"]
    state = image(ec2, late)["State"]
    assert state == "pending" or time.monotonic() - began >= 0.2
    time.sleep(0.25)
    assert image(ec2, late)["State"] == "available"


def test_unknown_images(cloud: Cloud, ec2: Any) -> None:
    with refused("InvalidAMIID.NotFound"):
        launch(cloud, ec2, ImageId="ami-0123456789abcdef0")
    with refused("InvalidAMIID.NotFound"):
        image(ec2, "ami-0123456789abcdef0")
    with refused("InvalidAMIID.NotFound"):
        ec2.describe_image_attribute(ImageId="ami-0123456789abcdef0", Attribute="launchPermission")
    with refused("InvalidSnapshot.NotFound"):
        ec2.describe_snapshot_attribute(
            SnapshotId="snap-0123456789abcdef0", Attribute="createVolumePermission"
        )
    with refused("InvalidAMIID.Malformed"):
        launch(cloud, ec2, ImageId="image")


def test_deregistration_takes_snapshots_along(cloud: Cloud, ec2: Any) -> None:
    source = launch(cloud, ec2)
    kept = ec2.create_image(InstanceId=source, Name="kept")["ImageId"]
    ec2.deregister_image(ImageId=kept)
    assert len(cloud.left()["snapshot"]) == 1
    made = ec2.create_image(InstanceId=source, Name="image")["ImageId"]
    ec2.enable_image_deregistration_protection(ImageId=made)
    with refused("OperationNotPermitted"):
        ec2.deregister_image(ImageId=made, DeleteAssociatedSnapshots=True)
    ec2.disable_image_deregistration_protection(ImageId=made)
    results = ec2.deregister_image(ImageId=made, DeleteAssociatedSnapshots=True)["DeleteSnapshotResults"]
    assert [each["ReturnCode"] for each in results] == ["success"]
    assert len(cloud.left()["snapshot"]) == 1
    with refused("InvalidAMIID.NotFound"):
        image(ec2, made)
    with refused("AuthFailure"):
        ec2.deregister_image(ImageId=cloud.base_ami())


def test_deprecation_and_imdsv2(cloud: Cloud, ec2: Any) -> None:
    made = ec2.create_image(InstanceId=launch(cloud, ec2), Name="image")["ImageId"]
    ec2.enable_image_deprecation(ImageId=made, DeprecateAt=datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC))
    assert image(ec2, made)["DeprecationTime"] == "2030-01-02T03:04:00.000Z"
    ec2.disable_image_deprecation(ImageId=made)
    assert "DeprecationTime" not in image(ec2, made)
    assert "ImdsSupport" not in image(ec2, made)
    ec2.modify_image_attribute(ImageId=made, ImdsSupport={"Value": "v2.0"})
    assert image(ec2, made)["ImdsSupport"] == "v2.0"
    launched = launch(cloud, ec2, ImageId=made)
    assert instance(ec2, launched)["MetadataOptions"]["HttpTokens"] == "required"
    plain = launch(cloud, ec2)
    assert instance(ec2, plain)["MetadataOptions"]["HttpTokens"] == "optional"
    ec2.modify_instance_metadata_options(InstanceId=plain, HttpTokens="required")
    assert instance(ec2, plain)["MetadataOptions"]["HttpTokens"] == "required"
    cloud.backend().amis[cloud.base_ami()].deprecation_time = (
        datetime.now(UTC) - timedelta(days=1)
    ).isoformat()
    named = {"Filters": [{"Name": "image-id", "Values": [cloud.base_ami()]}]}
    assert ec2.describe_images(**named)["Images"] == []
    assert len(ec2.describe_images(**named, IncludeDeprecated=True)["Images"]) == 1


def test_public_only_when_not_encrypted(cloud: Cloud, ec2: Any) -> None:
    made = ec2.create_image(InstanceId=launch(cloud, ec2), Name="image")["ImageId"]
    everybody = {"Add": [{"Group": "all"}]}
    ec2.modify_image_attribute(ImageId=made, LaunchPermission=everybody)
    assert image(ec2, made)["Public"] is True
    root = [{"DeviceName": "/dev/xvda", "Ebs": {"Encrypted": True, "VolumeSize": 8}}]
    secret = launch(cloud, ec2, BlockDeviceMappings=root)
    hidden = ec2.create_image(InstanceId=secret, Name="secret")["ImageId"]
    with refused("InvalidParameter"):
        ec2.modify_image_attribute(ImageId=hidden, LaunchPermission=everybody)


def test_tries_do_nothing(cloud: Cloud, ec2: Any) -> None:
    launched = launch(cloud, ec2)
    before = cloud.left()
    with refused("DryRunOperation", 412):
        launch(cloud, ec2, DryRun=True)
    for call, settings in (
        (ec2.terminate_instances, {"InstanceIds": [launched]}),
        (ec2.create_image, {"InstanceId": launched, "Name": "image"}),
        (ec2.create_security_group, {"GroupName": "group", "Description": "test"}),
        (ec2.create_tags, {"Resources": [launched], "Tags": [{"Key": "a", "Value": "b"}]}),
        (ec2.describe_images, {}),
        (ec2.deregister_image, {"ImageId": cloud.base_ami()}),
    ):
        with refused("DryRunOperation", 412):
            call(**settings, DryRun=True)
    with refused("InvalidInstanceID.NotFound"):
        ec2.terminate_instances(InstanceIds=["i-0123456789abcdef0"], DryRun=True)
    assert cloud.left() == before


def test_what_was_just_made_is_not_found_at_first(cloud: Cloud, ec2: Any) -> None:
    known = launch(cloud, ec2)
    cloud.options.hidden_describes = 2
    launched = launch(cloud, ec2)
    made = ec2.create_image(InstanceId=known, Name="image")["ImageId"]
    group = ec2.create_security_group(GroupName="group", Description="test")["GroupId"]
    for _ in range(2):
        with refused("InvalidInstanceID.NotFound"):
            instance(ec2, launched)
        with refused("InvalidAMIID.NotFound"):
            image(ec2, made)
        with refused("InvalidGroup.NotFound"):
            ec2.describe_security_groups(GroupIds=[group])
    assert instance(ec2, launched)["InstanceId"] == launched
    assert image(ec2, made)["ImageId"] == made
    assert ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"]
    late = launch(cloud, ec2)
    with refused("InvalidInstanceID.NotFound"):
        ec2.terminate_instances(InstanceIds=[late])
    listed = ec2.describe_instances()["Reservations"]
    assert late not in [each["Instances"][0]["InstanceId"] for each in listed]


def test_capacity_and_memory(cloud: Cloud, ec2: Any) -> None:
    subnet = ec2.describe_subnets()["Subnets"][0]
    cloud.options.no_capacity = {("t3.small", "*"), ("m5.large", subnet["SubnetId"])}
    with refused("InsufficientInstanceCapacity", 500):
        launch(cloud, ec2, ClientToken="t")
    with refused("InsufficientInstanceCapacity", 500):
        launch(cloud, ec2, InstanceType="m5.large", SubnetId=subnet["SubnetId"])
    launch(cloud, ec2, InstanceType="m5.large")
    cloud.options.no_capacity.clear()
    launch(cloud, ec2, ClientToken="t")
    with refused("InvalidParameterValue"):
        launch(cloud, ec2, InstanceType="t9.huge")
    with refused("InvalidParameterValue"):
        launch(cloud, ec2, InstanceType="m7g.large")  # of another architecture than the AMI

    def memory(kind: str) -> int:
        found = ec2.describe_instance_types(InstanceTypes=[kind])["InstanceTypes"][0]
        return int(found["MemoryInfo"]["SizeInMiB"])

    assert (memory("t3.small"), memory("m6i.large")) == (2048, 8192)
    cloud.options.memory = {"m6i.large": 3072}
    assert memory("m6i.large") == 3072
    assert ec2.get_console_output(InstanceId=launch(cloud, ec2), Latest=True)["Output"] == ""


def test_a_price(cloud: Cloud) -> None:
    wanted = [{"Type": "TERM_MATCH", "Field": "instanceType", "Value": "m6i.large"}]
    (told,) = cloud.client("pricing").get_products(ServiceCode="AmazonEC2", Filters=wanted)["PriceList"]
    (term,) = json.loads(told)["terms"]["OnDemand"].values()
    (dimension,) = term["priceDimensions"].values()
    assert float(dimension["pricePerUnit"]["USD"]) == 0.096


def test_addresses_and_groups(cloud: Cloud, ec2: Any) -> None:
    group = ec2.create_security_group(GroupName="group", Description="test")["GroupId"]
    launched = launch(cloud, ec2, SecurityGroupIds=[group], TagSpecifications=tagged("instance", "volume"))
    found = instance(ec2, launched)
    assert found["PublicIpAddress"].startswith("127.77.")
    assert found["PublicIpAddress"] == found["PrivateIpAddress"]
    volume = found["BlockDeviceMappings"][0]["Ebs"]["VolumeId"]
    assert ec2.describe_volumes(VolumeIds=[volume])["Volumes"][0]["Tags"] == found["Tags"]
    with refused("DependencyViolation"):
        ec2.delete_security_group(GroupId=group)
    ec2.stop_instances(InstanceIds=[launched])
    assert instance(ec2, launched)["State"]["Name"] == "stopped"
    ec2.start_instances(InstanceIds=[launched])
    assert instance(ec2, launched)["PublicIpAddress"] == found["PublicIpAddress"]
    ec2.terminate_instances(InstanceIds=[launched])
    assert "PublicIpAddress" not in instance(ec2, launched)
    ec2.delete_security_group(GroupId=group)
    assert cloud.left() == {}


def test_many_at_once(cloud: Cloud) -> None:
    def work(number: int) -> None:
        client = cloud.client()
        made.append(launch(cloud, client, ClientToken=f"t{number % 4}"))

    made: list[str] = []
    threads = [threading.Thread(target=work, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 12
    assert len(set(made)) == len(cloud.left()["instance"]) == 4


def test_ten_thousand_images_take_a_search_ten_times_as_long_as_a_thousand(cloud: Cloud, ec2: Any) -> None:
    """Not a hundred times, as moto's own would."""
    from moto.ec2.utils import random_ami_id

    from tests.fake_ec2.fake_image import FakeImage

    backend = cloud.backend()
    template = backend.amis[cloud.base_ami()]

    def seconds(images: range) -> float:
        """Add images, and return what a search takes of the processor, of which a busy host gives less."""
        for number in images:
            copy: Any = FakeImage.__new__(FakeImage)
            copy.__dict__ |= vars(template) | {
                "id": random_ami_id(),
                "name": f"image-{number}",
                "owner_id": ACCOUNT,
            }
            backend.amis[copy.id] = copy
            copy.add_tags({"Name": f"image-{number}", "ami-builder:run": f"r{number % 20}"})
        start = time.process_time()
        filters = [{"Name": "tag:ami-builder:run", "Values": ["r1"]}]
        found = ec2.describe_images(Owners=["self"], Filters=filters)["Images"]
        assert len(found) == images.stop // 20
        return time.process_time() - start

    few = seconds(range(1_000))
    assert seconds(range(1_000, 10_000)) < 30 * few


def test_an_unknown_action_is_loud(cloud: Cloud, ec2: Any) -> None:
    with refused("NotImitated", 501):
        ec2.describe_ipam_pools()


def test_limits_of_filters_tags_and_names_are_those_that_are_documented(cloud: Cloud) -> None:
    ec2 = cloud.client()
    values = [f"ami-{number:017x}" for number in range(201)]
    with pytest.raises(ClientError, match="FilterLimitExceeded"):
        ec2.describe_images(Filters=[{"Name": "image-id", "Values": values}])
    assert ec2.describe_images(Filters=[{"Name": "image-id", "Values": values[:200]}])["Images"] == []
    with pytest.raises(ClientError, match="InvalidParameterValue"):
        ec2.create_tags(Resources=[cloud.base_ami()], Tags=[{"Key": "aws:x", "Value": "y"}])
    with pytest.raises(ClientError, match="ValidationError"):
        cloud.client("iam").get_instance_profile(InstanceProfileName="arn:aws:iam::1:instance-profile/x")


def test_a_disabled_image_is_described_only_when_asked_for(cloud: Cloud) -> None:
    ec2 = cloud.client()
    ami = ec2.create_image(InstanceId=launch(cloud, ec2), Name="one")["ImageId"]
    ec2.disable_image(ImageId=ami)
    assert ec2.describe_images(Owners=["self"])["Images"] == []
    (found,) = ec2.describe_images(Owners=["self"], IncludeDisabled=True)["Images"]
    assert (found["ImageId"], found["State"]) == (ami, "disabled")
    ec2.enable_image(ImageId=ami)
    assert [one["ImageId"] for one in ec2.describe_images(Owners=["self"])["Images"]] == [ami]


def test_a_snapshot_is_registered_under_another_root_device(cloud: Cloud, ec2: Any) -> None:
    source = launch(cloud, ec2)
    made = image(ec2, ec2.create_image(InstanceId=source, Name="image")["ImageId"])
    snapshot = made["BlockDeviceMappings"][0]["Ebs"]["SnapshotId"]
    plain: dict[str, Any] = {
        "Name": "again",
        "RootDeviceName": "/dev/sda1",
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": {"SnapshotId": snapshot}}],
    }
    with refused("InvalidBlockDeviceMapping"):
        ec2.register_image(**{**plain, "RootDeviceName": "/dev/xvda"})
    with refused("InvalidParameterValue"):
        ec2.register_image(**plain, TagSpecifications=tagged("snapshot"))
    with refused("InvalidParameter"):
        disk = {"SnapshotId": snapshot, "Encrypted": True}
        ec2.register_image(**{**plain, "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}]})
    bare = image(ec2, ec2.register_image(**plain, TagSpecifications=tagged("image"))["ImageId"])
    assert (bare["Architecture"], bare["VirtualizationType"]) == ("i386", "paravirtual")
    assert {"BootMode", "ImdsSupport", "SriovNetSupport", "TpmSupport"}.isdisjoint(bare)
    assert bare["EnaSupport"] is False
    assert bare["RootDeviceName"] == "/dev/sda1"
    assert bare["BlockDeviceMappings"][0]["Ebs"]["SnapshotId"] == snapshot
    with refused("InvalidAMIName.Duplicate"):
        ec2.register_image(**plain)
    # A snapshot stays as long as any image has it.
    ec2.deregister_image(ImageId=made["ImageId"], DeleteAssociatedSnapshots=True)
    with refused("InvalidSnapshot.InUse"):
        ec2.delete_snapshot(SnapshotId=snapshot)
    ec2.deregister_image(ImageId=bare["ImageId"])
    ec2.delete_snapshot(SnapshotId=snapshot)
    with refused("InvalidSnapshot.NotFound"):
        ec2.register_image(**plain)
