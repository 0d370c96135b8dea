"""The scripts that Packer runs, in a folder that they take for / and with fake programs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from ami_builder.build import container
from ami_builder.config.schema import ImageSettings
from ami_builder.console import Mode, open_progress
from ami_builder.core.options import ContainerSource
from ami_builder.state.workspace import Workspace
from ami_builder.system import resources
from tests.fake_programs import calls, fake

# dd too: a mistake here must not fill this machine's disk.
PROGRAMS = ("systemctl", "journalctl", "fstrim", "sync", "findmnt", "debugfs", "mount", "chattr", "dd")


def _run(name: str, programs: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", resources.packer_dir() / "provisioners" / name],
        env={"PATH": f"{programs}:{os.environ['PATH']}", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    for name in PROGRAMS:
        fake(tmp_path / "programs", name, "")
    return tmp_path / "programs"


LEFT = (
    "etc/ssh/ssh_host_ed25519_key",
    "etc/ssh/ssh_host_ed25519_key.pub",
    "root/.ssh/authorized_keys",
    "root/.bash_history",
    "home/admin/.ssh/authorized_keys",
    "home/admin/.ssh/authorized_keys2",
    "home/admin/.ssh/known_hosts",
    "home/admin/.python_history",
    "home/admin/.cache/motd",
    "var/lib/dbus/machine-id",
    "var/lib/systemd/random-seed",
    "var/lib/systemd/credential.secret",
    "var/lib/systemd/timers/stamp-apt-daily.timer",
    "var/lib/cloud/instance/user-data.txt",
    "var/lib/cloud/data/instance-id",
    "var/lib/dhcp/dhclient.eth0.leases",
    "var/lib/docker/engine-id",
    "var/lib/dask/spill/old",
    "etc/dask/tls/ca.pem",
    "etc/dask/tls/key.pem",
    "etc/dask/tls/.old/key.pem",
    "run/dask/private/tls/key.pem",
    "var/lib/ami-builder/nonce",
    "var/lib/apt/lists/deb_dists_trixie_InRelease",
    "var/cache/apt/pkgcache.bin",
    "var/cache/apt/archives/tini.deb",
    "var/log/journal/0123/system.journal",
    "var/log/cloud-init.log",
    "var/log/apt/history.log",
    "etc/netplan/50-cloud-init.yaml",
    "tmp/something",
    "var/tmp/guest.tar",
    "tmp/script_1234.sh",
    "var/tmp/left",
)
KEPT = (
    "var/cache/apparmor/26b63962.0/docker-default",
    "etc/ssh/sshd_config",
    "home/admin/.bashrc",
    "var/lib/docker/image/overlay2/repositories.json",
    "tmp/systemd-private-1-chrony.service-x/tmp/file",
    "etc/dask/compose.yaml",
)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    root = tmp_path / "machine"
    for name in (*LEFT, *KEPT):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("something")
    (root / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    (root / "etc/passwd").write_text(
        "root:x:0:0::/root:/bin/bash\nnobody:x:65534:65534::/nonexistent:/usr/sbin/nologin\n"
        "odd:x:7:7::/:/bin/sh\nadmin:x:1000:1000::/home/admin:/bin/bash\n"
    )
    return root


def test_cleaning_leaves_nothing_of_the_machine(machine: Path, programs: Path) -> None:
    done = _run("90-clean.sh", programs, CLEAN_ROOT=str(machine))
    assert done.returncode == 0, done.stderr
    left = [name for name in LEFT if (machine / name).exists() and name != "var/lib/dbus/machine-id"]
    assert left == []
    assert [name for name in KEPT if not (machine / name).exists()] == []
    assert (machine / "etc/machine-id").read_text() == ""
    assert (machine / "var/lib/dbus/machine-id").readlink() == Path("/etc/machine-id")
    assert (machine / "var/log/journal").is_dir(), "without it the journal would not be kept"


def test_cleaning_keeps_a_shutdown_from_writing_again(machine: Path, programs: Path) -> None:
    _run("90-clean.sh", programs, CLEAN_ROOT=str(machine))
    assert calls(programs, "systemctl") == ["stop systemd-random-seed.service"]
    assert calls(programs, "journalctl") == ["--relinquish-var"]
    assert calls(programs, "fstrim") == ["--all --quiet-unsupported"]


def test_identity_is_overwritten_where_it_was(machine: Path, programs: Path, tmp_path: Path) -> None:
    names = (
        "etc/machine-id",
        "etc/ssh/ssh_host_ed25519_key",
        "home/admin/.ssh/authorized_keys",
        "etc/dask/tls/key.pem",
    )
    for number, name in enumerate(names):
        (tmp_path / f"same-{number}").hardlink_to(machine / name)
    other = tmp_path / "other"
    other.write_text("other")
    (machine / "var/lib/dbus/machine-id").unlink()
    (machine / "var/lib/dbus/machine-id").symlink_to(other)
    done = _run("90-clean.sh", programs, CLEAN_ROOT=str(machine))
    assert done.returncode == 0, done.stderr
    left = [(tmp_path / f"same-{number}").read_bytes() for number in range(len(names))]
    assert {text.strip(b"\0") for text in left} == {b""}
    assert [len(text) > 0 for text in left] == [False, True, True, True], "machine-id is emptied too"
    assert other.read_text() == "other", "what a link leads to stays"


def test_logs_that_a_program_has_open_are_empty(machine: Path, programs: Path) -> None:
    with (machine / "var/log/cloud-init.log").open("rb") as file:
        _run("90-clean.sh", programs, CLEAN_ROOT=str(machine))
        assert file.read() == b""


def test_a_folder_has_no_free_space_of_its_own(machine: Path, programs: Path) -> None:
    (programs / "findmnt").unlink()
    assert _run("90-clean.sh", programs, CLEAN_ROOT=str(machine)).returncode == 0
    assert calls(programs, "dd") == []


FULL = 'case "$*" in *fsync*) ;; *) echo "dd: No space left on device" >&2; exit 1 ;; esac'


@pytest.fixture
def mounted(machine: Path, programs: Path) -> Path:
    """A machine whose root is mounted, as ext4 with a log of 64 MiB."""
    kept = machine / "sys/fs/ext4/vda1/reserved_clusters"
    kept.parent.mkdir(parents=True)
    kept.write_text("4096\n")
    fake(programs, "findmnt", f"printf '%s\\n' '{machine} /dev/vda1 ext4' '{machine}/proc proc proc'")
    fake(programs, "debugfs", "printf '%s\\n' 'User: 0 Group: 0 Size: 67108864' 'Fragment: 0 Size: 0'")
    fake(programs, "dd", FULL)
    fake(programs, "stat", "echo 0")
    fake(programs, "sleep", "")
    return machine


@pytest.mark.parametrize(("freed", "rounds"), [(4, 4), (99, 10)])
def test_blocks_that_are_free_only_later_are_overwritten_too(
    mounted: Path, programs: Path, freed: int, rounds: int
) -> None:
    """On a host that is very busy, what was just deleted could not be overwritten in two rounds."""
    fake(programs, "stat", f'[ "$(wc -l <"$0.calls")" -ge {freed - 1} ] && echo 0 || echo 7')
    done = _run("90-clean.sh", programs, CLEAN_ROOT=str(mounted))
    assert done.returncode == 0
    assert len([call for call in calls(programs, "dd") if "bs=4k" in call]) == rounds
    warning = f"90-clean: 7 free blocks of {mounted} were not overwritten, and may contain deleted files\n"
    assert done.stderr == ("" if rounds < 10 else warning)


def test_free_space_and_the_log_are_overwritten(mounted: Path, programs: Path) -> None:
    done = _run("90-clean.sh", programs, CLEAN_ROOT=str(mounted))
    assert (done.returncode, done.stderr) == (0, "")
    zeros = mounted / ".90-clean.zeros"
    assert calls(programs, "dd") == [
        f"if=/dev/zero of={zeros} bs=1M count=66 conv=fsync",
        f"if=/dev/zero of={zeros} bs=16M oflag=direct",
        *[f"if=/dev/zero of={zeros} bs=4k oflag=append conv=notrunc"] * 2,
    ]
    assert len(calls(programs, "sync")) == 4, "before, after each, and at the very end"
    assert calls(programs, "chattr") == [f"+j {zeros}"]
    assert calls(programs, "mount") == [f"-o remount,nodelalloc {mounted}", f"-o remount,delalloc {mounted}"]
    assert (mounted / "sys/fs/ext4/vda1/reserved_clusters").read_text() == "0\n"
    assert not zeros.exists()


def test_a_file_system_that_looks_damaged_for_a_moment_is_read_again(mounted: Path, programs: Path) -> None:
    """Else keys of the baking machine stay in its log."""
    answer = "printf '%s\\n' 'User: 0 Group: 0 Size: 67108864'"
    fake(programs, "debugfs", f'[ "$(wc -l <"$0.calls")" -gt 2 ] || exit 1; {answer}')
    done = _run("90-clean.sh", programs, CLEAN_ROOT=str(mounted))
    assert (done.returncode, done.stderr) == (0, "")
    assert " bs=1M count=66 " in calls(programs, "dd")[0]


def test_free_space_that_cannot_be_overwritten_stops_the_bake(mounted: Path, programs: Path) -> None:
    zeros = mounted / ".90-clean.zeros"
    fake(programs, "dd", f'[ "$3" != bs=4k ] || {{ : >"{zeros}"; echo broken >&2; exit 1; }}')
    done = _run("90-clean.sh", programs, CLEAN_ROOT=str(mounted))
    assert done.returncode == 1
    assert "could not be overwritten: broken" in done.stderr
    assert not zeros.exists()


@pytest.mark.parametrize("broken", ["debugfs", "mount", "chattr"])
def test_a_log_that_cannot_be_overwritten_is_told(mounted: Path, programs: Path, broken: str) -> None:
    fake(programs, broken, "exit 1")
    done = _run("90-clean.sh", programs, CLEAN_ROOT=str(mounted))
    assert done.returncode == 0
    assert "the journal of /dev/vda1 could not be overwritten" in done.stderr
    assert len(calls(programs, "dd")) == 3


@pytest.mark.parametrize("name", [name for name in LEFT if not name.startswith("var/log/")])
def test_cleaning_fails_when_something_is_left(machine: Path, programs: Path, name: str) -> None:
    # A remover that can't: the proof has to see it.
    fake(programs, "rm", "exit 0")
    done = _run("90-clean.sh", programs, CLEAN_ROOT=str(machine))
    assert done.returncode == 1
    top = {"/".join(Path(name).parts[:depth]) for depth in range(1, 7)}
    assert top & {line.removeprefix("./") for line in done.stderr.splitlines()}, done.stderr


def test_cleaning_fails_on_containers_and_logs(machine: Path, programs: Path) -> None:
    container = machine / "var/lib/docker/containers/11aa"
    container.mkdir(parents=True)
    done = _run("90-clean.sh", programs, CLEAN_ROOT=str(machine))
    assert done.returncode == 1
    assert "var/lib/docker/containers/11aa" in done.stderr


def test_the_guest_is_unpacked_with_its_modes_and_enabled(tmp_path: Path, programs: Path) -> None:
    fake(programs, "docker", "")
    source = tmp_path / "start-dask"
    source.write_text("#!/bin/sh\n")
    source.chmod(0o755)
    archive = tmp_path / "guest.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(source, "usr/local/sbin/start-dask")
    root = tmp_path / "machine"
    (root / "usr/local").mkdir(parents=True)
    done = _run("10-guest.sh", programs, GUEST_ARCHIVE=str(archive), GUEST_ROOT=str(root))
    assert done.returncode == 0, done.stderr
    assert (root / "usr/local/sbin/start-dask").stat().st_mode & 0o777 == 0o755
    assert calls(programs, "systemctl") == [
        "daemon-reload",
        "is-enabled --quiet docker.service",
        "restart --no-block docker.service",
    ]
    assert calls(programs, "docker") == ["compose version"]


@pytest.mark.parametrize("own_settings", [False, True])
def test_a_flag_that_daemon_json_sets_too_is_removed(
    tmp_path: Path, programs: Path, own_settings: bool
) -> None:
    """With both, Docker does not start: Amazon Linux has the flag."""
    fake(programs, "docker", "")
    fake(programs, "systemctl", "")
    flags = tmp_path / "machine/etc/sysconfig/docker"
    flags.parent.mkdir(parents=True)
    text = 'DAEMON_MAXFILES=1048576\nOPTIONS="--log-level warn --default-ulimit nofile=32768:65536"\n'
    flags.write_text(text)
    if own_settings:
        (tmp_path / "machine/etc/docker").mkdir()
        (tmp_path / "machine/etc/docker/daemon.json").write_text("{}")
    done = _guest(tmp_path, programs)
    assert done.returncode == 0, done.stderr
    left = text if own_settings else 'DAEMON_MAXFILES=1048576\nOPTIONS="--log-level warn "\n'
    assert flags.read_text() == left


def test_docker_is_enabled_where_its_package_did_not(tmp_path: Path, programs: Path) -> None:
    fake(programs, "docker", "")
    fake(programs, "systemctl", '[ "$1" != is-enabled ]')
    done = _guest(tmp_path, programs)
    assert done.returncode == 0, done.stderr
    assert calls(programs, "systemctl") == [
        "daemon-reload",
        "is-enabled --quiet docker.service",
        "enable --quiet docker.service",
        "restart --no-block docker.service",
    ]


def test_a_docker_that_cannot_be_enabled_stops_the_bake(tmp_path: Path, programs: Path) -> None:
    fake(programs, "docker", "")
    fake(programs, "systemctl", 'case "$1" in is-enabled | enable) exit 1 ;; esac')
    assert _guest(tmp_path, programs).returncode == 1


DAEMON = "etc/docker/daemon.json"


def _guest(
    tmp_path: Path, programs: Path, arcname: str = DAEMON, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Unpack a guest with settings for Docker of its own onto `machine`."""
    ours = tmp_path / "daemon.json"
    ours.write_text('{"bridge": "none"}\n')
    other = tmp_path / "compose.yaml"
    other.write_text("ours")
    archive = tmp_path / "guest.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(ours, arcname)
        tar.add(other, "etc/dask/compose.yaml")
    root = tmp_path / "machine"
    root.mkdir(exist_ok=True)
    return _run("10-guest.sh", programs, GUEST_ARCHIVE=str(archive), GUEST_ROOT=str(root), **environment)


