"""What an error of AWS means and what to do about it, whether botocore or Packer reports it.

How AWS words a denial: https://docs.aws.amazon.com/IAM/latest/UserGuide/troubleshoot_access-denied.html
Codes of EC2: https://docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from types import TracebackType

from botocore import exceptions

from ami_builder.core.errors import CloudFailed, UsageError

NO_CAPACITY = "add aws.instance_types, or aws.subnets in other availability zones"
LOGIN = "log in again (`aws sso login`, or new keys), or choose another AWS_PROFILE"
GC = "an instance may be left: `ami-builder gc` finds it"

DENIED = frozenset({"UnauthorizedOperation", "AccessDenied", "AccessDeniedException", "UnauthorizedAccess"})
THROTTLED = frozenset({"RequestLimitExceeded", "Throttling", "ThrottlingException", "RequestThrottled"})
EXPIRED = frozenset(
    {
        "AuthFailure",
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidClientTokenId",
        "RequestExpired",
        "SignatureDoesNotMatch",
        "UnrecognizedClientException",
    }
)
_OURS = frozenset({"InternalError", "InternalFailure", "ServiceUnavailable", "Unavailable", "503", "500"})
_TAG_POLICY = "TagPolicyViolation"
# EC2's AuthFailure has this text for what belongs to another account.
_NOT_SHARED = "Not authorized for "
_NO_SPOT_ROLE = "AuthFailure.ServiceLinkedRoleCreationNotPermitted"

QUOTAS: Mapping[str, str] = {
    "VcpuLimitExceeded": "Running On-Demand … instances (vCPUs of a family of instance types)",
    "InstanceLimitExceeded": "Running On-Demand … instances",
    "MaxSpotInstanceCountExceeded": "All … Spot Instance Requests (vCPUs of a family of instance types)",
    "VolumeLimitExceeded": "Storage for General Purpose SSD (gp3) volumes",
    "MaxIOPSLimitExceeded": "IOPS of EBS volumes",
    "SnapshotLimitExceeded": "Snapshots per Region",
    "ConcurrentSnapshotLimitExceeded": "Concurrent snapshots per volume",
    "SecurityGroupLimitExceeded": "VPC security groups per Region",
    "SecurityGroupsPerInterfaceLimitExceeded": "Security groups per network interface",
    "RulesPerSecurityGroupLimitExceeded": "Inbound or outbound rules per security group",
    "AddressLimitExceeded": "EC2-VPC Elastic IPs",
    "MaxFleetCountExceeded": "EC2 Fleet and Spot Fleet requests",
}
"""Code of an error -> the quota's name in the console of Service Quotas."""

_QUOTA = re.compile(r"LimitExceeded$|QuotaExceeded$|CountExceeded$")
_ACTION = re.compile(r"not authorized to perform:? ([a-z0-9-]+:[A-Za-z]+)")
_OPERATION = re.compile(r"operation error (\w+): (\w+),")
_ENCODED = re.compile(r"\s*Encoded authorization failure message:\s*(\S*).*", re.DOTALL)
# The kind of policy that denied: "service control policy", "permissions boundary", "VPC endpoint policy" …
_EXPLICIT = re.compile(r"with an explicit deny in an? ([\w -]+?)(?=[.:,\n]|$| Encoded)")
_IMPLICIT = re.compile(r"because no ([\w -]+?) allows the ")
# "Code: message" of Packer's SDK v1; v2 writes "api error" before it. Of a fleet there are messages alone.
_IN_OUTPUT = re.compile(r"\b([A-Z][A-Za-z]+): ")
_FLEET_MESSAGES: Mapping[str, str] = {
    "Max spot instance count exceeded": "MaxSpotInstanceCountExceeded",
    "reached your quota for maximum Fleet Requests": "MaxFleetCountExceeded",
    "permission to create the service-linked role": _NO_SPOT_ROLE,
    "You have requested more vCPU capacity than": "VcpuLimitExceeded",
    "You are not authorized to perform this operation": "UnauthorizedOperation",
    "The tag policy does not allow": _TAG_POLICY,
}

# What botocore raises for a wrong setting, and not for what a service or a login answered.
_WRONG_SETTING = (
    exceptions.ConfigNotFound,
    exceptions.ConfigParseError,
    exceptions.EndpointProviderError,
    exceptions.InvalidChecksumConfigError,
    exceptions.InvalidConfigError,
    exceptions.InvalidDefaultsMode,
    exceptions.InvalidIMDSEndpointError,
    exceptions.InvalidIMDSEndpointModeError,
    exceptions.InvalidMaxRetryAttemptsError,
    exceptions.InvalidRegionError,
    exceptions.InvalidRetryConfigurationError,
    exceptions.InvalidRetryModeError,
    exceptions.InvalidSTSRegionalEndpointsConfigError,
    exceptions.NoRegionError,
    exceptions.PartialCredentialsError,
    exceptions.ProfileNotFound,
    exceptions.UnknownCredentialError,
)
# Only their messages say that it is a setting.
_SETTING = re.compile(
    r"Invalid value|nsupported config|invalid\. Valid values|empty or whitespace-only string|is not valid\."
)
_SECRET = re.compile(r"KEY|TOKEN$|_ID$")
_SHOWN = 6


