"""What lands in the image: paths, modes, and mistakes in templates."""

from __future__ import annotations

import json
import py_compile
from pathlib import Path, PurePosixPath

import pytest
import yaml

from ami_builder.build import guest
from ami_builder.config.schema import ImageSettings
from ami_builder.core.errors import UsageError
from ami_builder.core.options import ContainerNetwork, Role
from ami_builder.core.units import Reserve
from ami_builder.system import resources
from ami_builder.verify import journey
from tests.sample_image import image

CONTRACT = {
    "/usr/local/sbin/start-dask": 0o755,
    "/usr/local/sbin/stop-dask": 0o755,
    "/usr/local/sbin/measure-memory": 0o755,
    "/usr/local/sbin/lower-watermark": 0o755,
    "/usr/local/sbin/compare-memory": 0o755,
    "/usr/local/sbin/dask-wanted": 0o755,
    "/usr/local/sbin/wait-for-unit": 0o755,
    "/usr/local/sbin/dask-health": 0o755,
    "/usr/local/sbin/mount-spill": 0o755,
    "/usr/local/lib/dask/preload/follow_limit.py": 0o644,
    "/usr/local/lib/dask/preload/worker_deaths.py": 0o644,
    "/usr/local/lib/dask/retire.py": 0o644,
    "/usr/local/lib/dask/retire_workers.py": 0o644,
    "/usr/local/lib/dask/tls_errors.py": 0o644,
    "/usr/local/sbin/dask-aws": 0o755,
    "/usr/local/sbin/dask-tls": 0o755,
    "/usr/local/sbin/instance-metadata": 0o755,
    "/usr/local/sbin/log-reports": 0o755,
    "/usr/local/sbin/watch-kills": 0o755,
    "/usr/local/sbin/watch-notices": 0o755,
    "/etc/systemd/system/dask-notices.service": 0o644,
    "/etc/systemd/system/dask-reports.service": 0o644,
    "/etc/systemd/system/dask-reports.socket": 0o644,
    "/etc/systemd/system/watch-kills.service": 0o644,
    "/etc/systemd/system/retire-workers@.service": 0o644,
    "/etc/systemd/system/mount-spill.service": 0o644,
    "/etc/tmpfiles.d/dask.conf": 0o644,
    "/usr/local/sbin/remove-dask": 0o755,
    "/etc/systemd/system/dask.service": 0o644,
    "/etc/systemd/system/dask-memory.service": 0o644,
    "/etc/systemd/system/dask-.service.d/10-confined.conf": 0o644,
    "/etc/systemd/system/docker-.scope.d/00-unmeasured.conf": 0o644,
    "/etc/systemd/system/docker-.scope.d/20-metadata.conf": 0o644,
    "/etc/ssh/sshd_config.d/10-dask.conf": 0o644,
    "/etc/sysctl.d/60-dask.conf": 0o644,
    "/etc/modprobe.d/60-dask.conf": 0o644,
    "/etc/systemd/system/dask-health.service": 0o644,
    "/etc/systemd/system/dask-health.timer": 0o644,
    "/etc/dask/compose.yaml": 0o644,
    "/etc/docker/daemon.json": 0o644,
    "/etc/dask/dask.env": 0o644,
    "/etc/profile.d/dask-memory.sh": 0o644,
}


def _text(of: dict[PurePosixPath, guest.RenderedFile], path: str) -> str:
    return of[PurePosixPath(path)].content.decode()


def test_the_guest_is_the_contract() -> None:
    files = guest.guest(image())
    assert {str(path): file.mode for path, file in files.items()} == CONTRACT
    assert list(files) == sorted(files)
    assert guest.guest(image()) == files


def test_what_python_compiled_on_this_host_is_not_in_the_image() -> None:
    """A checkout whose programs of the guest have run here must bake the same image as a fresh one."""
    py_compile.compile(str(resources.packer_dir() / "guest/usr/local/lib/dask/retire.py"), doraise=True)
    assert not [path for path in guest.guest(image()) if "__pycache__" in path.parts]


def test_every_file_ends_in_one_newline_and_nothing_is_left_of_the_templates() -> None:
    bridge = guest.guest(image(network=ContainerNetwork.BRIDGE))
    files = guest.guest(image(workers=3, after=("agent.service",)))
    for path, file in [*files.items(), *bridge.items()]:
        text = file.content.decode()
        assert text.endswith("\n"), path
        assert not text.endswith("\n\n"), path
        assert "{{" not in text.replace("{{.", ""), path
        assert "{%" not in text, path
        assert not any(line.endswith(" ") for line in text.splitlines()), path


