"""What the Packer of this host can't do in an account, found out before anything is launched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ami_builder.aws.hints import DENIED
from ami_builder.aws.session import Account, aws_errors, code_of
from ami_builder.build import plugins
from ami_builder.config.schema import AwsSettings
from ami_builder.core.errors import CloudFailed, MissingTool
from ami_builder.core.options import Connect

# Plugins of AWS's SDK version 2, where each service has its own endpoint.
_OWN_ENDPOINTS_SINCE = (1, 8, 0)
_INSTALL = "install Packer 1.14 or later (developer.hashicorp.com/packer/install)"


def limits(account: Account, aws: AwsSettings, plugin: plugins.Plugin) -> Iterator[MissingTool]:
    """Yield an error for each thing that this Packer can't do with these settings. Raises CloudFailed."""
    if not plugins.has_plugins():
        name = f"Packer {plugins.dotted(plugins.version())}"
        if account.region.startswith(("us-gov-", "cn-")):
            # Its builder launches first, and tags then; the policy demands tags.
            yield MissingTool(
                f"{name} can't tag what it launches in {account.region} from the first call on, as in all"
                " regions of GovCloud and China",
                hint=_INSTALL,
            )
        defaults = metadata_defaults(account)
        # A launch that asks for nothing gets the account's default.
        if defaults.get("HttpTokensEnforced") == "enabled" and defaults.get("HttpTokens") != "required":
            yield MissingTool(
                f"the account enforces IMDSv2 in {account.region}, and {name} can't ask for it at a launch",
                hint=f"{_INSTALL}; or set the account's default of HttpTokens to required",
            )
        if defaults.get("HttpEndpoint") == "disabled":
            yield MissingTool(
                f"the account turns instance metadata off by default in {account.region}, which cloud-init"
                f" needs, and {name} can't turn it on at a launch",
                hint=f"{_INSTALL}; or set the account's default of HttpEndpoint to enabled",
            )
    if aws.connect is Connect.SESSION_MANAGER and not _has_own_endpoints(plugin):
        ec2, ssm = account.endpoint("ec2"), account.endpoint("ssm")
        if ec2 and ec2 != ssm:
            yield MissingTool(
                f"EC2's endpoint is {ec2}, and this Packer would send the calls to Session Manager there too",
                hint=f"{_INSTALL} with plugin amazon {plugins.dotted(_OWN_ENDPOINTS_SINCE)} or later, use the"
                " ordinary endpoint of EC2, or set aws.connect to ssh",
            )


def metadata_defaults(account: Account) -> Mapping[str, Any]:
    """Return the account's defaults for instance metadata; empty if they can't be read."""
    try:
        with aws_errors():
            return dict(account.ec2.get_instance_metadata_defaults().get("AccountLevel", {}))
    except CloudFailed as failed:
        # Clouds that imitate EC2, and some partitions, do not know it.
        if code_of(failed) in DENIED | {"InvalidAction", "UnsupportedOperation"}:
            return {}
        raise


def _has_own_endpoints(plugin: plugins.Plugin) -> bool:
    if not plugins.has_plugins():
        return False
    newest = max(plugins.installed(plugin), default=None)
    return newest is not None and newest[0] >= _OWN_ENDPOINTS_SINCE