def test_docker_gets_our_settings_where_the_base_has_none(tmp_path: Path, programs: Path) -> None:
    fake(programs, "docker", "")
    done = _guest(tmp_path, programs)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "machine" / DAEMON).read_text() == '{"bridge": "none"}\n'
    assert "container.network" not in done.stdout


@pytest.mark.parametrize("arcname", [DAEMON, f"./{DAEMON}"])
def test_a_base_keeps_its_own_settings_for_docker(tmp_path: Path, programs: Path, arcname: str) -> None:
    fake(programs, "docker", "")
    own = tmp_path / "machine" / DAEMON
    own.parent.mkdir(parents=True)
    own.write_text('{"data-root": "/data/docker"}\n')
    done = _guest(tmp_path, programs, arcname)
    assert done.returncode == 0, done.stderr
    assert own.read_text() == '{"data-root": "/data/docker"}\n'
    assert "/etc/docker/daemon.json, so container.network has no effect" in done.stdout
    assert (tmp_path / "machine/etc/dask/compose.yaml").read_text() == "ours", "all the rest is ours"


@pytest.mark.parametrize("folder", ["usr/local/lib", "usr/local/libexec", "usr/lib", "usr/libexec"])
def test_compose_that_is_there_as_a_file_is_not_started(tmp_path: Path, programs: Path, folder: str) -> None:
    fake(programs, "docker", "exit 1")
    fake(tmp_path / "machine" / folder / "docker/cli-plugins", "docker-compose", "")
    done = _guest(tmp_path, programs)
    assert done.returncode == 0, done.stderr
    assert calls(programs, "docker") == []


