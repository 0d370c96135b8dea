"""EC2 actions on instances, and on what belongs to them, where moto does less or something else."""

from __future__ import annotations

import base64
import re
from typing import TYPE_CHECKING, Any, cast

from moto.core.responses import ActionResult, EmptyResult
from moto.core.utils import utcnow
from moto.ec2.models.instance_types import INSTANCE_TYPES
from moto.ec2.utils import random_fleet_id, random_spot_request_id

from ami_builder.qemu.imds import MAX_USER_DATA
from tests.fake_ec2.api_call import Refused
from tests.fake_ec2.cloud_state import set_state
from tests.fake_ec2.ec2_action import EC2Action
from tests.fake_ec2.fake_image import FakeImage
from tests.fake_ec2.image_actions import root_of
from tests.fake_ec2.other_services import resolved

if TYPE_CHECKING:
    from collections.abc import Callable

    from moto.ec2.models.instances import Instance

_KEY_IN_METADATA = re.compile(r"[0-9a-zA-Z\-_+=,.@:]{1,255}")


class InstanceActions(EC2Action):
    """The actions on instances, and the listings around them."""

    def run_instances(self) -> ActionResult:
        """RunInstances: once per client token, where there is capacity, from an image that there is."""
        params = self.original_params()
        token = params.pop("ClientToken", "")

        def launched() -> list[str]:
            if self._get_param("InstanceMarketOptions.MarketType") == "spot":
                self.have_spot_role()
            template_tags = self._take_from_template()
            self.params["ImageId"] = resolved(self.region, self._get_param("ImageId"))
            image = self._launchable(self._get_param("ImageId"))
            self._have_short_user_data()
            if (refusal := self.state.options.launch_refusal)[0]:
                raise Refused(*refusal)
            self._have_capacity()
            self._of_one_architecture(image)
            self._fill_in(image)
            self._allowed_metadata()
            reservation: Any = super(InstanceActions, self).run_instances().result
            for instance in reservation.instances:
                volumes = [block.volume_id for block in instance.block_device_mapping.values()]
                for nic in instance.nics.values():
                    nic.add_tags(self.tags().get("network-interface", {}))
                    address = self.state.address(instance, nic.subnet)
                    nic.private_ip_address = address
                    nic.private_ip_addresses = [{"Primary": True, "PrivateIpAddress": address}]
                    if nic.public_ip is not None:
                        nic.public_ip, nic.public_ip_auto_assign = address, False
                self.state.made(instance.id, *volumes)
                instance.add_tags(template_tags)
                if self.state.machines is not None:
                    self.state.machines.launch(self.ec2_backend, instance, image)
                self.state.describe(instance)
            return [reservation.id]

        scope = (self.current_account, self.region, "RunInstances", token)
        reservation_id = self.state.once(scope, params, launched)[0]
        return ActionResult(self.ec2_backend.reservations[reservation_id])

    def create_fleet(self) -> ActionResult:
        """CreateFleet of type `instant`, as Packer makes spot instances: the first place with capacity."""
        if self._get_param("Type") != "instant":
            raise Refused("InvalidParameterValue", "only fleets of type 'instant' are made here")
        asked, errors = self.original_params(), []
        lifecycle = self._get_param("TargetCapacitySpecification.DefaultTargetCapacityType", "on-demand")
        for config in asked["LaunchTemplateConfigs"]:
            template = self.ec2_backend._get_template_from_args(config["LaunchTemplateSpecification"])
            for place in config.get("Overrides") or [{}]:
                about = {"LaunchTemplateAndOverrides": {"Overrides": place}, "Lifecycle": lifecycle}
                try:
                    if self.call.fleet_error is not None:
                        raise self.call.fleet_error
                    if lifecycle == "spot":
                        self.have_spot_role()
                    made = self._one_of_fleet(template.data, place, lifecycle, asked)
                except Refused as refused:
                    code, message = refused.code, refused.message
                    # behaviour: spot-shortage
                    if lifecycle == "spot" and code == "InsufficientInstanceCapacity":
                        code, message = self.state.options.spot_shortage
                    errors.append(about | {"ErrorCode": code, "ErrorMessage": message})
                    continue
                # As EC2 does with whatever comes of a template; the fleet's own tags are none of theirs.
                made.add_tags({"aws:ec2launchtemplate:id": template.template.id})
                made.spot_instance_request_id = random_spot_request_id()  # type: ignore[attr-defined]
                answer = about | {"InstanceIds": [made.id], "InstanceType": made.instance_type}
                return ActionResult({"FleetId": random_fleet_id(), "Errors": errors, "Instances": [answer]})
        return ActionResult({"FleetId": random_fleet_id(), "Errors": errors, "Instances": []})

    def _one_of_fleet(
        self, template: dict[str, Any], place: dict[str, Any], lifecycle: str, asked: dict[str, Any]
    ) -> Instance:
        specs = [*template.get("TagSpecifications", []), *asked.get("TagSpecifications", [])]
        settings = {
            **{key: value for key, value in template.items() if value},
            **{key: place[key] for key in ("InstanceType", "SubnetId") if place.get(key)},
            "TagSpecifications": [spec for spec in specs if spec["ResourceType"] in ("instance", "volume")],
            "InstanceMarketOptions": {"MarketType": "spot"} if lifecycle == "spot" else {},
            "MinCount": 1,
            "MaxCount": 1,
        }
        if "UserData" in settings:
            settings["UserData"] = str(settings["UserData"])
        if place.get("AvailabilityZone"):
            settings["Placement"] = {"AvailabilityZone": place["AvailabilityZone"]}
        self.params.clear()
        self.params |= settings
        reservation: Any = self.run_instances().result
        return cast("Instance", reservation.instances[0])

    def describe_instances(self) -> ActionResult:
        """DescribeInstances."""
        size, token = self.params.pop("MaxResults", None), self.params.pop("NextToken", None)
        self.params["MaxResults"] = 1 << 30
        result: Any = super().describe_instances().result
        del self.params["MaxResults"]
        self.params |= {k: v for k, v in (("MaxResults", size), ("NextToken", token)) if v is not None}
        return self.seen("InstanceIds", "Reservations", "InvalidInstanceID.NotFound", result)

    def delete_launch_template(self) -> ActionResult:
        """DeleteLaunchTemplate, by id too."""
        template = self._get_param("LaunchTemplateId")
        if template and template not in self.ec2_backend.launch_templates:
            raise Refused(
                "InvalidLaunchTemplateId.NotFound", f"The launch template '{template}' does not exist"
            )
        return super().delete_launch_template()

    def describe_launch_templates(self) -> ActionResult:
        """DescribeLaunchTemplates, in pages."""
        return self._cut(super().describe_launch_templates, "LaunchTemplates", "LaunchTemplateId")

    def describe_launch_template_versions(self) -> ActionResult:
        """DescribeLaunchTemplateVersions, in pages."""
        return self._cut(super().describe_launch_template_versions, "LaunchTemplateVersions", "VersionNumber")

    def _cut(self, whole: Callable[[], ActionResult], key: str, name: str) -> ActionResult:
        """Return one page of what moto cuts off without a token."""
        size, token = self.params.pop("MaxResults", None), self.params.pop("NextToken", None)
        self.params["MaxResults"] = 1 << 30
        result: Any = whole().result
        del self.params["MaxResults"]
        listed = {f"{each['LaunchTemplateId']} {each[name]}": each for each in result[key]}
        size = int(size) if size is not None else None
        names, following = self.state.page(self._get_action(), list(listed), size, token)
        result[key] = [listed[each] for each in names if each in listed]
        result["NextToken"] = following or None
        return ActionResult(result)

    def describe_snapshots(self) -> ActionResult:
        """DescribeSnapshots, of given owners too."""
        result: Any = super().describe_snapshots().result
        owners = {self.current_account if o == "self" else o for o in self._get_param("OwnerIds", [])}
        if owners:
            result["Snapshots"] = [s for s in result["Snapshots"] if s.owner_id in owners]
        return self.seen("SnapshotIds", "Snapshots", "InvalidSnapshot.NotFound", result)

    def modify_snapshot_attribute(self) -> ActionResult:
        """ModifySnapshotAttribute, unless the snapshot is under the default key."""
        snapshot = self.ec2_backend.get_snapshot(self._get_param("SnapshotId"))
        if snapshot.encrypted and snapshot.kms_key_id is None:
            raise Refused("InvalidParameter", "Encrypted snapshots with EBS default key cannot be shared")
        return super().modify_snapshot_attribute()

    def describe_volumes(self) -> ActionResult:
        """DescribeVolumes."""
        result: Any = super().describe_volumes().result
        return self.seen("VolumeIds", "Volumes", "InvalidVolume.NotFound", result)

    def describe_security_groups(self) -> ActionResult:
        """DescribeSecurityGroups."""
        result: Any = super().describe_security_groups().result
        return self.seen("GroupIds", "SecurityGroups", "InvalidGroup.NotFound", result)

    def create_security_group(self) -> ActionResult:
        """CreateSecurityGroup."""
        made = super().create_security_group()
        self.state.made(made.result["GroupId"])  # type: ignore[index]
        return made

    def delete_security_group(self) -> ActionResult:
        """DeleteSecurityGroup, unless an instance is in it."""
        wanted = self._get_param("GroupId") or self._get_param("GroupName")
        for instance in self.ec2_backend.all_instances():
            groups = [
                *instance.security_groups,
                *(g for nic in instance.nics.values() for g in nic.group_set),
            ]
            if instance.state != "terminated" and any(wanted in (group.id, group.name) for group in groups):
                raise Refused("DependencyViolation", f"resource {wanted} has a dependent object")
        return super().delete_security_group()

    def terminate_instances(self) -> ActionResult:
        """TerminateInstances; again too, as botocore's model has it: "each call succeeds"."""
        instances = self._instances()
        ended = [each for each in instances if each.state == "terminated"]
        self.params["InstanceIds"] = [each.id for each in instances if each not in ended]
        result: Any = super().terminate_instances() if self.params["InstanceIds"] else None
        for instance in instances:
            for nic in instance.nics.values():
                nic.public_ip = None
            if self.state.machines is not None and instance not in ended:
                set_state(instance, "shutting-down", 32)
                self.state.machines.terminate(instance)
        state = {"Code": 48, "Name": "terminated"}
        again = [{"InstanceId": one.id, "CurrentState": state, "PreviousState": state} for one in ended]
        done = result.result["TerminatingInstances"] if result is not None else []
        return ActionResult({"TerminatingInstances": [*done, *again]})

    def stop_instances(self) -> ActionResult:
        """StopInstances, gently."""
        instances = self._instances("pending", "running", "stopping", "stopped")
        was = {each.id: each.state for each in instances}
        result = super().stop_instances()
        for instance in instances:
            if self.state.machines is not None and was[instance.id] in ("pending", "running"):
                set_state(instance, "stopping", 64)
                self.state.machines.stop(instance)
        return result

    def start_instances(self) -> ActionResult:
        """StartInstances."""
        instances = self._instances("pending", "running", "stopped")
        was = {each.id: each.state for each in instances}
        result = super().start_instances()
        for instance in instances:
            if self.state.machines is not None and was[instance.id] == "stopped":
                self.state.machines.start(instance)
        return result

    def reboot_instances(self) -> ActionResult:
        """RebootInstances."""
        for instance in self._instances("running"):
            if self.state.machines is not None:
                self.state.machines.reboot(instance)
        return EmptyResult()

    def get_console_output(self) -> ActionResult:
        """GetConsoleOutput: what the guest has written so far, its last 64 KiB."""
        instance = self.instance(self._get_param("InstanceId"))
        output = b"" if self.state.machines is None else self.state.machines.console(instance.id)
        answer = base64.b64encode(output[-65536:]).decode()
        return ActionResult({"InstanceId": instance.id, "Timestamp": utcnow(), "Output": answer})

    def get_instance_metadata_defaults(self) -> ActionResult:
        """GetInstanceMetadataDefaults."""
        options = self.state.options
        level = {"HttpTokensEnforced": "enabled" if options.imdsv2_enforced else "disabled"}
        if options.imds_default != "no-preference":
            level["HttpTokens"] = options.imds_default
        # behaviour: metadata-defaults
        if options.imds_endpoint:
            level["HttpEndpoint"] = options.imds_endpoint
        return ActionResult({"AccountLevel": level})

    def modify_instance_metadata_options(self) -> ActionResult:
        """ModifyInstanceMetadataOptions, of instances that run or are stopped."""
        # behaviour: metadata-options-of-running-instances
        if self.state.options.pending_changes > 0:
            self.state.options.pending_changes -= 1
            raise Refused("IncorrectInstanceState", "The instance is not in a valid state: pending")
        return super().modify_instance_metadata_options()

    def describe_instance_types(self) -> ActionResult:
        """DescribeInstanceTypes, with the memory that the machines really have."""
        result: Any = super().describe_instance_types().result
        result["InstanceTypes"] = [
            dict(each) | {"MemoryInfo": {"SizeInMiB": self._memory(each["InstanceType"])}}
            for each in result["InstanceTypes"]
        ]
        return ActionResult(result)

    def _memory(self, kind: str) -> int:
        mib = int(INSTANCE_TYPES[kind]["MemoryInfo"]["SizeInMiB"])
        if self.state.machines is not None:
            mib = self.state.machines.memory_of(kind, mib)
        return self.state.options.memory.get(kind, mib)

    def _take_from_template(self) -> dict[str, str]:
        """Complete the call's parameters by those of its launch template, and return EC2's tags for that."""
        asked = self.original_params()
        if not (named := asked.pop("LaunchTemplate", None)):
            return {}
        version = self.ec2_backend._get_template_from_args(named)
        settings = {key: value for key, value in version.data.items() if value}
        if "UserData" in settings:
            settings["UserData"] = str(settings["UserData"])
        tags = [*settings.get("TagSpecifications", []), *asked.get("TagSpecifications", [])]
        self.params.clear()
        self.params |= settings | asked | {"TagSpecifications": tags}
        return {
            "aws:ec2launchtemplate:id": version.template.id,
            "aws:ec2launchtemplate:version": str(version.number),
        }

    def _have_short_user_data(self) -> None:
        # behaviour: user-data-limit
        if len(base64.b64decode(self._get_param("UserData", ""))) > MAX_USER_DATA:
            raise Refused("InvalidParameterValue", f"User data is limited to {MAX_USER_DATA} bytes")

    def _launchable(self, image_id: str) -> FakeImage:
        if not str(image_id).startswith("ami-"):
            raise Refused("InvalidAMIID.Malformed", f'Invalid id: "{image_id}" (expecting "ami-...")')
        image = self.ec2_backend.amis.get(image_id)
        if not isinstance(image, FakeImage):
            raise Refused("InvalidAMIID.NotFound", f"The image id '[{image_id}]' does not exist")
        if image.state != "available":
            raise Refused("InvalidAMIID.Unavailable", f"The image ID '{image_id}' is not available")
        return image

    def _have_capacity(self) -> None:
        kind = self._get_param("InstanceType", "m1.small")
        if kind not in INSTANCE_TYPES:
            raise Refused("InvalidParameterValue", f"Invalid value '{kind}' for InstanceType.")
        nics = self._get_param("NetworkInterfaces", [])
        subnet = self._get_param("SubnetId") or next((n["SubnetId"] for n in nics if "SubnetId" in n), "")
        zone = self._get_param("Placement.AvailabilityZone", "")
        if subnet:
            zone = self.ec2_backend.get_subnet(subnet).availability_zone
        full = self.state.options.no_capacity
        if any((kind, place) in full for place in (subnet, zone, "*")):
            # HTTP 500, and so retried by botocore, as EC2 has it.
            message = (
                f"We currently do not have sufficient {kind} capacity in the Availability Zone you requested "
                f"({zone or 'us-east-1a'}). Our system will be working on provisioning additional capacity."
            )
            raise Refused("InsufficientInstanceCapacity", message, 500)

    def _of_one_architecture(self, image: FakeImage) -> None:
        kind = self._get_param("InstanceType", "m1.small")
        runs = INSTANCE_TYPES[kind]["ProcessorInfo"]["SupportedArchitectures"]
        if image.architecture not in runs:
            raise Refused(
                "InvalidParameterValue",
                f"The architecture '{','.join(runs)}' of the specified instance type does not match the"
                f" architecture '{image.architecture}' of the specified AMI. Specify an instance type and an"
                " AMI that have matching architectures, and try again.",
            )

    def _fill_in(self, image: FakeImage) -> None:
        """Complete the call's parameters by what the image says."""
        root, name = root_of(image), image.root_device_name
        mapping = self._get_param("BlockDeviceMappings", [])
        others = [each for each in mapping if each.get("DeviceName") != name]
        own: dict[str, Any] = next((m["Ebs"] for m in mapping if m.get("DeviceName") == name), {})
        if own.get("VolumeSize", root["VolumeSize"]) < root["VolumeSize"]:
            size = f"Volume of size {own['VolumeSize']}GB is smaller than snapshot '{root['SnapshotId']}'"
            raise Refused("InvalidBlockDeviceMapping", f"{size}, expect size >= {root['VolumeSize']}GB")
        ebs = {**root, **own, "Encrypted": root["Encrypted"] or bool(own.get("Encrypted"))}
        self.params["BlockDeviceMappings"] = [{"DeviceName": name, "Ebs": ebs}, *others]
        if image.imds_support == "v2.0":
            self.params["MetadataOptions"] = {
                "HttpTokens": "required",
                "HttpPutResponseHopLimit": 2,
                **self._get_param("MetadataOptions", {}),
            }

    def _allowed_metadata(self) -> None:
        # behaviour: imdsv2-enforced
        given = self._get_param("MetadataOptions", {})
        default = self.state.options.imds_default
        tokens = given.get("HttpTokens") or ("optional" if default == "no-preference" else default)
        if self.state.options.imdsv2_enforced and tokens != "required":
            raise Refused("UnsupportedOperation", "HttpTokens must be required: the account enforces IMDSv2")
        # behaviour: tag-keys-in-metadata
        if given.get("InstanceMetadataTags") == "enabled":
            for key in self.tags().get("instance", {}):
                if not _KEY_IN_METADATA.fullmatch(key) or key in (".", "..", "_index"):
                    raise Refused(
                        "InvalidParameterValue",
                        f"'{key}' is not a valid tag key. Tag keys must match pattern"
                        r" ([0-9a-zA-Z\-_+=,.@:]{1,255}), and must not be a reserved name"
                        " ('.', '..', '_index')",
                    )

    def _instances(self, *states: str) -> list[Instance]:
        found = [self.instance(each) for each in self._get_param("InstanceIds", [])]
        for instance in found:
            if states and instance.state not in states:
                raise Refused(
                    "IncorrectInstanceState",
                    f"The instance '{instance.id}' is not in a state for that: {instance.state}",
                )
        return found
