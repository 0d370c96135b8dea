"""What a run is made of: a real scheduler with a real worker, logins, and the logs that are kept."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from ami_builder.core.errors import BuildFailed, TimedOut
from ami_builder.core.units import GIB, MIB
from ami_builder.qemu.hardware import Accelerator
from ami_builder.system import processes
from tests.experiment import run, tasks
from tests.experiment.driver import Driver, driving
from tests.experiment.samples import case
from tests.experiment.tasks import Task
from tests.fake_programs import calls, fake
from tests.sample_image import image

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SOURCE = Path(tasks.__file__).with_name("work.py")


@contextmanager
def worker(driver: Driver, folder: Path) -> Iterator[Path]:
    """Run a worker as the container does: the tasks' functions are a module of its own."""
    module = folder / f"{tasks.MODULE}.py"
    module.write_text(SOURCE.read_text().replace("/experiment/seen", str(folder / "seen")))
    argv = [
        sys.executable, "-m", "dask", "worker", f"tcp://127.0.0.1:{driver.port}", "--nworkers", "1",
        "--nthreads", "2", "--memory-limit", "400MiB", "--local-directory", str(folder), "--no-dashboard",
    ]  # fmt: skip
    log = folder / "worker.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            argv, env={**os.environ, "PYTHONPATH": str(folder)}, stdout=out, stderr=out
        )
    try:
        yield log
    finally:
        process.terminate()
        process.wait(120)


def test_a_scheduler_gives_the_tasks_and_sees_what_becomes_of_them(tmp_path: Path) -> None:
    work = (
        Task(key="plain", function="ordinary", arguments=(MIB, 0.01), taken=True),
        Task(key="spike", function="spike", arguments=("s", 600 * MIB, 20 * MIB, MIB, 0.01), taken=True),
        Task(key="left", function="block", arguments=(MIB,), kept=False),
        Task(key="sum", function="digest", after=("left",)),
        Task(key="leak", function="leak", arguments=(0, 600 * MIB, 20 * MIB, 0.01), taken=True),
    )
    with driving(tmp_path / "scheduler.log") as driver, worker(driver, tmp_path) as log:
        assert driver.expect("limit", timeout=300)["limit"] == 400 * MIB
        told = {"module": tasks.MODULE, "path": str(tmp_path / f"{tasks.MODULE}.py"), "timeout": 600}
        driver.send({**told, "tasks": [asdict(task) for task in work]})
        ended: Mapping[str, Any] = driver.expect("ended", timeout=700)["ended"]
        worker_log = log.read_text()
    assert (ended["done"], ended["failed"], ended["unfinished"]) == (3, 1, 0)
    assert ended["reasons"] == {"KilledWorker": 1}
    kinds = [kind for _, kind in ended["marks"]]
    assert kinds.count("lost") >= 4
    # What is counted on a machine.
    assert worker_log.count("memory budget. Restarting") >= 4


@pytest.mark.parametrize(("memory", "disk"), [(2 * GIB, 10 * GIB), (8 * GIB, 40 * GIB)])
def test_the_disk_has_room_for_what_spills(memory: int, disk: int, tmp_path: Path) -> None:
    setup = run.Setup(image=image(), disk=tmp_path, accelerator=Accelerator.TCG, timeout=None)
    step: Any = None
    one = run._OneRun(case(memory=memory), setup, tmp_path, step)
    assert one.image.verify.disk_size == disk


def test_a_scheduler_that_hears_nothing_ends_by_itself(tmp_path: Path) -> None:
    with driving(tmp_path / "scheduler.log") as driver:
        with pytest.raises(TimedOut):
            driver.expect("limit", timeout=0.2)
        with pytest.raises(ZeroDivisionError):
            driver.expect("limit", timeout=5, alive=lambda: [][1 // 0])


def test_logins_are_tried_until_the_work_is_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bin_ = tmp_path / "bin"
    fake(bin_, "ssh", '[ $(wc -l <"$0.calls") -ne 2 ] || exit 255')
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    monkeypatch.setattr(run, "_LOGIN_EVERY", 0.01)
    session: Any = SimpleNamespace(config=tmp_path / "ssh_config")
    with run._logins(session, os.getpid()) as seen:
        processes.wait_until(lambda: len(seen) >= 3, what="three logins", timeout=120, interval=0.01)
    assert [login.answered for login in seen[:3]] == [True, False, True]
    assert all(login.ended >= login.began for login in seen)
    assert not any(thread.name == "logins" for thread in threading.enumerate())
    # A login of its own each time, not another command over a connection that stands.
    assert all("ControlPath=none" in line for line in calls(bin_, "ssh"))


def test_the_logs_of_a_machine_that_shows_nothing_are_kept(tmp_path: Path) -> None:
    work, to = tmp_path / "work", tmp_path / "kept"
    work.mkdir()
    for name in ("console.log", "id_ed25519"):
        (work / name).write_text(name)
    failed = BuildFailed("it does not come up", log=work / "console.log")
    run._keep_logs(work, to, failed)
    assert failed.log == to / "console.log"
    assert [path.name for path in to.iterdir()] == ["console.log"]
