"""Fetches HashiCorp's releases of Packer and of plugins, as pinned in scripts/packer.txt.

Set-up runs `packer_release.py ROOT PLUGIN...` with the host's own Python (3.11 or newer) before there is a
virtual environment, so it imports only the standard library. Progress goes to stderr, and an error to stdout,
for set-up to report.

Installs .cache/tools/packer/bin/packer, and plugins beside it. Files that a person put into
.cache/tools/packer/downloads are used in place of the network. Environment: AMI_BUILDER_RELEASES (a mirror),
https_proxy.
"""

import hashlib
import http.client
import os
import platform
import re
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

RELEASES = "https://releases.hashicorp.com"
PLUGIN = "packer-plugin-"
_ARCHITECTURES = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}
_LIST = "_SHA256SUMS"
_OWN_PACKER = "Or install Packer 1.9 or newer by yourself: if it is on PATH, it is used as it is."
_SECONDS = 60.0


class Unavailable(Exception):
    """A file can't be had, or is not what HashiCorp published."""


def pins(text: str, system: str) -> dict[str, str]:
    """Return file -> sha256, or the name of the list that has it, for a system such as `linux_amd64`."""
    rows = (line.split() for line in text.splitlines() if line and not line.startswith("#"))
    return {file: digest for digest, file in rows if file.endswith(f"_{system}.zip")}


def url(file: str) -> str:
    """Return where a file of a release is: NAME/VERSION/FILE, on HashiCorp's site or a mirror of it."""
    name, version = file.split("_")[:2]
    return f"{(os.environ.get('AMI_BUILDER_RELEASES') or RELEASES).rstrip('/')}/{name}/{version}/{file}"


def sha256(path: Path) -> str:
    """Return the digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(file: str, folder: Path) -> Path:
    """Return the path of a file in `folder`; a file that is there is not fetched. Raises Unavailable."""
    path = folder / file
    if path.exists():
        return path
    partial = folder / f".{file}.{os.getpid()}"
    try:
        with urllib.request.urlopen(url(file), timeout=_SECONDS) as answer, partial.open("wb") as out:
            size = int(answer.headers.get("Content-Length") or 0)
            name, version = file.split("_")[:2]
            if file.endswith(".zip"):
                licence = "BUSL-1.1" if name == "packer" else "MPL-2.0"
                about = f"from HashiCorp (licence {licence}; {size / 1e6:.0f} MB)"
                print(f"==> downloading {name} {version} {about}", file=sys.stderr)
            shutil.copyfileobj(answer, out)
        if size and partial.stat().st_size != size:
            raise Unavailable(f"{url(file)}: only {partial.stat().st_size} of {size} bytes arrived")
        partial.rename(path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Unavailable(f"{url(file)}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def fetch(file: str, expected: str, folder: Path) -> Path:
    """Return the path of an archive in `folder` after comparing its sum. Raises Unavailable."""
    by_hand = (folder / file).exists()
    if expected.endswith(_LIST):
        lines = download(expected, folder).read_text().splitlines()
        known = {name: digest for digest, name in (line.split() for line in lines if line.strip())}
        if file not in known:
            raise Unavailable(f"{url(expected)}: it has no sum of {file}")
        expected = known[file]
    path = download(file, folder)
    if (found := sha256(path)) != expected:
        where = f"{path}: remove it, because it" if by_hand else f"{url(file)}: it"
        raise Unavailable(f"{where} has the sha256 {found}, and {expected} is expected")
    return path


def unpack(archive: Path, name: str, folder: Path) -> Path:
    """Unpack a program, whose file name begins with `name`, and return its path. Raises Unavailable."""
    with zipfile.ZipFile(archive) as contents:
        for member in contents.infolist():
            if re.fullmatch(rf"{name}(_v[^/]*)?", member.filename):
                contents.extract(member, folder)
                program = folder / member.filename
                program.chmod(0o755)
                return program
    raise Unavailable(f"{archive} has no program {name}")


def install(archives: Mapping[str, Path], folder: Path) -> None:
    """Put the programs in place, Packer last. Raises Unavailable if they don't run."""
    fresh = folder / "new"
    shutil.rmtree(fresh, ignore_errors=True)
    programs = {name: unpack(archive, name, fresh) for name, archive in archives.items()}
    packer = programs.pop("packer", folder / "bin/packer")
    environment = {
        "PACKER_PLUGIN_PATH": str(folder / "plugins"),
        "CHECKPOINT_DISABLE": "1",
        "HOME": str(fresh),
    }
    for name, program in programs.items():
        # Packer names the plugin by what it says of itself, and stores its sum.
        source = f"github.com/hashicorp/{name.removeprefix(PLUGIN)}"
        command: list[str | Path] = [packer, "plugins", "install", "--path", program, source]
        try:
            subprocess.run(
                command,
                env={**os.environ, **environment},
                check=True,
                capture_output=True,
                text=True,
                errors="replace",
            )
        except (OSError, subprocess.CalledProcessError) as error:
            output = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else ""
            raise Unavailable(f"Packer can't run here: {error}\n{output}".rstrip()) from error
    (folder / "bin").mkdir(exist_ok=True)
    packer.rename(folder / "bin/packer")
    shutil.rmtree(fresh)


def main(root: Path, plugins: Sequence[str]) -> None:
    """Fetch and install Packer and plugins as scripts/packer.txt pins them. Raises Unavailable."""
    folder = root / ".cache/tools/packer"
    downloads = folder / "downloads"
    architecture = _ARCHITECTURES.get(platform.machine().lower(), platform.machine())
    system = f"{platform.system().lower()}_{architecture}"
    listed = (root / "scripts/packer.txt").read_text()
    # What is installed has beside it the text that pinned it, which set-up compares too.
    stamps = {"packer": folder / "packer.txt"}
    stamps |= {f"{PLUGIN}{plugin}": folder / f"{plugin}.txt" for plugin in plugins}
    fresh = {name for name, stamp in stamps.items() if stamp.exists() and stamp.read_text() == listed}
    known = pins(listed, system)
    wanted = {
        file: digest
        for file, digest in known.items()
        if (name := file.split("_")[0]) in stamps and name not in fresh
    }
    if not known:
        raise Unavailable(f"scripts/packer.txt has no release for {system}. {_OWN_PACKER}")
    lists = {digest for digest in wanted.values() if digest.endswith(_LIST)}
    absent = [file for file in (*wanted, *sorted(lists)) if not (downloads / file).exists()]
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        archives = {file.split("_")[0]: fetch(file, digest, downloads) for file, digest in wanted.items()}
        install(archives, folder)
        for name in archives:
            stamps[name].write_text(listed)
    except (Unavailable, OSError) as error:
        raise Unavailable(f"{error}\n{advice(str(error), absent, downloads)}") from error
    finally:
        for file in absent:
            (downloads / file).unlink(missing_ok=True)
        with suppress(OSError):
            os.removedirs(downloads)


def advice(error: str, absent: Sequence[str], downloads: Path) -> str:
    """Return what to do about an error: certificates, files to put in place by hand, a proxy, a mirror."""
    lines = []
    if "CERTIFICATE_VERIFY_FAILED" in error:
        lines.append("Are the certificates of authorities installed (in Debian: ca-certificates)?")
    if absent:
        lines += [
            f"Without a network, put these files into {downloads}",
            *(f"  {url(file)}" for file in absent),
        ]
    lines += ["A proxy is named by https_proxy, and a mirror by AMI_BUILDER_RELEASES.", _OWN_PACKER]
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2:])
    except (Unavailable, OSError) as failed:
        print(failed)
        sys.exit(3)
