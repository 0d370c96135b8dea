"""A matrix of cells: all end, in order, whoever runs them; failures from elsewhere stay readable."""

from __future__ import annotations

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

from ami_builder import qemu
from ami_builder.aws import jobs as cells_module
from ami_builder.aws import matrix
from ami_builder.aws.jobs import Cell, CellProof, cells, prove_cell
from ami_builder.aws.matrix import Subject, prove_matrix, proved, verify_matrix
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
from ami_builder.state.workspace import StoredImage, Workspace, load
from ami_builder.system import ssh
from ami_builder.verify import executor as cluster
from ami_builder.verify.concurrency import open_executor, threads
from ami_builder.verify.journey import Proof
from tests.sample_image import image

EAST, WEST = "us-east-1", "eu-west-1"
Proving = Callable[[Cell], CellProof]


def cell(kind: str, region: str = EAST) -> Cell:
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
    return Cell(image=image(), artifact=artifact, instance_type=kind, parent="night", checks={})


def shown(cell: Cell, outcome: Outcome = Outcome.PASSED) -> CellProof:
    kind = cell.instance_type
    result = CheckResult(name="x", phase="boot", machine=kind, outcome=outcome, seconds=1, message="")
    measured = Measurement(machine=kind, phase="boot", total=4, available=3)
    return CellProof(
        cell=cell,
        host="there",
        directory=Path("/runs/1"),
        proof=Proof(results=(result,), measured=(measured,)),
        failure=None,
        steps=(),
        evidence={f"{kind}/console.log": b"up\n"},
    )


def broken(cell: Cell, failure: AmiBuilderError) -> CellProof:
    return replace(shown(cell), proof=None, failure=failure)


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
def prove_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Proving], None]:
    def install(prove: Proving) -> None:
        monkeypatch.setattr(matrix, "prove_cell", lambda cell, step=None: prove(cell))

    return install


def run(wanted: list[Cell], where: str, tmp_path: Path) -> tuple[tuple[CellProof, ...], Progress]:
    with open_progress(Mode.QUIET) as progress, executor(where) as made, progress.step("verify") as step:
        return prove_matrix(wanted, made, step, tmp_path / "machines"), progress


def test_proofs_come_in_the_order_of_their_cells(
    where: str, tmp_path: Path, prove_with: Callable[[Proving], None]
) -> None:
    second = threading.Event()

    def prove(cell: Cell) -> CellProof:
        if cell.instance_type == "a":
            assert second.wait(60)
        second.set()
        return shown(cell)

    prove_with(prove)
    proofs, _ = run([cell("a"), cell("b"), cell("c")], where, tmp_path)
    assert [proof.cell.instance_type for proof in proofs] == ["a", "b", "c"]
    assert [proof.measured[0].machine for proof in proved(proofs)] == ["a", "b", "c"]
    assert (tmp_path / "machines/b/console.log").read_bytes() == b"up\n"


def test_evidence_of_regions_does_not_mix(
    where: str, tmp_path: Path, prove_with: Callable[[Proving], None]
) -> None:
    prove_with(shown)
    _, progress = run([cell("a"), cell("a", WEST)], where, tmp_path)
    for region in (EAST, WEST):
        assert (tmp_path / "machines/default" / region / "a/console.log").exists()
    assert [s.name for s in progress.steps if s.name.count(">") == 1] == [
        "verify > default in us-east-1",
        "verify > default in eu-west-1",
    ]


def test_all_failures_are_named_and_the_first_decides(
    where: str, tmp_path: Path, prove_with: Callable[[Proving], None]
) -> None:
    failures = {
        "b": CloudFailed(
            "no capacity", hint="name more", tail=("full",), log=Path("/runs/1/work/console.log")
        ),
        "c": TimedOut("too late"),
    }

    def prove(cell: Cell) -> CellProof:
        failure = failures.get(cell.instance_type)
        if failure is not None:
            return broken(cell, failure)
        return shown(cell, Outcome.FAILED if cell.instance_type == "d" else Outcome.PASSED)

    prove_with(prove)
    proofs, progress = run([cell(kind) for kind in "abcd"], where, tmp_path)
    with pytest.raises(CloudFailed, match="2 of 4 machines could not be proved: no capacity") as caught:
        proved(proofs)
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
        assert status["verify > machine of a"] is RunStatus.PASSED


def test_a_single_failure_is_told_as_it_is(
    where: str, tmp_path: Path, prove_with: Callable[[Proving], None]
) -> None:
    prove_with(lambda cell: broken(cell, BuildFailed("it never answered")))
    proofs, _ = run([cell("a")], where, tmp_path)
    with pytest.raises(BuildFailed, match="it never answered") as caught:
        proved(proofs)
    assert caught.value.message == "it never answered"
    notes = getattr(caught.value, "__notes__", [])
    assert ("on there, in /runs/1" in notes) == (where == "elsewhere")


def test_what_the_cluster_gives_up_is_a_failure_of_its_cell(
    where: str, tmp_path: Path, prove_with: Callable[[Proving], None]
) -> None:
    def prove(cell: Cell) -> CellProof:
        if cell.instance_type == "a":
            raise CancelledError
        return shown(cell)

    prove_with(prove)
    proofs, _ = run([cell("a"), cell("b")], where, tmp_path)
    with pytest.raises(BuildFailed, match="given up a in us-east-1"):
        proved(proofs)


