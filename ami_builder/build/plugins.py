"""The Packer program at hand: its version, its environment, and the plugin that a target needs.

Two families are supported. 1.6.6 is Debian 12's, with its builders built in. Since 1.9 they are plugins,
which Packer downloads (`packer init`). HashiCorp publishes new plugins only on a site that 1.14 and later
know: 1.9 to 1.13 install older ones from GitHub, and most versions before 1.9 fail at that.
"""

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from ami_builder.core.errors import BuildFailed, MissingTool, TimedOut
from ami_builder.core.records import Finding, State
from ami_builder.system import processes

Version = tuple[int, ...]

_BUILT_IN = (1, 6, 6)
_PLUGINS_SINCE = (1, 9, 0)
# This version and later can install a plugin from a file.
_FILES_SINCE = (1, 11, 0)
_INSTALL = (
    "install Packer 1.14 or later (developer.hashicorp.com/packer/install); Debian 12's 1.6.6 works too"
)

# Where Packer asks for plugins: HashiCorp's own site since 1.14, GitHub before.
_SITE, _OLD_SITE = "releases.hashicorp.com", "api.github.com"
_SITE_SINCE = (1, 14, 0)
_REACH_SECONDS = 10.0
_INIT_SECONDS = 300.0

# Where Packer finds plugins, its settings and certificates.
_KEPT = ("PACKER_PLUGIN_PATH", "PACKER_CONFIG_DIR", "PACKER_CONFIG", "XDG_CONFIG_HOME", "SSL_CERT_DIR")
_TOKEN = "PACKER_GITHUB_API_TOKEN"  # noqa: S105 - the name of a variable

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
    text = _answer("version")
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", text)
    if found is None:
        raise MissingTool("`packer version` prints no version: this is another program", hint=_INSTALL)
    numbers = tuple(int(n) for n in found.groups())
    if numbers < _BUILT_IN:
        raise MissingTool(f"Packer {found[0]} is too old", hint=_INSTALL)
    if _BUILT_IN < numbers < _PLUGINS_SINCE:
        raise MissingTool(f"Packer {found[0]} is not supported: 1.6.6 is, and 1.9 or later", hint=_INSTALL)
    return numbers


def has_plugins() -> bool:
    """Return whether this Packer has its builders in plugins, unlike 1.6.6."""
    return version() >= _PLUGINS_SINCE


def environment() -> dict[str, str]:
    """Return the environment that Packer runs in. Raises MissingTool if the user has no home folder."""
    kept = processes.environment({k: os.environ[k] for k in _KEPT if os.environ.get(k)})
    if not kept.get("HOME"):
        # Without it Packer does not even tell its version.
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
    for line in _answer("plugins", "installed").splitlines():
        path = Path(line.strip())
        if (found := _FILE.fullmatch(path.name)) and found["name"] == plugin.name:
            numbers = tuple(int(n) for n in found["version"].split("."))
            if plugin.oldest <= numbers < plugin.below:
                yield numbers, path


def require(plugin: Plugin, work: Path, log: Path) -> None:
    """Let Packer install a plugin, unless it finds an accepted version. A build begins with this.

    `work` is a folder for the template that requires it.

    Raises MissingTool if that fails, and at once if the site that has plugins can't be reached; TimedOut.
    """
    if not has_plugins() or any(installed(plugin)):
        return
    with _one_at_a_time():
        if any(installed(plugin)):
            return
        if problem := _unreachable():
            raise MissingTool(f"{_missing(plugin)}; {problem}", hint=_mend(plugin))
        template = work / "plugin.pkr.hcl"
        template.write_text(plugin.block)
        # GitHub allows few requests without a token. No other command gets it.
        token = {_TOKEN: os.environ[_TOKEN]} if os.environ.get(_TOKEN) else {}
        try:
            processes.stream(
                ["packer", "init", template.name],
                log=log,
                what="packer init",
                env=environment() | token,
                cwd=work,
                timeout=_INIT_SECONDS,
            )
        except BuildFailed as failed:
            raise MissingTool(
                f"{_missing(plugin)}, and installing it failed: {failed.message}",
                hint=failed.hint or _mend(plugin),
                log=failed.log,
                tail=failed.tail,
            ) from failed


def findings(plugin: Plugin) -> Iterator[Finding]:
    """Yield what `ami-builder check` says of Packer and of the plugin that a target needs."""
    numbers = version()
    yield Finding(name="packer", state=State.OK, found=f"{dotted(numbers)} ({processes.find('packer')})")
    name = f"packer plugin {plugin.name}"
    if not has_plugins():
        yield Finding(name=name, state=State.OK, found=f"built into Packer {dotted(numbers)}")
    elif found := max(installed(plugin), default=None):
        yield Finding(name=name, state=State.OK, found=f"{dotted(found[0])} ({found[1]})")
    elif problem := _unreachable():
        text = f"{_missing(plugin)}; {problem}"
        exit_code = MissingTool.exit_code
        yield Finding(name=name, state=State.STOPS, found=text, hint=_mend(plugin), exit_code=exit_code)
    else:
        hint = f"a build installs it; or run {_install(plugin)}"
        yield Finding(name=name, state=State.NOTE, found=_missing(plugin), hint=hint)


def dotted(numbers: Version) -> str:
    """Return a version as text, such as 1.14.3."""
    return ".".join(map(str, numbers))


def _answer(*arguments: str) -> str:
    name = " ".join(("packer", *arguments))
    done = processes.capture(["packer", *arguments], what=name, env=environment())
    if done.status != 0:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise MissingTool(
            f"`{name}` failed (exit status {done.status}): {' '.join(lines[:2])}",
            hint="check PACKER_PLUGIN_PATH, PACKER_CONFIG and PACKER_CONFIG_DIR, if they are set",
        )
    return done.stdout


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Wait until no other ami-builder of this user installs a plugin."""
    lock = FileLock(user_cache_path("ami-builder") / "packer-init.lock", timeout=2 * _INIT_SECONDS)
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as late:
        raise TimedOut(f"another ami-builder is installing a plugin of Packer ({lock.lock_file})") from late
    except OSError:
        # A user who can't write there, such as a service, can't install a plugin either: Packer says so.
        pass
    try:
        yield
    finally:
        lock.release()


def _unreachable() -> str:
    """Return why the site that has plugins can't be reached, or nothing; a proxy counts in its place."""
    site = _SITE if version() >= _SITE_SINCE else _OLD_SITE
    host, port = site, 443
    proxy = "" if proxy_bypass(site) else getproxies().get("https", "")
    if proxy:
        parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
        host, port = parts.hostname or site, parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((host, port), timeout=_REACH_SECONDS).close()
    except OSError as error:
        through = f" through the proxy {host}:{port}" if proxy else ""
        return f"{site} can't be reached{through} ({error.strerror or error})"
    return ""


def _missing(plugin: Plugin) -> str:
    return f"Packer {dotted(version())} has no plugin {plugin.name} {plugin.versions}"


def _install(plugin: Plugin) -> str:
    return f'`packer plugins install {plugin.source} "{plugin.versions}"`'


def _mend(plugin: Plugin) -> str:
    """Return the command that installs a plugin, with a network and without."""
    if version() >= _FILES_SINCE:
        offline = f"run `packer plugins install --path FILE {plugin.source}`"
    else:
        offline = f"put it with its _SHA256SUM into the folder {plugin.source} of Packer's plugin folder"
    return (
        f"with a network run {_install(plugin)}; without one get packer-plugin-{plugin.name} from "
        f"https://{_SITE}/packer-plugin-{plugin.name}/ elsewhere, unpack it, and {offline}"
    )
