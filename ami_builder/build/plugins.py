"""The Packer program at hand: its version, its environment, and the plugin that a target needs.

Two families are supported. 1.6.6 is Debian 12's, with its builders built in. Since 1.9 they are plugins,
which Packer downloads (`packer init`). The versions between them can't install plugins any more: HashiCorp
has moved these to a site that they don't know.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ami_builder.core.errors import MissingTool
from ami_builder.system import processes

Version = tuple[int, ...]

_BUILT_IN = (1, 6, 6)
_PLUGINS_SINCE = (1, 9, 0)
# These three install a plugin from a file, and from the site where HashiCorp publishes plugins today.
_FILES_SINCE = (1, 11, 0)
_INSTALL = (
    "install Packer 1.14 or later (developer.hashicorp.com/packer/install); Debian 12's 1.6.6 works too"
)

# Where Packer looks for plugins and its settings, and the token that raises GitHub's limit of requests.
_KEPT = (
    "PACKER_PLUGIN_PATH", "PACKER_CONFIG_DIR", "PACKER_CONFIG", "XDG_CONFIG_HOME", "PACKER_GITHUB_API_TOKEN",
    "SSL_CERT_DIR",
)  # fmt: skip

_FILE = re.compile(r"packer-plugin-(?P<name>[\w-]+?)_v(?P<version>\d+\.\d+\.\d+)_x\d+\.\d+_\w+$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    """A plugin of Packer that a target needs, and the versions of it that are known to work."""

    name: str
    oldest: Version
    below: Version = (2, 0, 0)

    @property
    def source(self) -> str:
        """Its address, as Packer's commands and templates take it."""
        return f"github.com/hashicorp/{self.name}"

    @property
    def versions(self) -> str:
        """The versions that are accepted, as Packer writes them."""
        return f">= {dotted(self.oldest)}, < {dotted(self.below)}"

    @property
    def block(self) -> str:
        """The block of a template that requires it."""
        return (
            "packer {\n  required_plugins {\n"
            f"    {self.name} = {{\n"
            f'      source  = "{self.source}"\n'
            f'      version = "{self.versions}"\n'
            "    }\n"
            "  }\n}\n"
        )


@cache
def version() -> Version:
    """Return Packer's version. Raises MissingTool without Packer, and for a version that is not supported."""
    text = processes.output(["packer", "version"], env=environment(), error=MissingTool)
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", text)
    if found is None:
        raise MissingTool("`packer version` prints no version: this is another program", hint=_INSTALL)
    numbers = tuple(int(n) for n in found.groups())
    if numbers < _BUILT_IN:
        raise MissingTool(f"Packer {found[0]} is too old", hint=_INSTALL)
    if _BUILT_IN < numbers < _PLUGINS_SINCE:
        raise MissingTool(f"Packer {found[0]} can't install the plugins that a build needs", hint=_INSTALL)
    return numbers


def has_plugins() -> bool:
    """Return whether this Packer has its builders in plugins, unlike 1.6.6."""
    return version() >= _PLUGINS_SINCE


def environment() -> dict[str, str]:
    """Return the environment that Packer runs in. Raises MissingTool if the user has no home folder.

    It has GitHub's token, if there is one: log only names of it.
    """
    kept = processes.environment({k: os.environ[k] for k in _KEPT if k in os.environ})
    if not kept.get("HOME"):
        try:
            kept["HOME"] = str(Path.home())
        except RuntimeError as unknown:
            raise MissingTool(
                "Packer needs a home folder: HOME is not set, and this user has none",
                hint="set HOME to a folder that you can write to",
            ) from unknown
    return kept | {"CHECKPOINT_DISABLE": "1", "PACKER_NO_COLOR": "1"}


def installed(plugin: Plugin) -> Iterator[tuple[Version, Path]]:
    """Yield the accepted versions of a plugin that Packer finds on this host, and where they are."""
    for line in processes.output(["packer", "plugins", "installed"], env=environment()).splitlines():
        path = Path(line.strip())
        if (found := _FILE.fullmatch(path.name)) and found["name"] == plugin.name:
            numbers = tuple(int(n) for n in found["version"].split("."))
            if plugin.oldest <= numbers < plugin.below:
                yield numbers, path


def dotted(numbers: Version) -> str:
    """Return a version as text, such as 1.14.3."""
    return ".".join(map(str, numbers))