def test_the_settings_reach_the_files() -> None:
    files = guest.guest(
        image(role=Role.SCHEDULER, reserve=Reserve(bytes=123, percent=2.5), after=("a.service", "b.service"))
    )
    assert "\nDASK_ROLE=scheduler\n" in _text(files, "/etc/dask/dask.env")
    assert "reserve_bytes=123\nreserve_millipercent=2500\nreserve_capped=\n" in _text(
        files, "/usr/local/sbin/measure-memory"
    )
    memory = _text(files, "/etc/systemd/system/dask-memory.service")
    assert [line.split()[-1] for line in memory.splitlines() if "wait-for-unit" in line] == [
        "a.service",
        "b.service",
    ]


def test_what_nobody_asked_for_is_no_file() -> None:
    settings = {
        "container.unlimited": ("agent-*", "logs"),
        "base.security_updates": True,
        "base.packages": ("htop",),
        "memory.follow": True,
    }
    asked = ImageSettings().overlaid(settings).image("asked")
    files = guest.guest(asked)
    assert {str(path) for path in set(files) - set(guest.guest(image()))} == {
        "/etc/systemd/system/docker-.scope.d/30-unlimited.conf",
        "/etc/systemd/system/dask-follow.service",
        "/etc/systemd/system/dask-unlimited@.service",
        "/etc/systemd/system/security-updates.service",
        "/usr/local/sbin/dask-unlimited",
    }
    assert "    agent-* | logs) ;;\n" in _text(files, "/usr/local/sbin/dask-unlimited")
    assert asked.base.packages == ("htop", "unattended-upgrades")
    opened = ImageSettings().overlaid({"container.instance_metadata": True}).image("opened")
    closed = set(guest.guest(image())) - set(guest.guest(opened))
    assert {path.name for path in closed} == {"20-metadata.conf"}
    without = ImageSettings().overlaid({"dask.instance_store": False}).image("without")
    missing = set(guest.guest(image())) - set(guest.guest(without))
    assert {path.name for path in missing} == {"mount-spill.service"}


def test_what_mounts_for_the_whole_machine_has_no_mounts_of_its_own() -> None:
    """With any of these it has a mount namespace (systemd.exec(5)), and nobody else sees what it mounts."""
    unit = _text(guest.guest(image()), "/etc/systemd/system/mount-spill.service")
    names = [line.partition("=")[0] for line in unit.splitlines() if not line.startswith("#")]
    hidden = (
        "Protect",
        "Private",
        "ReadWritePaths",
        "ReadOnlyPaths",
        "InaccessiblePaths",
        "Bind",
        "Temporary",
    )
    assert not [name for name in names if name.startswith(hidden)]


def test_nothing_of_dask_is_ordered_after_user_datas_commands() -> None:
    """One of them may be `systemctl restart dask`, which would then wait for itself."""
    files = guest.guest(image(after=("agent.service",)))
    for path in (path for path in files if path.suffix == ".service" and path.name.startswith("dask")):
        lines = [line for line in files[path].content.decode().splitlines() if line.startswith("After=")]
        assert not [line for line in lines if "cloud-final" in line or "agent" in line], path


def test_the_service_starts_over_for_as_long_as_the_machine_lives() -> None:
    unit = _text(guest.guest(image()), "/etc/systemd/system/dask.service").splitlines()
    for line in (
        "Type=exec",
        "Restart=always",
        "RestartPreventExitStatus=78",
        "StartLimitIntervalSec=0",
        "Requires=docker.service",
        "WantedBy=multi-user.target docker.service",
    ):
        assert line in unit
    compose = yaml.safe_load(_text(guest.guest(image()), "/etc/dask/compose.yaml"))
    grace = compose["x-dask"]["stop_grace_period"]
    stop = next(line.partition("=")[2] for line in unit if line.startswith("TimeoutStopSec="))
    assert int(stop) > int(grace.removesuffix("s"))


def test_a_container_that_asks_for_nothing_is_bounded() -> None:
    settings = json.loads(_text(guest.guest(image()), "/etc/docker/daemon.json"))
    assert settings["log-opts"] == {"max-size": "10m", "max-file": "3"}
    assert {name: limit["Hard"] for name, limit in settings["default-ulimits"].items()} == {
        "core": 0,
        "nofile": 65536,
    }
    assert settings["no-new-privileges"] is True


