"""How long it is going to take: from earlier runs, from the bake's boot, and never from nothing."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from ami_builder.build import build, plugins, verify
from ami_builder.build.build import Options
from ami_builder.build.inputs import Inputs
from ami_builder.config.schema import Image
from ami_builder.console import Progress, Step
from ami_builder.console.progress import Renderer
from ami_builder.core.options import Arch
from ami_builder.core.records import Artifact, RunRecord, RunStatus, StepRecord, TargetKind
from ami_builder.qemu.target import QemuTarget
from ami_builder.state import runs
from ami_builder.state.workspace import Run, StoredImage, Workspace
from ami_builder.system import ssh
from ami_builder.verify import estimate, journey, runner
from ami_builder.verify.estimate import Estimate
from ami_builder.verify.journey import verify_machine
from ami_builder.verify.machine import MachineResult
from tests.fake_programs import fake
from tests.sample_image import GIB, image
from tests.unit.test_journey import Guest

TCG = "TCG (slow): /dev/kvm: No such file or directory"
SLOW = ": without KVM the VM is emulated, which is slow"


@pytest.mark.parametrize(
    ("seconds", "early", "late"),
    [
        (0.2, "about 10 s on this host", "about 10 more seconds"),
        (44.9, "about 40 s on this host", "about 40 more seconds"),
        (45, "about 50 s on this host", "about 50 more seconds"),
        (114, "about 110 s on this host", "about 110 more seconds"),
        (115, "about 2 min on this host", "about 2 more minutes"),
        (209, "about 3 min on this host", "about 3 more minutes"),
        (211, "about 4 min on this host", "about 4 more minutes"),
        (4000, "about 67 min on this host", "about 67 more minutes"),
    ],
)
def test_an_estimate_is_rounded(seconds: float, early: str, late: str) -> None:
    assert str(Estimate(seconds=seconds, runs=2)) == f"{early}, judging by 2 earlier runs"
    assert str(Estimate(seconds=seconds, emulated=True)) == f"{late}{SLOW}"


def test_one_earlier_run_is_one() -> None:
    assert str(Estimate(seconds=60, runs=1, emulated=True)).endswith(f"judging by 1 earlier run{SLOW}")


BUILD: Mapping[str, float | str] = {
    "base disk": 40,
    "container": 25,
    "choose the accelerator": TCG,
    "bake with Packer": 60,
    "verify": 100,
    "verify > machine of 2 GiB": 100,
    "verify > machine of 2 GiB > memory pressure": 40,
}
"""The steps of a build with their seconds; a text is the detail of one that takes no time."""


def record(
    steps: Mapping[str, float | str] = BUILD,
    *,
    number: int = 0,
    top: str = "build dask",
    status: RunStatus = RunStatus.PASSED,
    target: TargetKind = TargetKind.QEMU,
    arch: Arch = Arch.AMD64,
    **changed: float | str,
) -> RunRecord:
    """Return the record of an earlier run, with some steps changed."""
    whole = dict(steps) | {name.replace("_", " "): value for name, value in changed.items()}
    made = [StepRecord(name="resolve inputs", seconds=3, status=RunStatus.PASSED)]
    made += [
        StepRecord(
            name=f"{top} > {name}" if name else top,
            seconds=0 if isinstance(value, str) else value,
            detail=value if isinstance(value, str) else "",
            status=RunStatus.PASSED,
        )
        for name, value in {"": 400, **whole}.items()
    ]
    return RunRecord(
        run_id=f"run {number}",
        command=top.split()[0],
        image="dask",
        digest="d",
        status=status,
        started=datetime(2026, 1, 2, tzinfo=UTC) + timedelta(days=number),
        steps=tuple(made),
        artifact=Artifact(
            image="dask",
            target=target,
            location="/image.qcow2",
            digest="d",
            created=datetime(2026, 1, 2, tzinfo=UTC),
            run_id="r",
            size=1,
            arch=arch,
        ),
    )


def dask(**verify: object) -> Image:
    whole = image()
    settings = {"memory": (2 * GIB,), "pressure": True, **verify}
    return replace(whole, name="dask", verify=replace(whole.verify, **settings))  # type: ignore[arg-type]


def of_build(
    *known: RunRecord,
    ready: Sequence[str] = (),
    baked: bool = False,
    verify: bool = True,
    emulated: bool | None = True,
    target: TargetKind = TargetKind.QEMU,
    of: Image | None = None,
) -> tuple[float, int] | None:
    """Return the seconds of a build, and how many runs they come from."""
    found = estimate.of_build(
        known, of or dask(), target, ready=ready, baked=baked, verify=verify, emulated=emulated
    )
    return None if found is None else (found.seconds, found.runs)


def test_what_runs_side_by_side_counts_once() -> None:
    assert of_build(record()) == (40 + 60 + 100, 1)


def test_only_what_is_left_to_do_counts() -> None:
    assert of_build(record(), ready=["base disk"]) == (25 + 60 + 100, 1)
    assert of_build(record(), ready=["base disk", "container"]) == (60 + 100, 1)
    assert of_build(record(), verify=False) == (40 + 60, 1)
    assert of_build(record(), baked=True) == (100, 1)


def test_other_images_that_were_built_beside_it_do_not_count() -> None:
    """Their steps are in its record too."""
    beside = record({**BUILD, "choose the accelerator": "KVM", "verify > machine of 4 GiB": 9}, top="build b")
    other = tuple(replace(step, name=step.name.replace("build b", "build dask-gpu")) for step in beside.steps)
    for steps in ((*record().steps, *other), (*other, *record().steps)):
        both = replace(record(), steps=steps)
        assert of_build(both) == of_build(record())
        assert of_build(both, emulated=False) is None


def test_it_is_the_median_of_the_last_runs() -> None:
    known = [record(number=n, bake_with_Packer=seconds) for n, seconds in enumerate((999, 999, 50, 90, 60))]
    assert of_build(*known) == (40 + 60 + 100, 3)


def test_a_step_that_had_nothing_to_do_says_nothing_about_one_that_has() -> None:
    cached = [record(number=n, base_disk="cached", container="cached") for n in (2, 3, 4)]
    assert of_build(record(number=1, base_disk=70), *cached) == (70 + 60 + 100, 4)
    assert of_build(*cached) is None
    assert of_build(*cached, ready=["base disk", "container"]) == (60 + 100, 3)


@pytest.mark.parametrize(
    "other",
    [
        record(status=RunStatus.FAILED),
        record(status=RunStatus.INTERRUPTED),
        record(target=TargetKind.AWS),
        replace(record(), image="another"),
        replace(record(), artifact=None),
        record(arch=Arch.ARM64),
        record(choose_the_accelerator="KVM: a guest has run on it"),
        record({name: value for name, value in BUILD.items() if "accelerator" not in name}),
        record({name: value for name, value in BUILD.items() if "verify" not in name}),
        record({name: value for name, value in BUILD.items() if "pressure" not in name}),
        record({**BUILD, "verify > machine of 4 GiB": 100}),
        record({name: value for name, value in BUILD.items() if "bake" not in name}),
    ],
)
def test_a_run_that_did_something_else_says_nothing(other: RunRecord) -> None:
    assert of_build(other) is None


def test_without_earlier_runs_nothing_is_known() -> None:
    assert of_build() is None
    assert estimate.of_verification([], dask(), TargetKind.QEMU, emulated=True) is None


def test_an_ami_is_estimated_by_amis() -> None:
    steps: dict[str, float | str] = {
        "container": "cached",
        "bake with Packer": 200,
        "finish the AMI": 90,
        "verify": 150,
        "verify > machine of m6i.large": 150,
        "verify > machine of m6i.large > memory pressure": 40,
    }
    of = dask(instance_types=("m6i.large",))
    known = [record(), record(steps, target=TargetKind.AWS)]
    found = of_build(*known, of=of, target=TargetKind.AWS, emulated=None, ready=["container"])
    assert found == (200 + 90 + 150, 1)


def test_a_verification_is_estimated_by_builds_and_verifications() -> None:
    alone: dict[str, float | str] = {
        name.removeprefix("verify > "): value for name, value in BUILD.items() if "verify > " in name
    }
    alone["choose the accelerator"] = TCG
    known = [record(), record(alone, top="verify image.qcow2", number=1)]
    found = estimate.of_verification(known, dask(), TargetKind.QEMU, emulated=True)
    assert found == Estimate(seconds=(100 + 400) / 2, runs=2, emulated=True)
    assert estimate.of_verification(known, dask(memory=(GIB,)), TargetKind.QEMU, emulated=True) is None


def test_the_boot_of_the_bake_gives_the_rest() -> None:
    """On the host where this was measured: 20 s, 135 s, then 45 s of memory pressure."""

    def rest(of: Image, *, verify: bool = True, processors: int = 2) -> float:
        found = estimate.from_boot(of, 20, verify=verify, processors=processors)
        assert found is not None
        return found.seconds

    assert rest(dask(), verify=False) == pytest.approx(28, rel=0.05)
    assert rest(dask(pressure=False)) == pytest.approx(28 + 107, rel=0.05)
    assert rest(dask()) == pytest.approx(28 + 107 + 45, rel=0.05)
    both = dask(memory=(2 * GIB, 4 * GIB), cpus=2)
    assert rest(both) == pytest.approx(28 + 2 * 107 + 3 * 45, rel=0.05)
    assert rest(both, processors=4) == pytest.approx(28 + 107 + 2 * 45, rel=0.05)


def test_the_boot_of_another_base_gives_nothing() -> None:
    foreign = replace(dask(), base=replace(dask().base, source="/cloud.qcow2"))
    assert estimate.from_boot(foreign, 22, verify=True, processors=2) is None


@dataclass
class Said(Renderer):
    """A renderer that keeps what steps say, and whose clock moves as the fake Packer boots and bakes."""

    guest: Guest
    lines: list[str] = field(default_factory=list)

    def updated(self, step: Step) -> None:
        self.guest.now += {"Waiting for SSH to become available...": 20, "Converting hard drive...": 40}.get(
            step.detail, 0
        )

    def announced(self, step: Step) -> None:
        self.lines.append(f"{step.path}: {step.announced}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeTarget(QemuTarget):
    """This host with a machine that is only a clock."""

    guest: Guest

    def verify(
        self, image: Image, stored: StoredImage, run: Run, step: Step, evidence: Path
    ) -> list[MachineResult]:
        with step.step("choose the accelerator") as child:
            child.done(os.environ["AMI_BUILDER_ACCELERATOR"].upper())
        with step.step(f"machine of {self.guest.name}") as child:
            return [verify_machine(image, self.guest, work=run.work, evidence=evidence, step=child)]


PACKER = """
case $1 in
    version) echo Packer v1.6.6 ;;
    build)
        output=$(sed -n 's/.*"output_directory": "\\(.*\\)".*/\\1/p' run.auto.pkrvars.json)
        echo '==> qemu.image: Waiting for SSH to become available...'
        echo '==> qemu.image: Connected to SSH!'
        echo '==> qemu.image: Converting hard drive...'
        mkdir "$output" && echo disk >"$output/image.qcow2"
        records=$(sed -n 's/.*"records_directory": "\\(.*\\)".*/\\1/p' run.auto.pkrvars.json)
        echo 0123456789abcdef0123456789abcdef >"$records/identity.txt"
        ;;
