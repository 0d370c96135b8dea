"""watch-notices outside a VM, and what follows: real curl, our metadata service, a fake systemctl and AWS."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pytest

from ami_builder.build import guest as render
from ami_builder.qemu.imds import InstanceMetadata, MetadataServer
from ami_builder.system import resources
from tests.fake_programs import calls, fake
from tests.full_run import on_full_run
from tests.http_recorder import Recorder
from tests.sample_image import image

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    "show --property Result --value"*) echo "${FAKE_RESULT:-success}" ;;
    show*)
        echo "Result=${FAKE_RESULT:-exit-code}"
        echo "ExecMainStatus=${FAKE_SHOWN:-${FAKE_STATUS:-0}}"
        ;;
    "is-active dask.service docker.service") printf '%s\n' ${FAKE_ACTIVE:-activating active}; exit 3 ;;
esac
"""


class Machine:
    """A folder that the guest's programs take for /, and the metadata of its instance."""

    def __init__(self, root: Path, imds: MetadataServer) -> None:
        self.root, self.imds = root, imds
        self.run_is_full = False
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
        argv = on_full_run(self.root, argv) if self.run_is_full else argv
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
    assert [path.name for path in machine.state.iterdir()] == ["in-service"]


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


@pytest.mark.needs("unshare")
@pytest.mark.parametrize("shell", SHELLS, ids=os.path.basename)
def test_workers_retire_though_run_is_full(machine: Machine, shell: str) -> None:
    machine.interrupt()
    machine.write("health", "healthy\n")
    machine.run_is_full = True
    log = machine.watch(shell=shell)
    assert log[-1] == "<5>watch-notices: this machine's workers have retired"
    assert len(machine.retirements) == 1
    assert "stop --no-block dask.service" in machine.systemctl
    assert {path.name for path in machine.state.iterdir()} >= {"health", "leaving", "stopping"}
    assert not list(machine.state.glob("health.*"))


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


@pytest.mark.parametrize("runs", [True, False])
def test_a_dask_that_is_not_recognized_is_not_stopped(machine: Machine, runs: bool) -> None:
    """It may run in a program of another name, whose work would be lost."""
    machine.settings("DASK_LIFECYCLE_HOOK=drain", "DASK_AUTO_SCALING_GROUP=workers")
    machine.imds.tree.announce(LIFECYCLE, "Terminated")
    if runs:
        (machine.state / "containers").mkdir()
        machine.write("containers/c1", "dask-worker-1\n")
    log = machine.watch(3, FAKE_STATUS="4")
    assert (
        "<4>watch-notices: no process of Dask was recognized on this machine, so no worker has retired" in log
    )
    assert ("stop --no-block dask.service" in machine.systemctl) is not runs
    assert (machine.state / "leaving").exists() is not runs
    assert machine.read("health")[:1] == ([] if runs else ["retired"])
    assert len(machine.retirements) == 1
    assert len(machine.aws) == 1, "the group need not wait"


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


@pytest.mark.parametrize(
    ("result", "shown"),
    [("resources", "0"), ("resources", "3"), ("exit-code", "0"), ("exit-code", "203"), ("signal", "9")],
)
def test_a_program_that_could_not_run_has_not_retired_anything(
    machine: Machine, result: str, shown: str
) -> None:
    machine.interrupt()
    log = machine.watch(3, FAKE_STATUS="1", FAKE_RESULT=result, FAKE_SHOWN=shown)
    assert "could not retire" in log[-1]
    assert machine.read("health") == []


@pytest.mark.parametrize("shell", SHELLS, ids=os.path.basename)
def test_a_failed_retirement_does_not_hide_a_later_interruption(machine: Machine, shell: str) -> None:
    machine.imds.tree.announce("events/recommendations/rebalance", '{"noticeTime": "2026-08-01T08:22:00Z"}')
    at = (datetime.now(UTC) + timedelta(seconds=120)).strftime("%Y-%m-%dT%H:%M:%SZ")
    # Between two polls, EC2 interrupts the instance after all.
    fake(
        machine.programs,
        "sleep",
        '[ "$(wc -l <"$0.calls")" != 2 ] || touch "$WATCH_NOTICES_ROOT/interrupted"',
    )
    url = f"http://127.0.0.1:{machine.imds.port}"
    curl = shutil.which("curl")
    body = f'{{"action": "terminate", "time": "{at}"}}'
    fake(
        machine.programs,
        "curl",
        f'[ -e {machine.root}/interrupted ] || exec {curl} "$@"\n'
        f'case "$*" in *PUT*) exec {curl} "$@" ;; esac\n'
        f"printf '%s\\n<200>\\n\\n<404>\\n\\n<404>\\n' '{body}'",
    )
    fake(
        machine.programs,
        "systemctl",
        'case $* in "start retire-workers@600"*) exit 1 ;; show*) echo Result=exit-code ;; esac',
    )
    log = machine.watch(5, on_rebalance=True, shell=shell, INSTANCE_METADATA_URL=url)
    assert machine.retirements[0] == 600
    assert len(machine.retirements) == 2, "each kind of notice once"
    assert log[-1] == "<5>watch-notices: this machine's workers have retired"
    assert machine.read("health")[0] == "retired"


