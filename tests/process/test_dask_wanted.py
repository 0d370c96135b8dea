"""dask-wanted, stop-dask and wait-for-unit outside a VM: real shells, fake programs that they ask."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from ami_builder.system import resources
from ami_builder.verify import journey
from tests.fake_programs import calls, fake
from tests.sample_image import image

if TYPE_CHECKING:
    from pathlib import Path

SBIN = resources.packer_dir() / "guest/usr/local/sbin"
SHELLS = [found for name in ("dash", "busybox") if (found := shutil.which(name))]
EC2CLUSTER = """#cloud-config

runcmd:

  # Run container
  - 'docker run --net=host   ami-builder/dask:2026.8.0 env DASK_INTERNAL_INHERIT_CONFIG="e30=" python -m %s'

  # Shutdown when command is done
  - shutdown -h now
"""
"""As dask-cloudprovider 2025.9.0 renders it (tests/vm/test_9_ec2cluster.py does, for a VM)."""


def run(program: str, root: Path, *arguments: str, shell: str = SHELLS[0], **more: str) -> tuple[int, str]:
    argv = [shell, *(["sh"] if shell.endswith("busybox") else []), str(SBIN / program), *arguments]
    env = {"PATH": f"{root}:{os.environ['PATH']}", "DASK_WANTED_ROOT": str(root), **more}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.returncode, done.stdout


def user_data(root: Path, text: str | bytes | None, where: str = "user-data.txt") -> None:
    """Leave user data where cloud-init does."""
    (root / "etc/dask").mkdir(parents=True, exist_ok=True)
    instance = root / "var/lib/cloud/instance"
    instance.mkdir(parents=True, exist_ok=True)
    if text is not None:
        file = instance / where
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize("shell", SHELLS, ids=os.path.basename)
@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("user-data.txt", EC2CLUSTER % "distributed.cli.dask_scheduler"),
        (
            "user-data.txt.i",
            EC2CLUSTER % "distributed.cli.dask_spec tcp://10.0.0.5:8786 --spec ''{\"cls\": 1}''",
        ),
        ("user-data.txt", "#!/bin/sh\ndask-scheduler &\n"),
        ("user-data.txt", "#cloud-config\nruncmd:\n- [dask, worker]\n- docker run x dask worker tcp://a:1\n"),
        ("scripts/runcmd", "#!/bin/sh\n'docker' 'run' 'x' 'sh' '-c' 'exec dask scheduler'\n"),
        ("scripts/runcmd", "#!/bin/sh\n'dask' 'worker' 'tcp://a:1'\n"),
        ("user-data.txt", "runcmd:\n- [dask, worker, tcp://a:1]\n"),
        (
            "user-data.txt",
            "write_files:\n- path: /opt/dask/compose.yaml\n  content: |\n    command: dask worker a:1\n",
        ),
        (
            "user-data.txt",
            '#!/bin/sh\necho \'{"services": {"w": {"command": "dask worker a:1"}}}\' >c.json\n',
        ),
        ("user-data.txt", "runcmd: [sudo -u me /opt/venv/bin/dask-worker tcp://a:1]\n"),
    ],
)
def test_a_dask_of_user_data_has_the_machine_to_itself(
    tmp_path: Path, shell: str, where: str, text: str
) -> None:
    user_data(tmp_path, text, where)
    status, output = run("dask-wanted", tmp_path, shell=shell)
    reason = "this instance's user data starts its own Dask"
    assert (status, output) == (1, f"<5>dask-wanted: dask.service does not start Dask: {reason}\n")
    assert (tmp_path / "run/dask/health").read_text() == f"off\n{reason}\n"


@pytest.mark.parametrize("shell", SHELLS, ids=os.path.basename)
@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        b"\x00\xff\xfe garbage \x80" * 99,
        "#cloud-config\npackages: [htop]\n",
        "#cloud-config\n# starts no dask-worker, nor a dask scheduler\n",
        "#cloud-config\nwrite_files:\n- path: /etc/dask/compose.yaml\n  content: {command: dask worker tcp://a:1}\n",
        "#!/bin/sh\ninstall-agent\nsystemctl restart dask # the dask worker of this image\n",
        "#cloud-config\nruncmd: [pip install dask, echo mydask-worker]\n",
        "#cloud-config\nhostname: dask-worker-1\nfqdn: dask-scheduler.example.com\n",
        "#cloud-config\nwrite_files:\n- path: /etc/agent\n  content: 'tags: role:dask-worker'\n",
        "#!/bin/sh\necho 10.0.0.5 dask-scheduler >>/etc/hosts\n",
    ],
    ids=[
        "none",
        "empty",
        "garbage",
        "other",
        "comment",
        "compose file",
        "service",
        "package",
        "host name",
        "tags",
        "hosts",
    ],
)
def test_other_user_data_leaves_dask_to_the_service(
    tmp_path: Path, shell: str, text: str | bytes | None
) -> None:
    user_data(tmp_path, text)
    assert run("dask-wanted", tmp_path, shell=shell) == (0, "")
    assert not (tmp_path / "run").exists()


def test_a_machine_without_cloud_init_has_no_user_data(tmp_path: Path) -> None:
    assert run("dask-wanted", tmp_path) == (0, "")


def test_what_verification_sends_is_the_services(tmp_path: Path) -> None:
    user_data(tmp_path, journey.user_data(image(), nonce="n"))
    assert run("dask-wanted", tmp_path) == (0, "")


def test_the_last_line_of_the_role_counts(tmp_path: Path) -> None:
    user_data(tmp_path, None)
    (tmp_path / "etc/dask/dask.env").write_text("DASK_ROLE=none\nDASK_ROLE=worker\n")
    assert run("dask-wanted", tmp_path) == (0, "")


@pytest.mark.parametrize(
    "line", ["DASK_ROLE=none", "  DASK_ROLE=none", "export DASK_ROLE='none'\r", 'DASK_ROLE="none"']
)
def test_the_role_may_be_none(tmp_path: Path, line: str) -> None:
    user_data(tmp_path, None)
    (tmp_path / "etc/dask/dask.env").write_text(f"# as configured\n{line}\n")
    status, output = run("dask-wanted", tmp_path)
    assert status == 1
    assert "DASK_ROLE is none" in output


def test_stopping_is_announced_and_does_not_wait_for_a_docker_that_hangs(tmp_path: Path) -> None:
    fake(tmp_path, "docker", "case $1 in ps) echo aaa; echo bbb ;; esac")
    more = {"STOP_DASK_STATE": str(tmp_path), "STOP_DASK_SECONDS": "1"}
    assert run("stop-dask", tmp_path, **more)[0] == 0
    assert (tmp_path / "stopping").exists()
    assert calls(tmp_path, "docker")[-1] == "stop aaa bbb"
    fake(tmp_path, "docker", "exec sleep 60")
    begun = time.monotonic()
    run("stop-dask", tmp_path, **more)
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize(
    ("job", "behind", "started", "said"),
    [
        ("", "", False, ""),
        ("17", "", True, ""),
        ("17", "  cloud-final.service", False, "starts after cloud-final.service"),
    ],
    ids=["no job", "starting", "behind user data"],
)
def test_an_agent_is_waited_for_unless_it_waits_for_us(
    tmp_path: Path, job: str, behind: str, started: bool, said: str
) -> None:
    fake(
        tmp_path, "systemctl", f'case $1 in show) echo "{job}" ;; list-*) echo "$4"; echo "{behind}" ;; esac'
    )
    status, output = run("wait-for-unit", tmp_path, "agent.service")
    assert status == 0
    assert ("start agent.service" in calls(tmp_path, "systemctl")) is started
    assert said in output