@pytest.mark.parametrize(
    ("network", "settings"),
    [
        (
            ContainerNetwork.HOST,
            {"bridge": "none", "iptables": False, "ip6tables": False, "ip-forward": False},
        ),
        (
            ContainerNetwork.BRIDGE,
            {
                "bip": "198.18.0.1/24",
                "default-address-pools": [{"base": "198.18.0.0/16", "size": 24}],
            },
        ),
    ],
)
def test_docker_prepares_a_network_only_where_one_is_asked_for(
    network: ContainerNetwork, settings: dict[str, object]
) -> None:
    of = image(network=network)
    text = _text(guest.guest(of), "/etc/docker/daemon.json")
    assert text.startswith("{")
    assert text.endswith("}\n")
    bounds = {"log-driver", "log-opts", "default-ulimits", "no-new-privileges"}
    assert {name: value for name, value in json.loads(text).items() if name not in bounds} == settings
    assert ("check_network" in _text(guest.guest(of), "/usr/local/sbin/start-dask")) is ("bridge" in settings)
    # Our own services are there in either.
    services = yaml.safe_load(_text(guest.guest(of), "/etc/dask/compose.yaml"))["services"]
    assert {service["network_mode"] for service in services.values()} == {"host"}
    own = yaml.safe_load(journey.user_data(of, nonce="x"))["write_files"]
    (compose,) = (file["content"] for file in own if file["path"] == "/etc/dask/compose.yaml")
    assert {service["network_mode"] for service in yaml.safe_load(compose)["services"].values()} == {"host"}


def test_no_value_of_the_builder_is_baked_in() -> None:
    for path, file in guest.guest(image()).items():
        assert b"AVAILABLE_MEMORY_FOR_DASK=1" not in file.content, path


@pytest.fixture
def templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "guest/etc"
    folder.mkdir(parents=True)
    monkeypatch.setattr(resources, "packer_dir", lambda: tmp_path)
    return folder


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("one\n{{ image.nmae }}\n", r"etc/file.j2, line 2: .*nmae"),
        ("one\n\n{% if %}\n", r"etc/file.j2, line 3: "),
        ("one\n{{ 1 / 0 }}\n", r"etc/file.j2, line 2: division by zero"),
        ("{{ image.name + 1 }}\n", r"etc/file.j2, line 1: "),
    ],
)
def test_a_mistake_in_a_template_is_named_with_its_line(templates: Path, text: str, said: str) -> None:
    (templates / "file.j2").write_text(text)
    with pytest.raises(UsageError, match=said):
        guest.guest(image())


def test_other_files_are_copied_as_they_are(templates: Path) -> None:
    (templates / "raw").write_bytes(b"{{ not a template }}\xff\n\n")
    program = templates / "program.j2"
    program.write_text("{{ image.name }}")
    program.chmod(0o755)
    assert guest.guest(image()) == {
        PurePosixPath("/etc/program"): guest.RenderedFile(content=b"default", mode=0o755),
        PurePosixPath("/etc/raw"): guest.RenderedFile(content=b"{{ not a template }}\xff\n\n", mode=0o644),
    }


@pytest.mark.parametrize("nonce", ["4f2a", 'it\'s "quoted": {{ x }} # <no>', "007"])
def test_user_data_is_a_cloud_config_that_carries_the_nonce(nonce: str) -> None:
    text = journey.user_data(image(), nonce=nonce)
    assert text.startswith("#cloud-config\n")
    config = yaml.safe_load(text)
    files = {file["path"]: file["content"] for file in config["write_files"]}
    assert files["/var/lib/ami-builder/nonce"] == nonce
    assert "compose.image.yaml" in config["bootcmd"][0][2]
    assert set(files) == {"/var/lib/ami-builder/nonce", "/etc/dask/compose.yaml"}


def test_user_data_replaces_the_compose_file_by_another_with_the_same_promise() -> None:
    files = yaml.safe_load(journey.user_data(image(workers=3), nonce="x"))["write_files"]
    own = next(file["content"] for file in files if file["path"] == "/etc/dask/compose.yaml")
    assert own != _text(guest.guest(image(workers=3)), "/etc/dask/compose.yaml")
    services = yaml.safe_load(own)["services"]
    assert list(services) == ["cluster"]
    limit = "${AVAILABLE_MEMORY_FOR_DASK:-0}"
    assert (services["cluster"]["mem_limit"], services["cluster"]["memswap_limit"]) == (limit, limit)
    assert "profiles" not in services["cluster"]
    assert "--memory-limit 0.3333333333333333 " in services["cluster"]["command"][2]