def test_after_a_failed_recommendation_dask_may_start_again(machine: Machine) -> None:
    machine.imds.tree.announce("events/recommendations/rebalance", '{"noticeTime": "2026-08-01T08:22:00Z"}')
    machine.write("health", "retired\nwhy\n")  # of dask-wanted, because some workers had gone
    machine.watch(3, on_rebalance=True, FAKE_STATUS="1")
    assert machine.retirements == [600]
    assert not (machine.state / "leaving").exists()
    assert not (machine.state / "stopping").exists()
    assert machine.systemctl[-1] == "start --no-block dask.service"


@pytest.mark.parametrize("pool", ["Warmed:Stopped", "Warmed:Hibernated", "Warmed:Running"])
def test_workers_retire_before_the_instance_goes_to_a_warm_pool(machine: Machine, pool: str) -> None:
    machine.settings("DASK_LIFECYCLE_HOOK=drain", "DASK_AUTO_SCALING_GROUP=workers")
    machine.imds.tree.announce(LIFECYCLE, pool)
    assert machine.watch(2) == [], "launched into the pool"
    machine.write("in-service", "")
    log = machine.watch(3)
    assert log[0] == "<4>watch-notices: the Auto Scaling group moves this instance to its warm pool"
    assert log[-1].endswith("completed")
    assert machine.retirements == [600]


def test_an_instance_that_comes_back_from_the_pool_starts_dask(machine: Machine) -> None:
    machine.write("in-service", "")
    machine.imds.tree.announce(LIFECYCLE, "Warmed:Running")
    url = f"http://127.0.0.1:{machine.imds.port}"
    curl = shutil.which("curl")
    fake(machine.programs, "sleep", 'touch "$WATCH_NOTICES_ROOT/back"')
    back = "printf '\\n<404>\\nInService\\n<200>\\n\\n<404>\\n'"
    fake(
        machine.programs,
        "curl",
        f'case "$*" in *PUT*) exec {curl} "$@" ;; esac\n'
        f'[ ! -e {machine.root}/back ] || exec {back}\nexec {curl} "$@"',
    )
    machine.watch(3, INSTANCE_METADATA_URL=url)
    assert machine.retirements == [600]
    assert machine.systemctl[-1] == "start --no-block dask.service"
    assert not (machine.state / "leaving").exists()


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


# Health reported to the group

REPORT = (
    f"autoscaling SetInstanceHealth InstanceId={INSTANCE}"
    "&HealthStatus=Unhealthy&ShouldRespectGracePeriod=false"
)


def health(machine: Machine, shell: str = SHELLS[0], /, **more: str) -> list[str]:
    shutil.copy(SBIN / "dask-health", machine.root / "health")
    return machine.run("health", shell, **more)


@pytest.mark.needs("unshare")
@pytest.mark.parametrize("shell", SHELLS, ids=os.path.basename)
def test_an_unhealthy_dask_is_seen_and_reported_though_run_is_full(machine: Machine, shell: str) -> None:
    machine.settings("DASK_GROUP_HEALTH_SECONDS=60")
    machine.write("health", "healthy\n")
    machine.write("unhealthy-since", "-300\n")
    machine.run_is_full = True
    log = health(machine, shell)
    assert [line[:14] for line in log] == ["<4>dask-health"] * 2
    assert machine.read("health") == ["unhealthy", "Dask does not answer on port 1"]
    assert machine.aws == [REPORT]
    assert not list(machine.state.glob("health.*"))


def test_a_dask_that_is_unhealthy_for_long_is_reported_to_the_group_once(machine: Machine) -> None:
    word = "unhealthy"
    machine.settings("DASK_GROUP_HEALTH_SECONDS='300'")
    machine.write("health", f"{word}\nwhy\n")
    assert health(machine) == []
    assert machine.aws == []
    machine.write("unhealthy-since", "-300\n")
    fake(machine.programs, "dask-aws", 'echo "out"; [ -e "$0.works" ]')
    (line,) = health(machine)
    assert line.startswith("<3>dask-health: this instance could not be reported")
    (machine.programs / "dask-aws.works").touch()
    (line,) = health(machine)
    assert line.startswith(f"<4>dask-health: Dask was {word} for ")
    assert health(machine) == []
    assert machine.aws == [REPORT, REPORT]
    assert machine.read("health") == [word, "why"]


