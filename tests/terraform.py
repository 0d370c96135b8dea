"""Runs Terraform with the providers of this machine alone: a test fetches nothing."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Mapping

_PROVIDER = """
provider "aws" {
  region                      = "us-east-1"
  skip_credentials_validation = true
  skip_requesting_account_id  = true
  skip_metadata_api_check     = true
  endpoints {
%s  }
}
"""


class Terraform:
    """Terraform in a folder, against an endpoint of AWS's services.

    Its AWS provider is in a mirror in the folder TF_PLUGIN_DIR, or else in Terraform's own for plugins.
    """

    def __init__(self, folder: Path, endpoint: str, environment: Mapping[str, str]) -> None:
        self._plugins = os.environ.get("TF_PLUGIN_DIR", str(Path.home() / ".terraform.d" / "plugins"))
        settings = folder / "terraform.rc"
        settings.write_text(
            f'provider_installation {{\n  filesystem_mirror {{\n    path = "{self._plugins}"\n  }}\n}}\n'
        )
        services = ("autoscaling", "ec2", "iam", "sts")
        endpoints = "".join(f'    {service} = "{endpoint}"\n' for service in services)
        (folder / "provider.tf").write_text(_PROVIDER % endpoints)
        own = {"CHECKPOINT_DISABLE": "1", "TF_CLI_CONFIG_FILE": str(settings)}
        self._folder, self._env = folder, dict(os.environ) | dict(environment) | own

    def init(self) -> None:
        """Begin; skips the test where the provider is not on this machine."""
        if (begun := self("init", "-input=false")).returncode != 0:
            why = " ".join(begun.stderr.split())[:300]
            pytest.skip(f"terraform's AWS provider is not in {self._plugins} (TF_PLUGIN_DIR): {why}")

    def run(self, command: str, *arguments: str) -> str:
        """Return the output of a command that has to succeed."""
        done = self(command, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def __call__(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["terraform", command, "-no-color", *arguments],
            cwd=self._folder,
            env=self._env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
