"""EC2 actions about the account's own settings in a region, and what these settings do to others."""

from __future__ import annotations

from moto.core.responses import ActionResult

from tests.fake_ec2.ec2_action import EC2Action


class AccountActions(EC2Action):
    """The account's settings: what CloudOptions says, and moto's encryption by default."""

    def get_ebs_default_kms_key_id(self) -> ActionResult:
        """GetEbsDefaultKmsKeyId."""
        # behaviour: default-ebs-key
        return ActionResult({"KmsKeyId": self.state.options.default_ebs_key})

    def get_image_block_public_access_state(self) -> ActionResult:
        """GetImageBlockPublicAccessState."""
        # behaviour: block-public-access
        state = self.state.options.block_public_access
        return ActionResult({"ImageBlockPublicAccessState": state, "ManagedBy": "account"})

    def describe_regions(self) -> ActionResult:
        """DescribeRegions, of all or of those that the account can use."""
        # behaviour: opt-in-regions
        enabled = self.state.options.opted_in
        listed = [
            {
                "RegionName": region.name,
                "Endpoint": region.endpoint,
                "OptInStatus": "opted-in" if region.name in enabled else region.opt_in_status,
            }
            for region in self.ec2_backend.describe_regions(self._get_param("RegionNames", []))
        ]
        if not self._get_param("AllRegions"):
            listed = [one for one in listed if one["OptInStatus"] != "not-opted-in"]
        return ActionResult({"Regions": listed})