def test_a_defect_is_raised_once_all_have_ended(
    where: str, tmp_path: Path, prove_with: Callable[[Proving], None]
) -> None:
    ended: list[str] = []

    def prove(cell: Cell) -> CellProof:
        if cell.instance_type == "a":
            raise KeyError("a defect")
        ended.append(cell.instance_type)
        return shown(cell)

    prove_with(prove)
    with pytest.raises(KeyError, match="a defect"):
        run([cell("a"), cell("b"), cell("c")], where, tmp_path)
    assert sorted(ended) == ["b", "c"]


def test_an_executor_of_threads_can_be_had_again_after_a_failure() -> None:
    with pytest.raises(BuildFailed), open_executor(None, 1):
        raise BuildFailed("x")
    with open_executor(None, 1) as made:
        assert made.submit(lambda: 1).result() == 1


@dataclass(slots=True, kw_only=True)
class Place:
    """A site that keeps verdicts."""

    target: TargetKind = TargetKind.AWS
    judged: list[Verdict] = field(default_factory=list)

    def judge(self, stored: StoredImage, verdict: Verdict) -> StoredImage:
        self.judged.append(verdict)
        return stored


def test_a_region_that_fails_leaves_the_other_its_verdict(
    tmp_path: Path, prove_with: Callable[[Proving], None]
) -> None:
    prove_with(lambda cell: shown(cell) if cell.region == WEST else broken(cell, CloudFailed("it is down")))
    places = {region: Place() for region in (EAST, WEST)}
    subjects = [
        Subject(
            image=image(),
            stored=StoredImage(artifact=cell("a", region).artifact, verdict=None, directory=None),
            site=place,  # type: ignore[arg-type] # all that is asked of it
        )
        for region, place in places.items()
    ]
    workspace = Workspace.open({"AMI_BUILDER_HOME": str(tmp_path)})
    with (
        open_progress(Mode.QUIET) as progress,
        pytest.raises(CloudFailed, match="1 of 2 machines could not be proved: it is down"),
    ):
        verify_matrix(subjects, None, workspace, progress)
    assert places[EAST].judged == []
    assert [verdict.passed for verdict in places[WEST].judged] == [True]


def test_an_inconclusive_region_is_named_with_what_to_run_again(
    tmp_path: Path, prove_with: Callable[[Proving], None]
) -> None:
    prove_with(lambda cell: shown(cell, Outcome.INCONCLUSIVE if cell.region == WEST else Outcome.PASSED))
    places = {region: Place() for region in (EAST, WEST)}
    subjects = [
        Subject(
            image=image(),
            stored=StoredImage(artifact=cell("a", region).artifact, verdict=None, directory=None),
            site=place,  # type: ignore[arg-type] # all that is asked of it
        )
        for region, place in places.items()
    ]
    workspace = Workspace.open({"AMI_BUILDER_HOME": str(tmp_path)})
    with open_progress(Mode.QUIET) as progress, pytest.raises(Inconclusive) as caught:
        verify_matrix(subjects, None, workspace, progress)
    assert caught.value.tail == (f"x (boot, m6i.large in {WEST}): ",)
    assert f"`ami-builder verify ami-0123456789abcdef0 --region {EAST} --region {WEST}`" in (
        caught.value.hint or ""
    )
    assert [verdict.outcome for place in places.values() for verdict in place.judged] == [
        Outcome.PASSED,
        Outcome.INCONCLUSIVE,
    ]


def test_a_cell_is_a_run_of_its_own_wherever_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMI_BUILDER_HOME", str(tmp_path))
    seen: list[str] = []

    def prove(cell: Cell, run: Any, step: Step) -> Proof:
        seen.append((run.work / "checks/0/test_ours.py").read_text() if cell.checks else "")
        with step.step("first boot"):
            folder = run.directory / "machines" / cell.instance_type
            folder.mkdir(parents=True)
            (folder / "console.log").write_text("panic")
            raise BuildFailed("it died", hint="look", log=folder / "console.log", tail=("panic",))

    monkeypatch.setattr(cells_module, "_prove", prove)
    first, again = (pickle.loads(pickle.dumps(prove_cell(cell("m5.large")))) for _ in range(2))
    assert first.directory != again.directory
    assert first.directory.name.startswith("night.")
    assert (first.host, first.proof) == (socket.gethostname(), None)
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
    asked = replace(asked, verify=replace(asked.verify, checks=(ours / "test_ours.py", more)))
    stored = StoredImage(artifact=cell("a").artifact, verdict=None, directory=None)
    (stays,) = cells(asked, stored, "night", travelling=False)
    assert stays.checks == {}
    (travels,) = cells(asked, stored, "night", travelling=True)
    assert travels.checks.keys() == {"0/test_ours.py", "0/conftest.py", "1/more/deep/test_deep.py"}
    found: list[tuple[str, ...]] = []

    def prove(image: Any, machine: Any, run: Any, step: Step) -> Proof:
        found.append(tuple(str(path.relative_to(run.work)) for path in image.verify.checks))
        assert all(path.exists() for path in image.verify.checks)
        return Proof(results=(), measured=())

    @contextmanager
    def machine(*_: object) -> Iterator[None]:
        yield None

    monkeypatch.setenv("AMI_BUILDER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cells_module, "prove", prove)
    monkeypatch.setattr(cells_module, "_machine", machine)
    assert prove_cell(travels).failure is None
    assert found == [("checks/0/test_ours.py", "checks/1/more")]


ERRORS = [
    *(kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AmiBuilderError)),
    qemu.MachineDied,
    qemu.GuestStuck,
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
    assert caught.value.hint == "pip install 'ami-builder[dask]'"


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
        with pytest.raises(TimedOut, match=f"{address}: no scheduler"), open_executor(address, 1):
            pass
    assert logging.getLogger("distributed").level == level
