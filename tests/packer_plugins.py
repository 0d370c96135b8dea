"""Skips tests whose plugin the Packer on PATH does not find."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ami_builder.build import plugins

if TYPE_CHECKING:
    from ami_builder.build import packer


def needs_plugin(source: packer.Source) -> None:
    """Skip this test if Packer has plugins, and not the one of this source."""
    if plugins.has_plugins() and not any(plugins.installed(source.plugin)):
        pytest.skip(
            f"plugin {source.plugin.name} is not installed: packer plugins install {source.plugin.source}"
        )