def test_compose_that_is_no_program_is_none(tmp_path: Path, programs: Path) -> None:
    fake(programs, "docker", "exit 1")
    fake(programs, "apt-get", "")
    fake(programs, "apt-cache", "echo '  Candidate: (none)'")
    plugin = fake(tmp_path / "machine/usr/libexec/docker/cli-plugins", "docker-compose", "")
    plugin.chmod(0o644)
    done = _guest(tmp_path, programs)
    assert done.returncode == 1
    assert "no package of Compose 2" in done.stderr
    assert calls(programs, "docker") == ["compose version"]


POLICY = "case $2 in {offers}) echo '  Candidate: {version}' ;; *) echo '  Candidate: (none)' ;; esac"


@pytest.mark.parametrize(
    ("offers", "version", "status", "installed"),
    [
        ("docker-cli|docker-compose", "2.26.1-4", 0, "docker.io docker-cli docker-compose"),
        ("docker-compose-v2", "2.24.6+ds1-0ubuntu2", 0, "docker.io docker-compose-v2"),
        ("docker-compose", "1.29.2-3", 1, None),
    ],
    ids=["debian-13", "ubuntu-24.04", "debian-12"],
)
def test_a_foreign_base_gets_docker_and_compose_2(
    tmp_path: Path, programs: Path, offers: str, version: str, status: int, installed: str | None
) -> None:
    fake(programs, "docker", '[ -e "${0%/*}/installed" ]')
    fake(programs, "apt-get", 'case "$*" in *" install "*) : >"${0%/*}/installed" ;; esac')
    fake(programs, "apt-cache", POLICY.format(offers=offers, version=version))
    archive = tmp_path / "guest.tar"
    tarfile.open(archive, "w").close()
    done = _run("10-guest.sh", programs, GUEST_ARCHIVE=str(archive), GUEST_ROOT=str(tmp_path))
    assert done.returncode == status, done.stderr
    installs = [call for call in calls(programs, "apt-get") if " install " in call]
    if installed is None:
        assert installs == []
        assert "no package of Compose 2" in done.stderr
    else:
        assert installs[0].endswith(f"install --no-install-recommends {installed}")


