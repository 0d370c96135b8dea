"""The experiment with VMs that answer at once: what is run, kept, continued, and drawn."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ami_builder.core.errors import BuildFailed
from ami_builder.qemu.hardware import Accelerator
from ami_builder.state.workspace import Workspace
from tests.experiment import __main__ as cli
from tests.experiment import series
from tests.experiment.cases import METHOD, Case, LimitPolicy, Work
from tests.experiment.docs import PAGE as DOCS
from tests.experiment.layers import LAYERS
from tests.experiment.results import Result, Trace
from tests.experiment.samples import result
from tests.stored_images import stored
from tests.unit.test_report import Parsed

ROOT = Path(__file__).resolve().parents[2]
TRACE = Trace(
    times=(0.0, 1.0, 2.0), held=(0, 700 << 20, 100 << 20), available=(1, 1, 1), marks=((1.0, "lost"),)
)
Make = Callable[..., tuple[Result, Trace]]


class Machines:
    """Replaces real VMs: each run returns a result at once, or fails."""

    def __init__(self) -> None:
        self.made: list[Case] = []
        self.broken: set[LimitPolicy] = set()

    def make(self, case: Case, *_: object) -> tuple[Result, Trace]:
        self.made.append(case)
        if case.policy in self.broken:
            raise BuildFailed("it does not come up")
        stalls = (
            {"stalled": 70.0, "longest_stall": 30.0, "system_oom_kills": 3}
            if case.policy is LimitPolicy.NONE
            else {}
        )
        names = ("memory", "policy", "work", "repeat", "seed", "cpus", "layers")
        fields = {name: getattr(case, name) for name in names}
        return result(**fields, **stalls), TRACE


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machines:
    monkeypatch.setenv("AMI_BUILDER_HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    workspace = Workspace(cache=tmp_path / "cache", state=tmp_path / "state")
    workspace.ensure()
    stored(workspace, "a")
    found = Machines()
    monkeypatch.setattr(series, "make", found.make)
    monkeypatch.setattr(series, "image_info", lambda _: None)
    monkeypatch.setattr(series, "choose_accelerator", lambda *_, **__: (Accelerator.TCG, "TCG"))
    return found


pytestmark = pytest.mark.usefixtures("machines")


def answer(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    assert cli.main(["--quiet", *arguments, "--json"]) == status
    out = capsys.readouterr().out
    return json.loads(out) if out else None


def test_existing_runs_are_not_repeated(machines: Machines, capsys: pytest.CaptureFixture[str]) -> None:
    first = answer(capsys, "--memory", "1GiB", "--repeat", "1")
    assert len(machines.made) == len(first["results"]) == 2
    second = answer(capsys, "--memory", "1GiB", "--repeat", "2", "--policy", "none", "--policy", "gke")
    assert [(c.policy, c.repeat) for c in machines.made[2:]] == [
        (c.policy, c.repeat) for c in sorted(machines.made[2:], key=lambda c: c.repeat)
    ]
    assert len(machines.made) == len(second["results"]) == 5
    again = answer(capsys, "--memory", "1GiB", "--repeat", "2", "--policy", "none", "--policy", "gke")
    assert len(machines.made) == 5
    assert again["left"] == []


def test_damaged_results_and_those_of_another_method_are_ignored(
    machines: Machines, capsys: pytest.CaptureFixture[str]
) -> None:
    page = answer(capsys, "--repeat", "1")["page"]
    kept = Path(page).with_name("results.jsonl")
    lines = kept.read_text().splitlines()
    assert len(lines) == 2
    other = json.loads(lines[0]) | {"method": METHOD + 1}
    kept.write_text("\n".join([json.dumps(other), lines[1], '{"half": ']))
    assert len(answer(capsys, "--no-run")["results"]) == 1
    answer(capsys, "--repeat", "1")
    assert len(machines.made) == 3


def test_no_run_starts_after_the_time_and_the_next_call_continues(
    machines: Machines, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10000, 100))
    monkeypatch.setattr(f"{series.__name__}.time.monotonic", lambda: float(next(clock)))
    found = answer(capsys, "--repeat", "3", "--jobs", "1", "--for", "250s")
    assert len(machines.made) == 2
    assert len(found["left"]) == 4
    answer(capsys, "--repeat", "3", "--jobs", "1")
    assert len(machines.made) == len(set(machines.made)) == 6


def test_a_vm_that_does_not_boot_does_not_stop_the_others(
    machines: Machines, capsys: pytest.CaptureFixture[str]
) -> None:
    machines.broken = {LimitPolicy.NONE}
    found = answer(capsys, "--repeat", "1")
    assert len(found["results"]) == 1
    assert list(found["failed"].values()) == ["it does not come up"]
    assert found["left"] == list(found["failed"])
    # Nothing was left but what fails.
    assert cli.main(["--quiet", "--repeat", "1"]) == BuildFailed.exit_code


def test_without_dask_the_error_names_the_package(
    machines: Machines, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "distributed" else find(name, *a)
    )
    assert cli.main(["--quiet"]) == 3
    assert "its extra 'dask'" in capsys.readouterr().err
    assert machines.made == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--no-run"], "no run of this image has been made yet"),
        (["./nowhere.qcow2"], "no such finished image"),
    ],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert cli.main(["--quiet", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_page_shows_the_criteria_the_policies_and_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(
        answer(capsys, "--memory", "1GiB", "--repeat", "2", "--work", "spikes", "--work", "array")["page"]
    )
    text = page.read_text(encoding="utf-8")
    parsed = Parsed(text)
    tags = {tag for tag, _ in parsed.tags}
    assert not tags & {"script", "img", "link", "iframe"}
    assert "http" not in text.replace("http://www.w3.org", "").replace(
        "Content-Security-LimitPolicy", ""
    ).replace('http-equiv="', "")
    assert text.count("<svg") == 5 + 2
    assert "W3 completes at least as many tasks as without a limit" in parsed.text
    assert (
        "python -m tests.experiment dask --cpus 2 --layers image --memory 1GiB --policy none "
        "--policy available --work array --work spikes --repeat 2 --seed 1" in parsed.text
    )
    answer(capsys, "--no-run")
    assert page.read_text(encoding="utf-8") == text


PAGE = DOCS.read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python -m tests.experiment .*", PAGE.replace("\\\n", ""), re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_in_docs_are_valid(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert cli.main([*shlex.split(command)[3:], "--no-run"]) == 2
    assert "no run of this image has been made yet" in capsys.readouterr().err


def test_an_unknown_layer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--layers", "ttl+tll"])
    assert ended.value.code == 2
    assert "'tll' is not a layer; known: image, off, ttl" in capsys.readouterr().err


def test_docs_name_every_policy_work_and_layer() -> None:
    assert len(COMMANDS) >= 4
    for word in (*LimitPolicy, *Work, *LAYERS):
        assert f"`{word}`" in PAGE


def test_a_table_for_a_pipe_has_the_criteria_and_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--quiet", "--repeat", "1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split("\t")[:5] == ["2 GiB, 2 CPUs", "spikes", "none", "image", "1"]
    assert any("\tpassed\t" in line for line in out)
    assert Path(out[-1]).name == "report.html"
