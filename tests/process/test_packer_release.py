"""Set-up fetches HashiCorp's release of Packer where the distribution has none, from a server on loopback."""

from __future__ import annotations

import hashlib
import io
import platform
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.fake_programs import fake
from tests.process.conftest import ROOT, Checkout

SYSTEM = f"{platform.system().lower()}_{'arm64' if platform.machine() in {'arm64', 'aarch64'} else 'amd64'}"
PACKER = f"packer_9.1.0_{SYSTEM}.zip"
PLUGIN = f"packer-plugin-qemu_9.2.0_{SYSTEM}.zip"
SUMS = "packer-plugin-qemu_9.2.0_SHA256SUMS"
AMAZON = f"packer-plugin-amazon_9.3.0_{SYSTEM}.zip"
PATHS = {PACKER: "/packer/9.1.0/", PLUGIN: "/packer-plugin-qemu/9.2.0/", SUMS: "/packer-plugin-qemu/9.2.0/"}

# Stores a plugin as Packer's `plugins install --path` does: by what the plugin says of itself, with its sum.
PACKER_PROGRAM = """#!/bin/sh
[ "$*" = "plugins install --path $4 $5" ] || { echo "unknown: $*" >&2; exit 1; }
folder="$PACKER_PLUGIN_PATH/$5"
mkdir -p "$folder"
cp "$4" "$folder/$("$4" describe)"
"""
PLUGIN_PROGRAM = "#!/bin/sh\necho packer-plugin-qemu_v9.2.0_x5.0_here\n"
INSTALLED = ".cache/tools/packer/plugins/github.com/hashicorp/qemu/packer-plugin-qemu_v9.2.0_x5.0_here"