def test_packages_that_the_base_lacks_are_installed(tmp_path: Path, programs: Path) -> None:
    fake(programs, "docker", "")
    fake(programs, "apt-get", "")
    fake(programs, "dpkg-query", 'for last; do :; done; [ "$last" = there ] && printf installed || exit 1')
    archive = tmp_path / "guest.tar"
    tarfile.open(archive, "w").close()
    environment = {"GUEST_ARCHIVE": str(archive), "GUEST_ROOT": str(tmp_path)}
    assert _run("10-guest.sh", programs, PACKAGES="there", **environment).returncode == 0
    assert calls(programs, "apt-get") == []
    assert _run("10-guest.sh", programs, PACKAGES="there some-agent other", **environment).returncode == 0
    assert calls(programs, "apt-get")[-1].endswith("install --no-install-recommends some-agent other")


@pytest.mark.parametrize("apt", [True, False])
def test_a_base_without_curl_gets_it(tmp_path: Path, programs: Path, apt: bool) -> None:
    for name in ("sh", "tar", "gzip"):
        (programs / name).symlink_to(shutil.which(name) or name)
    fake(programs, "docker", "")
    if apt:
        install = 'echo \'echo curl 8.14.1\' >"${0%/*}/curl"; chmod 755 "${0%/*}/curl"'
        (programs / "chmod").symlink_to("/usr/bin/chmod")
        fake(programs, "apt-get", f'case "$*" in *" install "*) {install} ;; esac')
    done = _guest(tmp_path, programs, PATH=str(programs))
    if apt:
        assert done.returncode == 0, done.stderr
        assert calls(programs, "apt-get")[-1].endswith("install --no-install-recommends curl ca-certificates")
    else:
        assert done.returncode == 1
        assert "the base has no curl, and no apt-get" in done.stderr


