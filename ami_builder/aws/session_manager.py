"""Session Manager: ssh to an instance that has no open port, through AWS's own tunnel."""

from __future__ import annotations


def proxy_command(instance: str, region: str) -> str:
    """Return the ssh ProxyCommand that reaches an instance, by the AWS CLI and its session-manager-plugin."""
    return (
        f"aws ssm start-session --region {region} --target {instance} "
        "--document-name AWS-StartSSHSession --parameters portNumber=%p"
    )
