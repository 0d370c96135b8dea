"""remove-dask outside a VM: a real shell and a fake docker."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

from ami_builder.system import resources
from tests.fake_programs import calls, fake

if TYPE_CHECKING:
    from pathlib import Path

DOCKER = """
case $1 in
    ps) [ -z "${FAKE_HANGS:-}" ] || exec sleep 60
        [ -z "${FAKE_DOWN:-}" ] || exit 1
        printf '%s' "${FAKE_CONTAINERS:-}" ;;
    rm) [ -z "${FAKE_STAYS:-}" ] ;;
esac
"""


def removed(programs: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    fake(programs, "docker", DOCKER)
    return subprocess.run(
        [resources.packer_dir() / "guest/usr/local/sbin/remove-dask"],
        env={
            "PATH": f"{programs}:{os.environ['PATH']}",
            "REMOVE_DASK_STATE": str(programs / "state"),
            **environment,
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_container_of_the_project_goes(tmp_path: Path) -> None:
    assert removed(tmp_path, FAKE_CONTAINERS="aaa\nbbb").returncode == 0
    assert calls(tmp_path, "docker")[-1] == "rm --force --volumes aaa bbb"


def test_a_container_that_stays_is_left_to_start_dask(tmp_path: Path) -> None:
    assert removed(tmp_path, FAKE_CONTAINERS="aaa", FAKE_STAYS="1").returncode == 0


def test_nothing_to_remove_and_no_docker_are_no_failure(tmp_path: Path) -> None:
    assert removed(tmp_path).returncode == 0
    assert removed(tmp_path, FAKE_DOWN="1").returncode == 0
    assert not any(call.startswith("rm") for call in calls(tmp_path, "docker"))


def test_the_containers_of_others_are_dasks_from_now_on(tmp_path: Path) -> None:
    """Else what they use would be reported as growth of the system."""
    (tmp_path / "state/containers").mkdir(parents=True)
    (tmp_path / "state/containers/aaa").touch()
    (tmp_path / "state/follows").touch()
    assert removed(tmp_path, FAKE_DOWN="1").returncode == 0
    assert list((tmp_path / "state").iterdir()) == []


def test_a_docker_that_never_answers_is_not_waited_for(tmp_path: Path) -> None:
    assert removed(tmp_path, FAKE_HANGS="1", REMOVE_DASK_SECONDS="0.2").returncode == 0