def archive(**programs: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        made.writestr("LICENSE.txt", "terms")
        for name, content in programs.items():
            made.writestr(name.replace("__", "-"), content)
    return buffer.getvalue()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Releases:
    """A mirror of HashiCorp's site: `files` by name, of which those in `cut` break off in the middle."""

    address: str
    files: dict[str, bytes]
    cut: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def releases() -> Iterator[Releases]:
    packer = archive(packer=PACKER_PROGRAM)
    plugin = archive(packer__plugin__qemu_v9_x5_0=PLUGIN_PROGRAM)
    sums = f"{'0' * 64}  another.zip\n{sha256(plugin)}  {PLUGIN}\n".encode()
    amazon = archive(packer__plugin__amazon=PLUGIN_PROGRAM.replace("qemu_v9.2.0", "amazon_v9.3.0"))
    mirror = Releases("", {PACKER: packer, PLUGIN: plugin, SUMS: sums, AMAZON: amazon})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            mirror.asked.append(self.path)
            name = self.path.rpartition("/")[2]
            content = mirror.files.get(name, b"")
            self.send_response(200 if name in mirror.files else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if name in mirror.cut else content)

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        mirror.address = f"http://127.0.0.1:{server.server_port}"
        yield mirror
        server.shutdown()
        thread.join()


@pytest.fixture
def host(checkout: Checkout, releases: Releases) -> Checkout:
    """A host whose distribution has no package of Packer."""
    checkout.environ |= {"NO_PACKAGE": "packer", "AMI_BUILDER_RELEASES": f"{releases.address}/"}
    (checkout.root / "scripts/packer.txt").write_text(
        f"# a comment\n{sha256(releases.files[PACKER])} {PACKER}\n{SUMS} {PLUGIN}\n"
        f"{sha256(releases.files[AMAZON])} {AMAZON}\n{'0' * 64} packer_9.1.0_plan9_mips.zip\n"
    )
    return checkout


def downloads(host: Checkout) -> Path:
    return host.root / ".cache/tools/packer/downloads"


def installed(host: Checkout) -> bool:
    return (host.root / ".cache/tools/packer/bin/packer").exists()


def packages_were_installed(host: Checkout) -> bool:
    return any(" install " in line for line in host.calls("apt-get"))


def test_the_release_is_fetched_and_reported(host: Checkout, releases: Releases) -> None:
    status, out, err = host.run("build")
    assert (status, out) == (0, "<build>\n"), err
    assert "downloading packer 9.1.0 from HashiCorp (licence BUSL-1.1; " in err
    assert "downloading packer-plugin-qemu 9.2.0 from HashiCorp (licence MPL-2.0; " in err
    assert "installing system packages: qemu-utils\n" in err
    assert releases.asked == [PATHS[name] + name for name in (PACKER, SUMS, PLUGIN)]
    assert (host.root / INSTALLED).read_text() == PLUGIN_PROGRAM
    assert (host.root / ".cache/tools/packer/bin/packer").stat().st_mode & 0o777 == 0o755
    assert {each.name for each in (host.root / ".cache/tools/packer").iterdir()} == {
        "bin",
        "plugins",
        "packer.txt",
        "qemu.txt",
    }
    host.forget()
    assert host.run("list") == (0, "<list>\n", "")
    assert len(releases.asked) == 3


def test_each_target_gets_its_own_plugin(host: Checkout, releases: Releases) -> None:
    assert host.run("build", "--target", "aws")[0] == 0
    assert [path.rpartition("/")[2] for path in releases.asked] == [PACKER, AMAZON]
    releases.asked.clear()
    assert host.run("build")[0] == 0
    assert [path.rpartition("/")[2] for path in releases.asked] == [SUMS, PLUGIN]
    releases.asked.clear()
    assert host.run("build", "--target", "aws")[2] == host.run("build")[2] == ""
    assert {each.name for each in (host.root / INSTALLED).parents[1].iterdir()} == {"qemu", "amazon"}


def test_it_is_fetched_again_when_the_pin_changes(host: Checkout, releases: Releases) -> None:
    host.run("build")
    newer = archive(packer=PACKER_PROGRAM + "# newer\n")
    releases.files[PACKER.replace("9.1.0", "9.1.1")] = newer
    (host.root / "scripts/packer.txt").write_text(
        f"{sha256(newer)} {PACKER.replace('9.1.0', '9.1.1')}\n{SUMS} {PLUGIN}\n"
    )
    status, _, err = host.run("build")
    assert status == 0
    assert "downloading packer 9.1.1 " in err
    assert (host.root / ".cache/tools/packer/bin/packer").read_text().endswith("# newer\n")


@pytest.mark.parametrize("own", [False, True])
def test_its_plugins_are_found_unless_the_user_names_a_folder(host: Checkout, own: bool) -> None:
    fake(
        host.bin,
        "python3",
        (host.bin / "python3").read_text().replace("shift 3;", 'echo "$PACKER_PLUGIN_PATH";'),
    )
    if own:
        host.environ["PACKER_PLUGIN_PATH"] = "/mine"
    expected = "/mine" if own else str(host.root / ".cache/tools/packer/plugins")
    for _ in ("new", "installed"):
        assert host.run("build")[1].splitlines()[0] == expected


def test_a_packer_of_the_system_keeps_its_own_plugins(checkout: Checkout, releases: Releases) -> None:
    checkout.environ["AMI_BUILDER_RELEASES"] = releases.address
    fake(
        checkout.bin,
        "python3",
        (checkout.bin / "python3").read_text().replace("shift 3;", 'echo "$PACKER_PLUGIN_PATH";'),
    )
    assert checkout.run("build")[1].splitlines()[0] == ""
    assert releases.asked == []


@pytest.mark.parametrize("name", [PACKER, PLUGIN])
def test_a_file_with_another_checksum_is_refused(host: Checkout, releases: Releases, name: str) -> None:
    releases.files[name] = archive(packer="#!/bin/sh\n")
    status, _, err = host.run("build")
    assert status == 3
    assert "HashiCorp's release could not be fetched. Nothing has been changed." in err
    assert f"{PATHS[name]}{name}: it has the sha256 {sha256(releases.files[name])}, and " in err
    assert not installed(host)
    assert not (downloads(host) / name).exists()
    assert not packages_were_installed(host)


@pytest.mark.parametrize("name", [PACKER, PLUGIN])
def test_a_download_that_is_cut_off_leaves_nothing_and_is_repeated(
    host: Checkout, releases: Releases, name: str
) -> None:
    releases.cut = {name}
    status, _, err = host.run("build")
    assert status == 3
    size = len(releases.files[name])
    assert f"{name}: only {size // 2} of {size} bytes arrived" in err
    assert "Nothing has been changed" in err
    assert not installed(host)
    assert not packages_were_installed(host)
    assert not (host.root / ".cache").exists()
    releases.cut = set()
    assert host.run("build")[0] == 0
    assert installed(host)


def test_without_a_network_it_names_the_files_and_takes_them_when_they_are_there(
    host: Checkout, releases: Releases
) -> None:
    nobody = "http://127.0.0.1:9"
    host.environ["AMI_BUILDER_RELEASES"] = nobody
    before = set(host.root.rglob("*"))
    status, _, err = host.run("build")
    assert status == 3
    assert "Connection refused" in err
    assert "Nothing has been changed" in err
    assert f"put these files into {downloads(host)}\n" in err
    assert re.findall(r"^ +(http\S+zip|http\S+SUMS)$", err, re.M) == [
        f"{nobody}{PATHS[name]}{name}" for name in (PACKER, PLUGIN, SUMS)
    ]
    assert set(host.root.rglob("*")) == before
    assert not packages_were_installed(host)

    downloads(host).mkdir(parents=True)
    (downloads(host) / PACKER).write_bytes(releases.files[PACKER])
    _, _, err = host.run("build")
    assert f"{PATHS[PACKER]}{PACKER}\n" not in err, "it is there"
    assert f"{PATHS[PLUGIN]}{PLUGIN}\n" in err
    for name in (PLUGIN, SUMS):
        (downloads(host) / name).write_bytes(releases.files[name])
    status, _, err = host.run("build")
    assert (status, releases.asked) == (0, []), err
    assert (host.root / INSTALLED).exists()
    assert (downloads(host) / PACKER).exists(), "what the user put there is kept"


def test_files_put_by_hand_need_no_network_of_apt(host: Checkout, releases: Releases) -> None:
    host.environ |= {"AMI_BUILDER_RELEASES": "http://127.0.0.1:9", "APT_OFFLINE": "yes"}
    _, _, err = host.run("build")
    assert "E: Could not resolve the mirror" not in err, "its lists have all but Packer"
    assert f"put these files into {downloads(host)}\n" in err
    downloads(host).mkdir(parents=True)
    for name in (PACKER, PLUGIN, SUMS):
        (downloads(host) / name).write_bytes(releases.files[name])
    assert host.run("build")[:2] == (0, "<build>\n")
    assert installed(host)


@pytest.mark.parametrize("name", [PACKER, PLUGIN])
def test_a_file_put_by_hand_is_checked_too(host: Checkout, name: str) -> None:
    downloads(host).mkdir(parents=True)
    (downloads(host) / name).write_bytes(b"something else")
    status, _, err = host.run("build")
    assert status == 3
    assert (
        f"{downloads(host) / name}: remove it, because it has the sha256 {sha256(b'something else')}" in err
    )
    assert (downloads(host) / name).exists()
    assert not installed(host)


def test_a_list_without_the_plugin_is_refused(host: Checkout, releases: Releases) -> None:
    releases.files[SUMS] = f"{'0' * 64}  another.zip\n".encode()
    assert f"has no sum of {PLUGIN}" in host.run("build")[2]
    assert not installed(host)


def test_a_plugin_can_be_pinned_too(host: Checkout, releases: Releases) -> None:
    pins = host.root / "scripts/packer.txt"
    pins.write_text(pins.read_text().replace(SUMS, "0" * 64))
    assert f"and {'0' * 64} is expected" in host.run("build")[2]
    pins.write_text(
        pins.read_text().replace(f"{'0' * 64} {PLUGIN}", f"{sha256(releases.files[PLUGIN])} {PLUGIN}")
    )
    assert host.run("build")[0] == 0
    assert PATHS[SUMS] + SUMS not in releases.asked


def test_a_packer_that_does_not_run_is_not_installed(host: Checkout, releases: Releases) -> None:
    broken = archive(packer="#!/bin/sh\necho 'wrong libc' >&2; exit 1\n")
    releases.files[PACKER] = broken
    (host.root / "scripts/packer.txt").write_text(f"{sha256(broken)} {PACKER}\n{SUMS} {PLUGIN}\n")
    status, _, err = host.run("build")
    assert status == 3
    assert "Packer can't run here" in err
    assert "wrong libc" in err
    assert not installed(host)


def test_the_proxy_is_used(host: Checkout, releases: Releases) -> None:
    host.environ |= {"AMI_BUILDER_RELEASES": "http://releases.invalid", "http_proxy": releases.address}
    assert host.run("build")[0] == 0
    assert releases.asked[0] == f"http://releases.invalid{PATHS[PACKER]}{PACKER}"


def test_other_distributions_get_it_too(host: Checkout) -> None:
    for name in ("apt-get", "apt-cache"):
        (host.bin / name).unlink()
    fake(host.bin, "qemu-img", "")
    assert host.run("build")[:2] == (0, "<build>\n")
    assert installed(host)


def test_an_unknown_system_is_told_to_install_packer(host: Checkout) -> None:
    (host.root / "scripts/packer.txt").write_text(f"{'0' * 64} packer_9.1.0_plan9_mips.zip\n")
    status, _, err = host.run("build")
    assert status == 3
    assert f"scripts/packer.txt has no release for {SYSTEM}" in err
    assert "install Packer 1.9 or newer" in err


def test_python_comes_first_where_it_is_missing(host: Checkout) -> None:
    python = (host.bin / "python3").read_text()
    (host.bin / "python3").unlink()
    apt = (host.bin / "apt-get").read_text()
    saved = fake(host.root.parent, "saved-python", python)
    fake(
        host.bin,
        "apt-get",
        f'{apt}\ncase "$*" in *python3-venv*) cp "{saved}" "$(dirname "$0")/python3" ;; esac\n',
    )
    status, _, err = host.run("build")
    assert status == 0, err
    assert err.index("installing system packages: qemu-utils python3 python3-venv") < err.index(
        "downloading packer"
    )


def test_every_system_has_all_pins() -> None:
    rows = [line.split() for line in (ROOT / "scripts/packer.txt").read_text().splitlines() if line[0] != "#"]
    names = ("packer", "packer-plugin-qemu", "packer-plugin-amazon")
    systems = {"darwin_amd64", "darwin_arm64", "linux_amd64", "linux_arm64"}
    found = {
        name: {
            "_".join(file.removesuffix(".zip").split("_")[2:])
            for _, file in rows
            if file.startswith(f"{name}_")
        }
        for name in names
    }
    assert found == dict.fromkeys(names, systems)
    assert all(
        re.fullmatch(r"[0-9a-f]{64}|packer-plugin-\w+_[\d.]+_SHA256SUMS", digest) for digest, _ in rows
    )