@pytest.mark.parametrize(("version", "said"), [("7.81.0", True), ("7.88.1", False), ("8.5.0", False)])
def test_a_curl_that_cannot_sign_is_reported(
    tmp_path: Path, programs: Path, version: str, said: bool
) -> None:
    fake(programs, "docker", "")
    fake(programs, "curl", f"echo 'curl {version} (x86_64)'")
    done = _guest(tmp_path, programs)
    assert done.returncode == 0, done.stderr
    assert ("older than 7.87" in done.stdout) == said


@pytest.fixture
def docker(programs: Path) -> Path:
    fake(programs, "docker", 'case "$1 $2" in "image inspect") [ "$5" = a/b:1 ] && echo sha256:1234 ;; esac')
    fake(programs, "dpkg-query", "printf 'tini=0.19.0\\nadduser=3.152\\n'")
    fake(programs, "sleep", "")
    return programs


def _container(programs: Path, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return _run(
        "20-container.sh",
        programs,
        RECORD=str(tmp_path / "record/packages.txt"),
        DOCKER_CONFIG_FILE=str(tmp_path / "docker/daemon.json"),
        **{"CONTAINER_REFERENCE": "a/b:1", **environment},
    )


def test_the_identity_of_the_machine_is_written_down(docker: Path, tmp_path: Path) -> None:
    # Files that are not there are no failure.
    fake(docker, "grep", 'case "$*" in "-hs . /etc/machine-id /etc/ssh/"*) echo 0123; exit 2 ;; esac')
    done = _container(docker, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "record/identity.txt").read_text() == "0123\n"


def test_an_archive_is_loaded_and_recorded(docker: Path, tmp_path: Path) -> None:
    archive = tmp_path / "container.tar"
    archive.write_text("")
    done = _container(docker, tmp_path, CONTAINER_ARCHIVE=str(archive))
    assert done.returncode == 0, done.stderr
    assert f"load --quiet --input {archive}" in calls(docker, "docker")
    record = (tmp_path / "record/packages.txt").read_text().splitlines()
    assert record == ["adduser=3.152", "tini=0.19.0", "container:a/b:1=sha256:1234"]


def test_a_reference_is_pulled(docker: Path, tmp_path: Path) -> None:
    done = _container(docker, tmp_path, CONTAINER_ARCHIVE="", INSECURE_REGISTRY="")
    assert done.returncode == 0, done.stderr
    assert calls(docker, "docker")[0] == "pull --quiet a/b:1"
    units = "dask.service dask-memory.service dask-health.timer dask-notices.service"
    enable = f"enable --quiet {units} dask-reports.socket watch-kills.service"
    assert calls(docker, "systemctl") == ["start docker.service", enable]


def test_a_dask_that_cannot_be_enabled_stops_the_bake(docker: Path, tmp_path: Path) -> None:
    fake(docker, "systemctl", '[ "$1" != enable ]')
    assert _container(docker, tmp_path).returncode == 1


def test_an_insecure_registry_is_allowed_only_while_pulling(docker: Path, tmp_path: Path) -> None:
    config = tmp_path / "docker/daemon.json"
    fake(docker, "docker", f'case $1 in pull) cat "{config}" >&2 ;; image) echo sha256:1 ;; esac')
    done = _container(docker, tmp_path, INSECURE_REGISTRY="10.0.2.2:5000")
    assert done.returncode == 0, done.stderr
    assert '{"insecure-registries": ["10.0.2.2:5000"]}' in done.stderr
    assert not config.exists()
    assert calls(docker, "systemctl")[:-1] == ["start docker.service", "reload docker.service"]


def test_a_failed_pull_is_tried_again_and_leaves_no_setting(docker: Path, tmp_path: Path) -> None:
    fake(docker, "docker", "exit 1")
    done = _container(docker, tmp_path, INSECURE_REGISTRY="10.0.2.2:5000")
    assert done.returncode == 1
    assert len(calls(docker, "docker")) == 4
    assert "a/b:1 could not be pulled" in done.stderr
    assert not (tmp_path / "docker/daemon.json").exists()


@pytest.mark.parametrize("pulls", [True, False])
def test_settings_for_docker_that_were_there_come_back(docker: Path, tmp_path: Path, pulls: bool) -> None:
    config = tmp_path / "docker/daemon.json"
    config.parent.mkdir()
    config.write_text('{"bridge": "none"}\n')
    config.chmod(0o640)
    program = f'case $1 in pull) cat "{config}" >&2; exit {int(not pulls)} ;; image) echo sha256:1 ;; esac'
    fake(docker, "docker", program)
    done = _container(docker, tmp_path, INSECURE_REGISTRY="10.0.2.2:5000")
    assert done.returncode == int(not pulls)
    assert '{"insecure-registries": ["10.0.2.2:5000"]}' in done.stderr
    assert config.read_text() == '{"bridge": "none"}\n'
    assert config.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in config.parent.iterdir()] == ["daemon.json"]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"CONTAINER_REFERENCE": "other:2"}, "Docker has no image other:2"),
        ({"CONTAINER_ARCHIVE": "/nowhere.tar"}, "/nowhere.tar can't be read"),
    ],
)
def test_a_missing_container_stops_the_bake(
    docker: Path, tmp_path: Path, environment: dict[str, str], said: str
) -> None:
    done = _container(docker, tmp_path, **environment)
    assert done.returncode == 1
    assert said in done.stderr