def of(code: str, call: str, text: str) -> str | None:
    """Return what to do about an error of AWS: its code, the call that it refused, its message."""
    if code in DENIED:
        refused = _ACTION.search(text)
        return _denied(refused[1] if refused else call, text)
    if code == _TAG_POLICY:
        return "a tag policy of the organization demands other values: set these tags with aws.tags"
    if code == _NO_SPOT_ROLE:
        return (
            "the account has no role for spot instances yet: allow iam:CreateServiceLinkedRole for"
            " spot.amazonaws.com (`ami-builder iam-policy` has it with aws.spot), or let an administrator run"
            " `aws iam create-service-linked-role --aws-service-name spot.amazonaws.com` once"
        )
    if code == "AuthFailure" and _NOT_SHARED in text:
        return "another account owns this and has not shared it with yours: ask its owner, or use another"
    if code in EXPIRED:
        return f"the credentials are invalid or have expired: {LOGIN}"
    if code in THROTTLED:
        return "AWS throttled the call, also after several attempts: try again later"
    if code == "InsufficientInstanceCapacity":
        return NO_CAPACITY
    if code == "InsufficientFreeAddressesInSubnet":
        return "the subnet has no free address: name another one in aws.subnets"
    if code in QUOTAS or _QUOTA.search(code):
        return _quota(code)
    if code in _OURS:
        return "an error on AWS's side: try again later; `ami-builder gc` lists orphaned resources"
    return None


def in_output(text: str) -> str | None:
    """Return what to do about the first error of AWS in the output of Packer that has a hint."""
    codes = [code for message, code in _FLEET_MESSAGES.items() if message in text]
    operation = _OPERATION.search(text)
    call = f"{operation[1].lower()}:{operation[2]}" if operation else "the call"
    found = (of(code, call, text) for code in [*_IN_OUTPUT.findall(text), *codes])
    return next((hint for hint in found if hint is not None), None)


def is_expired(text: str) -> bool:
    """Return whether the output of Packer says that its credentials were not accepted."""
    return _NOT_SHARED not in text and any(code in EXPIRED for code in _IN_OUTPUT.findall(text))


def without_encoded(text: str) -> tuple[str, str]:
    """Return a message of AWS without its encoded part, and that part, which can be decoded."""
    found = _ENCODED.search(text)
    return _ENCODED.sub("", text).strip().rstrip("."), found[1] if found else ""


def _denied(action: str, text: str) -> str:
    if (found := _EXPLICIT.search(text)) is not None:
        return (
            f"a {found[1]} denies {action}, whatever else is allowed: ask those who administer it;"
            " if it demands tags, set them with aws.tags"
        ).replace("a identity", "an identity")
    if (found := _IMPLICIT.search(text)) is not None and found[1] not in (
        "identity-based policy",
        "resource-based policy",
    ):
        return f"a {found[1]} does not allow {action}: ask those who administer it"
    hint = f"allow {action} for these credentials; `ami-builder iam-policy` prints the whole policy"
    if _ENCODED.search(text) is not None and found is None:
        hint += (
            "; if they have it, `aws sts decode-authorization-message --encoded-message …` names the policy"
            " that denies it, such as one of the organization"
        )
    return hint


def _quota(code: str) -> str:
    name = f" {QUOTAS[code]!r}" if code in QUOTAS else ""
    return (
        f"the account has reached a quota{name}: delete what you do not need, or request an increase in the"
        " console of Service Quotas"
    )


def not_usable(error: Exception) -> UsageError | CloudFailed:
    """Return an error of botocore that is no answer of AWS: settings, credentials, the network."""
    name, text = type(error).__name__, str(error)
    if isinstance(error, RuntimeError):
        # botocore's: they were refreshed, and have still expired.
        return CloudFailed(f"the AWS credentials have expired: {text}", hint=LOGIN)
    if not isinstance(error, exceptions.BotoCoreError):
        return _wrong_setting(f"{name}: {text}")
    if isinstance(error, _WRONG_SETTING) or _SETTING.search(text):
        return _wrong_setting(text)
    if any(word in name for word in ("Credential", "Token", "SSO", "Profile")):
        return CloudFailed(f"the AWS credentials can't be used: {text}", hint=LOGIN)
    given = [name for name in os.environ if name.startswith("AWS_ENDPOINT_URL") or name == "AWS_CA_BUNDLE"]
    return CloudFailed(
        f"AWS did not answer: {text}",
        hint="check the network and the region's name"
        + "".join(f", and {name}={os.environ[name]}" for name in sorted(given)),
    )


def raised_by_botocore(error: BaseException) -> bool:
    """Return whether an exception comes out of botocore, and not out of our own code."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        if str(trace.tb_frame.f_globals.get("__name__", "")).startswith("botocore."):
            return True
        trace = trace.tb_next
    return False


def _wrong_setting(text: str) -> UsageError:
    """Return an error that names the variables whose values are in a message, or else all of AWS's."""
    known = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith("AWS_") and not _SECRET.search(name)
    }
    quoted = re.findall(r"['\"](\S{2,}?)['\"]", text)
    blamed = {
        name: value
        for name, value in known.items()
        if value
        and (
            f"{value!r}" in text
            or (len(value) > 1 and value in text)
            or any(part in value for part in quoted)
        )
    }
    shown = ", ".join(f"{n}={v!r}" for n, v in list((blamed or known).items())[:_SHOWN])
    where = f"check {shown}" if shown else "check ~/.aws/config and ~/.aws/credentials"
    return UsageError(f"AWS's settings can't be used: {text}", hint=where)
