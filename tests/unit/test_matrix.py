"""Jobs of a matrix: all end, in order, wherever they run; failures from elsewhere stay readable."""

from __future__ import annotations

import json
import logging
import pickle
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ami_builder.aws import matrix
from ami_builder.aws.matrix import Job, JobResult, jobs_of, require_results, run_job, run_jobs
from ami_builder.build.verify import Located, verify_images
from ami_builder.console import Mode, Progress, Step, open_progress
from ami_builder.core import errors
from ami_builder.core.errors import (
    AmiBuilderError,
    BuildFailed,
    CloudFailed,
    Inconclusive,
    Interrupted,
    MissingTool,
    TimedOut,
    UsageError,
)
from ami_builder.core.records import (
    Artifact,
    CheckResult,
    Measurement,
    Outcome,
    RunRecord,
    RunStatus,
    TargetKind,
    Verdict,
)
from ami_builder.qemu.machine import GuestStuck, MachineDied
from ami_builder.state.workspace import StoredImage, Workspace, load
from ami_builder.system import ssh
from ami_builder.verify import executor as cluster
from ami_builder.verify.executor import open_executor, threads
from ami_builder.verify.machine import MachineResult
from tests.sample_image import image

EAST, WEST = "us-east-1", "eu-west-1"
Running = Callable[[Job], JobResult]


def job(kind: str, region: str = EAST) -> Job:
    artifact = Artifact(
        image="default",
        target=TargetKind.AWS,
        location="ami-0123456789abcdef0",
        digest="d" * 64,
        created=datetime(2026, 1, 2, tzinfo=UTC),
        run_id="r",
        size=1,
        region=region,
    )
    return Job(image=image(), artifact=artifact, instance_type=kind, parent="night", checks={})


def result_of(job: Job, outcome: Outcome = Outcome.PASSED) -> JobResult:
    kind = job.instance_type
    result = CheckResult(name="x", phase="boot", machine=kind, outcome=outcome, seconds=1, message="")
    measured = Measurement(machine=kind, phase="boot", total=4, available=3)
    return JobResult(
        job=job,
        host="there",
        directory=Path("/runs/1"),
        found=MachineResult(results=(result,), measured=(measured,)),
        failure=None,
        steps=(),
        evidence={f"{kind}/console.log": b"up\n"},
    )


def broken(job: Job, failure: AmiBuilderError) -> JobResult:
    return replace(result_of(job), found=None, failure=failure)