TOOLS = ("mmdebstrap", "python3-pip", "debian-archive-keyring")


@pytest.fixture
def apt(tmp_path: Path, programs: Path) -> Path:
    """A Debian that has pip already, and on which mmdebstrap needs perl."""
    state = tmp_path / "dpkg"
    state.mkdir()
    for name in ("python3", "python3-pip"):
        (state / name).touch()
    fake(programs, "apt-cache", "echo 'mmdebstrap - create a Debian chroot'")
    fake(programs, "dpkg-query", f'for one in "{state}"/*; do echo "installed ${{one##*/}}"; done')
    fake(
        programs,
        "apt-get",
        f"""case "$*" in
            *" install "*) touch "{state}/mmdebstrap" "{state}/perl" ;;
            *" purge "*) for name in mmdebstrap perl; do rm "{state}/$name"; done ;;
        esac""",
    )
    return state


def _archive(programs: Path, tmp_path: Path, build: str) -> subprocess.CompletedProcess[str]:
    program = tmp_path / "build"
    program.write_text(f"#!/bin/sh\n{build}\n")
    program.chmod(0o755)
    with tarfile.open(tmp_path / "recipe.tar", "w") as tar:
        tar.add(program, "build")
    return _run(
        "15-archive.sh",
        programs,
        CONTAINER_RECIPE=str(tmp_path / "recipe.tar"),
        CONTAINER_ARCHIVE=str(tmp_path / "container.tar"),
        WORK=str(tmp_path / "work"),
    )


