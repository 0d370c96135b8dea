"""Settings of the account in a region that would fail a build, a verification or a release late.

Each function returns what it found for `check`. It raises UsageError for what can't work, with what to do,
and CloudFailed if the account does not tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from ami_builder.aws.session import Account, aws_errors, code_of
from ami_builder.aws.source_ami import BaseAmi
from ami_builder.config.schema import AwsSettings, Image
from ami_builder.core.errors import CloudFailed, UsageError
from ami_builder.core.options import Connect

Named = tuple[str, Callable[[], str]]
"""A probe and its name."""
_AWS_KEY = "alias/aws/ebs"
_UNUSABLE_KEY = frozenset({"NotFoundException", "InvalidArnException", "KMSInvalidStateException"})


def of_build(account: Account, image: Image, base: BaseAmi | None, *, public: bool) -> Iterator[Named]:
    """Yield name and probe of what would fail a build; `image` has the settings of the region."""
    aws = image.aws
    if public or aws.share_with:
        yield "encryption", partial(encryption, account, aws, public=public)
    if aws.kms_key:
        yield "KMS key", partial(kms_key, account, aws.kms_key, "aws.kms_key")
    if public:
        yield "public AMIs", partial(public_access, account)
    if base is not None and aws.connect is Connect.SESSION_MANAGER:
        yield "Session Manager", partial(ssm_agent, base)


def of_copy(account: Account, aws: AwsSettings) -> Iterator[Named]:
    """Yield the same of a region that AMIs are copied to; `aws` has its settings."""
    where = f" in {account.region}"
    if aws.share_with:
        yield f"encryption{where}", partial(encryption, account, aws, public=False)
    if aws.kms_key:
        yield f"KMS key{where}", partial(kms_key, account, aws.kms_key, "aws.copy_to")


def require(probes: Iterable[Named]) -> None:
    """Raise the first UsageError of some probes; what the account does not tell is no reason to stop."""
    for _, probe in probes:
        try:
            probe()
        except CloudFailed:
            continue


def encryption(account: Account, aws: AwsSettings, *, public: bool) -> str:
    """Return how the region encrypts the AMI."""
    with aws_errors():
        always = account.ec2.get_ebs_encryption_by_default()["EbsEncryptionByDefault"]
    if not (always or aws.encrypt):
        return "off by default"
    reason = "EBS encryption by default is on" if always and not aws.encrypt else "aws.encrypt is set"
    if public:
        raise UsageError(
            f"{reason} in {account.region}, and an encrypted AMI can't be public",
            hint="turn it off there, or build without --public",
        )
    key = aws.kms_key
    if not key:
        with aws_errors():
            key = account.ec2.get_ebs_default_kms_key_id()["KmsKeyId"]
    if aws.share_with and key.endswith(_AWS_KEY):
        raise UsageError(
            f"{reason} in {account.region} with the key {_AWS_KEY} of AWS, and AMIs under it can't be shared",
            hint="set aws.encrypt and aws.kms_key, and write REGION=KEY in aws.copy_to,"
            " or make a key of yours the region's default",
        )
    return f"with {key}{'' if aws.encrypt else ', by default'}"


def default_key(account: Account) -> str:
    """Return the user's own KMS key of EBS encryption by default; empty if it is off, or the key is AWS's."""
    with aws_errors():
        if not account.ec2.get_ebs_encryption_by_default()["EbsEncryptionByDefault"]:
            return ""
        key = account.ec2.get_ebs_default_kms_key_id()["KmsKeyId"]
    return "" if key.endswith(_AWS_KEY) else key


def kms_key(account: Account, key: str, setting: str) -> str:
    """Return a KMS key's ARN; whether its own policy allows what is needed can't be read."""
    try:
        with aws_errors("kms"):
            found = account.client("kms").describe_key(KeyId=key)["KeyMetadata"]
    except CloudFailed as failed:
        if code_of(failed) not in _UNUSABLE_KEY:
            raise
        raise UsageError(
            f"{setting}: there is no KMS key {key} in {account.region}",
            hint="a key belongs to one region; `aws kms list-aliases` lists them",
        ) from failed
    if found["KeyState"] != "Enabled" or found.get("KeyUsage", "ENCRYPT_DECRYPT") != "ENCRYPT_DECRYPT":
        raise UsageError(
            f"{setting}: KMS key {key} is {found['KeyState']} and for {found.get('KeyUsage')},"
            " but must be Enabled and for ENCRYPT_DECRYPT",
            hint="enable it, or change the setting",
        )
    return f"{found['Arn']}; its own policy is not looked at"


def public_access(account: Account) -> str:
    """Return whether AMIs can be made public."""
    with aws_errors():
        state = account.ec2.get_image_block_public_access_state()["ImageBlockPublicAccessState"]
    if state.startswith("block"):
        raise UsageError(
            f"the account blocks public access to AMIs in {account.region} ({state})",
            hint="build without --public, or run `aws ec2 disable-image-block-public-access`",
        )
    return "allowed"


def ssm_agent(base: BaseAmi) -> str:
    """Return that a base AMI may have the agent of Session Manager; Debian's have none."""
    if base.by_debian:
        raise UsageError(
            f"aws.connect: {base} is Debian's, which has no SSM agent, so Session Manager can't reach it",
            hint='use aws.connect = "ssh", or set aws.source to an AMI with the agent, such as one of yours',
        )
    return f"expects the SSM agent in {base}"


def opt_in(account: Account) -> dict[str, str]:
    """Return the regions of the partition, and whether each is enabled: as EC2's OptInStatus."""
    with aws_errors():
        known = account.ec2.describe_regions(AllRegions=True)["Regions"]
    return {one["RegionName"]: one.get("OptInStatus", "") for one in known}


def require_region(region: str, status: Mapping[str, str]) -> str:
    """Return whether a region can be used: those that AWS opened since 2019 have to be enabled first."""
    if region not in status:
        raise UsageError(f"there is no region {region} in this partition", hint="check aws.copy_to")
    if status[region] == "not-opted-in":
        raise UsageError(
            f"the account has not enabled {region}",
            hint=f"`aws account enable-region --region-name {region}`, or remove it from aws.copy_to",
        )
    return "enabled"
