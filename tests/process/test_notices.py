"""watch-notices outside a VM, and what follows: real curl, our metadata service, a fake systemctl and AWS."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import pytest

from ami_builder.build import guest as render
from ami_builder.qemu.imds import InstanceMetadata, MetadataServer
from ami_builder.system import resources
from tests.fake_programs import calls, fake
from tests.http_recorder import Recorder
from tests.sample_image import image

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SBIN = resources.packer_dir() / "guest/usr/local/sbin"
SHELLS = [found for name in ("dash", "busybox") if (found := shutil.which(name))]
INSTANCE = "i-0123456789abcdef0"
LIFECYCLE = "autoscaling/target-lifecycle-state"
# Ends as retire-workers does, and notes what was there when it began.
SYSTEMCTL = """
case $* in
    "start retire-workers@"*)
        cat "$WATCH_NOTICES_ROOT/run/dask/leaving" >"$0.leaving"
        exit "${FAKE_STATUS:-0}"
        ;;
    show*) echo "${FAKE_STATUS:-0}" ;;
esac
"""


class Machine:
    """A folder that the guest's programs take for /, and the metadata of its instance."""

    def __init__(self, root: Path, imds: MetadataServer) -> None:
        self.root, self.imds = root, imds
        self.programs = root / "programs"
        self.state = root / "run/dask"
        self.state.mkdir(parents=True)
        (root / "etc/dask").mkdir(parents=True)
        self.settings()
        fake(self.programs, "systemctl", SYSTEMCTL)
        fake(self.programs, "dask-aws", "")
        fake(self.programs, "sleep", "")
        (self.programs / "instance-metadata").symlink_to(SBIN / "instance-metadata")

    def settings(self, *lines: str) -> None:
        (self.root / "etc/dask/dask.env").write_text("\n".join(("DASK_ROLE=worker", *lines, "")))

    def write(self, name: str, text: str) -> None:
        (self.state / name).write_text(text)

    def read(self, name: str) -> list[str]:
        file = self.state / name
        return file.read_text().splitlines() if file.exists() else []

    def run(self, program: str, shell: str = SHELLS[0], **more: str) -> list[str]:
        """Run a program of the guest and return what it logs."""
        environment = {
            "PATH": f"{self.programs}:{os.environ['PATH']}",
            "INSTANCE_METADATA_URL": f"http://127.0.0.1:{self.imds.port}",
            "WATCH_NOTICES_ROOT": str(self.root),
            "DASK_WANTED_ROOT": str(self.root),
            "DASK_HEALTH_STATE": str(self.state / "health"),
            "DASK_HEALTH_SETTINGS": str(self.root / "etc/dask/dask.env"),
            "DASK_HEALTH_PORT": "1",
            **more,
        }
        argv = [shell, *(["sh"] if shell.endswith("busybox") else []), str(self.root / program)]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
        assert done.stderr == ""
        return done.stdout.splitlines()

    def watch(
        self, polls: int = 1, *, on_rebalance: bool = False, shell: str = SHELLS[0], **more: str
    ) -> list[str]:
        files = render.guest(image(retire_on_rebalance=on_rebalance))
        (self.root / "watch").write_bytes(files[PurePosixPath("/usr/local/sbin/watch-notices")].content)
        return self.run("watch", shell, WATCH_NOTICES_POLLS=str(polls), **more)

    def interrupt(self, action: str = "terminate", seconds: float = 120) -> str:
        at = (datetime.now(UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.imds.tree.announce("spot/instance-action", f'{{"action": "{action}", "time": "{at}"}}')
        return at

    @property
    def retirements(self) -> list[int]:
        """The seconds that each had."""
        found = [re.fullmatch(r"start retire-workers@(\d+)\.service", each) for each in self.systemctl]
        return [int(each[1]) for each in found if each]

    @property
    def systemctl(self) -> list[str]:
        return calls(self.programs, "systemctl")

    @property
    def aws(self) -> list[str]:
        return calls(self.programs, "dask-aws")


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with MetadataServer(InstanceMetadata(instance_id=INSTANCE)) as imds:
        yield Machine(tmp_path, imds)


@pytest.mark.parametrize("shell", SHELLS, ids=os.path.basename)
def test_without_a_notice_nothing_happens(machine: Machine, shell: str) -> None:
    machine.imds.tree.announce(LIFECYCLE, "InService")
    assert machine.watch(3, shell=shell) == []
    assert machine.systemctl == machine.aws == []
    assert list(machine.state.iterdir()) == []


@pytest.mark.parametrize("shell", SHELLS, ids=os.path.basename)
@pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
def test_workers_retire_before_the_time_of_an_interruption(machine: Machine, action: str, shell: str) -> None:
    at = machine.interrupt(action)
    log = machine.watch(3, shell=shell)
    reason = f"EC2 interrupts this spot instance at {at} ({action})"
    assert log == [f"<4>watch-notices: {reason}", "<5>watch-notices: this machine's workers have retired"]
    (seconds,) = machine.retirements
    assert 60 < seconds <= 115
    assert (machine.programs / "systemctl.leaving").read_text() == f"{reason}\n", "before the workers end"
    assert machine.read("health") == ["retired", reason]
    assert "stop --no-block dask.service" in machine.systemctl
    assert machine.aws == []


@pytest.mark.parametrize(("seconds", "bound"), [(-600, 15), (3, 15), (86400, 600)])
def test_a_retirement_has_some_time_but_not_for_ever(machine: Machine, seconds: float, bound: int) -> None:
    machine.interrupt(seconds=seconds)
    machine.watch()
    assert machine.retirements == [bound]


def test_dask_does_not_start_again_where_it_has_retired(machine: Machine) -> None:
    at = machine.interrupt()
    machine.watch()
    shutil.copy(SBIN / "dask-wanted", machine.root / "wanted")
    reason = f"EC2 interrupts this spot instance at {at} (terminate)"
    assert machine.run("wanted") == [f"<5>dask-wanted: dask.service does not start Dask: {reason}"]
    assert machine.read("health") == ["retired", reason]
    shutil.copy(SBIN / "dask-health", machine.root / "health")
    assert machine.run("health") == []
    assert machine.read("health") == ["retired", reason]


def test_scale_in_completes_the_hook_after_the_retirement(machine: Machine) -> None:
    machine.settings("DASK_LIFECYCLE_HOOK=drain")
    machine.imds.tree.announce("tags/instance/aws:autoscaling:groupName", "Gruppe ä&b")
    machine.imds.tree.announce(LIFECYCLE, "Terminated")
    fake(machine.programs, "dask-aws", f'[ -e "{machine.programs}/systemctl.leaving" ] || echo early')
    log = machine.watch(3)
    assert log == [
        "<4>watch-notices: the Auto Scaling group terminates this instance",
        "<5>watch-notices: this machine's workers have retired",
        "<5>watch-notices: lifecycle hook drain of group Gruppe ä&b: completed",
    ]
    assert machine.retirements == [600]
    encoded = "".join(f"%{byte:02x}" for byte in "Gruppe ä&b".encode())
    hook = "".join(f"%{byte:02x}" for byte in b"drain")
    assert machine.aws == [
        f"autoscaling CompleteLifecycleAction AutoScalingGroupName={encoded}&LifecycleHookName={hook}"
        f"&InstanceId={INSTANCE}&LifecycleActionResult=CONTINUE"
    ]


def test_the_groups_name_may_be_a_setting(machine: Machine) -> None:
    machine.settings("DASK_LIFECYCLE_HOOK=drain", "DASK_AUTO_SCALING_GROUP=workers")
    machine.imds.tree.announce(LIFECYCLE, "Terminated")
    assert "group workers: completed" in machine.watch()[-1]


def test_a_group_without_a_name_is_reported_once(machine: Machine) -> None:
    machine.settings("DASK_LIFECYCLE_HOOK=drain")
    machine.imds.tree.announce(LIFECYCLE, "Terminated")
    assert ["can't be completed" in line for line in machine.watch(3)] == [False, False, True]
    assert machine.aws == []


def test_without_a_hook_there_is_nothing_to_complete(machine: Machine) -> None:
    machine.imds.tree.announce(LIFECYCLE, "Terminated")
    machine.watch(3)
    assert machine.retirements == [600]
    assert machine.aws == []


def test_completing_is_tried_again(machine: Machine) -> None:
    machine.settings("DASK_LIFECYCLE_HOOK=drain", "DASK_AUTO_SCALING_GROUP=workers")
    machine.imds.tree.announce(LIFECYCLE, "Terminated")
    fake(machine.programs, "dask-aws", '[ "$(wc -l <"$0.calls")" -ge 3 ]')
    log = machine.watch(5)
    assert len(machine.aws) == 3
    assert [line for line in log if "could not be completed" in line] == [
        "<3>watch-notices: lifecycle hook drain of group workers could not be completed; trying again"
    ]
    assert log[-1].endswith("completed")


def test_data_that_has_not_moved_keeps_the_hook_open(machine: Machine) -> None:
    machine.settings("DASK_LIFECYCLE_HOOK=drain", "DASK_AUTO_SCALING_GROUP=workers")
    machine.imds.tree.announce(LIFECYCLE, "Terminated")
    log = machine.watch(3, FAKE_STATUS="1")
    assert log[-1] == (
        "<4>watch-notices: the workers could not retire (see journalctl -u retire-workers@600): "
        "work may be lost"
    )
    assert machine.aws == []
    assert "stop --no-block dask.service" not in machine.systemctl, "others may still fetch its data"
    assert machine.read("health") == []
    assert (machine.state / "leaving").exists()


def test_an_interruption_during_scale_in_retires_once(machine: Machine) -> None:
    machine.settings("DASK_LIFECYCLE_HOOK=drain", "DASK_AUTO_SCALING_GROUP=workers")
    machine.interrupt()
    machine.imds.tree.announce(LIFECYCLE, "Terminated")
    machine.watch(3)
    assert len(machine.retirements) == len(machine.aws) == 1


def test_a_scheduler_is_reported_and_goes_on(machine: Machine) -> None:
    at = machine.interrupt()
    log = machine.watch(3, FAKE_STATUS="3")
    assert log == [
        f"<4>watch-notices: EC2 interrupts this spot instance at {at} (terminate)",
        "<4>watch-notices: this machine has a scheduler, which can't be moved: "
        "its cluster ends with this instance",
    ]
    assert not (machine.state / "leaving").exists()
    assert "stop --no-block dask.service" not in machine.systemctl
    assert len(machine.read("instance-notices")) == 2


def test_a_recommendation_is_reported(machine: Machine) -> None:
    machine.imds.tree.announce("events/recommendations/rebalance", '{"noticeTime": "2026-08-01T08:22:00Z"}')
    (line,) = machine.watch(3)
    assert line.startswith("<4>watch-notices: EC2 recommends to replace this instance")
    assert "2026-08-01T08:22:00Z" in line
    assert machine.retirements == []
    assert machine.read("instance-notices") == [line.removeprefix("<4>watch-notices: ")]


def test_a_recommendation_retires_if_so_configured(machine: Machine) -> None:
    machine.imds.tree.announce("events/recommendations/rebalance", '{"noticeTime": "2026-08-01T08:22:00Z"}')
    machine.watch(3, on_rebalance=True)
    assert machine.retirements == [600]


def test_a_new_service_and_an_expired_token_are_no_end(machine: Machine) -> None:
    """A VM that was saved goes on with another service; a token lasts for hours."""
    url = f"http://127.0.0.1:{machine.imds.port}"
    real = shutil.which("curl")
    # The first question has a token that the service does not know.
    first = '[ -e "$0.first" ] || { touch "$0.first"; echo unknown; exit; }'
    fake(machine.programs, "curl", f'case "$*" in *PUT*) {first} ;; esac; exec {real} "$@"')
    machine.interrupt()
    assert machine.watch(1, INSTANCE_METADATA_URL=url) == []
    assert machine.watch(2, INSTANCE_METADATA_URL=url)[-1].endswith("have retired")


def test_a_service_that_does_not_answer_is_no_notice(machine: Machine) -> None:
    assert machine.watch(2, INSTANCE_METADATA_URL="http://127.0.0.1:1") == []
    assert machine.retirements == []


# Health told to the group

TOLD = (
    f"autoscaling SetInstanceHealth InstanceId={INSTANCE}"
    "&HealthStatus=Unhealthy&ShouldRespectGracePeriod=false"
)


def health(machine: Machine, **more: str) -> list[str]:
    shutil.copy(SBIN / "dask-health", machine.root / "health")
    return machine.run("health", **more)


@pytest.mark.parametrize("word", ["unhealthy", "refused"])
def test_a_dask_that_is_unhealthy_for_long_is_reported_to_the_group_once(machine: Machine, word: str) -> None:
    machine.settings("DASK_GROUP_HEALTH_SECONDS='300'")
    machine.write("health", f"{word}\nwhy\n")
    assert health(machine) == []
    assert machine.aws == []
    machine.write("unhealthy-since", "-300\n")
    fake(machine.programs, "dask-aws", 'echo "out"; [ -e "$0.works" ]')
    (line,) = health(machine)
    assert line.startswith("<3>dask-health: the Auto Scaling group could not be told")
    (machine.programs / "dask-aws.works").touch()
    (line,) = health(machine)
    assert line.startswith(f"<4>dask-health: Dask was {word} for ")
    assert health(machine) == []
    assert machine.aws == [TOLD, TOLD]
    assert machine.read("health") == [word, "why"]


@pytest.mark.parametrize("word", ["waiting", "starting", "off", "retired"])
def test_a_dask_that_is_not_unhealthy_is_not_reported(machine: Machine, word: str) -> None:
    machine.settings("DASK_GROUP_HEALTH_SECONDS=0")
    machine.write("health", f"{word}\nwhy\n")
    machine.write("unhealthy-since", "-300\n")
    assert health(machine) == []
    assert machine.aws == []
    assert (machine.state / "unhealthy-since").exists() == (word == "starting")


@pytest.mark.parametrize("line", ["", "DASK_GROUP_HEALTH_SECONDS=", "# DASK_GROUP_HEALTH_SECONDS=1"])
def test_without_the_setting_no_group_is_asked(machine: Machine, line: str) -> None:
    machine.settings(line)
    machine.write("health", "refused\nwhy\n")
    machine.write("unhealthy-since", "-9999\n")
    assert health(machine) == []
    assert machine.aws == []


def test_notices_to_the_instance_are_in_the_health_of_a_dask_that_goes_on(machine: Machine) -> None:
    machine.write("health", "healthy\nan open port\n")
    machine.write("notices", "an open port\n")
    machine.write("instance-notices", "EC2 recommends\n")
    with Recorder() as dask:
        assert health(machine, DASK_HEALTH_PORT=dask.url.rpartition(":")[2]) == []
    assert machine.read("health") == ["healthy", "an open port", "EC2 recommends"]
    assert sorted(path.name for path in machine.state.iterdir()) == ["health", "instance-notices", "notices"]