def test_the_container_is_built_and_its_tools_are_removed(apt: Path, programs: Path, tmp_path: Path) -> None:
    done = _archive(programs, tmp_path, f'ls "{apt}" >"$1"; echo "$AMI_BUILDER_CACHE"')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "container.tar").read_text().split() == [
        "mmdebstrap",
        "perl",
        "python3",
        "python3-pip",
    ]
    assert f"{tmp_path}/work/cache" in done.stdout, "downloads are not kept in the image"
    assert sorted(path.name for path in apt.iterdir()) == ["python3", "python3-pip"]
    update, install, purge = (call.partition("-y ")[2] for call in calls(programs, "apt-get"))
    assert update == "update"
    assert install == f"install --no-install-recommends {' '.join(TOOLS)}"
    assert purge == "purge mmdebstrap perl", "not pip, which was there before"
    assert not (tmp_path / "work").exists()


def test_a_container_that_cannot_be_built_stops_the_bake(apt: Path, programs: Path, tmp_path: Path) -> None:
    done = _archive(programs, tmp_path, "echo 'no network' >&2; exit 1")
    assert done.returncode == 1
    assert "no network" in done.stderr
    assert "reach Debian's packages and PyPI" in done.stderr


@pytest.mark.parametrize(
    ("program", "script", "reported"),
    [
        ("apt-cache", "", "no package mmdebstrap"),
        ("apt-get", "exit 100", "can this machine reach them"),
        ("apt-get", 'case "$*" in *" install "*) : >"STATE/perl" ;; esac', "could not be removed again"),
    ],
)
def test_a_base_that_cannot_build_the_container_says_what_to_set(
    apt: Path, programs: Path, tmp_path: Path, program: str, script: str, reported: str
) -> None:
    fake(programs, program, script.replace("STATE", str(apt)))
    done = _archive(programs, tmp_path, "")
    assert done.returncode == 1
    assert reported in done.stderr
    assert "removed" in reported or 'container.source to "registry"' in done.stderr