esac
"""


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    """A host with a fake Packer, and the base and the container of `INPUTS` in its cache."""
    fake(tmp_path / "bin", "packer", PACKER)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    plugins.version.cache_clear()
    made = Workspace.open({"AMI_BUILDER_HOME": str(tmp_path / "home")})
    made.ensure()
    base, container = made.cache / "base" / "b", made.cache / "container" / "c"
    base.mkdir(parents=True)
    container.mkdir(parents=True)
    for file in (base / "vmlinuz", base / "initrd.img", container / "container.tar"):
        file.touch()
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base / "disk.qcow2", "1M"], check=True)
    yield made
    plugins.version.cache_clear()


@pytest.mark.parametrize(("wanted", "known"), [("tcg", True), ("kvm", False), ("neither", None)])
@pytest.mark.needs("qemu-img")
def test_whether_machines_are_emulated_never_fails(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, wanted: str, known: bool | None
) -> None:
    monkeypatch.setenv("AMI_BUILDER_ACCELERATOR", wanted)
    assert QemuTarget(workspace=workspace).emulated is known


def inputs(digest: str) -> Inputs:
    return Inputs(image=dask(), guest={}, base_digest="b", container_digest="c", digest=digest * 64)


@pytest.mark.needs("qemu-img")
def test_a_build_says_how_long_it_takes_by_its_boot_and_then_by_earlier_runs(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names of the steps are the real ones: another name for one of them is seen here."""
    guest = Guest()
    monkeypatch.setattr(journey, "time", SimpleNamespace(monotonic=lambda: guest.now))
    monkeypatch.setattr(ssh, "Session", guest.session)
    monkeypatch.setattr(runner, "run", guest.checks)
    target = FakeTarget(workspace=workspace, guest=guest)

    def said(act: Callable[[Progress], object]) -> list[str]:
        renderer = Said(guest)
        with Progress(renderer, lambda: guest.now) as progress:
            act(progress)
        return renderer.lines

    def built(digest: str, options: Options | None = None) -> list[str]:
        made = inputs(digest)
        return said(lambda p: build.build_from(made, options or Options(), target, workspace, p))

    monkeypatch.setenv("AMI_BUILDER_ACCELERATOR", "kvm")
    assert built("0") == [], "how a build goes on under KVM was never measured"
    monkeypatch.setenv("AMI_BUILDER_ACCELERATOR", "tcg")
    units = 1.4 + 5.3 + 2.3
    assert built("1") == [f"build dask: about {units * 20 / 60:.0f} more minutes{SLOW}"]
    _, first = runs.run_records(workspace)
    whole = next(step.seconds for step in first.steps if step.name == "build dask")
    again = f"about {whole / 60:.0f} min on this host, judging by 1 earlier run{SLOW}"
    assert built("2") == [f"build dask: {again}"]
    assert built("3", Options(verify=False)) == [
        f"build dask: about 60 s on this host, judging by 2 earlier runs{SLOW}"
    ]

    stored = workspace.image("dask", "2" * 64)
    assert stored is not None
    at = verify.Located(target=target, stored=stored)
    verification = next(step.seconds for step in first.steps if step.name == "build dask > verify")
    text = f"about {verification / 60:.0f} min on this host, judging by"
    verified = said(lambda p: verify.verify_images(dask(), [at], workspace, p))
    assert verified == [f"verify image.qcow2: {text} 2 earlier runs{SLOW}"]
    assert runs.run_records(workspace)[-1].artifact == stored.artifact
    verified = said(lambda p: verify.verify_images(dask(), [at], workspace, p))
    assert verified == [f"verify image.qcow2: {text} 3 earlier runs{SLOW}"]