class Elsewhere(Executor):
    """As a cluster's: its calls and their results travel as bytes."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=2)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        sent = pickle.dumps((args, kwargs))

        def run() -> Any:
            arguments, named = pickle.loads(sent)
            return pickle.loads(pickle.dumps(fn(*arguments, **named)))

        return self._pool.submit(run)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._pool.shutdown(wait=wait, cancel_futures=cancel_futures)


@contextmanager
def executor(name: str) -> Iterator[Executor]:
    with threads(2) if name == "threads" else Elsewhere() as made:
        yield made


@pytest.fixture(params=["threads", "elsewhere"])
def where(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Running], None]:
    def install(act: Running) -> None:
        monkeypatch.setattr(matrix, "run_job", lambda job, step=None, workspace=None: act(job))

    return install


def run(wanted: list[Job], where: str, tmp_path: Path) -> tuple[tuple[JobResult, ...], Progress]:
    with open_progress(Mode.QUIET) as progress, executor(where) as made, progress.step("verify") as step:
        return run_jobs(wanted, made, step, tmp_path / "machines"), progress


def test_results_come_in_the_order_of_their_jobs(
    where: str, tmp_path: Path, run_with: Callable[[Running], None]
) -> None:
    second = threading.Event()

    def act(job: Job) -> JobResult:
        if job.instance_type == "a":
            assert second.wait(60)
        second.set()
        return result_of(job)

    run_with(act)
    results, _ = run([job("a"), job("b"), job("c")], where, tmp_path)
    assert [one.job.instance_type for one in results] == ["a", "b", "c"]
    assert [one.measured[0].machine for one in require_results(results)] == ["a", "b", "c"]
    assert (tmp_path / "machines/b/console.log").read_bytes() == b"up\n"


def test_all_failures_are_named_and_the_first_decides(
    where: str, tmp_path: Path, run_with: Callable[[Running], None]
) -> None:
    failures = {
        "b": CloudFailed(
            "no capacity", hint="name more", tail=("full",), log=Path("/runs/1/work/console.log")
        ),
        "c": TimedOut("too late"),
    }

    def act(job: Job) -> JobResult:
        failure = failures.get(job.instance_type)
        if failure is not None:
            return broken(job, failure)
        return result_of(job, Outcome.FAILED if job.instance_type == "d" else Outcome.PASSED)

    run_with(act)
    results, progress = run([job(kind) for kind in "abcd"], where, tmp_path)
    with pytest.raises(CloudFailed, match="2 of 4 machines could not be verified: no capacity") as caught:
        require_results(results)
    assert caught.value.hint == "name more"
    assert caught.value.log == tmp_path / "machines/b/console.log", "where it lies here"
    assert caught.value.tail == (
        "b in us-east-1 (on there): no capacity",
        "  full",
        "c in us-east-1 (on there): too late",
        "d in us-east-1 (on there): 1 checks failed",
    )
    if where == "elsewhere":
        status = {s.name: s.status for s in progress.steps}
        assert status["verify > machine of b"] is RunStatus.FAILED
        assert status["verify > machine of d"] is RunStatus.FAILED, "it came up, but did not pass"
        assert status["verify > machine of a"] is RunStatus.PASSED


def test_a_single_failure_is_told_as_it_is(
    where: str, tmp_path: Path, run_with: Callable[[Running], None]
) -> None:
    run_with(lambda job: broken(job, BuildFailed("it never answered")))
    results, _ = run([job("a")], where, tmp_path)
    with pytest.raises(BuildFailed, match="it never answered") as caught:
        require_results(results)
    assert caught.value.message == "it never answered"
    notes = getattr(caught.value, "__notes__", [])
    assert ("on there, in /runs/1" in notes) == (where == "elsewhere")


def test_what_the_cluster_gives_up_is_a_failure_of_its_job(
    where: str, tmp_path: Path, run_with: Callable[[Running], None]
) -> None:
    def act(job: Job) -> JobResult:
        if job.instance_type == "a":
            raise CancelledError
        return result_of(job)

    run_with(act)
    results, _ = run([job("a"), job("b")], where, tmp_path)
    with pytest.raises(BuildFailed, match="gave up on a in us-east-1"):
        require_results(results)


def test_a_defect_is_raised_once_all_have_ended(
    where: str, tmp_path: Path, run_with: Callable[[Running], None]
) -> None:
    ended: list[str] = []

    def act(job: Job) -> JobResult:
        if job.instance_type == "a":
            raise KeyError("a defect")
        ended.append(job.instance_type)
        return result_of(job)

    run_with(act)
    with pytest.raises(KeyError, match="a defect"):
        run([job("a"), job("b"), job("c")], where, tmp_path)
    assert sorted(ended) == ["b", "c"]


def test_an_executor_of_threads_can_be_had_again_after_a_failure() -> None:
    with pytest.raises(BuildFailed), open_executor(None, 1):
        raise BuildFailed("x")
    with open_executor(None, 1) as made:
        assert made.submit(lambda: 1).result() == 1


@dataclass(slots=True, kw_only=True)
class Region:
    """A target whose one machine ends as it is told, and that keeps verdicts."""

    name: str
    outcome: Outcome | None = Outcome.PASSED
    """None: the machine does not come up."""
    kind: TargetKind = TargetKind.AWS
    emulated: None = None
    kept: list[Verdict] = field(default_factory=list)

    def verify(self, image: object, stored: StoredImage, run: object, step: Step, evidence: Path) -> Any:
        assert evidence.name == self.name, "evidence of regions does not mix"
        if self.outcome is None:
            raise CloudFailed("it is down", tail=("full",))
        found = result_of(job("a", self.name), self.outcome).found
        assert found is not None
        return [found]

    def keep_verdict(self, stored: StoredImage, verdict: Verdict) -> StoredImage:
        self.kept.append(verdict)
        return stored


def verify(regions: list[Region], tmp_path: Path) -> None:
    copies = [
        Located(
            target=region,  # type: ignore[arg-type] # all that is asked of it
            stored=StoredImage(artifact=job("a", region.name).artifact, verdict=None, directory=None),
        )
        for region in regions
    ]
    workspace = Workspace.open({"AMI_BUILDER_HOME": str(tmp_path)})
    with open_progress(Mode.QUIET) as progress:
        verify_images(image(), copies, workspace, progress)


def test_a_region_that_fails_leaves_the_other_its_verdict(tmp_path: Path) -> None:
    regions = [Region(name=EAST, outcome=None), Region(name=WEST)]
    with pytest.raises(CloudFailed, match="1 of 2 regions could not be verified: it is down") as caught:
        verify(regions, tmp_path)
    assert caught.value.tail == (f"{EAST}: it is down", "  full")
    assert [[verdict.passed for verdict in one.kept] for one in regions] == [[], [True]]


def test_an_inconclusive_region_is_named_with_what_to_run_again(tmp_path: Path) -> None:
    regions = [Region(name=EAST), Region(name=WEST, outcome=Outcome.INCONCLUSIVE)]
    with pytest.raises(Inconclusive) as caught:
        verify(regions, tmp_path)
    assert caught.value.tail == (f"x (boot, a in {WEST}): ",)
    assert f"`ami-builder verify ami-0123456789abcdef0 --region {EAST} --region {WEST}`" in (
        caught.value.hint or ""
    )
    kept = [verdict.outcome for one in regions for verdict in one.kept]
    assert kept == [Outcome.PASSED, Outcome.INCONCLUSIVE]


def test_a_verdict_that_can_not_be_kept_is_in_the_record_of_the_run(tmp_path: Path) -> None:
    class Refused(Region):
        def keep_verdict(self, stored: StoredImage, verdict: Verdict) -> StoredImage:
            raise CloudFailed("no permission to tag")

    with pytest.raises(CloudFailed, match="no permission"):
        verify([Refused(name="machines")], tmp_path)
    (record,) = (tmp_path / "state" / "runs").glob("*/record.json")
    assert json.loads(record.read_text())["verdict"]["results"]


def test_a_job_is_a_run_of_its_own_wherever_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMI_BUILDER_HOME", str(tmp_path))
    seen: list[str] = []

    def fails(job: Job, run: Any, step: Step) -> MachineResult:
        seen.append((run.work / "checks/0/test_ours.py").read_text() if job.checks else "")
        with step.step("first boot"):
            folder = run.directory / "machines" / job.instance_type
            folder.mkdir(parents=True)
            (folder / "console.log").write_text("panic")
            raise BuildFailed("it died", hint="look", log=folder / "console.log", tail=("panic",))

    monkeypatch.setattr(matrix, "_verify", fails)
    first, again = (pickle.loads(pickle.dumps(run_job(job("m5.large")))) for _ in range(2))
    assert first.directory != again.directory
    assert first.directory.name.startswith("night.")
    assert (first.host, first.found) == (socket.gethostname(), None)
    assert isinstance(first.failure, BuildFailed)
    assert first.failure.tail == ("panic",)
    assert first.evidence["m5.large/console.log"] == b"panic"
    assert [(step.name, step.status) for step in first.steps] == [
        ("m5.large in us-east-1", RunStatus.FAILED),
        ("m5.large in us-east-1 > first boot", RunStatus.FAILED),
    ]
    record = load(RunRecord, first.directory / "record.json")
    assert record is not None
    assert (record.status, record.error) == (RunStatus.FAILED, "it died")


def test_checks_of_the_user_travel_with_what_lies_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, more = tmp_path / "ours", tmp_path / "more"
    for path in (ours / "test_ours.py", ours / "conftest.py", more / "deep/test_deep.py"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    asked = image()
    asked = replace(
        asked, verify=replace(asked.verify, checks=(ours / "test_ours.py", more / "deep/test_deep.py"))
    )
    stored = StoredImage(artifact=job("a").artifact, verdict=None, directory=None)
    (stays,) = jobs_of(asked, stored, "night", with_files=False)
    assert stays.checks == {}
    (travels,) = jobs_of(asked, stored, "night", with_files=True)
    assert travels.checks.keys() == {"0/test_ours.py", "0/conftest.py", "1/test_deep.py"}
    found: list[tuple[str, ...]] = []

    def verify_machine(image: Any, machine: Any, *, work: Path, **_: Any) -> MachineResult:
        found.append(tuple(str(path.relative_to(work)) for path in image.verify.checks))
        assert all(path.exists() for path in image.verify.checks)
        return MachineResult(results=(), measured=())

    @contextmanager
    def machine(*_: object) -> Iterator[None]:
        yield None

    monkeypatch.setenv("AMI_BUILDER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(matrix, "verify_machine", verify_machine)
    monkeypatch.setattr(matrix, "_machine", machine)
    assert run_job(travels).failure is None
    assert found == [("checks/0/test_ours.py", "checks/1/test_deep.py")]


ERRORS = [
    *(kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AmiBuilderError)),
    MachineDied,
    GuestStuck,
    ssh.Unreachable,
]


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_travel_with_all_that_they_say(kind: type[AmiBuilderError]) -> None:
    error = kind("it broke", hint="mend it", log=Path("/x.log"), tail=("a", "b"))
    error.add_note("step: x")
    came = pickle.loads(pickle.dumps(error))
    assert type(came) is kind
    assert (came.message, came.hint, came.log, came.tail) == (
        "it broke",
        "mend it",
        Path("/x.log"),
        ("a", "b"),
    )
    assert (str(came), came.__notes__) == ("it broke", ["step: x"])


def test_an_interruption_travels_too() -> None:
    came = pickle.loads(pickle.dumps(Interrupted("stopped")))
    assert (came.message, came.exit_code) == ("stopped", 130)


def test_without_dask_the_flag_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingTool) as caught, open_executor("tcp://127.0.0.1:1", 1):
        pass
    assert caught.value.hint == cluster.INSTALL


@pytest.mark.parametrize("address", ["tpc://127.0.0.1:8786", "127.0.0.1:many", ""])
def test_an_address_that_is_none_is_a_wrong_flag(address: str) -> None:
    with pytest.raises(UsageError, match="--dask-scheduler") as caught, open_executor(address, 1):
        pass
    assert "tcp://10.0.0.7:8786" in (caught.value.hint or "")


def test_a_scheduler_that_does_not_answer_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    for bound in ("_ANSWER_SECONDS", "_CLOSE_SECONDS"):
        monkeypatch.setattr(cluster, bound, 0.5)
    level = logging.getLogger("distributed").level
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(TimedOut, match=f"{address}: no Dask scheduler"), open_executor(address, 1):
            pass
    assert logging.getLogger("distributed").level == level