def test_a_base_without_apt_cannot_build_the_container(tmp_path: Path) -> None:
    done = subprocess.run(
        ["/bin/sh", resources.packer_dir() / "provisioners" / "15-archive.sh"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "the base has no apt-get" in done.stderr
    assert 'container.source to "registry"' in done.stderr


@pytest.mark.whole
@pytest.mark.needs("mmdebstrap", "unshare")
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a Debian's /proc")
def test_a_real_debian_builds_the_real_container(tmp_path: Path) -> None:
    """Two minutes: a new Debian without mmdebstrap and pip builds what ships with ami-builder."""
    image = ImageSettings().overlaid({"container.source": ContainerSource.MACHINE}).image("dask")
    root = tmp_path / "root"
    make = ["mmdebstrap", "--variant=apt", "--include=python3,ca-certificates", image.base.suite, str(root)]
    subprocess.run(make, check=True, capture_output=True)
    at = root / "var/tmp"
    workspace = Workspace.open({"AMI_BUILDER_HOME": str(tmp_path / "home")})
    workspace.ensure()
    with workspace.run("build", image.name, "digest") as run, open_progress(Mode.PLAIN) as progress:
        with progress.step("container") as step:
            recipe = container.prepare(image, "digest", workspace, run, step)
        assert recipe is not None
        shutil.copy(recipe, at / "recipe.tar")
    shutil.copy(resources.packer_dir() / "provisioners" / "15-archive.sh", at)
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    # A host's proxy may answer for PyPI.
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", at / "ca.crt")
    before = _packages(root)
    environment = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "PIP_CERT=/var/tmp/ca.crt"]
    environment += ["CONTAINER_RECIPE=/var/tmp/recipe.tar", "CONTAINER_ARCHIVE=/var/tmp/container.tar"]
    mounts = 'for one in dev proc sys; do mount --rbind "/$one" "$0/$one"; done; exec chroot "$0" "$@"'
    run_it = ["env", "-i", *environment, "sh", "/var/tmp/15-archive.sh"]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mounts, str(root), *run_it],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert _packages(root) == before
    with tarfile.open(at / "container.tar") as archive:
        member = archive.extractfile("./manifest.json")
        assert member is not None
        (manifest,) = json.load(member)
    assert manifest["RepoTags"] == [image.container.reference]


def _packages(root: Path) -> str:
    argv = ["dpkg-query", f"--admindir={root}/var/lib/dpkg", "--show"]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout
