"""What EC2 does with images, where moto does less or something else."""

from __future__ import annotations

import copy
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from moto.core.responses import ActionResult, EmptyResult
from moto.ec2.models import ec2_backends
from moto.ec2.utils import random_ami_id

from tests.fake_ec2.api_call import Refused
from tests.fake_ec2.ec2_action import EC2Action
from tests.fake_ec2.fake_image import FakeImage

if TYPE_CHECKING:
    from collections.abc import Sequence


_ID = re.compile(r"ami-(?:[0-9a-f]{8}|[0-9a-f]{17})")


class ImageActions(EC2Action):
    """The actions on images."""

    def create_image(self) -> ActionResult:
        """CreateImage, also of a running instance."""
        instance = self.instance(self._get_param("InstanceId"))
        name = self._free_name()
        if instance.state not in ("running", "stopped"):
            raise Refused(
                "IncorrectInstanceState", f"the instance '{instance.id}' is not 'running' or 'stopped'"
            )
        source = self.ec2_backend.amis.get(instance.image_id)
        mapping = []
        for device, block in instance.block_device_mapping.items():
            volume = self.ec2_backend.get_volume(block.volume_id)
            ebs = {
                "VolumeSize": volume.size,
                "VolumeType": volume.volume_type,
                "Encrypted": bool(volume.encrypted),
                "DeleteOnTermination": True,
                "KmsKeyId": volume.kms_key_id,
            }
            mapping.append({"DeviceName": device, "Ebs": ebs})
        image = FakeImage(
            self.ec2_backend,
            random_ami_id(),
            instance=instance,
            name=name,
            description=self._get_param("Description", ""),
            image_location=f"{self.current_account}/{name}",
            hypervisor="xen",
            region_name=instance.placement.availability_zone,
            snapshot_description=f"Created by CreateImage({instance.id})",
            like=source,
            root_device=instance.root_device_name,
            mapping=mapping,
        )
        for block in instance.block_device_mapping.values():
            image.ebs_snapshot.volume = self.ec2_backend.get_volume(block.volume_id)
            break
        self._add(image)
        if self.state.machines is not None:
            image.captured = False
            self.state.machines.capture(instance, image)
        return ActionResult({"ImageId": image.id})

    def register_image(self) -> ActionResult:
        """RegisterImage, of a snapshot: the parameters' defaults are those of an AMI that boots nowhere."""
        name, root = self._free_name(), self._get_param("RootDeviceName", "")
        if unknown := set(self.tags()) - {"image"}:
            raise Refused("InvalidParameterValue", f"'{unknown.pop()}' is not a valid taggable resource type")
        mapping = copy.deepcopy(self._get_param("BlockDeviceMappings", []))
        for disk in mapping:
            self._register_disk(disk.get("Ebs", {}))
        disk = next((one["Ebs"] for one in mapping if one["DeviceName"] == root), None)
        if disk is None or not disk.get("SnapshotId"):
            # behaviour: register-root-snapshot
            raise Refused(
                "InvalidBlockDeviceMapping", f"the root device {root} must be in the block device mapping"
            )
        image = FakeImage(
            self.ec2_backend,
            random_ami_id(),
            name=name,
            description=self._get_param("Description", ""),
            image_location=f"{self.current_account}/{name}",
            hypervisor="xen",
            architecture=self._get_param("Architecture", "i386"),
            virtualization_type=self._get_param("VirtualizationType", "paravirtual"),
            boot_mode=self._get_param("BootMode"),
            region_name=f"{self.region}a",
            root_device=root,
            snapshot=self.ec2_backend.snapshots[disk["SnapshotId"]],
            mapping=mapping,
        )
        image.sriov_net_support = self._get_param("SriovNetSupport")
        image.ena_support = bool(self._get_param("EnaSupport", False))
        image.tpm_support, image.uefi_data = self._get_param("TpmSupport"), self._get_param("UefiData")
        image.imds_support = self._get_param("ImdsSupport")
        image.add_tags(self.tags().get("image", {}))
        image.wait(self.state.options)
        if not (self.state.options.image_describes or self.state.options.image_seconds):
            image.look()
        self.ec2_backend.amis[image.id] = image
        self.state.made(image.id)
        return ActionResult({"ImageId": image.id})

    def _register_disk(self, disk: dict[str, Any]) -> None:
        """Complete a disk by its snapshot; raises Refused."""
        if not (snapshot_id := disk.get("SnapshotId")):
            return
        snapshot = self.ec2_backend.snapshots.get(snapshot_id)
        if snapshot is None:
            raise Refused("InvalidSnapshot.NotFound", f"The snapshot '{snapshot_id}' does not exist.")
        if any(one.state == "pending" for one in self._using(snapshot_id)):
            raise Refused("IncorrectState", f"The snapshot '{snapshot_id}' is not completed")
        if "Encrypted" in disk or "KmsKeyId" in disk:
            raise Refused(
                "InvalidParameter", "the encryption state of a snapshot's volume can't be specified"
            )
        size = disk.setdefault("VolumeSize", snapshot.volume.size)
        if size < snapshot.volume.size:
            raise Refused("InvalidBlockDeviceMapping", f"a volume of {size}GB is smaller than its snapshot")
        disk.setdefault("DeleteOnTermination", True)
        disk["Encrypted"] = bool(snapshot.encrypted)

    def _using(self, snapshot_id: str) -> list[FakeImage]:
        return [
            image
            for image in self.ec2_backend.amis.values()
            if any(one.get("Ebs", {}).get("SnapshotId") == snapshot_id for one in image.mapping)
        ]

    def delete_snapshot(self) -> ActionResult:
        """DeleteSnapshot, unless an image uses it."""
        snapshot_id = self._get_param("SnapshotId")
        if used := self._using(snapshot_id):
            raise Refused(
                "InvalidSnapshot.InUse", f"The snapshot {snapshot_id} is currently in use by {used[0].id}"
            )
        answer: ActionResult = super().delete_snapshot()
        if self.state.machines is not None:
            self.state.machines.drop(snapshot_id)
        return answer

    def copy_image(self) -> ActionResult:
        """CopyImage, within the account."""
        params = self.original_params()
        token = params.pop("ClientToken", "")

        def copied() -> list[str]:
            if self.region in self.state.options.full_regions:
                raise Refused("ResourceLimitExceeded", f"Too many image copies in progress in {self.region}")
            self.state.backend(self.current_account, params["SourceRegion"])
            source = ec2_backends[self.current_account][params["SourceRegion"]].amis.get(
                params["SourceImageId"]
            )
            if not isinstance(source, FakeImage):
                raise _not_found([params["SourceImageId"]])
            if source.state != "available":
                raise Refused(
                    "InvalidAMIID.Unavailable", f"the image '{source.id}' is not available for a copy"
                )
            mapping = copy.deepcopy(source.mapping)
            for each in mapping:
                each["Ebs"]["Encrypted"] |= bool(params.get("Encrypted"))
                each["Ebs"]["KmsKeyId"] = params.get("KmsKeyId")
            image = FakeImage(
                self.ec2_backend,
                random_ami_id(),
                source_ami=source,
                name=self._free_name(),
                description=params.get("Description", source.description),
                image_location=f"{self.current_account}/{params['Name']}",
                hypervisor="xen",
                region_name=f"{self.region}a",
                like=source,
                mapping=mapping,
            )
            if params.get("CopyImageTags"):
                own = source.ec2_backend.tags.get(source.id, {})
                image.add_tags({key: value for key, value in own.items() if not key.startswith("aws:")})
            self.state.copies.append(image)
            together = len(self.state.copies) >= self.state.options.copies_together
            for one in self.state.copies:
                one.captured = together
            self._add(image)
            if self.state.machines is not None:
                self.state.machines.copy(source, image)
            return [image.id]

        scope = (self.current_account, self.region, "CopyImage", token)
        return ActionResult({"ImageId": self.state.once(scope, params, copied)[0]})

    def describe_images(self) -> ActionResult:
        """DescribeImages: new ones are pending at first, others' deprecated ones out of sight."""
        backend = self.ec2_backend
        ids = self._get_param("ImageIds", [])
        if bad := [each for each in ids if not _ID.fullmatch(each)]:
            raise Refused("InvalidAMIID.Malformed", f'Invalid id: "{bad[0]}" (expecting "ami-...")')
        if gone := [each for each in ids if each not in backend.amis]:
            raise _not_found(gone)

        def wanted(image: FakeImage) -> bool:
            if image.state == "disabled" and not self._get_param("IncludeDisabled"):
                return False
            if ids or image.owner_id == self.current_account or self._get_param("IncludeDeprecated"):
                return True
            return image.deprecation_time is None or image.deprecation_time > _stamp(datetime.now(UTC))

        for image in backend.amis.values():
            if not ids or image.id in ids:
                image.look()
        result: Any = super().describe_images().result
        result["Images"] = [image for image in result["Images"] if wanted(image)]
        return self.seen("ImageIds", "Images", "InvalidAMIID.NotFound", result, least=1)

    def deregister_image(self) -> ActionResult:
        """DeregisterImage, with its snapshots when asked."""
        image = self.own_image(self._get_param("ImageId"))
        if image.deregistration_protection != "disabled" or image.cooling:
            raise Refused("OperationNotPermitted", f"{image.id} is protected from deregistration")
        super().deregister_image()
        results = []
        # behaviour: deregister-with-snapshots
        if self._get_param("DeleteAssociatedSnapshots"):
            kept = {m["Ebs"]["SnapshotId"] for other in self.ec2_backend.amis.values() for m in other.mapping}
            for each in image.mapping:
                snapshot = each["Ebs"]["SnapshotId"]
                if snapshot in kept or snapshot not in self.ec2_backend.snapshots:
                    code = "skipped"
                else:
                    self.ec2_backend.delete_snapshot(snapshot)
                    code = "success"
                    if self.state.machines is not None:
                        self.state.machines.drop(snapshot)
                results.append({"SnapshotId": snapshot, "ReturnCode": code})
        return ActionResult({"Return": True, "DeleteSnapshotResults": results})

    def modify_image_attribute(self) -> ActionResult:
        """ModifyImageAttribute: launch permissions, description, and IMDSv2 from now on."""
        image = self.own_image(self._get_param("ImageId"))
        support = self._get_param("ImdsSupport.Value")
        if self._get_param("Attribute") == "imdsSupport":
            support = self._get_param("Value")
        if support is not None:
            if support != "v2.0":
                raise Refused("InvalidParameterValue", f"'{support}' is no value of imdsSupport")
            image.imds_support = support
            return EmptyResult()
        if (description := self._get_param("Description.Value")) is not None:
            image.description = description
            return EmptyResult()
        added = self._get_param("LaunchPermission.Add", [])
        public = {"Group": "all"} in added or (
            self._get_param("OperationType") == "add" and "all" in self._get_param("UserGroups", [])
        )
        if public and image.encrypted:
            raise Refused("InvalidParameter", "images with encrypted snapshots can't be public")
        if added and image.encrypted and image.ebs_snapshot.kms_key_id is None:
            raise Refused("InvalidParameter", "snapshots encrypted with the default key can't be shared")
        return super().modify_image_attribute()

    def describe_image_attribute(self) -> ActionResult:
        """DescribeImageAttribute, of an image of this account."""
        image = self.own_image(self._get_param("ImageId"))
        if self._get_param("Attribute") == "uefiData":
            data = {"Value": image.uefi_data} if image.uefi_data else {}
            return ActionResult({"ImageId": image.id, "UefiData": data})
        return super().describe_image_attribute()

    def enable_image_deprecation(self) -> ActionResult:
        """EnableImageDeprecation, to the minute."""
        image = self.own_image(self._get_param("ImageId"))
        when = self._get_param("DeprecateAt")
        if isinstance(when, str):
            when = datetime.fromisoformat(when)
        when = when.replace(tzinfo=when.tzinfo or UTC)
        if when < datetime.now(UTC):
            raise Refused("InvalidParameterValue", "the time of deprecation is in the past")
        image.deprecation_time = _stamp(when.replace(second=0, microsecond=0))
        return ActionResult({"Return": True})

    def disable_image_deprecation(self) -> ActionResult:
        """DisableImageDeprecation."""
        self.own_image(self._get_param("ImageId")).deprecation_time = None
        return ActionResult({"Return": True})

    def enable_image_deregistration_protection(self) -> ActionResult:
        """EnableImageDeregistrationProtection."""
        image = self.own_image(self._get_param("ImageId"))
        cooldown = bool(self._get_param("WithCooldown"))
        image.deregistration_protection = "enabled-with-cooldown" if cooldown else "enabled-without-cooldown"
        return ActionResult({"Return": image.deregistration_protection})

    def disable_image_deregistration_protection(self) -> ActionResult:
        """DisableImageDeregistrationProtection: at once, or a day later if it has a cooldown."""
        image = self.own_image(self._get_param("ImageId"))
        # behaviour: deregistration-cooldown
        image.cooling = image.cooling or image.deregistration_protection == "enabled-with-cooldown"
        image.deregistration_protection = "disabled"
        return ActionResult({"Return": "disabled"})

    def own_image(self, image_id: str) -> FakeImage:
        """Return an image of this account; raises Refused for any other."""
        image = self.ec2_backend.amis.get(image_id)
        if not isinstance(image, FakeImage):
            raise _not_found([image_id])
        if image.owner_id != self.current_account:
            raise Refused("AuthFailure", f"not authorized for the image '{image_id}'", 403)
        return image

    def _free_name(self) -> str:
        name = self._get_param("Name")
        for image in self.ec2_backend.amis.values():
            if image.name == name and image.owner_id == self.current_account:
                raise Refused("InvalidAMIName.Duplicate", f"the name '{name}' is in use by {image.id}")
        return str(name)

    def _add(self, image: FakeImage) -> None:
        tags = self.tags()
        image.add_tags(tags.get("image", {}))
        image.ebs_snapshot.add_tags(tags.get("snapshot", {}))
        image.ebs_snapshot.description += f" for {image.id}"
        image.wait(self.state.options)
        if not (self.state.options.image_describes or self.state.options.image_seconds):
            image.look()
        self.ec2_backend.amis[image.id] = image
        self.state.made(image.id, image.ebs_snapshot.id)


def root_of(image: FakeImage) -> dict[str, Any]:
    """Return the root disk of an image."""
    return dict(next(m for m in image.mapping if m["DeviceName"] == image.root_device_name)["Ebs"])


def _not_found(ids: Sequence[str]) -> Refused:
    return Refused("InvalidAMIID.NotFound", f"The image id '[{', '.join(ids)}]' does not exist")


def _stamp(when: datetime) -> str:
    return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