@pytest.mark.parametrize("word", ["waiting", "starting", "off", "retired", "refused", "unhealthy"])
def test_notices_are_added_in_every_state(machine: Machine, word: str) -> None:
    machine.write("health", f"{word}\nwhy\n")
    for name in ("notices", "memory-notice", "kill-notice"):
        machine.write(name, f"of {name}\n")
        assert health(machine) == []
    assert machine.read("health") == [word, "why", "of notices", "of memory-notice", "of kill-notice"]
    (machine.state / "memory-notice").unlink()
    health(machine)
    assert machine.read("health") == [word, "why", "of notices", "of kill-notice"]


@pytest.mark.parametrize("word", ["waiting", "starting", "off", "retired", "refused"])
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
    machine.write("health", "unhealthy\nwhy\n")
    machine.write("unhealthy-since", "-9999\n")
    assert health(machine) == []
    assert machine.aws == []


@pytest.mark.parametrize("value", ["10min", "600s", "-5", "1e3", "99999999"])
def test_a_time_that_is_no_whole_number_is_noticed_once(machine: Machine, value: str) -> None:
    machine.settings(f"DASK_GROUP_HEALTH_SECONDS={value}")
    machine.write("health", "unhealthy\nwhy\n")
    machine.write("unhealthy-since", "-99999\n")
    (line,) = health(machine)
    assert line.startswith(f"<4>dask-health: DASK_GROUP_HEALTH_SECONDS={value} in ")
    assert health(machine) == []
    assert machine.aws == []


def test_a_time_is_at_least_a_minute(machine: Machine) -> None:
    machine.settings("DASK_GROUP_HEALTH_SECONDS=1")
    machine.write("health", "unhealthy\nwhy\n")
    now = float(Path("/proc/uptime").read_text().split()[0])
    machine.write("unhealthy-since", f"{int(now) - 20}\n")
    assert health(machine) == []
    machine.write("unhealthy-since", f"{int(now) - 61}\n")
    assert len(health(machine)) == 1


@pytest.mark.parametrize("docker", ["active", "inactive"])
@pytest.mark.parametrize("before", ["healthy", "unhealthy", "waiting"])
def test_a_dask_that_somebody_stopped_is_not_reported(machine: Machine, before: str, docker: str) -> None:
    machine.settings("DASK_GROUP_HEALTH_SECONDS=60")
    machine.write("health", f"{before}\nwhy\n")
    machine.write("unhealthy-since", "-99999\n")
    stopped = f"inactive {docker}"
    assert health(machine, FAKE_ACTIVE=stopped) == ["<5>dask-health: off: dask.service was stopped"]
    assert health(machine, FAKE_ACTIVE=stopped) == []
    assert machine.read("health") == ["off", "dask.service was stopped"]
    assert machine.aws == []


def test_a_dask_of_user_data_that_ended_was_not_stopped(machine: Machine) -> None:
    machine.settings("DASK_GROUP_HEALTH_SECONDS=60")
    machine.write("health", "healthy\n")
    machine.write("unhealthy-since", "-99999\n")
    never_ran = {"FAKE_ACTIVE": "inactive active", "FAKE_RESULT": "exec-condition"}
    first, second = health(machine, **never_ran)
    assert first.startswith("<4>dask-health: unhealthy (")
    assert second.startswith("<4>dask-health: Dask was unhealthy for ")
    assert health(machine, **never_ran) == []
    assert machine.read("health")[0] == "unhealthy"
    assert machine.aws == [REPORT]


@pytest.mark.parametrize("active", ["inactive failed", "inactive activating", "failed active"])
def test_a_dask_without_docker_is_not_a_stopped_one(machine: Machine, active: str) -> None:
    machine.settings("DASK_GROUP_HEALTH_SECONDS=60")
    machine.write("health", "unhealthy\nwhy\n")
    machine.write("unhealthy-since", "-99999\n")
    assert len(health(machine, FAKE_ACTIVE=active)) == 1
    assert machine.aws == [REPORT]


def test_notices_to_the_instance_are_in_the_health_of_a_dask_that_goes_on(machine: Machine) -> None:
    machine.write("health", "healthy\nan open port\n")
    machine.write("notices", "an open port\n")
    machine.write("instance-notices", "EC2 recommends\n")
    machine.write("kill-notice", "processes that the kernel has killed\n")
    with Recorder() as dask:
        assert health(machine, DASK_HEALTH_PORT=dask.url.rpartition(":")[2]) == []
    assert machine.read("health") == [
        "healthy",
        "an open port",
        "EC2 recommends",
        "processes that the kernel has killed",
    ]
    found = sorted(path.name for path in machine.state.iterdir())
    assert found == ["health", "instance-notices", "kill-notice", "notices"]
