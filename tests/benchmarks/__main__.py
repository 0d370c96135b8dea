"""The figures of docs/explanation/performance.md: `python -m tests.benchmarks [NAME ...]`.

Each benchmark runs what a user would do otherwise in the same run, in turns, and reports the ratio. Without
names all run, which takes about an hour and a half without KVM. The result is a Markdown table on stdout.

Two take hours, and have options of their own (--help):
  against     what a build costs here and in another commit
  slow-host   whether the verdict on an image is the same on a host that is slowed down
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ami_builder import console
from ami_builder.build import plugins
from ami_builder.config import loading
from ami_builder.qemu import bake
from ami_builder.qemu.accelerator import known_accelerator
from ami_builder.qemu.target import QemuTarget
from ami_builder.state.workspace import Workspace
from tests.benchmarks import against, layering, slow_host, spilling
from tests.benchmarks.doctoring import doctor_seconds, judging_seconds
from tests.benchmarks.planning import planning_seconds
from tests.vm.conftest import HOME, ROOT, booted, environment

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ami_builder.config.schema import Image

MEGABYTE = 1000**2


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    what: str
    figure: str
    against: str
    bound: str


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _command(*argv: str | Path, **more: str) -> None:
    done = subprocess.run(
        [str(a) for a in argv],
        env=environment(**more),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, argv))} failed with exit status {done.returncode}")


def _pairs(
    ours: Callable[[], object], theirs: Callable[[], object], count: int
) -> tuple[float, float, float]:
    """Return the medians of both and of the ratio ours/theirs pair by pair; who begins changes each time."""
    times: list[tuple[float, float]] = []
    for number in range(count):
        if number % 2:
            b = _seconds(theirs)
            a = _seconds(ours)
        else:
            a = _seconds(ours)
            b = _seconds(theirs)
        times.append((a, b))
    a_median, b_median = (statistics.median(t[i] for t in times) for i in (0, 1))
    return a_median, b_median, statistics.median(a / b for a, b in times)


def _workspace() -> Workspace:
    return Workspace.open({"AMI_BUILDER_HOME": str(HOME)})


def _image() -> Image:
    return loading.load(ROOT / "ami-builder.toml", environ={}, overrides={}).select()


def _built() -> tuple[Image, Path]:
    """Return the default image and its disk, built first if it is not."""
    workspace, image = _workspace(), _image()
    _command(sys.executable, "-m", "ami_builder", "build")
    inputs = QemuTarget(workspace=workspace).gather(image, refresh=False)
    stored = workspace.image(image.name, inputs.digest)
    assert stored is not None
    return image, stored.path


def startup() -> Sequence[Row]:
    """`ami-builder --version` and the set-up script around it, against `packer version`."""
    program = (sys.executable, "-I", "-m", "ami_builder")
    script = ROOT / "scripts" / "ami-builder"
    for argv in ((*program, "--version"), (script, "--version"), ("packer", "version")):
        _command(*argv)
    ours, theirs, ratio = _pairs(
        lambda: _command(*program, "--version"), lambda: _command("packer", "version"), 21
    )
    through, direct, _ = _pairs(
        lambda: _command(script, "--version"), lambda: _command(*program, "--version"), 21
    )
    return (
        Row(
            what="`ami-builder --version`",
            figure=f"{ours * 1000:.0f} ms",
            against=f"{ratio:.2f} × `packer version` ({theirs * 1000:.0f} ms)",
            bound="1.2 ×",
        ),
        Row(
            what="`scripts/ami-builder`, all installed",
            figure=f"{through * 1000:.0f} ms",
            against=f"{(through - direct) * 1000:.0f} ms over the program itself",
            bound="300 ms",
        ),
    )


def unchanged() -> Sequence[Row]:
    """An unchanged `build` and an unchanged night (built and promoted first if there is no image)."""
    rows = []
    for command, bound in (("build", "about 1 s"), ("nightly", "2 s")):
        argv = (sys.executable, "-m", "ami_builder", "--quiet", command)
        _command(*argv)
        times = [_seconds(lambda argv=argv: _command(*argv)) for _ in range(7)]  # type: ignore[misc]
        rows.append(
            Row(
                what=f"`{command}`, unchanged",
                figure=f"{statistics.median(times):.2f} s",
                against="a build with everything cached: below",
                bound=bound,
            )
        )
    return rows


def build() -> Sequence[Row]:
    """A cold `build` with empty caches, then one with base and container cached, each with verification."""
    with tempfile.TemporaryDirectory(dir=HOME.parent) as home:
        argv = (sys.executable, "-m", "ami_builder", "build")
        cold = _seconds(lambda: _command(*argv, AMI_BUILDER_HOME=home))
        cached = _seconds(lambda: _command(*argv, "--force", AMI_BUILDER_HOME=home))
        size = Workspace.open({"AMI_BUILDER_HOME": home}).images()[-1].artifact.size
    return (
        Row(what="`build`, cold", figure=_minutes(cold), against="", bound="9 min"),
        Row(
            what="`build`, base and container cached",
            figure=_minutes(cached),
            against=f"{cached / cold:.2f} × cold",
            bound="5 min",
        ),
        Row(
            what="the image, as qcow2",
            figure=f"{size / MEGABYTE:.0f} MB",
            against="with Docker and Dask in it",
            bound="700 MB",
        ),
    )


def baking() -> Sequence[Row]:
    """Our bake step against a bare `packer build` of the same staged template, one pair."""
    workspace, image = _workspace(), _image()
    _command(sys.executable, "-m", "ami_builder", "build")
    inputs = QemuTarget(workspace=workspace).gather(image, refresh=False)
    with workspace.run("benchmark", image.name) as run, console.open_progress(console.Mode.PLAIN) as progress:
        with progress.step("bake") as step:
            bake.bake(inputs, workspace, run, step)
        ours = next(s.seconds for s in progress.steps if s.name.endswith("bake with Packer"))
        output = run.work / "bare"
        argv = ["packer", "build", f"-var=output_directory={output}", "."]
        theirs = _seconds(
            lambda: subprocess.run(
                argv,
                cwd=run.directory / "packer",
                env={**os.environ, "CHECKPOINT_DISABLE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                check=True,
            )
        )
    return (
        Row(
            what="the bake step",
            figure=_minutes(ours),
            against=f"{ours / theirs:.2f} × a bare `packer build` of the same folder ({_minutes(theirs)})",
            bound="1.05 ×",
        ),
    )


def checks() -> Sequence[Row]:
    """The checks on one booted machine, with the shared ssh connection and without."""
    image, disk = _built()
    with (
        tempfile.TemporaryDirectory() as folder,
        booted(image, disk, Path(folder)) as machine,
    ):
        machine.check("warm", phase="boot")
        count = len(machine.check("count", phase="boot"))
        ours, theirs, ratio = _pairs(
            lambda: machine.check("shared", phase="boot"),
            lambda: machine.check("unshared", phase="boot", shared=False),
            5,
        )
    return (
        Row(
            what=f"{count} checks, boots aside",
            figure=f"{ours:.1f} s",
            against=f"{1 / ratio:.1f} times faster than without connection sharing ({theirs:.1f} s)",
            bound="2 times",
        ),
    )


def planning() -> Sequence[Row]:
    """Which of 100,000 images with 1,000,000 references go; and half of each, to see that it is linear."""
    half = min(planning_seconds(50_000, 500_000) for _ in range(3))
    whole = min(planning_seconds(100_000, 1_000_000) for _ in range(3))
    return (
        Row(
            what="a plan for 100,000 images with 1,000,000 references",
            figure=f"{whole:.2f} s of CPU",
            against=f"{whole / half:.2f} × half as many of both",
            bound="2 s, 2 ×",
        ),
    )


def doctor() -> Sequence[Row]:
    """`ami-builder doctor` for 1,000 simulated workers, and its judgement alone."""
    whole, one = doctor_seconds(1000), doctor_seconds(1)
    return (
        Row(
            what="`doctor`, 1,000 simulated workers",
            figure=f"{whole:.2f} s",
            against=f"{one:.2f} s for one; judging them takes {judging_seconds(1000) * 1000:.0f} ms of CPU",
            bound="5 s",
        ),
    )


def spill() -> Sequence[Row]:
    """Spilling to the container's layer, the root disk, one NVMe disk and two joined, with bounded disks."""
    image, disk = _built()
    with tempfile.TemporaryDirectory() as folder:
        found = spilling.measure(image, disk, Path(folder))
    return [
        Row(
            what=f"spilling to {place}",
            figure=f"{write:.0f} s written, {read:.0f} s read, {cpu:.0f} s of the worker's CPU",
            against=f"{ratio:.2f} × {spilling.LAYER}",
            bound="",
        )
        for place, write, read, cpu, ratio in spilling.table(found)
    ]


