"""What Packer prints of a bake on EC2, in all supported versions: ids, and why it failed."""

import re

_INSTANCE = re.compile(r"Instance ID: (i-[0-9a-f]+)")
_IMAGE = re.compile(r"AMI: (ami-[0-9a-f]+)")
# Printed once the instance runs: what is waited for next, or with no communicator its end.
_BOOTED = re.compile(
    r"Waiting for SSH to become available|Using (SSH|ssh) communicator|Connected to SSH"
    r"|Stopping the source instance|Starting portForwarding session"
)
_IMAGING = re.compile(r"Creating AMI ")
# Of an instance Packer prints EC2's code, of a spot fleet only its messages.
_NO_CAPACITY = re.compile(
    r"InsufficientInstanceCapacity|InsufficientHostCapacity|SpotMaxPriceTooLow|Unsupported:"
    r"|UnfulfillableCapacity|no Spot capacity available|do not have sufficient \S+ capacity"
    r"|Unable to fulfill capacity|not supported in your requested Availability Zone"
    r"|Spot request price of \S+ is lower than|InsufficientFreeAddressesInSubnet"
    r"|not enough free addresses in subnet"
)
# EC2 may not know our security group yet. The AWS SDK before version 2 writes "status code: 503", version 2
# "StatusCode: 503". A plugin that crashed ends with "unexpected EOF".
_TRANSIENT = re.compile(
    r"RequestLimitExceeded|Throttling|InternalError|InternalFailure|ServiceUnavailable|Unavailable"
    r"|(?:status code|StatusCode): 50[0-9]|retry quota exceeded|connection reset|(?<!unexpected )EOF"
    r"|i/o timeout|InvalidGroup\.NotFound"
)
_NOT_SEEN_YET = re.compile(r"InvalidAMIID\.NotFound")


def instance_in(line: str) -> str:
    """Return the id of the instance that a line reports as launched, or nothing."""
    found = _INSTANCE.search(line)
    return found[1] if found else ""


def image_in(line: str) -> str:
    """Return the id of the AMI that a line reports as begun, or nothing."""
    found = _IMAGE.search(line)
    return found[1] if found else ""


def is_imaging(line: str) -> bool:
    """Return whether a line reports that an AMI will be asked for."""
    return _IMAGING.search(line) is not None


def has_booted(line: str) -> bool:
    """Return whether a line means that the instance runs."""
    return _BOOTED.search(line) is not None


def lacks_capacity(text: str) -> bool:
    """Return whether EC2 has no such instance at the moment: another type or subnet may do."""
    return _NO_CAPACITY.search(text) is not None


def is_transient(text: str) -> bool:
    """Return whether another attempt may succeed.

    EC2 answers a lack of capacity with HTTP 500 too, but then the next type or subnet is better.
    """
    return _TRANSIENT.search(text) is not None and not lacks_capacity(text)


def lost_the_image(text: str) -> bool:
    """Return whether Packer gave up on an AMI because EC2 did not show it yet, as plugin 1.8 does."""
    return _NOT_SEEN_YET.search(text) is not None