def layers() -> Sequence[Row]:
    """W1 and W4 of the experiment on one VM, with the layers of defence and without them in turns."""
    image, disk = _built()
    with tempfile.TemporaryDirectory() as folder:
        found = layering.measure(image, disk, Path(folder))
    return [
        Row(
            what=f"the layers' cost in {work.text.split(':')[0]}, {len(pairs)} pairs",
            figure=f"{_percents(layering.costs(pairs, 1))} of the VM's CPU time",
            against=f"{_percents(layering.costs(pairs, 0))} of the time"
            f" ({statistics.median(pair.off[0] for pair in pairs):.0f} s without them)",
            bound="+1 %",
        )
        for work, pairs in found.items()
    ]


def _percents(added: tuple[float, float, float]) -> str:
    middle, low, high = (f"{share * 100:+.1f}" for share in added)
    return f"{middle} % (half of the pairs: {low} to {high} %)"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


BENCHMARKS = {
    b.__name__: b for b in (startup, build, unchanged, baking, checks, planning, doctor, spill, layers)
}


COMMANDS = {"against": against.main, "slow-host": slow_host.main}


def main() -> None:
    """Run what is asked for and print the table."""
    # What was started is ended, and what was made is removed, as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        try:
            COMMANDS[sys.argv[1]](sys.argv[2:])
        except KeyboardInterrupt:
            sys.exit(130)
        return
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names", nargs="*", choices=[[], *BENCHMARKS], metavar="NAME", help=", ".join(BENCHMARKS)
    )
    names = parser.parse_args().names or list(BENCHMARKS)
    accelerator = (known_accelerator(HOME / "cache" / "accelerator.json") or ("", "KVM or TCG"))[1]
    version = ".".join(map(str, plugins.version()))
    sys.stderr.write(f"{os.cpu_count()} processors, Packer {version}, {accelerator}\n")
    print("| what | measured | compared | must reach |\n|---|---|---|---|")
    for name in names:
        for row in BENCHMARKS[name]():
            print(f"| {row.what} | {row.figure} | {row.against} | {row.bound} |", flush=True)


if __name__ == "__main__":
    main()
